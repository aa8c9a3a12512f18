# SPDX-License-Identifier: Apache-2.0
"""What a session gives back for a prompt."""

import dataclasses
from typing import Any

from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.request import Alternatives
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.typing import short_repr


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
      stats: Of this request; see `ospec_jax.decoding.stats`.
      text: Without the stop string that ended it, if one did.
      token_ids: What the text needs; the last one may run into the stop string.
      seconds: Decoding time, learning not included.
      learning_seconds: Time that learning took after this answer.
      version: Of the draft that was served when the answer ended: how often learning
        had changed it; see `online.trainer.TrainerState`.
      precision: Of the target, whose answer in this precision it is.
      alternatives: Of each token, ids and log-probabilities of the target's most
        probable ones; empty if not asked for (`num_log_probs`).
    """

    __repr__ = short_repr

    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: str
    stats: DecodingStats
    log_probs: list[float]
    seconds: float
    learning_seconds: float = 0.0
    version: int = 0
    precision: str = ""
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict:
        """The command line's JSON object."""
        found: dict[str, Any] = {
            "id": self.prompt.id,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "precision": self.precision,
            "metrics": {"speculative_decoding": self.stats.to_json()},
        }
        if self.log_probs:
            found["logprobs"] = self.log_probs
        if self.alternatives:
            found["alternatives"] = self.alternatives

        return found
