# SPDX-License-Identifier: Apache-2.0
"""From an answered request to a better output projection, in the served draft.

The learner's projection is in float32, the served one in the target's precision: after
an update only the rows that changed are cast again.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ospec_jax import sharding
from ospec_jax.config import ConfigError
from ospec_jax.decoding.request import Completion
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.learners.last_layer import head_learner
from ospec_jax.learners.preference import Preference, preference_learner
from ospec_jax.learners.projection import (
    HeadInfo,
    HeadLearner,
    HeadSamples,
    HeadState,
)
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.models.quantization import cast_params
from ospec_jax.models.sharing import share
from ospec_jax.online import pace
from ospec_jax.online.samples import (
    CHUNK,
    HEAD,
    as_drawn,
    num_chunks_of,
    parts_of,
    samples_of,
)
from ospec_jax.online.slices import Slices, run
from ospec_jax.online.trainer import (
    Speed,
    Traffic,
    Trainer,
    TrainerState,
    UpdateReport,
    new_counts,
)
from ospec_jax.types import Draft
from ospec_jax.typing import struct

_FIRST_SPAN = 16
"""Rounds of a regime's first span (see `pace`): an answer's are small ones."""
_EAGER = 16
"""Answers that are all learned from, before anybody looks whether that leads."""
_PATIENT = 64
"""Answers after which, where none of it leads, learning comes still more seldom."""
_LEAD = 5.0
"""Tokens of lead from which on all answers are learned from. Of the 160 tokens that it
counts these are three in a hundred: what a gain must be to pay for all of them. Where
learning makes no difference the lead wavers by two, and now and then by more."""


@struct
class LastLayerState(TrainerState):
    """What learning the last layer remembers between answers.

    Attributes:
      learner: The projection in float32, and its preconditioner.
    """

    learner: HeadState = flax.struct.field(kw_only=True)

    @property
    def num_updates(self) -> Int[Array, ""]:
        """Steps that the update rule has taken."""
        return self.learner.num_updates


def last_layer_trainer(
    config: LearnerConfig,
    head_inputs: Callable | None,
    numerics: Numerics,
    vocab_size: int,
    serve: Callable[[Draft], Draft],
    mesh: jax.sharding.Mesh | None = None,
) -> Trainer:
    """Trains the draft's output projection alone, after every answer.

    Args:
      head_inputs: The drafter's.
      vocab_size: The target's.
      serve: Makes the draft that decodes of one in float32.

    Raises:
      ConfigError: The draft has no output projection of its own.
    """
    last_layer = LastLayer(config, head_inputs, numerics, vocab_size, mesh)
    return Trainer(
        recording=config.recording,
        init=last_layer.init,
        serve=lambda draft: last_layer.own(serve(draft)),
        warm_up=last_layer.warm_up,
        is_ready=lambda state: True,
        observe=last_layer.observe,
        is_due=last_layer.is_due,
        answers_until_due=last_layer.answers_until_due,
        update=last_layer.update,
        update_in_slices=last_layer.update_in_slices,
        rehearse_slices=last_layer.rehearse_slices,
        label=f"{config.name!r} with head_rate {config.head_rate}",
        remedy="a lower head_rate",
        own=last_layer.own,
    )


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """What is run over parts of answers; equal ones share their compiled functions.

    Attributes:
      head_inputs: The drafter's.
      vocab_size: The target's.
    """

    config: LearnerConfig
    head_inputs: Callable
    numerics: Numerics
    vocab_size: int

    @property
    def softmax(self) -> HeadLearner:
        """The update rule that reads the logits of all tokens."""
        config = self.config
        return head_learner(
            config.head_rate,
            config.head_damping,
            config.head_candidates,
            config.head_patience,
            # Preferences have a reference of their own.
            pull=0.0 if self.is_greedy_only else config.head_return,
        )

    @property
    def is_greedy_only(self) -> bool:
        """Whether sampled answers are left out: pairs of draws come to no rest."""
        return isinstance(self.config.method, Preference)

    @property
    def preference(self) -> HeadLearner:
        """The one that reads pairs of tokens alone."""
        config = self.config
        return preference_learner(
            config.head_rate,
            config.head_damping,
            config.beta,
            config.rejected_weight,
            config.margin_cap,
            config.head_patience,
        )

    def samples(self, *args) -> HeadSamples:
        """A part of an answer; see `online.samples`."""
        return samples_of(self.head_inputs, self.vocab_size, *args)

    def learn(self, state: HeadState, head: dict, sampling, *args):
        """One step: the learner's state, the served projection, and the info."""
        samples = self.samples(*args)
        logits = linear(samples.inputs, head, self.numerics)
        samples = samples.replace(logits=logits, sampling=sampling)
        return self._serve(head, *self.softmax.update(state, samples))

    def prefer(self, state: HeadState, head: dict, sampling, *args):
        """Likewise, by the pairs of a greedy answer, without any logits."""
        del sampling
        return self._serve(head, *self.preference.update(state, self.samples(*args)))

    def _serve(self, head: dict, state: HeadState, rows, info: HeadInfo):
        """Puts the rows that changed into the served projection."""
        changed = cast_params({"kernel": state.kernel[rows]}, self.numerics.precision)
        # Only the rows that changed are cast and written; an int8 head has its scales
        # by row.
        head = {name: head[name].at[rows].set(changed[name]) for name in head}

        return state, head, info

    def accepted(self, heads, *args):
        """`[1]` accepted tokens a step with each projection, and the samples' weight.

        A share of a drafted tokens that are right makes a + a^2 + ... accepted ones.
        Right is the likeliest token: of sampled answers this tells what children of
        the kind `topk` get accepted, and only nearly what drawn ones do.
        """
        samples = self.samples(*args)
        count = jnp.sum(samples.is_real)[None]

        def accepted_with(head):
            best = jnp.argmax(linear(samples.inputs, head, self.numerics), axis=-1)
            is_right = samples.is_real & (best == samples.labels)
            share = jnp.sum(is_right) / jnp.maximum(count, 1)
            return sum(share ** (i + 1) for i in range(self.config.num_steps))

        return *(accepted_with(head) for head in heads), count


