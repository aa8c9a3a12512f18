# SPDX-License-Identifier: Apache-2.0
"""What a draft would have drafted along an answer that others drafted.

Teacher-forced through the drafter's `unroll`, the answer's tokens are those that the
draft itself would have proposed up to the first mismatch; so one pass tells, for every
position, how many of K drafted tokens the target would accept, and from which states
they would have come. A replay scores drafts so; who learns the last layer without
having drafted learns from these states.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.decoding.request import Completion
from ospec_jax.decoding.step import narrow
from ospec_jax.drafters.base import Drafter, frozen_head
from ospec_jax.learners.losses import forward_kl
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.models.sharing import share
from ospec_jax.online.samples import CHUNK, span_of
from ospec_jax.online.slices import Slices, run
from ospec_jax.online.trainer import Trainer
from ospec_jax.sampling import argmax
from ospec_jax.types import Draft, Feedback, SharedTables

_MAX_CONTEXT = 448
"""Pairs before a part of an answer that it attends to: all there are in caches of 512
slots. More would cost each part as much as it brings the last ones."""


def build_score(
    drafter,
    numerics,
    num_context: int,
    num_steps: int,
    decay: float,
    has_states: bool = False,
):
    """Builds the pass that scores whole answers.

    It maps `(params, token_ids, shared, feedback, start, following, weight)` to the
    accepted draft tokens `[b, a]` of a proposal at each root, the losses `[b]`, the
    states `[b, a, num_steps, d]` that each proposal's tokens were predicted from, and
    these tokens `[b, a, num_steps]`; None for both unless `has_states`.
    Feedback has `num_context` context tokens, then the `a` tokens before the roots,
    then `num_steps` more; `following[b, a + num_steps]` are the tokens after the first
    root, negative where there are none; `weight[b, a]` is None for no losses.
    """

    def score(params, token_ids, shared, feedback, start, following, weight):
        args = params, token_ids, shared, feedback, start
        sizes = {"num_context": num_context, "num_steps": num_steps}
        states = choices = None
        if has_states:
            logits, outputs = drafter.unroll_outputs(*args, **sizes)
            # Rounded as they are when decoding records them.
            states = jnp.stack([narrow(of_depth) for of_depth in outputs], axis=2)
        else:
            logits = drafter.unroll(*args, **sizes)

        # A token counts as accepted if all drafted before it were: `is_same` is the
        # chain's survival, `accepted` its sum.
        length = logits[0].shape[1]
        is_same = True
        accepted = 0
        drafted = []

        for depth, of_depth in enumerate(logits):
            best = argmax(of_depth)
            best = best if token_ids is None else token_ids[best]
            drafted.append(best)
            is_same &= best == following[:, depth : depth + length]
            accepted += is_same.astype(jnp.int32)

        if has_states:
            choices = jnp.stack(drafted, axis=2)
        if weight is None:
            return accepted, None, states, choices

        found = losses(logits, token_ids, shared, feedback, weight)
        return accepted, found, states, choices

    def losses(logits, token_ids, shared, feedback, weight):
        # The pair at the root's predecessor predicts the token after the root, so the
        # target's rows begin one behind the context.
        hidden = feedback.hidden[:, num_context + 1 :].astype(jnp.float32)
        target = linear(hidden, frozen_head(shared, token_ids), numerics)
        total = feedback.logsumexp[:, num_context + 1 :, None]
        probs = jnp.exp(jnp.minimum(target - total, 0.0))
        length = weight.shape[1]
        found = 0.0
        scale = 0.0

        for depth, of_depth in enumerate(logits):
            rows = slice(depth, depth + length)
            # The target's word after token i + depth counts where that was verified.
            count = jnp.pad(weight[:, depth:], ((0, 0), (0, depth)))
            mean = jnp.sum(forward_kl(probs[:, rows], of_depth) * count, axis=1)
            found += decay**depth * mean / jnp.maximum(jnp.sum(count, axis=1), 1.0)
            scale += decay**depth

        return found / scale

    return score


def steps(
    accepted: Sequence[int] | np.ndarray, num_tokens: int
) -> Iterator[tuple[int, int]]:
    """Each step's root, as a token of the answer, and what it gets accepted."""
    root = 0
    # A step emits what it accepts and one token more, the next root.
    while root < num_tokens - 1:
        count = int(accepted[root])
        yield root, count
        root += count + 1


