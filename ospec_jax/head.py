# SPDX-License-Identifier: Apache-2.0
"""From an answered request to a better output projection, in the served draft.

The learner's projection is in float32, the served one in the target's precision: after
an update only the rows that changed are cast again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, LearnerConfig
from ospec_jax.decoding.engine import Completion
from ospec_jax.learners.head import HeadSamples, HeadState, head_learner
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.models.quantization import cast_params
from ospec_jax.types import Draft

_CHUNK = 64
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
        self._learn = jax.jit(self._chunk, donate_argnums=(0, 1))

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

    def observe(
        self, state: HeadState, served: Draft, completion: Completion
    ) -> tuple[HeadState, Draft]:
        """Learns from an answer; the state and the served projection are donated."""
        request = completion.request
        ids = [*request.prompt_ids, *completion.token_ids]
        tokens = np.full(completion.capacity + 1, -1, np.int32)
        tokens[: len(ids)] = ids
        params = dict(served.params)
        head = params.pop(HEAD)
        # The answer's first token came from prefill and was never drafted.
        first, last = len(request.prompt_ids), completion.num_recorded
        for start in range(first, last, _CHUNK):
            state, head, _ = self._learn(
                state, head, params, served.token_ids, completion.feedback, tokens,
                np.int32(start), np.int32(last),
            )  # fmt: skip
        return state, served.replace(params={**params, HEAD: head})

    def _chunk(self, state, head, params, token_ids, feedback, tokens, start, end):
        positions = start + jnp.arange(_CHUNK)
        take = lambda x: jnp.take(x, positions, axis=0, mode="clip")
        inputs = self._head_inputs(params, take(feedback.states[0]).astype(jnp.float32))
        labels = take(tokens[1:])
        if token_ids is not None:
            entry_of = jnp.full((self._vocab_size,), -1, jnp.int32)
            entry_of = entry_of.at[token_ids].set(jnp.arange(token_ids.shape[0]))
            labels = entry_of[labels]
        samples = HeadSamples(
            inputs=inputs,
            logits=linear(inputs, head, self._numerics),
            labels=labels,
            is_real=take(feedback.has_state[0]) & (positions < end),
        )
        state, rows, info = self._learner.update(state, samples)
        changed = cast_params({"kernel": state.kernel[rows]}, self._numerics.precision)
        head = {name: head[name].at[rows].set(changed[name]) for name in head}
        return state, head, info
