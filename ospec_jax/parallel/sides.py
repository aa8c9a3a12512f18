# SPDX-License-Identifier: Apache-2.0
"""The two sides of a round: what they hold, and what they are asked to do next.

Nothing here waits. Each call hands work to its side's devices and returns arrays that
are still to come, so that one side computes while the other does.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ospec_jax import sharding
from ospec_jax.config import ConfigError, StepKind, TreeConfig
from ospec_jax.decoding.engine import CAPACITIES, PREFILL_CHUNK, Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import Scored, StepConfig
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.sharing import share
from ospec_jax.models.tpu_options import compiler_options
from ospec_jax.parallel.places import Place
from ospec_jax.parallel.rounds import (
    Chunk,
    RoundOutput,
    build_chunk,
    build_judging,
    build_reading,
    build_scoring,
)
from ospec_jax.types import DecodeState, SamplingParams

_KINDS: tuple[StepKind, ...] = ("greedy", "sampled")


class Drafting(Protocol):
    """Whoever drafts: another device of this process, or another process."""

    def begin(self, request: Request, ordinal: int, capacity: int) -> None:
        """Runs over a prompt."""

    def ask(self, newest: tuple[int, int], position: int) -> None:
        """Asks for a chunk behind the last of two tokens, whose position is given."""

    def take(self) -> Chunk:
        """The chunk that was asked for, which may still be to come."""
        ...


class _DraftPrograms(NamedTuple):
    """Jitted functions of `rounds`, and that of an empty cache."""

    init_cache: Any
    read: Any
    draft_chunk: Any


# As in the engine, drafters are the same if they are one object.
@share
def _draft_programs(drafter: Drafter, mesh: sharding.AnyMesh | None) -> _DraftPrograms:
    rows = sharding.row_shardings
    pinned = lambda function, *places: sharding.pinned(function, mesh, *places)
    jit = lambda function, **how: jax.jit(
        function, compiler_options=compiler_options(), **how
    )

    return _DraftPrograms(
        init_cache=jax.jit(
            pinned(lambda capacity: drafter.init_cache(1, capacity), rows),
            static_argnums=0,
        ),
        # Caches are donated: each pass writes into the one that it was given.
        read=jit(pinned(build_reading(drafter), rows), donate_argnums=1),
        draft_chunk=jit(
            pinned(build_chunk(drafter), rows, sharding.replicated), donate_argnums=1
        ),
    )


class DraftSide:
    """A language model that drafts on its own devices; see `Drafting`."""

    def __init__(self, draft: LoadedDraft, tree: TreeConfig, place: Place):
        """Prepares its programs.

        Args:
          tree: The chain that is a chunk.

        Raises:
          ConfigError: It reads the target, and could not go on without it.
        """
        if draft.family.name != "model" or draft.model is None or draft.mix:
            raise ConfigError(
                f"a draft of the family {draft.family.name!r} cannot go on behind "
                f"tokens that the target has not run over yet; drafting in parallel "
                f"takes a language model of its own, --draft-model SMALL"
            )

        model = draft.model
        self.drafter = build_drafter("model", model.config, tree, model.numerics)
        self.place = place
        self._draft = place.put(draft.draft) if place.mesh is None else draft.draft
        self._programs = _draft_programs(self.drafter, place.mesh)
        self._cache: Any = None
        self._key: Any = None
        self._sampling: Any = None
        self._chunk: Chunk | None = None

    def begin(self, request: Request, ordinal: int, capacity: int) -> None:
        """Runs over a prompt, chunk by chunk."""
        with self.place.chosen():
            self._key = self.place.put(request.key(ordinal)[None])
            self._cache = self._programs.init_cache(capacity)
        self._sampling = _sampling_of(request)
        ids = np.asarray(request.prompt_ids, np.int32)

        # The last token is nobody's predecessor yet: the first chunk runs over it.
        for start in range(0, len(ids) - 1, PREFILL_CHUNK):
            part = ids[start : start + PREFILL_CHUNK + 1]
            padded = np.zeros((1, PREFILL_CHUNK + 1), np.int32)
            padded[0, : len(part)] = part
            self._cache = self._programs.read(
                self._draft,
                self._cache,
                padded[:, :-1],
                padded[:, 1:],
                np.full(1, start, np.int32),
                np.full(1, len(part) - 1, np.int32),
            )

    def ask(self, newest: tuple[int, int], position: int) -> None:
        """Sends a chunk's passes to the draft's devices."""
        self._cache, self._chunk = self._programs.draft_chunk(
            self._draft,
            self._cache,
            np.asarray([newest], np.int32),
            np.full(1, position, np.int32),
            self._key,
            self._sampling,
        )

    def take(self) -> Chunk:
        """The chunk, on the draft's devices."""
        assert self._chunk is not None, "it was asked for"
        return self._chunk


