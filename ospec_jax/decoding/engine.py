# SPDX-License-Identifier: Apache-2.0
"""The host's side of decoding: prompts in, tokens out, one device read a step.

`Engine` holds compiled functions and nothing that changes. A batch is served by
prefilling each request alone and inserting its row into the running state, so a row's
tokens cannot depend on its neighbours.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import sharding
from ospec_jax.config import ConfigError, Recording, TreeConfig
from ospec_jax.control.depth import DepthChooser
from ospec_jax.decoding.request import (
    Completion,
    PromptTooLongError,
    Request,
    Slot,
)
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.decoding.step import StepConfig, build_prefill, build_step, empty_state
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.prediction import as_prediction
from ospec_jax.models.cache import KVCache
from ospec_jax.types import DecodeState, Draft, Feedback, SamplingParams, StepOutput
from ospec_jax.typing import Params

PREFILL_CHUNK = 64
CAPACITIES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Cache sizes that are compiled for; a request takes the smallest that holds it."""
PREDICTED = "predicted_step"
"""The step of a menu that is taken where suggestions are sure to be right."""


def step_of_depth(depth: int) -> str:
    """Name of the step of a menu that drafts so many tokens."""
    return f"step_{depth}"


def fetch(output: Any) -> Any:
    """The only place where the host waits for the device while decoding."""
    return jax.device_get(output)


def _insert(state: DecodeState, row: DecodeState, slot) -> DecodeState:
    """Puts a single-row state into a slot of a batch."""

    def place(batch, one, axis=0):
        if isinstance(batch, KVCache):
            within = lambda x, y: place(x, y, batch.batch_axis)
            return jax.tree.map(within, batch, one)
        return jax.lax.dynamic_update_slice_in_dim(batch, one, slot, axis)

    is_cache = lambda node: isinstance(node, KVCache)
    return jax.tree.map(place, state, row, is_leaf=is_cache)


def _take_row(feedback: Feedback, slot) -> Feedback:
    # A gather, which, unlike a slice, fetches one row from split ones.
    take = lambda x: jnp.take(x, slot[None], axis=0, mode="clip")
    return jax.tree.map(take, feedback)


def _finish(is_finished, slot):
    return is_finished.at[slot].set(True)


class _Sent(NamedTuple):
    """A pass that was sent to the device.

    Attributes:
      rows: Number of the slot and of the output's row, for each request.
      depth: That was chosen for a step, None where there was no choice.
    """

    is_step: bool
    rows: list[tuple[int, int, Slot]]
    output: StepOutput
    depth: int | None = None


def _accepted_by_running(sent: _Sent) -> list[int]:
    """Accepted tokens of the rows that a step did not end, and that may be told."""
    output = sent.output
    return [
        int(output.num_accepted[row])
        for _, row, slot in sent.rows
        if not slot.is_done and not output.is_finished[row] and slot.request.can_teach
    ]


def _share_numbers(slots: list[Slot]) -> bool:
    """Whether two rows draw the same random numbers."""
    own = [
        (slot.request.seed, slot.request.choice)
        for slot in slots
        if not slot.request.can_teach
    ]
    return len(set(own)) < len(own)


