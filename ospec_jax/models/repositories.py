# SPDX-License-Identifier: Apache-2.0
"""Repositories of the Hugging Face hub: targets and drafts that others have published.

What was downloaded once is found without a connection.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name` or `owner/name@revision`.

    >>> is_hub_id("Qwen/Qwen3-8B@main"), is_hub_id("./Qwen/Qwen3-8B")
    (True, False)
    """
    return _HUB_ID.fullmatch(name) is not None


def from_hub(name: str, patterns: Sequence[str] = ("*",)) -> Path:
    """The folder of a repository on the hub, of which what is missing is downloaded.

    Args:
      name: `owner/name`, and behind an @ the branch, tag or commit, by default `main`.
      patterns: Of the files that are wanted.

    Raises:
      FileNotFoundError: It cannot be had; the message says what would help.
    """
    from huggingface_hub import errors, snapshot_download

    repo_id, _, revision = name.partition("@")
    _LOG.info(f"looking for {name} on the hub, to fetch what is not here")
    page = f"https://huggingface.co/{repo_id}"
    remedies = {
        errors.GatedRepoError: f"it is for those alone who accept its conditions: do "
        f"so at {page}, then log in with `hf auth login`, or set HF_TOKEN",
        errors.RevisionNotFoundError: f"it has no revision {revision!r}; {page} lists "
        f"its branches and tags",
        errors.RepositoryNotFoundError: "there is none of that name, or it is private: "
        "check the spelling, or log in with `hf auth login`",
        errors.LocalEntryNotFoundError: "it is not in the local cache, and the hub "
        "cannot be reached (or HF_HUB_OFFLINE forbids it): check the connection, or "
        "pass a local folder",
    }
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision or None, allow_patterns=list(patterns)
            )
        )
    except Exception as error:
        # Some of these kinds are kinds of others: the first that fits says most.
        known = (told for kind, told in remedies.items() if isinstance(error, kind))
        told = next(known, f"{error}; check the connection, or pass a local folder")
        raise FileNotFoundError(
            f"{name!r} is nothing here, and could not be fetched from the hub: {told}"
        ) from error
