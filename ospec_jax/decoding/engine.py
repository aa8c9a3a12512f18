# SPDX-License-Identifier: Apache-2.0
"""The host's side of decoding: prompts in, tokens out, one device read a step.

`Engine` holds compiled functions and nothing that changes. A batch is served by
prefilling each request alone and inserting its row into the running state, so a row's
tokens cannot depend on its neighbours.
"""

import contextlib
import dataclasses
import itertools
import logging
import typing
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import sharding
from ospec_jax.config import (
    RECORDS_STATES,
    ConfigError,
    Recording,
    StepKind,
    TreeConfig,
)
from ospec_jax.control.base import SUGGESTIONS, Action, Chooser, fixed
from ospec_jax.decoding.adjusting import as_extras, neutral_extras
from ospec_jax.decoding.batch import Batch, Queue, Reading
from ospec_jax.decoding.kept import Found, RowCaches, start_behind
from ospec_jax.decoding.request import (
    Completion,
    Emitted,
    PromptTooLongError,
    Request,
)
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.decoding.step import (
    StepConfig,
    build_catching_up,
    build_judging,
    build_prefill,
    build_step,
    empty_state,
)
from ospec_jax.drafters.base import Drafter, as_reader
from ospec_jax.drafters.pool import bring_first, put_back, take_chosen
from ospec_jax.drafters.prediction import as_prediction
from ospec_jax.models.cache import KVCache
from ospec_jax.models.sharing import share
from ospec_jax.models.tpu_options import compiler_options
from ospec_jax.types import (
    DecodeState,
    Draft,
    Extras,
    Feedback,
    SamplingParams,
    StepOutput,
)
from ospec_jax.typing import Params