class Engine:
    """Compiled prefill and step functions for one target, drafter and tree."""

    def __init__(
        self,
        config: StepConfig,
        target_params: Params,
        drafter: Drafter | None = None,
        recording: Recording = "nothing",
        menu: Mapping[str, tuple[TreeConfig, Drafter | None]] | None = None,
    ):
        """Prepares the functions; they are compiled when first needed.

        Args:
          recording: What to keep of verified tokens; see `Feedback`.
          menu: Other steps by name: how much they draft, and what with. Their state
            must be that of `drafter`. One is `PREDICTED`, for where suggestions are
            sure to be right (`StepOutput.is_sure`); others are named by
            `step_of_depth`, for `serve` to choose from, beside that of `config`.
        """
        if drafter is None and config.tree.num_steps:
            raise ConfigError(
                f"a tree of depth {config.tree.num_steps} needs a drafter; attach a "
                f"draft or set num_speculative_tokens to 0"
            )
        self._menu = {"step": (config.tree, drafter), **(menu or {})}
        largest = max(tree.num_nodes for tree, _ in self._menu.values())
        room = min(config.model.max_position, CAPACITIES[-1]) - 1
        if largest > room:
            raise ConfigError(
                f"a tree of {largest} nodes does not fit: "
                f"{config.model.max_position} positions and caches of {CAPACITIES[-1]} "
                f"slots leave room for {room}; draft less"
            )
        if recording == "features" and not config.taps:
            raise ConfigError("recording features needs the draft's taps")
        if recording == "states" and drafter is None:
            raise ConfigError("recording a draft's states needs a drafter")
        self.config, self.drafter = config, drafter
        self.target_params = target_params
        self.recording: Recording = recording
        kinds = [("prefill", build_prefill, config, drafter)]
        for name, (tree, drafts) in self._menu.items():
            special = dataclasses.replace(config, tree=tree)
            kinds += [(name, build_step, special, drafts)]
        mesh, rows = config.mesh, sharding.row_shardings
        # The host reads outputs, and learning keeps feedback, whatever its process.
        pinned = lambda function, *places: sharding.pinned(function, mesh, *places)
        self._functions = {}
        for name, build, special, drafts in kinds:
            for is_greedy in (True, False):
                special = dataclasses.replace(special, is_greedy=is_greedy)
                function = pinned(build(special, drafts), rows, sharding.replicated)
                self._functions[name, is_greedy] = jax.jit(function, donate_argnums=2)
        for is_greedy in (True, False):
            own = step_of_depth(config.tree.num_steps)
            self._functions[own, is_greedy] = self._functions["step", is_greedy]
        self._start_row = jax.jit(pinned(self._new_row, rows), static_argnums=(0, 1))
        self._start_batch = jax.jit(
            pinned(self._empty_rows, rows), static_argnums=(0, 1, 2)
        )
        self._insert = jax.jit(pinned(_insert, rows), donate_argnums=0)
        self._take_row = jax.jit(pinned(_take_row, sharding.replicated))
        self._finish = jax.jit(pinned(_finish, rows), donate_argnums=0)

    def compiled(self, name: str, is_greedy: bool) -> Callable:
        """The jitted `prefill`, `step` or another step of the menu."""
        return self._functions[name, is_greedy]

    @property
    def num_extra_slots(self) -> int:
        """Cache slots needed beyond a request's tokens."""
        nodes = [tree.num_nodes for tree, _ in self._menu.values()]
        scratch = [drafter.num_scratch for _, drafter in self._menu.values() if drafter]
        return max(nodes + scratch) + 2

    def capacity_for(self, requests: Iterable[Request]) -> int:
        """The smallest compiled capacity that holds every request.

        Raises:
          PromptTooLongError: One of them fits no cache.
        """
        largest = CAPACITIES[-1] - self.num_extra_slots
        limit = min(self.config.model.max_position, largest)
        needed = 0
        for request in requests:
            length = len(request.prompt_ids) + request.max_new_tokens
            if not request.prompt_ids:
                raise ConfigError(f"request {request.id} has an empty prompt")
            if length > limit:
                raise PromptTooLongError(
                    f"request {request.id}: {len(request.prompt_ids)} prompt tokens "
                    f"and {request.max_new_tokens} new ones exceed the limit of "
                    f"{limit} tokens; shorten the prompt or lower max_new_tokens"
                )
            needed = max(needed, length)
        return next(c for c in CAPACITIES if c >= needed + self.num_extra_slots)

    def prefill(
        self,
        draft: Draft | None,
        request: Request,
        capacity: int,
        has_prediction: bool | None = None,
        ordinal: int = 0,
    ) -> tuple[DecodeState, StepOutput]:
        """Runs the prompt, chunk by chunk, and chooses the answer's first token.

        Args:
          has_prediction: Make room for one; by default if the request has one.
          ordinal: The request's number among all admitted ones; see `Request.key`.
        """
        if has_prediction is None:
            has_prediction = bool(request.prediction_ids)
        is_greedy = request.sampling.temperature == 0
        key = request.key(ordinal)
        state = self._initial_state(request, capacity, has_prediction, key)
        ids = np.asarray(request.prompt_ids, np.int32)
        run = self.compiled("prefill", is_greedy)
        output = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            is_last = start + PREFILL_CHUNK >= len(ids)
            following = 0 if is_last else ids[start + PREFILL_CHUNK]
            padded = np.zeros((1, PREFILL_CHUNK), np.int32)
            padded[0, : len(chunk)] = chunk
            state, output = run(
                self.target_params, draft, state, padded,
                np.full(1, following, np.int32), np.full(1, len(chunk), np.int32),
                np.bool_(is_last),
            )  # fmt: skip
        assert output is not None, "an empty prompt is refused by capacity_for"
        return state, output

    def start(
        self, draft: Draft | None, request: Request, batch_size: int, capacity: int
    ) -> DecodeState:
        """The state of a batch whose rows have all been prefilled with one request."""
        state = None
        for slot in range(batch_size):
            row, _ = self.prefill(draft, request, capacity)
            state = self._place(state, row, slot, batch_size, capacity)
        assert state is not None, "a batch has rows"
        return state

    def _initial_state(self, request, capacity, has_prediction, key) -> DecodeState:
        sampling = request.sampling
        values = (sampling.temperature, sampling.top_k, sampling.top_p)
        args = capacity, has_prediction, key, values, request.max_new_tokens
        state = self._start_row(*args)
        if not has_prediction:
            return state
        ids, confidence = request.prediction_ids, request.prediction_confidence
        return state.replace(prediction=as_prediction(ids, capacity, confidence))

    def _empty_rows(self, batch_size, capacity, has_prediction) -> DecodeState:
        return empty_state(
            self.config, self.drafter, batch_size, capacity, self.recording,
            has_prediction,
        )  # fmt: skip

    def _new_row(self, capacity, has_prediction, key, values, num_remaining):
        """The state of one request before its prefill."""
        state = self._empty_rows(1, capacity, has_prediction)
        sampling = SamplingParams(*values)
        fill = lambda old, value: jnp.full_like(old, value)
        return state.replace(
            request_keys=key[None],
            sampling=jax.tree.map(fill, state.sampling, sampling),
            num_remaining=fill(state.num_remaining, num_remaining),
        )

    def serve(
        self,
        requests: Iterable[Request],
        draft_fn: Callable[[], Draft | None] = lambda: None,
        batch_size: int = 1,
        capacity: int | None = None,
        on_tokens: Callable[[Request, list[int]], None] | None = None,
        lag: int = 1,
        depths: DepthChooser | None = None,
        ordinals: Iterator[int] | None = None,
    ) -> Iterator[Completion]:
        """Answers requests as rows become free; yields them in order of completion.

        Args:
          draft_fn: Gives the draft to use, asked before every step, so that a learner
            may swap it between two completions. The tree of a step is verified with
            the draft that drew it, whatever it is.
          capacity: Cache slots of a row; by default the smallest for all requests, or
            for each of them when `batch_size` is 1.
          on_tokens: Called with each request's new tokens as they come.
          lag: Steps dispatched before the oldest one is read: with one, the device
            computes while the host reads and dispatches.
          depths: Says how deep each step drafts, of those on the menu, and hears what
            came of it; by default all steps are alike.
          ordinals: Gives each request its number when it is admitted (`Request.key`),
            none of them twice in the life of a session; by default 0, 1, 2, ...
        """
        sharding.check_batch(self.config.mesh, batch_size)
        ordinals = itertools.count() if ordinals is None else ordinals
        if batch_size == 1:
            for request in requests:
                slots = self._checked_capacity([request], capacity)
                yield from self._serve_batch(
                    [request], draft_fn, 1, slots, on_tokens, lag, depths, ordinals
                )
            return
        requests = list(requests)
        if not requests:
            return
        slots = self._checked_capacity(requests, capacity)
        yield from self._serve_batch(
            requests, draft_fn, batch_size, slots, on_tokens, lag, depths, ordinals
        )

    def _checked_capacity(self, requests, capacity: int | None) -> int:
        """The capacity to use; a chosen one in whole prefill chunks."""
        needed = max(
            len(request.prompt_ids) + request.max_new_tokens + self.num_extra_slots
            for request in requests
        )
        fitting = self.capacity_for(requests)
        if capacity is None:
            return fitting
        if capacity < needed:
            raise PromptTooLongError(
                f"the cache has {capacity} slots a row, the longest request needs "
                f"{needed}; raise the capacity or lower max_new_tokens"
            )
        return -(-capacity // PREFILL_CHUNK) * PREFILL_CHUNK

    def _serve_batch(
        self, requests, draft_fn, batch_size, capacity, on_tokens, lag, depths, ordinals
    ):
        has_prediction = any(request.prediction_ids for request in requests)
        if has_prediction:
            self._check_predictions()
        pending = iter(requests)
        slots: list[Slot | None] = [None] * batch_size
        state = None
        in_flight: deque[_Sent] = deque()
        while True:
            for i in range(batch_size):
                if slots[i] is None and (request := next(pending, None)) is not None:
                    slot = Slot(request, self._new_stats())
                    slots[i] = slot
                    row, output = self.prefill(
                        draft_fn(), request, capacity, has_prediction, next(ordinals)
                    )
                    state = self._place(state, row, i, batch_size, capacity)
                    in_flight.append(_Sent(False, [(i, 0, slot)], output))
            active = [(i, i, slot) for i, slot in enumerate(slots) if slot]
            if not active and not in_flight:
                return
            # No step is sent ahead that would find all rows at their limit.
            unread = sum(sent.output.tokens.shape[1] for sent in in_flight)
            if any(slot.num_remaining > unread for _, _, slot in active):
                step, depth = self._next_step([slot for *_, slot in active], depths)
                state, output = step(self.target_params, draft_fn(), state)
                in_flight.append(_Sent(True, active, output, depth))
                num_ahead = lag
            else:
                num_ahead = 0
            while len(in_flight) > num_ahead:
                sent = in_flight.popleft()
                sent = sent._replace(output=fetch(sent.output))
                if sent.depth is not None:
                    depths.observe(sent.depth, _accepted_by_running(sent))
                for i, slot in self._read(sent, on_tokens):
                    state = self._without(state, i)
                    slots[i] = None
                    yield self._complete(slot, state, i)

    def _next_step(self, slots: list[Slot], depths: DepthChooser | None):
        """The function for these rows' next step, and its depth if that was chosen."""
        is_greedy = all(slot.request.sampling.temperature == 0 for slot in slots)
        all_are_sure = all(slot.is_sure for slot in slots)
        # What one row drafts must not follow from numbers that its twin has yet to use.
        if PREDICTED in self._menu and all_are_sure and not _share_numbers(slots):
            return self.compiled(PREDICTED, is_greedy), None
        if depths is None:
            return self.compiled("step", is_greedy), None
        depth = depths.depth
        return self.compiled(step_of_depth(depth), is_greedy), depth

    def rehearse_longer(
        self,
        request: Request,
        draft_fn: Callable[[], Draft | None],
        batch_size: int,
        capacity: int | None = None,
    ) -> None:
        """Compiles the step for sure suggestions, if anybody is ever sure of them."""
        if PREDICTED not in self._menu:
            return
        slots = self._checked_capacity([request], capacity)
        row, output = self.prefill(draft_fn(), request, slots)
        if output.is_sure is None:
            return
        state = self._place(None, row, 0, batch_size, slots)
        is_greedy = request.sampling.temperature == 0
        step = self.compiled(PREDICTED, is_greedy)
        jax.block_until_ready(step(self.target_params, draft_fn(), state))

    def _check_predictions(self) -> None:
        if self.config.tree.children != "topk":
            raise ConfigError(
                f"a prediction is exact only among children='topk', not "
                f"{self.config.tree.children!r}"
            )

    def _place(self, state, row, slot, batch_size, capacity):
        if batch_size == 1:
            return row
        if state is None:
            has_prediction = row.prediction is not None
            state = self._start_batch(batch_size, capacity, has_prediction)
        return self._insert(state, row, np.int32(slot))

    def _without(self, state, row: int):
        is_finished = self._finish(state.is_finished, np.int32(row))
        return state.replace(is_finished=is_finished)

    def _new_stats(self) -> DecodingStats:
        deepest = max(tree.num_steps for tree, _ in self._menu.values())
        return DecodingStats(num_spec_tokens=deepest)

    def _read(self, sent: _Sent, on_tokens):
        """Books one pass's tokens; yields the slots that are done."""
        for i, row, slot in sent.rows:
            if slot.is_done:
                continue
            tokens = slot.book(sent.output, row, sent.is_step, self.config.stop_ids)
            if tokens and on_tokens is not None:
                on_tokens(slot.request, tokens)
            if slot.is_done:
                yield i, slot

    def _complete(self, slot: Slot, state: DecodeState, row: int) -> Completion:
        feedback = state.feedback
        if feedback is not None:
            feedback = self._take_row(feedback, np.int32(row))
        return slot.completion(feedback, state.cache.capacity)
