# SPDX-License-Identifier: Apache-2.0
"""PEARL: the draft writes on while the target verifies (arXiv 2408.11850).

The host sends work to both sides before it waits for either: JAX hands it to their
devices, and comes back at once. It waits once a round, for what was judged. What a
round is, `rounds` says.
"""

import dataclasses
import time
from typing import Any, Literal, NamedTuple

from ospec_jax.config import ConfigError, TreeConfig, whole_number
from ospec_jax.decoding.batch import fetch
from ospec_jax.decoding.request import Request
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.parallel.places import Places
from ospec_jax.parallel.rounds import Chunk
from ospec_jax.parallel.sides import Drafting, DraftSide, TargetSide

Children = Literal["topk", "sampled"]


class Round(NamedTuple):
    """What one round came to.

    Attributes:
      num_judged: Drafted tokens that the target's pass had to judge: 1 in pre-verify.
      num_accepted: Of these, from the first on.
      num_emitted: Tokens that the answer grew by.
    """

    num_judged: int
    num_accepted: int
    num_emitted: int

    @property
    def is_kept(self) -> bool:
        """Whether all were accepted: what else was drafted is then judged next."""
        return self.num_accepted == self.num_judged


@dataclasses.dataclass(frozen=True)
class ParallelAnswer:
    """An answer, and the rounds that it came of.

    Attributes:
      finish_reason: `stop` or `length`.
      seconds: Wall-clock time; `prompt_seconds` of these until the first token.
    """

    token_ids: tuple[int, ...]
    rounds: tuple[Round, ...]
    finish_reason: str
    seconds: float
    prompt_seconds: float

    @property
    def tokens_per_round(self) -> float:
        """How much the answer grew a round, which is a pass of the target."""
        emitted = sum(one.num_emitted for one in self.rounds)
        return emitted / max(len(self.rounds), 1)

    @property
    def acceptance_rate(self) -> float:
        """Share of tokens that were accepted, of those judged behind accepted ones."""
        accepted = sum(one.num_accepted for one in self.rounds)
        rejected = sum(not one.is_kept for one in self.rounds)
        return accepted / max(accepted + rejected, 1)

    @property
    def share_pre_verify(self) -> float:
        """Of rounds that judged a single token."""
        alone = sum(one.num_judged == 1 for one in self.rounds)
        return alone / max(len(self.rounds), 1)


