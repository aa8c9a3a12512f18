# SPDX-License-Identifier: Apache-2.0
"""What passes between those who ask and the thread that decodes.

Nothing here knows of HTTP, and nothing of devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ospec_jax.config import SamplingConfig
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.sources import Source


class OverloadedError(Exception):
    """The queue is full, or the service is about to end.

    Attributes:
      retry_after: Seconds after which it is worth asking again.
    """

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request, its numbers checked.

    Attributes:
      prompt: Turns or a text; its prediction, if it has one, among it. Its seed is
        that of the request alone: nothing is learned of a sampled answer to it.
      prompt_ids: Token ids in place of the prompt's text, or empty.
      is_raw: Without the chat template.
      max_new_tokens: None for as many as fit.
      num_choices: Answers to give, each with random numbers of its own.
      stop: Strings that end an answer.
      num_log_probs: Alternatives to report with each token's log-probability; 0 for
        none but its own, None for no log-probabilities at all.
      can_speculate: Draft for it.
      can_teach: Learn from its answers.
      informs: Tell controllers what came of its drafts; else its client forbade it.
      scope: Whose it is: n-grams of one scope's text are suggested to no other.
      is_shared: Learn from its answers also what serves others.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...] = ()
    is_raw: bool = False
    max_new_tokens: int | None = None
    sampling: SamplingConfig = SamplingConfig()
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    num_log_probs: int | None = None
    can_speculate: bool = True
    can_teach: bool = True
    informs: bool = True
    scope: str = ""
    is_shared: bool = True


class Token(NamedTuple):
    """One token of an answer.

    Attributes:
      source: Who proposed it; `target` if nobody but the target did.
      log_prob: The target's own, before temperature and cuts; None if not asked for.
      alternatives: The most probable tokens with their log-probabilities.
    """

    id: int
    source: Source = "target"
    log_prob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def is_drafted(self) -> bool:
        """Whether it had been proposed; else the target chose it."""
        return self.source != "target"


class Piece(NamedTuple):
    """What one pass added to an answer.

    Attributes:
      choice: Which answer, from 0.
      text: May be empty: of a character some bytes may be missing, and what may be the
        beginning of a stop string is held back.
      tokens: That the pass emitted and the answer keeps.
      drafter: Number of the pool's member that drafted; None without a pool, and where
        none did.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...]
    drafter: int | None = None


class Usage(NamedTuple):
    """Tokens of a request, over all its answers.

    Attributes:
      accepted_prediction: Of the expected answer, those that were drafted along it and
        accepted.
      rejected_prediction: Those that the answer does not have.
      cached: Of the prompt, those that no answer had run: an earlier one had.
    """

    prompt: int
    completion: int
    accepted_prediction: int = 0
    rejected_prediction: int = 0
    cached: int = 0


class ChoiceEnd(NamedTuple):
    """An answer is complete.

    Attributes:
      text: What was held back; together with the pieces all of the answer.
      finish_reason: `stop` or `length`.
    """

    choice: int
    text: str
    finish_reason: str


class Ended(NamedTuple):
    """All answers are complete.

    Attributes:
      stats: Of all their steps.
      version: Of the draft that served the last of them.
      queue_seconds: From being asked to the beginning of the prompt's pass.
      first_token_seconds: From being asked to the first token.
      seconds: From being asked to the end.
    """

    usage: Usage
    stats: DecodingStats
    version: int
    queue_seconds: float
    first_token_seconds: float
    seconds: float


class Failed(NamedTuple):
    """There will be no answer."""

    error: Exception


Event = Piece | ChoiceEnd | Ended | Failed
"""What a request hears; the last one is `Ended` or `Failed`."""


class Prepared(NamedTuple):
    """A request that is known to fit.

    Attributes:
      num_prompt_tokens: With the chat template.
      requests: One an answer, for the service alone.
    """

    ask: Ask
    num_prompt_tokens: int
    requests: Any


class Ticket(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """Gives it up: its rows are free at the next step, and it hears no more."""
        ...


class Serves(Protocol):
    """What the API asks of the service; every method may be called from any thread.

    Attributes:
      model: Name of the model, as clients say it.
      max_model_len: Tokens of prompt and answer together.
      tokenizer: Of transformers.
    """

    model: str
    max_model_len: int
    tokenizer: Any

    @property
    def is_ready(self) -> bool:
        """Whether everything is compiled."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the thread that decodes is running."""
        ...

    @property
    def version(self) -> int:
        """Of the served draft."""
        ...

    def prepare(self, ask: Ask) -> Prepared:
        """Applies the template and counts tokens; may take a while.

        Raises:
          ConfigError: The template refuses the prompt, or an argument means nothing.
          PromptTooLongError: Prompt and answer do not fit the context.
        """
        ...

    def submit(self, prepared: Prepared, on_event: Callable[[Event], None]) -> Ticket:
        """Queues a request.

        Args:
          on_event: Called from the thread that decodes; must not wait.

        Raises:
          OverloadedError: The queue is full.
        """
        ...

    def status(self) -> dict[str, Any]:
        """What is going on, as JSON: draft, learning, queue, speed."""
        ...

    def administer(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Runs an action between two steps, and waits for it.

        Args:
          action: `checkpoint`, `pause`, `resume`, `promote`, `rollback`, `pin`,
            `unpin`, `load`, `forget`.

        Raises:
          ConfigError: It cannot be done, with the reason.
        """
        ...