_LOG = logging.getLogger(__name__)
KINDS: tuple[StepKind, ...] = typing.get_args(StepKind)
PREFILL_CHUNK = 64
CAPACITIES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Cache sizes that are compiled for; a request takes the smallest that holds it."""


def _insert(state: Any, row: Any, slot) -> Any:
    """Puts a single-row state, or its extras, into a slot of a batch."""

    # Rows are axis 0 of all arrays but those of a cache with stacked layers.
    def place(batch, one, axis=0):
        if isinstance(batch, KVCache):
            within = lambda x, y: place(x, y, batch.batch_axis)
            return jax.tree.map(within, batch, one)

        return jax.lax.dynamic_update_slice_in_dim(batch, one, slot, axis)

    is_cache = lambda node: isinstance(node, KVCache)
    return jax.tree.map(place, state, row, is_leaf=is_cache)


def _pick(state: DecodeState, numbers) -> DecodeState:
    """Rows by number in a batch of another size; those below 0 are free ones."""
    picked = _pick_any(state, numbers)
    return picked.replace(is_finished=picked.is_finished | (numbers < 0))


def _pick_any(rows: Any, numbers) -> Any:
    """Rows by number, of a state or of its extras; any row for those below 0."""

    def take(x, axis=0):
        if isinstance(x, KVCache):
            return jax.tree.map(lambda array: take(array, x.batch_axis), x)

        return jnp.take(x, jnp.maximum(numbers, 0), axis, mode="clip")

    is_cache = lambda node: isinstance(node, KVCache)
    return jax.tree.map(take, rows, is_leaf=is_cache)


def _at_the_beginning(new, old):
    """An array with another one, or what it has room for, in its first slots."""
    old = _first_slots(old, new)
    if new.shape == old.shape:
        return old

    return jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim)


def _first_slots(x, like):
    """What of an array lies where another one has places, too."""
    sizes = map(min, x.shape, like.shape)
    return x[tuple(slice(size) for size in sizes)]


def _take_row(feedback: Feedback, slot) -> Feedback:
    # A gather, which, unlike a slice, fetches one row from split ones.
    take = lambda x: jnp.take(x, slot[None], axis=0, mode="clip")
    return jax.tree.map(take, feedback)


def _finish(is_finished, slot):
    return is_finished.at[slot].set(True)


def _set_aside(
    state: DecodeState, kind: StepKind | None = None
) -> tuple[DecodeState, Extras | None]:
    """Takes the extras off a state, for what neither reads nor changes them.

    So the programs of those who ask for nothing are the same with and without them.
    """
    if kind == "full":
        return state, None

    return state.replace(extras=None), state.extras


def _put_back(state: DecodeState, extras: Extras | None) -> DecodeState:
    return state if extras is None else state.replace(extras=extras)


def _left_unjudged(state: DecodeState) -> DecodeState:
    """A prompt's state whose answer says nothing of a pool's members."""
    assert state.unjudged is not None, "some are judged"
    is_judged = np.zeros(state.lengths.shape, bool)
    return state.replace(unjudged=state.unjudged.replace(is_judged=is_judged))


# Drafters are the same if they are the same object, as `build_drafter` gives them. All
# that a program depends on must be an argument here, or it would be shared by engines
# that differ in it.
@share
def _compiled(
    build: Callable, config: StepConfig, drafter: Drafter | None
) -> Callable[..., tuple[DecodeState, StepOutput]]:
    """The jitted step, prefill or judging that `build` makes."""
    # The host reads outputs, and learning keeps feedback, whatever its process.
    # The state is donated: a step writes into the caches that it was given, and its
    # caller must not use the old state again. Parameters are not: the next step reads
    # them.
    places = sharding.row_shardings, sharding.replicated
    function = sharding.pinned(build(config, drafter), config.mesh, *places)
    return jax.jit(function, donate_argnums=2, compiler_options=compiler_options())


class _Rows(NamedTuple):
    """Jitted functions that begin, place and end rows of a batch."""

    start_row: Callable[..., DecodeState]
    start_batch: Callable[[int, int, bool], DecodeState]
    grow: Callable[[DecodeState, int], DecodeState]
    pick: Callable[..., DecodeState]
    pick_extras: Callable[..., Extras]
    insert: Callable[..., Any]
    take: Callable[..., Feedback]
    keep: Callable[..., RowCaches]
    go_on_from: Callable[..., tuple[RowCaches, jax.Array]]
    finish: Callable[..., jax.Array]
    start_extras: Callable[[int], Extras]
    pin_extras: Callable[[Extras], Extras]


@share
def _compiled_rows(
    config: StepConfig, drafter: Drafter | None, recording: Recording
) -> _Rows:
    rows = sharding.row_shardings
    pinned = lambda function, place: sharding.pinned(function, config.mesh, place)

    def start_batch(batch_size, capacity, has_prediction) -> DecodeState:
        return empty_state(
            config, drafter, batch_size, capacity, recording, has_prediction
        )

    def grow(state, capacity) -> DecodeState:
        """The same rows in larger caches, whose slots are those of the old ones."""
        fresh = start_batch(len(state.lengths), capacity, state.prediction is not None)
        # All that has slots counts them from a row's beginning.
        return jax.tree.map(_at_the_beginning, fresh, state)

    def keep(caches, slot, capacity) -> RowCaches:
        """One row's caches, the first slots of them."""
        like = jax.eval_shape(lambda: RowCaches.of(start_batch(1, capacity, False)))
        return jax.tree.map(_first_slots, _pick_any(caches, slot[None]), like)

    def go_on_from(caches, kept, length) -> tuple[RowCaches, jax.Array]:
        """A new row's caches with those of a kept one, and its length."""
        return jax.tree.map(_at_the_beginning, caches, kept), length[None]

    def start_row(capacity, has_prediction, key, values, num_remaining) -> DecodeState:
        """The state of one request before its prefill."""
        state = start_batch(1, capacity, has_prediction)
        sampling = SamplingParams(*values)
        fill = lambda old, value: jnp.full_like(old, value)
        # Keys and sampling are arguments, not constants, so that one program serves
        # every request.
        return state.replace(
            request_keys=key[None],
            sampling=jax.tree.map(fill, state.sampling, sampling),
            num_remaining=fill(state.num_remaining, num_remaining),
        )

    def start_extras(batch_size) -> Extras:
        return neutral_extras(batch_size, config.model.vocab_size)

    return _Rows(
        start_row=jax.jit(pinned(start_row, rows), static_argnums=(0, 1)),
        start_batch=jax.jit(pinned(start_batch, rows), static_argnums=(0, 1, 2)),
        grow=jax.jit(pinned(grow, rows), static_argnums=1),
        pick=jax.jit(pinned(_pick, rows)),
        pick_extras=jax.jit(pinned(_pick_any, rows)),
        insert=jax.jit(pinned(_insert, rows), donate_argnums=0),
        take=jax.jit(pinned(_take_row, sharding.replicated)),
        keep=jax.jit(pinned(keep, rows), static_argnums=2),
        # Kept caches are not donated: the next turn may begin there once more.
        go_on_from=jax.jit(
            sharding.pinned(go_on_from, config.mesh, rows, rows), donate_argnums=0
        ),
        finish=jax.jit(pinned(_finish, rows), donate_argnums=0),
        start_extras=jax.jit(pinned(start_extras, rows), static_argnums=0),
        pin_extras=jax.jit(pinned(lambda extras: extras, rows)),
    )


