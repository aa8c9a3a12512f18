# SPDX-License-Identifier: Apache-2.0
"""A target, its draft and what the draft has learned: the library's front door.

A `Session` is the one mutable object: it owns the current state, and moves it on by the
pure transitions of `decoding` and `online`, which meet only here.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax

from ospec_jax import sharding
from ospec_jax.config import ConfigError, LearnerConfig, SamplingConfig, TreeConfig
from ospec_jax.control.base import Chooser
from ospec_jax.control.registry import BuildController
from ospec_jax.data.prompts import (
    Prompt,
    add_predictions,
    encode,
    encode_prediction,
    parse_prompt,
)
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.ngram import ORDERS, init_memory
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.quantization import cast_params
from ospec_jax.models.tokenizer import TextStream
from ospec_jax.online.trainer import Learning
from ospec_jax.online.windows import UpdateReport
from ospec_jax.session import build, resume, warm_up
from ospec_jax.types import Draft, NgramMemory

_COLLAPSE_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
      stats: Of this request; see `ospec_jax.decoding.stats`.
      seconds: Decoding time, learning not included.
      learning_seconds: Time that learning took after this answer.
      version: Of the draft that was served when the answer ended.
    """

    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: str
    stats: DecodingStats
    log_probs: list[float]
    seconds: float
    learning_seconds: float = 0.0
    version: int = 0

    def to_json(self) -> dict:
        """The command line's JSON object."""
        return {
            "id": self.prompt.id,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "metrics": {"speculative_decoding": self.stats.to_json()},
        } | ({"logprobs": self.log_probs} if self.log_probs else {})


