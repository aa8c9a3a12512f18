# SPDX-License-Identifier: Apache-2.0
"""From an answered request to a better output projection, in the served draft.

The learner's projection is in float32, the served one in the target's precision: after
an update only the rows that changed are cast again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, LearnerConfig, SamplingConfig
from ospec_jax.decoding.request import Completion
from ospec_jax.learners.last_layer import (
    HeadInfo,
    HeadSamples,
    HeadSampling,
    HeadState,
    head_learner,
)
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.models.quantization import cast_params
from ospec_jax.online import pace
from ospec_jax.types import Draft

CHUNK = 64
"""Positions of an answer that one update looks at."""
HEAD = "lm_head"


class HeadAdaptation:
    """Compiled functions that learn a draft's output projection; holds no state.

    Args:
      head_inputs: The drafter's.
      vocab_size: The target's.
    """

    def __init__(
        self,
        config: LearnerConfig,
        head_inputs: Callable | None,
        numerics: Numerics,
        vocab_size: int,
    ):
        if head_inputs is None:
            raise ConfigError(
                "the learner 'head' learns a draft's own output projection, and this "
                "draft has none; use --learner gradient, or memory"
            )
        if numerics.num_groups > 1:
            raise ConfigError(
                "the learner 'head' works on a single device; use --learner gradient"
            )
        self._head_inputs, self._numerics = head_inputs, numerics
        self._vocab_size = vocab_size
        self._learner = head_learner(
            config.head_rate, config.head_damping, config.head_candidates
        )
        self._num_steps = config.num_steps
        self._learn = jax.jit(self._chunk, donate_argnums=(0, 1))
        self._compare = jax.jit(self._accepted)

    def init(self, draft: Draft) -> HeadState:
        """A state that has seen nothing."""
        return self._learner.init(draft.params[HEAD]["kernel"])

    def own(self, served: Draft) -> Draft:
        """A served draft whose projection nobody else holds: updates overwrite it."""
        copy = jax.tree.map(lambda x: jnp.array(x, copy=True), served.params[HEAD])
        return served.replace(params={**served.params, HEAD: copy})

    def master(self, state: HeadState, draft: Draft) -> Draft:
        """A draft with the learned projection, in float32."""
        return draft.replace(params={**draft.params, HEAD: {"kernel": state.kernel}})

    def served(self, state: HeadState) -> dict:
        """A copy of the learned projection, in the target's precision."""
        served = cast_params({"kernel": state.kernel}, self._numerics.precision)
        return jax.tree.map(lambda x: jnp.array(x, copy=True), served)

    def num_chunks(self, completion: Completion) -> int:
        """Updates that an answer is worth."""
        return len(range(*self._span(completion), CHUNK))

    def _span(self, completion: Completion) -> tuple[int, int]:
        """Where an answer's samples begin and end; its first token came from prefill
        and was never drafted."""
        return len(completion.request.prompt_ids), completion.num_recorded

    def observe(
        self, state: HeadState, served: Draft, completion: Completion
    ) -> tuple[HeadState, Draft, Callable[[], HeadInfo]]:
        """Learns from an answer; the state and the served projection are donated.

        Returns:
          State, draft, and what waits for the device and tells what was learned.
        """
        params = dict(served.params)
        head, infos = params.pop(HEAD), []
        sampling = as_drawn(completion.request.sampling)
        for args in self._chunks(params, served, completion):
            state, head, info = self._learn(state, head, sampling, *args)
            infos.append(info)
        draft = served.replace(params={**params, HEAD: head})
        return state, draft, lambda: _summed(jax.device_get(infos))

    def compare(
        self, state: pace.PaceState, served: Draft, completion: Completion
    ) -> pace.PaceState:
        """Holds the served projection against the snapshot, before learning."""
        params = dict(served.params)
        heads = params.pop(HEAD), state.snapshot
        for args in self._chunks(params, served, completion):
            state = pace.compared(state, *self._compare(heads, *args))
        return state

    def _chunks(self, params, served: Draft, completion: Completion):
        """Arguments of `_samples`, for each part of an answer."""
        ids = [*completion.request.prompt_ids, *completion.token_ids]
        tokens = np.full(completion.capacity + 1, -1, np.int32)
        tokens[: len(ids)] = ids
        first, last = self._span(completion)
        for start in range(first, last, CHUNK):
            yield (
                params, served.token_ids, completion.feedback, tokens,
                np.int32(start), np.int32(last),
            )  # fmt: skip

    def _samples(self, params, token_ids, feedback, tokens, start, end) -> HeadSamples:
        """Without logits."""
        positions = start + jnp.arange(CHUNK)
        take = lambda x: jnp.take(x, positions, axis=0, mode="clip")
        labels = take(tokens[1:])
        if token_ids is not None:
            entry_of = jnp.full((self._vocab_size,), -1, jnp.int32)
            entry_of = entry_of.at[token_ids].set(jnp.arange(token_ids.shape[0]))
            labels = entry_of[labels]
        inputs = self._head_inputs(params, take(feedback.states[0]).astype(jnp.float32))
        is_real = take(feedback.has_state[0]) & (positions < end)
        return HeadSamples(inputs, jnp.zeros((CHUNK, 0)), labels, is_real)

    def _chunk(self, state, head, sampling, *args):
        samples = self._samples(*args)
        logits = linear(samples.inputs, head, self._numerics)
        samples = samples.replace(logits=logits, sampling=sampling)
        state, rows, info = self._learner.update(state, samples)
        changed = cast_params({"kernel": state.kernel[rows]}, self._numerics.precision)
        head = {name: head[name].at[rows].set(changed[name]) for name in head}
        return state, head, info

    def _accepted(self, heads, *args):
        """`[1]` accepted tokens a step with each projection, and the samples' weight.

        A share of a drafted tokens that are right makes a + a^2 + ... accepted ones.
        Right is the likeliest token: of sampled answers this tells what children of
        the kind `topk` get accepted, and only nearly what drawn ones do.
        """
        samples = self._samples(*args)
        count = jnp.sum(samples.is_real)[None]

        def accepted(head):
            best = jnp.argmax(linear(samples.inputs, head, self._numerics), axis=-1)
            is_right = samples.is_real & (best == samples.labels)
            share = jnp.sum(is_right) / jnp.maximum(count, 1)
            return sum(share ** (i + 1) for i in range(self._num_steps))

        return *(accepted(head) for head in heads), count


def as_drawn(sampling: SamplingConfig) -> HeadSampling | None:
    """How an answer's tokens were drawn, as `HeadSamples` says it.

    An executable each for greedy answers and those of the unchanged law, for those of
    another temperature, and for those of which top-k or top-p cut something off.
    """
    is_cut = sampling.top_k > 0 or sampling.top_p < 1
    is_greedy = sampling.temperature == 0 or sampling.top_k == 1
    if is_greedy or (sampling.temperature == 1 and not is_cut):
        return None
    drawn = HeadSampling(jnp.float32(sampling.temperature))
    if not is_cut:
        return drawn
    return drawn.replace(
        top_k=jnp.int32(sampling.top_k), top_p=jnp.float32(sampling.top_p)
    )


def _summed(infos: list[HeadInfo]) -> HeadInfo:
    """One answer's, of its parts'; without any sample, zeros."""
    found = np.asarray(infos, np.float32).reshape(-1, len(HeadInfo._fields))
    loss, agreement, counts, norms, refused = found.T
    mean = lambda values: values @ counts / max(counts.sum(), 1)
    values: Any = (
        mean(loss), mean(agreement), counts.sum(), norms.sum(), refused.sum()
    )  # fmt: skip
    return HeadInfo(*values)
