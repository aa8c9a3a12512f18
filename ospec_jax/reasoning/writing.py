# SPDX-License-Identifier: Apache-2.0
"""A model that writes steps behind given tokens, several at once."""

import dataclasses
import itertools
from collections.abc import Sequence

from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.models.tokenizer import tokenizer_hash
from ospec_jax.reasoning.steps import StepRule
from ospec_jax.session.live import Live
from ospec_jax.session.session import Session
from ospec_jax.typing import Params

Step = tuple[int, ...]
"""Token ids, those of the separator included."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written behind one prefix.

    Attributes:
      steps: Complete ones, and what came before the end of the text.
      has_ended: The model said that there is nothing more to come, by a stop token,
        which the last step holds.
      stats: Of the passes that it took.
    """

    steps: tuple[Step, ...]
    has_ended: bool
    stats: DecodingStats


class Writer:
    """Writes greedily with a session, which may draft tokens for it.

    What rows have computed is kept for prefixes that go on from them.

    Args:
      session: Nobody else may use it. It writes behind at most `batch_size` prefixes
        at once, and learns nothing.
      kept_bytes: That kept rows may take.
    """

    def __init__(self, session: Session, rule: StepRule, kept_bytes: int = 2**29):
        self.session = session
        self.rule = rule
        self._live = Live(session, kept_bytes=kept_bytes)
        self._numbers = itertools.count()

    def write(
        self,
        prefixes: Sequence[Step],
        num_steps: int,
        max_new_tokens: Sequence[int],
    ) -> list[Written]:
        """The next steps behind each prefix.

        Args:
          num_steps: At most, behind each.
          max_new_tokens: Of each text, at most.

        Raises:
          ConfigError: There are more prefixes than rows.
          PromptTooLongError: A prefix and what may follow do not fit.
        """
        self.check_rows(len(prefixes))
        find_stop = self.rule.stop_after(self.session.decode, num_steps)
        longest = num_steps * self.rule.max_tokens
        requests = [
            Request(
                id=f"steps-{next(self._numbers)}",
                prompt_ids=prefix,
                max_new_tokens=min(longest, most),
                sampling=SamplingConfig(),
                find_stop=find_stop,
            )
            for prefix, most in zip(prefixes, max_new_tokens, strict=True)
        ]
        for request in requests:
            self._live.join(request)

        done: dict[str, Completion] = {}
        while len(done) < len(requests):
            done |= {one.request.id: one for one in self._live.turn()}

        return [self._written(done[request.id]) for request in requests]

    def check_rows(self, count: int) -> None:
        """Refuses more prefixes at once than the session has rows.

        Raises:
          ConfigError: There are more.
        """
        if count > self.session.batch_size:
            raise ConfigError(
                f"{count} prefixes are to be continued at once, and the session of "
                f"{self.session.target.name} has a batch size of "
                f"{self.session.batch_size}; open it with batch_size={count}"
            )

    def _written(self, completion: Completion) -> Written:
        ids = completion.token_ids
        has_ended = ids[-1] in self.session.target.stop_ids
        steps = self.rule.cut(self.session.decode, ids)
        return Written(tuple(steps), has_ended, completion.stats)

    def use(self, params: Params) -> None:
        """Goes on with other parameters of the same shapes.

        What was kept is dropped: it was computed with the former ones.
        """
        self.session.engine.target_params = params
        if self.session.kept is not None:
            self.session.kept.forget()


def check_pair(draft: Session, target: Session) -> None:
    """Refuses models that do not share their tokens.

    Raises:
      ConfigError: Their tokenizers differ.
    """
    names = draft.target.name, target.target.name
    hashes = [tokenizer_hash(one.target.tokenizer) for one in (draft, target)]
    if hashes[0] != hashes[1]:
        raise ConfigError(
            f"{names[0]} and {names[1]} have different tokenizers, so neither can "
            f"go on behind the other's tokens; use two models of one family"
        )