def _fitting(queue: Queue, batch: Batch, batch_size: int) -> Iterator[Request]:
    """The requests of a batch: one alone, or all up to one that does not fit."""
    if batch_size == 1:
        yield queue.take()
        return

    while (ahead := queue.look(1)) and batch.fits(ahead[0]):
        yield queue.take()


class Engine:
    """Compiled prefill and step functions for one target, drafter and tree."""

    def __init__(
        self,
        config: StepConfig,
        target_params: Params,
        drafter: Drafter | None = None,
        recording: Recording = "nothing",
        menu: Mapping[Action, Drafter | None] | None = None,
    ):
        """Prepares the functions; they are compiled when first needed.

        Args:
          recording: What to keep of verified tokens; see `Feedback`.
          menu: Other actions, and the drafters of their trees, for a controller to
            choose from beside the tree of `config`. Their state must be that of
            `drafter`.
        """
        if drafter is None and config.tree.num_steps:
            raise ConfigError(
                f"a tree of depth {config.tree.num_steps} needs a drafter; attach a "
                f"draft or set num_speculative_tokens to 0"
            )

        self.action = Action(config.tree)
        self._menu: dict[Action, Drafter | None] = {self.action: drafter}
        self._menu |= menu or {}
        largest = max(action.tree.num_nodes for action in self._menu)
        room = min(config.model.max_position, CAPACITIES[-1]) - 1
        if largest > room:
            raise ConfigError(
                f"a tree of {largest} nodes does not fit: "
                f"{config.model.max_position} positions and caches of {CAPACITIES[-1]} "
                f"slots leave room for {room}; draft less"
            )
        if recording == "features" and not config.taps:
            raise ConfigError("recording features needs the draft's taps")
        if recording in RECORDS_STATES and drafter is None:
            raise ConfigError("recording a draft's states needs a drafter")

        self.config = config
        self.drafter = drafter
        self.target_params = target_params
        self.recording: Recording = recording
        self._announced: set[tuple] = set()
        self._is_silent = False
        self._prefills: dict[StepKind, Callable] = {}
        self._judgings: dict[StepKind, Callable] = {}
        self._prefills_alone: dict[tuple[int, StepKind], Callable] = {}
        self._steps: dict[tuple[Action, StepKind], Callable] = {}
        self._resting: dict[tuple[Action, StepKind], Callable] = {}
        self._catching_up: Callable | None = None
        if config.num_behind:
            self._catching_up = _compiled(build_catching_up, config, drafter)

        # What is drafted behind a prompt is nothing to it, nor to where rows begin:
        # these programs are the same for all trees.
        no_tree = TreeConfig(num_steps=0)

        # Greedy and sampled steps are separate programs: a greedy one needs no
        # probabilities over the vocabulary. So are full ones, which do more than most
        # requests ask for.
        for kind in KINDS:
            own = dataclasses.replace(config, kind=kind)
            reading = dataclasses.replace(own, tree=no_tree)
            self._prefills[kind] = _compiled(build_prefill, reading, as_reader(drafter))
            if config.num_unjudged:
                self._judgings[kind] = _compiled(build_judging, own, drafter)
            for action, member in self._menu.items():
                special = dataclasses.replace(own, tree=action.tree)
                step = _compiled(build_step, special, member)
                self._steps[action, kind] = step
                if config.num_unjudged and member is not None and member.takes_chosen:
                    one = _compiled(build_prefill, reading, as_reader(member))
                    self._prefills_alone[max(action.drafter, 0), kind] = one
                if config.num_behind and not action.tree.num_steps:
                    special = dataclasses.replace(special, is_resting=True)
                    step = _compiled(build_step, special, member)
                    self._resting[action, kind] = step

        reading = dataclasses.replace(config, tree=no_tree)
        self._rows = _compiled_rows(reading, as_reader(drafter), recording)

    @property
    def is_drawn(self) -> bool:
        """Whether some action draws its tree's children; see `TreeConfig.is_drawn`."""
        return any(action.tree.is_drawn for action in self._menu)

    @property
    def actions(self) -> tuple[Action, ...]:
        """The menu, the engine's own action first."""
        return tuple(self._menu)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a request."""
        return self.config.stop_ids

    @property
    def has_log_probs(self) -> bool:
        """Whether log-probabilities are reported to all requests."""
        return self.config.has_log_probs

    def compiled(
        self, action: Action, kind: StepKind, is_resting: bool = False
    ) -> Callable:
        """The jitted `(target_params, draft, state) -> (state, output)` of an action.

        Args:
          is_resting: See `step`.

        Raises:
          ConfigError: The action is not on the menu.
        """
        if (action, kind) not in self._steps:
            raise ConfigError(
                f"{action} is not on this engine's menu; a controller chooses among "
                f"its own actions, here {'; '.join(map(str, self.actions))}"
            )

        return (self._resting if is_resting else self._steps)[action, kind]

    @property
    def num_unjudged(self) -> int:
        """Emitted tokens of a row that may wait to be judged; 0 where none do."""
        return self.config.num_unjudged

    def judge(
        self, kind: StepKind, draft: Draft | None, state: DecodeState
    ) -> tuple[DecodeState, Any]:
        """Judges a pool's members by the tokens that wait; the state is donated."""
        shape = state.num_remaining.shape[0], state.cache.capacity
        self._announce("the judging of drafts", kind, *shape)
        state, extras = _set_aside(state, kind)
        state, judged = self._judgings[kind](self.target_params, draft, state)
        return _put_back(state, extras), judged

    @property
    def num_behind(self) -> int:
        """Emitted tokens of a row that the draft may be behind by; 0 where it keeps
        up with every step."""
        return self.config.num_behind

    def catch_up(self, draft: Draft | None, state: DecodeState) -> DecodeState:
        """Runs the draft over all that it is behind by; the state is donated."""
        assert self._catching_up is not None, "no draft is ever behind"
        shape = state.num_remaining.shape[0], state.cache.capacity
        self._announce("a draft's catching up", *shape)
        state, extras = _set_aside(state)
        state, _ = self._catching_up(self.target_params, draft, state)
        return _put_back(state, extras)

    def compiled_prefill(self, kind: StepKind) -> Callable:
        """The jitted pass over one chunk of a prompt; see `step.build_prefill`."""
        return self._prefills[kind]

    @property
    def num_extra_slots(self) -> int:
        """Cache slots needed beyond a request's tokens."""
        # Rejected nodes and scratch entries are written behind a row's last token;
        # without room, `dynamic_update_slice` would move the write back over real
        # entries.
        nodes = [action.tree.num_nodes for action in self._menu]
        scratch = [drafter.num_scratch for drafter in self._menu.values() if drafter]
        # All tokens that may wait for a draft are run over as one chunk, full or not.
        waiting = self.num_unjudged, self.num_behind
        return max(*nodes, *scratch, *waiting) + 2

    def capacity_for(
        self, requests: Iterable[Request], capacity: int | None = None
    ) -> int:
        """Cache slots of a row that hold every request, as they are compiled for.

        Args:
          capacity: Slots that are wanted; by default the smallest that fit. Rounded up
            to whole prefill chunks.

        Raises:
          ConfigError: A prompt is empty.
          PromptTooLongError: One of the requests does not fit.
        """
        # The model's positions bound the tokens, the largest cache bounds tokens and
        # room.
        largest = CAPACITIES[-1] - self.num_extra_slots
        limit = min(self.config.model.max_position, largest)
        needed = self.num_extra_slots

        for request in requests:
            length = len(request.prompt_ids) + request.max_new_tokens
            if not request.prompt_ids:
                raise ConfigError(f"request {request.id} has an empty prompt")
            self._check_ids(request)
            if length > limit:
                raise PromptTooLongError(
                    f"request {request.id}: {len(request.prompt_ids)} prompt tokens "
                    f"and {request.max_new_tokens} new ones exceed the limit of "
                    f"{limit} tokens; shorten the prompt or lower max_new_tokens"
                )
            needed = max(needed, self.needed_slots(request))

        if capacity is None:
            return next(c for c in CAPACITIES if c >= needed)
        if capacity < needed:
            raise PromptTooLongError(
                f"the cache has {capacity} slots a row, the longest request needs "
                f"{needed}; raise the capacity or lower max_new_tokens"
            )

        # A prompt's last chunk is padded to its full length: it must fit as well, or
        # its write would be moved back over earlier slots.
        return -(-capacity // PREFILL_CHUNK) * PREFILL_CHUNK

    def _check_ids(self, request: Request) -> None:
        """Refuses tokens without an embedding, which XLA takes for the nearest one."""
        vocab_size = self.config.model.vocab_size
        biased = (token for token, _ in request.sampling.logit_bias)
        ids = (*request.prompt_ids, *request.prediction_ids, *biased)
        wrong = sorted({i for i in ids if not 0 <= i < vocab_size})
        if wrong:
            raise ConfigError(
                f"request {request.id} has the token ids {wrong[:3]}, for which the "
                f"model has no embedding: it knows ids below {vocab_size}; the "
                f"tokenizer is of another model, or has tokens added to it"
            )

    def needed_slots(self, request: Request) -> int:
        """Cache slots that a request takes at most."""
        num_tokens = len(request.prompt_ids) + request.max_new_tokens
        return num_tokens + self.num_extra_slots

    def prefill(
        self,
        draft: Draft | None,
        request: Request,
        capacity: int,
        has_prediction: bool | None = None,
        ordinal: int = 0,
        only: int | None = None,
    ) -> tuple[DecodeState, StepOutput]:
        """Runs the prompt, chunk by chunk, and chooses the answer's first token.

        Args:
          has_prediction: Make room for one; by default if the request has one.
          ordinal: The request's number among all admitted ones; see `Request.key`.
          only: The member of a pool that alone runs over it; None for all.
        """
        if has_prediction is None:
            has_prediction = bool(request.prediction_ids)

        reading = self.begin(request, capacity, has_prediction, ordinal)
        reading = reading._replace(only=only)
        # The chunks are only dispatched here; nobody waits for them.
        while not reading.is_done:
            reading = self.read_on(draft, reading)

        assert reading.output is not None, "an empty prompt is refused by capacity_for"

        return reading.state, reading.output

    def begin(
        self, request: Request, capacity: int, has_prediction: bool, ordinal: int
    ) -> Reading:
        """A request of whose prompt nothing has been run; see `prefill`."""
        self._check_ids(request)
        key = request.key(ordinal)
        state = self._initial_state(request, capacity, has_prediction, key)
        return Reading(request, state)

    def start_of(self, reading: Reading, num_tokens: int) -> int:
        """Tokens of a prompt that need not be run; 0 where that is not worth it.

        Args:
          reading: Of whose prompt nothing has been run.
          num_tokens: Of the prompt, that another row has.
        """
        num_prompt = len(reading.request.prompt_ids)
        capacity = reading.state.cache.capacity
        return start_behind(num_tokens, num_prompt, capacity, PREFILL_CHUNK)

    def go_on_from(self, reading: Reading, found: Found) -> Reading:
        """Begins behind the tokens that another row has, if that is worth it.

        Args:
          reading: Of whose prompt nothing has been run; its state is donated.
        """
        start = self.start_of(reading, found.num_tokens)
        if not start:
            return reading

        state = reading.state
        caches, lengths = self._rows.go_on_from(
            RowCaches.of(state), found.caches, np.int32(start)
        )
        state = state.replace(
            cache=caches.cache,
            draft_cache=caches.draft_cache,
            feedback=caches.feedback,
            lengths=lengths,
        )
        return reading._replace(state=state, position=start)

    def keep(self, state: DecodeState, slot: int, capacity: int) -> RowCaches:
        """A copy of a row's caches.

        Args:
          capacity: Slots of the copy, no more than the row has.
        """
        return self._rows.keep(RowCaches.of(state), np.int32(slot), capacity)

    def read_on(self, draft: Draft | None, reading: Reading) -> Reading:
        """Runs the next chunk of a prompt; its state is donated."""
        request, state, start, *_ = reading
        ids = np.asarray(request.prompt_ids, np.int32)
        kind = request.kind
        self._announce("the pass over a prompt", kind, state.cache.capacity)

        # Every chunk has one shape, so that one program runs prompts of any length.
        chunk = ids[start : start + PREFILL_CHUNK]
        num_ahead = max(len(ids) - start - PREFILL_CHUNK, 0)
        following = ids[start + PREFILL_CHUNK] if num_ahead else 0
        padded = np.zeros((1, PREFILL_CHUNK), np.int32)
        padded[0, : len(chunk)] = chunk
        # A draft that looks back no farther than at a prompt's end leaves out what lies
        # before. Of a row that is kept another prompt's end may lie anywhere.
        if reading.is_to_keep:
            num_ahead = min(num_ahead, 1)
        # `following` tells the draft which token comes after the chunk's last one.
        chunk_args = (
            padded,
            np.full(1, following, np.int32),
            np.full(1, len(chunk), np.int32),
            np.int32(num_ahead),
            np.full(1, request.scope, np.int32),
        )
        if reading.only is None:
            run = self.compiled_prefill(kind)
            state, output = run(self.target_params, draft, state, *chunk_args)
        else:
            run = self._prefills_alone[reading.only, kind]
            state = _left_unjudged(state)
            args = draft, state, chunk_args
            state, output = self._run_chosen(run, reading.only, *args)

        return reading._replace(
            state=state, position=start + PREFILL_CHUNK, output=output
        )

    def _run_chosen(
        self, run: Callable, number: int, draft: Draft | None, state, args: tuple
    ) -> tuple[DecodeState, StepOutput]:
        """Runs a program that is given one member of a pool alone."""
        own = take_chosen(draft, number), take_chosen(state, number)
        found, output = run(self.target_params, *own, *args)
        return put_back(state, number, found), output

    def grow(self, state: DecodeState, capacity: int) -> DecodeState:
        """Moves running rows to larger caches."""
        rows, extras = _set_aside(state)
        return _put_back(self._rows.grow(rows, capacity), extras)

    def pick(self, state: DecodeState, numbers: Sequence[int]) -> DecodeState:
        """Moves rows, by their numbers, to a batch of so many; -1 is a free one."""
        chosen = np.asarray(numbers, np.int32)
        rows, extras = _set_aside(state)
        if extras is not None:
            extras = self._rows.pick_extras(extras, chosen)

        return _put_back(self._rows.pick(rows, chosen), extras)

    def start(
        self,
        draft: Draft | None,
        request: Request,
        batch_size: int,
        capacity: int,
        has_prediction: bool | None = None,
    ) -> DecodeState:
        """The state of a batch whose rows have all been prefilled with one request."""
        state = None

        for slot in range(batch_size):
            row, _ = self.prefill(draft, request, capacity, has_prediction)
            state = self.place(state, row, slot, batch_size, capacity)

        assert state is not None, "a batch has rows"
        return state

    def _initial_state(self, request, capacity, has_prediction, key) -> DecodeState:
        sampling = request.sampling
        values = (sampling.temperature, sampling.top_k, sampling.top_p)
        args = capacity, has_prediction, key, values, request.max_new_tokens
        state = self._rows.start_row(*args)
        if request.kind == "full":
            state = state.replace(extras=self._extras_of(request))
        if not has_prediction:
            return state

        ids = request.prediction_ids
        confidence = request.prediction_confidence

        expected = lambda: as_prediction(ids, capacity, confidence)
        state = state.replace(prediction=expected())
        if state.unjudged is None:
            return state

        # The state is donated, so no two of its parts may be the same.
        return state.replace(unjudged=state.unjudged.replace(prediction=expected()))

    def _extras_of(self, request: Request) -> Extras:
        """What a request asks of `full` passes, before anything was answered."""
        return self._rows.pin_extras(
            as_extras(
                request.sampling,
                request.prompt_ids,
                request.can_speculate,
                self.config.model.vocab_size,
            )
        )

    def serve(
        self,
        requests: Iterable[Request],
        draft_fn: Callable[[], Draft | None] = lambda: None,
        batch_size: int = 1,
        capacity: int | None = None,
        on_tokens: Callable[[Request, Emitted], None] | None = None,
        lag: int = 1,
        chooser: Chooser | None = None,
        ordinals: Iterator[int] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Completion]:
        """Answers requests as rows become free; yields them in order of completion.

        Args:
          requests: A list is looked at as a whole, for what its longest one needs. Of
            other sources only so many are taken ahead as the batch has rows; a request
            that needs more than those it follows begins when these have ended.
          draft_fn: Gives the draft to use, asked before every step, so that a learner
            may swap it between two completions. The tree of a step is verified with
            the draft that drew it, whatever it is.
          capacity: Cache slots of a row; by default the smallest for all requests that
            are known, or for each of them when `batch_size` is 1.
          on_tokens: Called with what each pass added to a request's answer.
          lag: Steps dispatched before the oldest one is read: with one, the device
            computes while the host reads and dispatches.
          chooser: Says what each step runs, of the menu, and hears what came of it; by
            default the engine's own action.
          ordinals: Gives each request its number when it is admitted (`Request.key`),
            none of them twice in the life of a session; by default 0, 1, 2, ...
          should_stop: Asked before every step; once it says so, requests that are on
            their way are dropped, and no others are begun.
        """
        sharding.check_batch(self.config.mesh, batch_size)
        chooser = chooser or Chooser.start(fixed((self.action,)), batch_size)
        ordinals = itertools.count() if ordinals is None else ordinals
        queue = Queue(requests)
        # Only a list can be looked through without using it up. Alone in its batch each
        # request may have a cache of its own size.
        are_known = isinstance(requests, list | tuple) and batch_size > 1

        # Each turn is a batch of one compiled shape; a request that does not fit waits
        # for the next turn.
        while ahead := queue.look(batch_size):
            group = requests if are_known else ahead
            slots = self.capacity_for(group, capacity)
            has_prediction = self._has_prediction(group)
            batch = Batch(
                self,
                batch_size,
                slots,
                has_prediction,
                on_tokens,
                chooser.observe,
                now=chooser.now,
                rests=chooser.rests,
            )
            pending = _fitting(queue, batch, batch_size)
            # Admit, dispatch, collect: the next step is sent before the oldest is read,
            # so that the device does not wait for the host.
            while True:
                if should_stop():
                    return
                for request in itertools.islice(pending, batch.num_free):
                    batch.admit(request, draft_fn(), next(ordinals))
                if batch.is_idle:
                    break
                # When no row is sure to want another step, all passes are read first:
                # only then is it known which rows are left.
                num_ahead = 0
                if batch.has_work:
                    rows = batch.rows
                    action = chooser.choose(rows)
                    batch.dispatch(draft_fn(), action, chooser.steer(action, rows))
                    num_ahead = lag
                yield from batch.collect(num_ahead)

    def _has_prediction(self, requests: Iterable[Request]) -> bool:
        """Whether rows need room for predictions, and may have them."""
        has_prediction = any(request.prediction_ids for request in requests)
        if has_prediction and self.config.tree.children != "topk":
            raise ConfigError(
                f"a prediction is exact only among children='topk', not "
                f"{self.config.tree.children!r}"
            )

        return has_prediction

    def step(
        self,
        action: Action,
        kind: StepKind,
        draft: Draft | None,
        state: DecodeState,
        steering: Any = None,
        is_resting: bool = False,
    ) -> tuple[DecodeState, StepOutput]:
        """Runs one step of an action of the menu; the state is donated.

        Args:
          is_resting: Of a plain step: leave the draft behind by one more token, of
            `num_behind` at most; `catch_up` comes before it drafts again.
          steering: What rules within the step are told; None for nothing, which is a
            program of its own.
        """
        shape = state.num_remaining.shape[0], state.cache.capacity
        depth = action.tree.num_steps
        rest = ", the draft resting" if is_resting else ""
        self._announce(f"a step of depth {depth}{rest}", action, kind, *shape)
        run = self.compiled(action, kind, is_resting)
        chosen = max(action.drafter, 0)
        state, extras = _set_aside(state, kind)
        told = () if steering is None else (steering,)
        drafter = self._menu[action]
        if drafter is not None and drafter.takes_chosen:
            state, output = self._run_chosen(run, chosen, draft, state, told)
            return _put_back(state, extras), output

        # The member that shall propose is swapped to the front, and back once it has:
        # the state's order is always that of the menu. Nothing is copied.
        own = bring_first(draft, chosen), bring_first(state, chosen)
        state, output = run(self.target_params, *own, *told)
        state = _put_back(state, extras)

        return bring_first(state, chosen), bring_first(output, chosen)

    @contextlib.contextmanager
    def silent(self) -> Generator[None]:
        """For who compiles programs on purpose, and tells of it."""
        before = self._is_silent
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = before

    def _announce(self, what: str, *key: Any) -> None:
        """Tells of a program that this engine has not run yet, and must compile."""
        if (what, *key) in self._announced:
            return

        self._announced.add((what, *key))
        if self._is_silent:
            return
        known = {name for name, *_ in self._announced}
        # Long steps along a prediction are compiled only where one is sure.
        depths = {a.tree.num_steps for a in self._menu if a.drafter != SUGGESTIONS}
        count = max(len(known), 1 + len(depths))
        _LOG.info(f"compiling {len(known)} of {count}: {what}")

    def place(
        self,
        state: DecodeState | None,
        row: DecodeState,
        slot: int,
        batch_size: int,
        capacity: int,
    ) -> DecodeState:
        """Puts a prefilled request into a row of a batch; None begins one."""
        if batch_size == 1:
            return row

        if state is None:
            has_prediction = row.prediction is not None
            state = self._rows.start_batch(batch_size, capacity, has_prediction)

        assert state is not None
        rows, extras = _set_aside(state)
        row, own = _set_aside(row)
        rows = self._rows.insert(rows, row, np.int32(slot))

        return rows.replace(extras=self._with_extras(extras, own, slot, batch_size))

    def _with_extras(
        self, extras: Extras | None, row: Extras | None, slot: int, batch_size: int
    ) -> Extras | None:
        """A batch's extras with those of a new row; None while no row has had any."""
        if extras is None and row is None:
            return None
        if extras is None:
            extras = self._rows.start_extras(batch_size)

        # What the row's last request asked for must not be there for the new one. Made
        # in any case, so that it is compiled with the first of these programs.
        neutral = self._rows.start_extras(1)
        row = neutral if row is None else row
        return self._rows.insert(extras, row, np.int32(slot))

    def finish(self, state: DecodeState, slot: int) -> DecodeState:
        """Marks a row as done: it emits nothing more."""
        # Only this array is donated; the rest of the state is shared with the new one.
        is_finished = self._rows.finish(state.is_finished, np.int32(slot))
        return state.replace(is_finished=is_finished)

    def feedback_of(self, state: DecodeState, slot: int) -> Feedback | None:
        """What was recorded of a row, `[1, capacity, ...]`."""
        if state.feedback is None:
            return None

        return self._rows.take(state.feedback, np.int32(slot))

    def new_stats(self) -> DecodingStats:
        """Counters of a request that has not been decoded yet."""
        # Long steps along a prediction count once one runs: most requests have none.
        depths = [
            action.tree.num_steps
            for action in self._menu
            if action.drafter != SUGGESTIONS
        ]
        return DecodingStats(num_spec_tokens=max(depths))
