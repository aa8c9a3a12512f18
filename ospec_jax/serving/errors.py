# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a request, as the API says it."""

from typing import Any

_MAX_MESSAGE = 600
"""Characters: what a client sends is not sent back whole."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    501: "not_implemented_error",
    503: "overloaded_error",
}


class RequestError(Exception):
    """A request is refused.

    Attributes:
      param: The parameter that is wrong, as the client calls it.
      code: A word for programs.
      status: Of HTTP.
      retry_after: Seconds after which it is worth asking again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": _printable(self.message),
                "type": _TYPES.get(self.status, kind),
                "param": self.param if self.param is None else _printable(self.param),
                "code": self.code,
            }
        }


def _printable(text: str) -> str:
    """Bounded, and such that it can be written as UTF-8."""
    if len(text) > _MAX_MESSAGE:
        text = text[:_MAX_MESSAGE] + " ..."

    return text.encode("utf-8", "replace").decode("utf-8")