class _Programs(NamedTuple):
    """Jitted `_Chunks.learn` and `prefer`, which overwrite state and head, and
    `accepted`."""

    learn: Callable
    prefer: Callable
    accepted: Callable


@share
def _compiled(chunks: _Chunks, mesh: jax.sharding.Mesh | None) -> _Programs:
    # Rows stay on the devices that have them. Of those that a step reads and changes
    # each device adds up or takes what is its own; the projection is never gathered.
    places = _place_state, _place_head, sharding.replicated
    step = lambda function: jax.jit(
        sharding.pinned(function, mesh, *places), donate_argnums=(0, 1)
    )
    compare = sharding.pinned(chunks.accepted, mesh, sharding.replicated)

    return _Programs(step(chunks.learn), step(chunks.prefer), jax.jit(compare))


def _place_state(state: HeadState, mesh: sharding.AnyMesh):
    """Where it belongs, which goes by its name among a trainer's."""
    return sharding.param_shardings({"learner": state}, mesh)["learner"]


def _place_head(head: dict, mesh: sharding.AnyMesh):
    """Likewise, of the served projection among a draft's parameters."""
    return sharding.param_shardings({HEAD: head}, mesh)[HEAD]


class LastLayer:
    """What `last_layer_trainer` runs; holds no state."""

    def __init__(
        self,
        config: LearnerConfig,
        head_inputs: Callable | None,
        numerics: Numerics,
        vocab_size: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        if head_inputs is None:
            raise ConfigError(
                f"the learner {config.name!r} learns a draft's own output projection, "
                f"and this draft has none; use --learner gradient, or memory"
            )

        self.config = config
        self._mesh = mesh
        self.chunks = _Chunks(config, head_inputs, numerics, vocab_size)
        self._learn, self._prefer, self._compare = _compiled(self.chunks, mesh)

    def init(self, draft: Draft) -> tuple[LastLayerState, Traffic]:
        """A state that has seen nothing."""
        learner = self.chunks.softmax.init(draft.params[HEAD]["kernel"])
        if self._keeps_reference:
            learner = learner.replace(reference=jnp.copy(learner.kernel))
        state = LastLayerState(*new_counts(), learner=learner)
        if self.config.pace == "pays":
            cost = self.config.budget_share * CHUNK
            first = pace.start(self._projection(state), _FIRST_SPAN, cost)
            state = state.replace(pace=first)

        return sharding.put_params((state, Traffic()), self._mesh)

    def own(self, draft: Draft) -> Draft:
        """A draft whose projection nobody else holds: updates overwrite it."""
        copy = jax.tree.map(lambda x: jnp.array(x, copy=True), draft.params[HEAD])
        return draft.replace(params={**draft.params, HEAD: copy})

    def _projection(self, state: LastLayerState) -> dict:
        """A copy of the learned projection, in the target's precision."""
        served = cast_params(
            {"kernel": state.learner.kernel}, self.chunks.numerics.precision
        )
        return jax.tree.map(lambda x: jnp.array(x, copy=True), served)

    @property
    def _is_greedy_only(self) -> bool:
        return self.chunks.is_greedy_only

    @property
    def _keeps_reference(self) -> bool:
        return self._is_greedy_only and self.config.reference_answers > 0

    def _rule_of(self, state: LastLayerState) -> Callable:
        """The step that learns from the answer that was observed last."""
        if not self._is_greedy_only:
            return self._learn

        every = self.config.softmax_every
        is_softmax = every > 0 and (int(state.version) + 1) % every == 0
        return self._learn if is_softmax else self._prefer

    @property
    def _turns(self) -> tuple[int, ...]:
        """Versions at which each of the steps is taken."""
        if not self._is_greedy_only or self.config.softmax_every < 2:
            return (0,)

        return 0, self.config.softmax_every - 1

    def _with_reference(self, state: LastLayerState) -> HeadState:
        """The learner's state, its reference renewed where a span of answers begins."""
        learner = state.learner
        if not self._keeps_reference:
            return learner

        # Versions count the answers that were learned from: with `pace` not all are.
        if int(state.version) % self.config.reference_answers:
            return learner

        # A copy: the projection itself is overwritten by the next step.
        return learner.replace(reference=jnp.copy(learner.kernel))

    def warm_up(
        self,
        state: LastLayerState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
        speed: Speed | None = None,
    ) -> LastLayerState:
        """See `Trainer`."""

        def seconds_of_update(state: LastLayerState) -> float:
            # An update overwrites both.
            copies = jax.tree.map(jnp.copy, (state, served))
            jax.block_until_ready(copies)
            start = time.perf_counter()
            observed, _ = self.observe(copies[0], traffic, draft, completion)
            results = self.update(observed, traffic, draft, copies[1], completion)
            jax.block_until_ready(results[:3])

            return time.perf_counter() - start

        for version in self._turns:
            turn = jnp.full_like(state.version, version)
            seconds_of_update(state.replace(version=turn))
        if state.pace is None:
            return state

        self._record_gains(state.pace, served, completion)
        pace.warm_up(state.pace, num_windows=1)
        if speed is None or int(state.num_prompts) > 0:
            return state  # what is on its way keeps its price

        seconds = min(seconds_of_update(state) for _ in range(4))
        num_chunks = max(num_chunks_of(completion, self._is_greedy_only), 1)
        cost = seconds / num_chunks / speed.seconds_per_token

        return state.replace(pace=pace.set_cost(state.pace, cost))

    def observe(
        self,
        state: LastLayerState,
        traffic: Traffic,
        draft: Draft,
        completion: Completion,
    ) -> tuple[LastLayerState, Traffic]:
        """Counts an answer; all that is learned from it comes with the update."""
        # A copy, since the next update overwrites the projection.
        take_snapshot = lambda: self._projection(state)
        return state.replace(
            num_prompts=state.num_prompts + 1,
            pace=pace.observe(state.pace, completion, take_snapshot),
        ), traffic

    def is_due(self, state: LastLayerState) -> bool:
        """After every answer, or as often as the pace allows."""
        if bool(state.is_stopped):
            return False

        return int(state.num_prompts) % self._stride(state) == 0

    def _stride(self, state: LastLayerState) -> int:
        """Answers, of which one is learned from: all where learning leads."""
        lead = state.learner.lead
        num_answers = int(state.num_prompts)
        if lead is None or num_answers <= _EAGER or float(lead) > _LEAD:
            return state.stride

        every = self.config.head_every
        if num_answers > _PATIENT:
            every *= every

        return max(state.stride, every)

    def answers_until_due(
        self, state: LastLayerState, num_tokens: Sequence[int]
    ) -> int:
        """See `Trainer`."""
        if bool(state.is_stopped):
            return len(num_tokens)

        stride = self._stride(state)
        return min(len(num_tokens), stride - int(state.num_prompts) % stride)

    def update(
        self,
        state: LastLayerState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> tuple[LastLayerState, Draft, Draft, UpdateReport]:
        """Learns from an answer, part by part; the served projection is overwritten.

        The draft of before shares the learned projection's memory, which is
        overwritten, too: go on with the one that is returned.
        """
        return run(self._round(state, draft, served, completion))

    def update_in_slices(
        self,
        state: LastLayerState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> Slices[tuple[LastLayerState, Draft, Draft, UpdateReport]]:
        """The same, a part of the answer in each slice.

        Of an answer with several parts they are learned in copies, which take the
        place of what there was when all are. One part is a slice by itself.
        """
        if num_chunks_of(completion, self._is_greedy_only) > 1:
            learner = jax.tree.map(jnp.copy, state.learner)
            state = state.replace(learner=jax.block_until_ready(learner))
            yield
            served = self.own(served)
            jax.block_until_ready(served.params[HEAD])
            yield

        return (yield from self._round(state, draft, served, completion))

    def rehearse_slices(
        self,
        state: LastLayerState,
        traffic: Traffic,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> None:
        """See `Trainer`: parts have the programs of the update at once."""
        copies = jax.tree.map(jnp.copy, state.learner), self.own(served)
        jax.block_until_ready(copies)

    def _round(
        self,
        state: LastLayerState,
        draft: Draft,
        served: Draft,
        completion: Completion,
    ) -> Slices[tuple[LastLayerState, Draft, Draft, UpdateReport]]:
        start = time.perf_counter()
        stride = self._stride(state)
        is_greedy_only = self._is_greedy_only
        num_updates = num_chunks = num_chunks_of(completion, is_greedy_only)
        # Before learning from the answer, which neither projection has seen then.
        if state.pace is not None and pace.is_compared(state.pace):
            compared = self._record_gains(state.pace, served, completion)
            state = state.replace(pace=compared)
            num_updates = 2 * num_chunks

        # The projection is taken out of the parameters, because it alone is donated.
        params = dict(served.params)
        head = params.pop(HEAD)
        learner = self._with_reference(state)
        learn = self._rule_of(state)
        infos = []
        sampling = as_drawn(completion.request.sampling)

        # An answer is learned from in parts of one shape, so one program serves all
        # lengths.
        for args in self._parts(params, served, completion):
            if infos:
                # The part before is done, and somebody may have waited for that.
                jax.block_until_ready(learner)
                yield
            learner, head, info = learn(learner, head, sampling, *args)
            infos.append(info)

        state = state.replace(learner=learner)
        served = served.replace(params={**params, HEAD: head})
        draft = draft.replace(params={**draft.params, HEAD: {"kernel": learner.kernel}})
        take_snapshot = lambda: self._projection(state)
        after = pace.finish_round(state.pace, num_updates, take_snapshot)
        info = _summed(jax.device_get(infos))  # waits

        # Refused parts changed nothing; if all were refused, the served draft is the
        # old one.
        is_changed = num_chunks > info.num_refused
        decision = "promote" if is_changed else "wait"
        if info.num_refused > 0:
            state = state.replace(is_stopped=jnp.ones((), bool))
            decision = "stopped"

        state = state.replace(version=state.version + int(is_changed), pace=after)
        seconds = time.perf_counter() - start
        report = UpdateReport(info, decision, seconds, stride, float(info.step_norm))

        return state, draft, served, report

    def _record_gains(
        self, state: pace.PaceState, served: Draft, completion: Completion
    ) -> pace.PaceState:
        """Holds the served projection against the snapshot, before learning."""
        params = dict(served.params)
        heads = params.pop(HEAD), state.snapshot

        for args in self._parts(params, served, completion):
            state = pace.record_gain(state, *self._compare(heads, *args))

        return state

    def _parts(self, params, served: Draft, completion: Completion):
        """Arguments of `_Chunks.samples`, for each part of an answer."""
        return parts_of(params, served.token_ids, completion, self._is_greedy_only)


def _summed(infos: list[HeadInfo]) -> HeadInfo:
    """One answer's, of its parts'; without any sample, zeros."""
    # `[parts, fields]`; an answer without samples has no parts.
    found = np.asarray(infos, np.float32).reshape(-1, len(HeadInfo._fields))
    loss, agreement, counts, norms, refused = found.T
    mean = lambda values: values @ counts / max(counts.sum(), 1)
    values: Any = (
        mean(loss),
        mean(agreement),
        counts.sum(),
        norms.sum(),
        refused.sum(),
    )
    return HeadInfo(*values)