class Parallel:
    """Answers one request at a time with both models at work; see this module.

    Greedy answers are plain decoding's, token for token; sampled ones, too, of the same
    seed, as long as the draft proposes its most probable tokens (`topk`). With
    `sampled` it draws them, and the target's law is kept by rejection.
    """

    def __init__(
        self,
        target: Target,
        draft: LoadedDraft | None,
        places: Places,
        num_speculative_tokens: int = 4,
        children: Children = "topk",
        drafting: Drafting | None = None,
    ):
        """Prepares both sides; programs are compiled when first needed.

        Args:
          draft: A language model of its own, `loading.model_draft`; None with
            `drafting`.
          num_speculative_tokens: Of a chunk, the paper's gamma. About as many as the
            draft writes while the target verifies them: `costs.balanced_length`.
          drafting: Whoever drafts elsewhere, in place of `draft`. It shares the
            target's vocabulary, and draws nothing.

        Raises:
          ConfigError: The draft reads the target, or there is none.
        """
        whole_number("num_speculative_tokens", num_speculative_tokens, least=1)
        if children not in ("topk", "sampled"):
            raise ConfigError(
                f"children is {children!r}; in parallel a draft proposes 'topk' (its "
                f"most probable token) or 'sampled' (draws)"
            )

        tree = TreeConfig(num_steps=num_speculative_tokens, children=children)
        self.places = places
        self.target = TargetSide(target, tree, places.target)
        self.num_speculative_tokens = num_speculative_tokens
        self._num_scratch = num_speculative_tokens
        self._token_ids = None
        self.drafting = drafting
        if drafting is None:
            if draft is None:
                raise ConfigError(
                    "nobody drafts; give a draft of `loading.model_draft`"
                )
            self.drafting = DraftSide(draft, tree, places.draft)
            self._num_scratch = self.drafting.drafter.num_scratch
            # Sent once: chunks name target tokens, their distributions entries of the
            # draft's vocabulary.
            if children == "sampled":
                self._token_ids = places.target.put(draft.draft.token_ids)

    def answer(self, request: Request, ordinal: int = 0) -> ParallelAnswer:
        """Answers a request.

        Args:
          ordinal: Its number among all requests; see `Request.key`.

        Raises:
          ConfigError: It asks for what rounds do not do.
          PromptTooLongError: Prompt and answer do not fit.
        """
        begin = time.perf_counter()
        output = self.begin(request, ordinal)
        first, is_finished = fetch((output.tokens, output.is_finished))
        prompt_seconds = time.perf_counter() - begin
        answer = [int(first[0, 0])]
        rounds: list[Round] = []
        known = [*request.prompt_ids, *answer]
        previous: Chunk | None = None
        pending: list[int] = []

        while not is_finished[0]:
            # Both are sent before either is waited for.
            self.send(known + pending, previous)
            output, chunk = self.receive(previous)
            found, drafted = fetch((output, chunk.tokens))

            emitted = found.tokens[0, : found.num_emitted[0]].tolist()
            rounds.append(
                Round(1 + len(pending), int(found.num_accepted[0]), len(emitted))
            )
            answer += emitted
            known += emitted
            is_finished = found.is_finished
            # A rejection drops the chunk. A chunk of one token has been judged whole.
            is_pending = found.is_kept[0] and self.num_speculative_tokens > 1
            previous = chunk if is_pending else None
            pending = drafted[0, 1:].tolist() if is_pending else []

        has_stopped = answer[-1] in self.target.engine.stop_ids
        return ParallelAnswer(
            token_ids=tuple(answer),
            rounds=tuple(rounds),
            finish_reason="stop" if has_stopped else "length",
            seconds=time.perf_counter() - begin,
            prompt_seconds=prompt_seconds,
        )

    def begin(self, request: Request, ordinal: int = 0) -> Any:
        """Sends a prompt to both sides; returns what will hold the first token."""
        _check(request)
        # A chunk may lie wholly behind another one that is still pending.
        num_more = 2 * self.num_speculative_tokens + self._num_scratch
        capacity = self.target.capacity_for(request, num_more)
        assert self.drafting is not None
        output = self.target.begin(request, ordinal, capacity)
        self.drafting.begin(request, ordinal, capacity)

        return output

    def send(self, ahead: list[int], previous: Chunk | None) -> None:
        """Sends a round's passes to both sides.

        Args:
          ahead: All tokens, emitted and pending: the draft goes on behind them.
          previous: The chunk whose rest is pending.
        """
        assert self.drafting is not None
        self.drafting.ask((ahead[-2], ahead[-1]), len(ahead) - 1)
        self.target.score(previous)

    def receive(self, previous: Chunk | None) -> tuple[Any, Chunk]:
        """The round's output and its chunk, on the target's devices, still to come."""
        assert self.drafting is not None
        return self.judge(previous, self.drafting.take())

    def judge(self, previous: Chunk | None, chunk: Chunk) -> tuple[Any, Chunk]:
        """As `receive`, of a chunk that was taken before."""
        chunk = self.places.target.put(chunk)
        output = self.target.judge(previous, chunk, self._token_ids)

        return output, chunk


def _check(request: Request) -> None:
    """Refuses what rounds do not do.

    Raises:
      ConfigError: It asks for that.
    """
    asked = {
        "penalties, biases, min_p or log-probabilities": request.kind == "full",
        "stop strings": request.find_stop is not None,
        "a prediction": bool(request.prediction_ids),
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"request {request.id} asks for {what}, which parallel drafting does "
                f"not do; use a Session for it"
            )


def summed(answers: list[ParallelAnswer]) -> ParallelAnswer:
    """All rounds of several answers, and what they took together."""
    return ParallelAnswer(
        token_ids=tuple(token for one in answers for token in one.token_ids),
        rounds=tuple(round for one in answers for round in one.rounds),
        finish_reason="",
        seconds=sum(one.seconds for one in answers),
        prompt_seconds=sum(one.prompt_seconds for one in answers),
    )