class Session:
    """Decodes, and learns from what it decodes.

    Args:
      target: From `load_target`.
      draft: From `load_draft`; None decodes plainly.
      learner: How to learn; None serves the draft as it is. Of drafts that are not
        trained (`ngram`, `model`) only n-grams are learned.
      tree: How much to draft; a chain of three by default. `TreeConfig.auto()` drafts
        as deep as pays, which is measured once, at warm-up or before the first answer.
        How deep that is, neighbours in the batch have a say in: greedy tokens do not
        depend on it, sampled ones do, though their law does not.
      batch_size: Requests decoded together.
      stop: Strings that end an answer.
      has_log_probs: Report log-probabilities.
      ngrams: Let n-grams of the request, and of learned traffic, suggest tokens. Drawn
        children (`tree.children` other than `topk`) leave no room for them.
      num_predicted_tokens: Tokens verified at once while a request's prediction holds;
        0 keeps to the tree.
      controller: What each step runs, of the tree's depths: `fixed`, `auto`, or a
        function from actions to a `control.base.Controller`. By default `auto` where
        the tree has several depths.

    Sampled answers draw from `SamplingConfig.seed` and the number of requests that the
    session, or the checkpoint it resumed, has begun before: copies of a prompt are
    answered independently of each other, and a new session repeats an old one.

    `on_update`, if set, is called after each update with its report and the draft that
    was served before and is after it; its time is not learning's. The learner `head`
    overwrites its projection: there, that of the draft before is gone.
    """

    def __init__(
        self,
        target: Target,
        draft: LoadedDraft | None = None,
        *,
        learner: LearnerConfig | None = None,
        tree: TreeConfig | None = None,
        batch_size: int = 1,
        stop: tuple[str, ...] = (),
        has_log_probs: bool = False,
        ngrams: bool = True,
        num_predicted_tokens: int = 12,
        controller: str | BuildController | None = None,
    ):
        tree = build.fitting_tree(tree, draft)
        self.target, self.batch_size, self.stop = target, batch_size, stop
        self.tree, mesh = tree, target.mesh
        sharding.check_batch(mesh, batch_size)
        parts = build.assembled(
            target, draft, tree, learner, ngrams, num_predicted_tokens, has_log_probs,
            controller,
        )  # fmt: skip
        self.engine, learner = parts.engine, parts.learner
        self.chooser = Chooser.start(parts.controller, batch_size)
        self.learning: Learning | None = None
        self.meta = draft.meta if draft else None
        self.own_family = draft.own_family if draft else None
        cast = lambda params: cast_params(params, target.numerics.precision)
        self._cast = jax.jit(sharding.pinned(cast, mesh, sharding.param_shardings))
        self.stats = DecodingStats(num_spec_tokens=tree.num_steps)
        self._unjudged = self.stats
        self.reports: list[UpdateReport] = []
        self.on_update: Callable[[UpdateReport, Draft, Draft], None] | None = None
        self.answered: list[str] = []
        self.num_admitted = 0
        self.saved: resume.Saved | None = None
        # Without learning there is nothing to remember but the rates.
        orders = draft.memory_orders if draft else ORDERS
        self._memory = sharding.put_params(init_memory(1, orders), mesh)
        if draft is not None:
            self.serve(self.grouped(draft.draft))
        if draft is not None and learner is not None:
            assert parts.drafter is not None
            adaptation = build.build_adaptation(
                target, draft, parts.drafter, learner, parts.has_ngrams, orders
            )
            self.learning = Learning(learner, adaptation, *adaptation.init(self.draft))
            self.serve(self.draft)

    def serve(self, draft: Draft) -> None:
        """Makes `draft` the served one; in the target's precision, for speed."""
        self.draft, self._served = draft, self._as_served(draft)

    def _as_served(self, draft: Draft) -> Draft:
        is_trained = self.meta is not None and self.meta.draft is not None
        params = self._cast(draft.params) if is_trained else draft.params
        served = draft.replace(params=params, memory=self.memory)
        head = self.learning.head if self.learning is not None else None
        return served if head is None else head.own(served)

    def grouped(self, tree, is_inverse: bool = False):
        """A draft or learner in the mesh's order of rows, or back in the files'."""
        mesh, config = self.target.mesh, self.meta.draft if self.meta else None
        if mesh is None or config is None:
            return sharding.put_params(tree, mesh)
        sharding.check_model(mesh, config, "the draft")
        move = lambda tree: sharding.regroup(
            tree, config, sharding.num_groups(mesh), is_inverse
        )
        return jax.jit(sharding.pinned(move, mesh, sharding.param_shardings))(
            sharding.put_params(tree, mesh)
        )

    @property
    def memory(self) -> NgramMemory:
        """The n-grams in use."""
        learned = self.learning.traffic.memory if self.learning else None
        return self._memory if learned is None else learned

    @property
    def is_drafting(self) -> bool:
        """Whether anything is ever proposed."""
        return self.engine.drafter is not None and self.tree.num_steps > 0

    @property
    def version(self) -> int:
        """Version of the served draft."""
        return int(self.learning.state.version) if self.learning else 0

    def warm_up(
        self, capacities: Iterable[int | None] = (None,),
        sampling: SamplingConfig = SamplingConfig(), has_predictions: bool = False,
    ) -> float:  # fmt: skip
        """Compiles what decoding and learning need; returns the seconds it took.

        Also turns a learning budget into an interval of target passes, and measures
        what steps of varying depth cost, unless a checkpoint told that.

        Args:
          capacities: Of the caches to compile for; None is the smallest one.
          has_predictions: Some of the prompts to come have one.
        """
        return warm_up.warm_up(self, capacities, sampling, has_predictions)

    def probe_request(
        self, max_new_tokens: int = 128, sampling: SamplingConfig = SamplingConfig()
    ) -> Request:
        """A request for warming up and timing."""
        prompt = parse_prompt({"prompt": "Tell me about the sea."}, "probe")
        ids = encode(prompt, self.target.tokenizer)
        return Request("probe", ids, max_new_tokens, sampling)

    @property
    def served_draft(self) -> Draft | None:
        """The draft in use, in serving precision; None when decoding plainly."""
        return self._served if self.meta is not None else None

    def requests(
        self, prompts: Iterable[Prompt], max_new_tokens: int, sampling: SamplingConfig,
        is_raw: bool = False,
    ) -> Iterator[tuple[Prompt, Request]]:  # fmt: skip
        """Tokenises prompts."""
        for prompt in prompts:
            ids = encode(prompt, self.target.tokenizer, is_raw)
            find_stop = self._find_stop if self.stop else None
            predicted = ()
            if self.is_drafting:
                predicted = encode_prediction(prompt, self.target.tokenizer)
            yield prompt, Request(
                prompt.id, ids, max_new_tokens, sampling, find_stop, predicted,
                prompt.prediction_confidence, prompt.seed, prompt.choice,
            )  # fmt: skip

    def _find_stop(self, token_ids: list[int]) -> int | None:
        """Tokens to keep when the answer's text holds a stop string."""
        decode = self.target.tokenizer.decode
        if not any(s in decode(token_ids) for s in self.stop):
            return None
        keep = len(token_ids)
        while keep and any(s in decode(token_ids[:keep]) for s in self.stop):
            keep -= 1
        return keep

    def generate(
        self,
        prompts: Iterable[Prompt | str | dict],
        max_new_tokens: int = 128,
        sampling: SamplingConfig = SamplingConfig(),
        *,
        is_raw: bool = False,
        on_text: Callable[[Prompt, str], None] | None = None,
        predictions: Sequence[str | None] | None = None,
    ) -> Iterator[Result]:
        """Answers prompts, in order of completion, learning in between.

        Args:
          prompts: Strings, `{prompt}` or `{messages}` rows, or `Prompt`s.
          on_text: Called with new text as it comes.
          predictions: What each answer is expected to be, None for no idea; rows may
            have a key `prediction` instead.
        """
        parsed = [_as_prompt(p, i) for i, p in enumerate(prompts)]
        if predictions is not None:
            parsed = add_predictions(parsed, predictions)
            if not self.is_drafting and any(predictions):
                raise ConfigError(
                    "predictions are verified as drafts, and this session decodes "
                    "plainly; give it a draft, if only load_draft('prediction', target)"
                )
        pairs = list(self.requests(parsed, max_new_tokens, sampling, is_raw))
        # Refuse what does not fit before anything is decoded.
        capacity = self.engine.capacity_for(request for _, request in pairs)
        if pairs and self.learning is not None and not self.learning.is_calibrated:
            warm_up.warm_up(self, [capacity], sampling, has_predictions=False)
        elif pairs and not self.chooser.has_costs:
            warm_up.measure_costs(self, capacity, sampling)
        prompt_of = {id(request): prompt for prompt, request in pairs}
        streams: dict[int, TextStream] = {}

        def on_tokens(request, tokens):
            stream = streams.setdefault(id(request), TextStream(self._decode))
            if text := stream.add(tokens):
                assert on_text is not None
                on_text(prompt_of[id(request)], text)

        completions = self.engine.serve(
            (request for _, request in pairs), lambda: self.served_draft,
            self.batch_size, on_tokens=on_tokens if on_text else None,
            chooser=self.chooser, ordinals=self._ordinals(),
        )  # fmt: skip
        for completion in completions:
            stream = streams.pop(id(completion.request), None)
            if stream and on_text and (rest := stream.flush()):
                on_text(prompt_of[id(completion.request)], rest)
            version = self.version
            learning_seconds = self._learn_from(completion)
            self.answered.append(completion.request.id)
            self.stats = self.stats + completion.stats
            self._warn_of_collapse(completion.stats)
            yield Result(
                prompt=prompt_of[id(completion.request)],
                text=self._decode(completion.token_ids),
                token_ids=completion.token_ids,
                finish_reason=completion.finish_reason,
                stats=completion.stats,
                log_probs=completion.log_probs,
                seconds=completion.seconds,
                learning_seconds=learning_seconds,
                version=version,
            )

    def _ordinals(self) -> Iterator[int]:
        """Numbers for requests, each taken when one is begun; none ever comes twice.

        A request that is begun again after an interruption gets another one: what is
        kept may depend on the numbers that it was accepted with before.
        """
        while True:
            ordinal = self.num_admitted
            self.num_admitted += 1
            yield ordinal

    def _decode(self, token_ids: list[int]) -> str:
        return self.target.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _learn_from(self, completion: Completion) -> float:
        """Remembers the answer and updates the draft when it is time."""
        if self.learning is None or not completion.request.can_teach:
            return 0.0
        start, before = time.perf_counter(), self.draft
        self.draft, self._served, report = self.learning.learn_from(
            completion, self.draft, self._served, self._as_served
        )
        seconds = time.perf_counter() - start
        if report is not None:
            self.reports.append(report)
            if self.on_update is not None:
                self.on_update(report, before, self.draft)
        return seconds

    def _warn_of_collapse(self, newest: DecodingStats) -> None:
        self._unjudged = stats = self._unjudged + newest
        if stats.num_draft_tokens and stats.num_drafts >= _COLLAPSE_STEPS:
            # A controller of its own accord hardly drafts where that does not pay.
            if stats.mean_acceptance_length < 1.05 and not self.tree.depths:
                warnings.warn(
                    f"the mean acceptance length is {stats.mean_acceptance_length:.2f} "
                    f"over {stats.num_drafts} steps: the draft hardly ever predicts "
                    f"this target; check that it was trained for it (taps, "
                    f"vocabulary), or decode with --draft none",
                    stacklevel=3,
                )
            self._unjudged = DecodingStats(num_spec_tokens=self.tree.num_steps)

    def save(self, folder: str | Path, with_feedback: bool = True) -> Path:
        """Writes a checkpoint of the draft and of what learning needs to go on.

        Nothing is written if the step is there as this session last wrote or read it,
        nothing was answered since, and it holds feedback as wished.

        Args:
          with_feedback: Also store recent traffic and remembered n-grams, from which
            users' prompts and answers can be read back; without them a resumed run
            starts with none.
        """
        return resume.save(self, folder, with_feedback)

    def resume(self, folder: str | Path) -> list[str]:
        """Goes on from a checkpoint; returns the ids of the prompts it had answered.

        At batch size 1 all that follows is bitwise what an uninterrupted run does. In
        larger batches requests that were on their way begin again, as new ones.

        Raises:
          CheckpointError: It holds no state of the same learner.
        """
        return resume.resume(self, folder)


def _as_prompt(prompt: Prompt | str | dict, number: int) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    row = {"prompt": prompt} if isinstance(prompt, str) else prompt
    return parse_prompt(row, f"prompt-{number}")