def drafting_states(
    accepted: np.ndarray, states: np.ndarray, choices: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The states from which the engine's steps would have drafted an answer.

    Args:
      states: `[a, num_steps, d]` of all proposals, as `build_score` gives them.
      choices: `[a, num_steps]` what was drafted from these.

    Returns:
      `[num_tokens - 1, d]` by the token that came before the predicted one, where there
      are any, since nothing is drafted behind a chain that was accepted whole, and what
      was drafted from them, -1 elsewhere.
    """
    kept = np.zeros((num_tokens - 1, states.shape[-1]), states.dtype)
    has_state = np.zeros(num_tokens - 1, bool)
    chosen = np.full(num_tokens - 1, -1, np.int32)

    for root, count in steps(accepted, num_tokens):
        # States up to the first rejected token: behind it the engine would have begun
        # anew. The answer may end within a chain.
        size = min(count + 1, states.shape[1], num_tokens - 1 - root)
        kept[root : root + size] = states[root, :size]
        chosen[root : root + size] = choices[root, :size]
        has_state[root : root + size] = True

    return kept, has_state, chosen


@dataclasses.dataclass(frozen=True)
class Redrafting:
    """How a draft is asked what it would have drafted.

    Attributes:
      drafter: The draft's.
      shared: The target's embedding and head.
      num_steps: Tokens of a chain, K.
    """

    drafter: Drafter
    numerics: Numerics
    shared: SharedTables
    num_steps: int

    def redrafted(self, served: Draft, completion: Completion) -> Slices[Completion]:
        """The answer, with the draft's states recorded in place of features.

        Args:
          served: The draft, as it decodes.
          completion: With features.
        """
        request = completion.request
        first = len(request.prompt_ids)
        num_tokens = len(completion.token_ids)
        # One place more for each depth: what comes after a root is read behind it.
        tokens = np.full(completion.capacity + CHUNK + self.num_steps, -1, np.int32)
        tokens[: first + num_tokens] = [*request.prompt_ids, *completion.token_ids]
        context = min(completion.capacity - CHUNK, _MAX_CONTEXT)
        part = _compiled(self.drafter, self.numerics, max(context, 0), self.num_steps)
        found = []

        for root in range(*span_of(completion), CHUNK):
            if found:
                yield
            found.append(
                jax.device_get(
                    part(
                        served.params,
                        served.token_ids,
                        self.shared,
                        completion.feedback,
                        tokens,
                        np.int32(root),
                    )
                )
            )

        return dataclasses.replace(completion, feedback=_recorded(completion, found))


def _recorded(completion: Completion, found: list[tuple]) -> Feedback:
    """What decoding would have recorded, had the draft drafted.

    Args:
      found: Of each part of the answer, what `build_score` says of it.
    """
    assert completion.feedback is not None, "features are recorded"
    shape = 1, completion.capacity
    # Where nothing is learned from the answer nobody reads any state.
    width = found[0][1].shape[-1] if found else 1
    states = np.zeros((*shape, width), np.float16)
    has_state = np.zeros(shape, bool)
    choices = np.full(shape, -1, np.int32)

    if found:
        accepted, all_states, all_choices = map(
            np.concatenate, zip(*found, strict=True)
        )
        drafted = drafting_states(
            accepted, all_states, all_choices, len(completion.token_ids)
        )
        first = len(completion.request.prompt_ids)
        span = slice(first, first + len(drafted[0]))
        states[0, span], has_state[0, span], choices[0, span] = drafted

    arrays: Any = states, has_state, choices
    recorded = dict(zip(("states", "has_state", "choices"), arrays, strict=True))
    return Feedback(completion.feedback.tokens, **recorded)


@share
def _compiled(
    drafter: Drafter, numerics: Numerics, num_context: int, num_steps: int
) -> Callable:
    """The jitted pass over `CHUNK` roots of an answer; see `build_score`."""
    score = build_score(drafter, numerics, num_context, num_steps, 1.0, has_states=True)
    size = num_context + CHUNK + num_steps

    def part(params, token_ids, shared, feedback, tokens, root):
        # The pair before a root is the first that tells of its draft. Positions before
        # the prompt are padding, which negative ones are known by.
        start = root - 1 - num_context
        positions = start + jnp.arange(size)
        take = lambda x: jnp.take(x, positions, axis=1, mode="clip")
        window = jax.tree.map(take, feedback)
        following = jax.lax.dynamic_slice_in_dim(tokens, root + 1, CHUNK + num_steps)
        args = params, token_ids, shared, window, start[None], following[None]
        found: Any = score(*args, None)
        accepted, _, states, choices = found
        return accepted[0], states[0], choices[0]

    return jax.jit(part)


def with_redrafting(trainer: Trainer, redrafting: Redrafting) -> Trainer:
    """A trainer that learns from a draft's states, whoever drafted.

    It wants features recorded, and asks the draft what it would have drafted. That is a
    pass of the draft over each answer that is learned from.

    Args:
      trainer: That learns from states; see `online.last_layer`.
    """
    redrafted = lambda served, completion: run(redrafting.redrafted(served, completion))

    def warm_up(state, traffic, draft, served, completion, speed=None):
        answer = redrafted(served, completion)
        return trainer.warm_up(state, traffic, draft, served, answer, speed)

    def update(state, traffic, draft, served, completion):
        answer = redrafted(served, completion)
        return trainer.update(state, traffic, draft, served, answer)

    def in_slices(state, traffic, draft, served, completion):
        answer = yield from redrafting.redrafted(served, completion)
        yield
        # Slices of others may follow the last one of this trainer, which overwrites
        # what it is given: copies, until all of them are done.
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        yield
        served = jax.block_until_ready(trainer.own(served))
        yield
        assert trainer.update_in_slices is not None
        args = state, traffic, draft, served, answer
        return (yield from trainer.update_in_slices(*args))

    def rehearse_slices(state, traffic, draft, served, completion):
        answer = redrafted(served, completion)
        trainer.rehearse_slices(state, traffic, draft, served, answer)

    has_slices = trainer.update_in_slices is not None
    return trainer._replace(
        recording="features",
        warm_up=warm_up,
        update=update,
        update_in_slices=in_slices if has_slices else None,
        rehearse_slices=rehearse_slices,
    )