class _TargetPrograms(NamedTuple):
    """Jitted functions of `rounds`, for blocks of one length."""

    score: Any
    judge: Any


@share
def _target_programs(config: StepConfig) -> _TargetPrograms:
    rows = sharding.row_shardings
    pinned = lambda function, *places: sharding.pinned(function, config.mesh, *places)
    how: dict[str, Any] = dict(compiler_options=compiler_options())

    return _TargetPrograms(
        score=jax.jit(
            pinned(build_scoring(config), rows, rows), donate_argnums=1, **how
        ),
        judge=jax.jit(
            pinned(build_judging(config), rows, sharding.replicated),
            donate_argnums=0,
            **how,
        ),
    )


class TargetSide:
    """The model whose answers are given, on its own devices.

    Attributes:
      scored: What it says of the newest block.
    """

    def __init__(self, target: Target, tree: TreeConfig, place: Place):
        """Prepares its programs.

        Args:
          tree: The chain that is a chunk.
        """
        config = StepConfig(
            model=target.config,
            numerics=target.numerics,
            tree=TreeConfig(num_steps=0),
            stop_ids=target.stop_ids,
            mesh=place.mesh,
        )
        params = place.put(target.params) if place.mesh is None else target.params
        self.engine = Engine(config, params)
        self.place = place
        self._tree = tree
        self._state: DecodeState | None = None
        self.scored: Scored | None = None
        self._kind: StepKind = "greedy"
        # One block is the newest token alone, the other has a chunk's rest behind it.
        self._programs = {
            (kind, is_pending): _target_programs(
                dataclasses.replace(
                    config,
                    kind=kind,
                    tree=tree.of_depth(tree.num_steps - 1 if is_pending else 0),
                )
            )
            for kind in _KINDS
            for is_pending in (False, True)
        }

    def capacity_for(self, request: Request, num_more: int) -> int:
        """Cache slots for both sides.

        Args:
          num_more: Slots beyond the request's tokens.

        Raises:
          PromptTooLongError: The request does not fit.
        """
        least = self.engine.capacity_for([request])
        needed = self.engine.needed_slots(request) + num_more
        # Drafted tokens that nobody will take may lie beyond the largest cache that
        # others are compiled for.
        whole = -(-needed // PREFILL_CHUNK) * PREFILL_CHUNK
        return max(least, next((c for c in CAPACITIES if c >= needed), whole))

    def begin(self, request: Request, ordinal: int, capacity: int) -> Any:
        """Runs over a prompt; returns what is to come of it: the first token."""
        self._kind = request.kind
        with self.place.chosen():
            self._state, output = self.engine.prefill(
                None, request, capacity, ordinal=ordinal
            )

        return output

    def score(self, previous: Chunk | None) -> None:
        """Sends the pass over a block to the target's devices."""
        programs = self._programs[self._kind, previous is not None]
        self._state, self.scored = programs.score(
            self.engine.target_params, self._state, previous
        )

    def judge(
        self, previous: Chunk | None, chunk: Chunk, token_ids: Any
    ) -> RoundOutput:
        """Judges what is pending and the first token of the new chunk.

        Args:
          chunk: On the target's devices, as are all others.
        """
        programs = self._programs[self._kind, previous is not None]
        self._state, output = programs.judge(
            self._state, self.scored, previous, chunk, token_ids
        )

        return output


def _sampling_of(request: Request) -> SamplingParams:
    sampling = request.sampling
    values: tuple[Any, ...] = (
        np.full(1, sampling.temperature, np.float32),
        np.full(1, sampling.top_k, np.int32),
        np.full(1, sampling.top_p, np.float32),
    )
    return SamplingParams(*values)
