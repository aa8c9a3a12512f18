# SPDX-License-Identifier: Apache-2.0
"""Traces: the widest, deepest tree that a draft grows at every token of an answer.

A tree of most probable children (`topk`) that is less deep, or keeps fewer nodes, is a
part of it, and greedy answers do not depend on the draft: a node is right if its path
begins what the target went on with. So what any smaller tree would have got accepted is
known, not estimated. Trees of another width are others; each width has its own trace.

A trace is grown by the engine's own parts along recorded answers, one token a step, so
its numbers are those of decoding, bit by bit where numerics are row invariant. As in
`store`, a shard of it is a folder of memory-mapped arrays that appears when complete.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax import atomic
from ospec_jax.config import ConfigError, TreeConfig, from_dict, naming
from ospec_jax.config.fields import read_json
from ospec_jax.control.base import Action
from ospec_jax.decoding.batch import fetch
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig, build_step, propose_tree, shared_tables
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.replay.record import open_recording
from ospec_jax.replay.score import whole_answer
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.reports.progress import Interrupt, progress_bar
from ospec_jax.session.build import serving
from ospec_jax.storage import low_rank
from ospec_jax.types import Draft, DraftTree
from ospec_jax.typing import Params, struct

_FILE = "trace.json"
_ARRAYS = {
    "tokens": (np.int32, 2),
    "parents": (np.int32, 2),
    "scores": (np.float32, 2),
    "is_right": (np.bool_, 2),
    "entropies": (np.float32, 3),
    "contexts": (np.int32, 1),
    "followers": (np.int32, 1),
}
_SHARD_SIZE = 50


@dataclasses.dataclass(frozen=True)
class TraceShape:
    """How wide and deep the trees of a trace are.

    Attributes:
      topk: Children of a node, and nodes of each depth that are expanded.
      depth: Of the deepest nodes.
      num_nodes: Most nodes that may be verified, the root left out.
    """

    topk: int
    depth: int
    num_nodes: int

    def __post_init__(self):
        if min(self.topk, self.depth, self.num_nodes) < 1:
            raise ConfigError(
                f"trees of a trace need a width, a depth and a number of nodes of at "
                f"least 1, not {self.topk}, {self.depth} and {self.num_nodes}"
            )
        if self.num_nodes > self.num_places:
            raise ConfigError(
                f"a tree of width {self.topk} and depth {self.depth} has "
                f"{self.num_places} nodes, not {self.num_nodes}"
            )

    @classmethod
    def parse(cls, text: str) -> "TraceShape":
        """Reads `TOPK,DEPTH,NODES`.

        Raises:
          ConfigError: It is something else.
        """
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(
                f"cannot read the trees {text!r}: use TOPK,DEPTH,NODES, like 4,6,16"
            )

        return cls(*map(int, parts))

    @property
    def num_places(self) -> int:
        """Nodes that are seen while a tree grows, the root left out."""
        return self.first_place(self.depth + 1)

    def first_place(self, depth: int) -> int:
        """Place of the first node of a depth, among all nodes in depth order."""
        return 0 if depth <= 1 else self.topk + (depth - 2) * self.topk**2

    @property
    def depths(self) -> np.ndarray:
        """Depth of the node at each place, `[p]`."""
        sizes = [self.first_place(d + 1) - self.first_place(d) for d in self._range]
        return np.repeat(np.arange(1, self.depth + 1, dtype=np.int32), sizes)

    @property
    def _range(self) -> range:
        return range(1, self.depth + 1)

    @property
    def grown(self) -> TreeConfig:
        """The tree that keeps every node it has seen."""
        return self.tree(self.depth, self.num_places)

    def tree(self, depth: int, num_nodes: int) -> TreeConfig:
        """The engine's tree of a choice; plain decoding for a depth of 0.

        Args:
          num_nodes: The root left out; fewer where the depth has fewer.
        """
        if depth == 0:
            return TreeConfig(num_steps=0)

        kept = min(num_nodes, self.first_place(depth + 1))
        return TreeConfig(
            kind="dynamic", topk=self.topk, num_steps=depth, num_draft_tokens=kept
        )


@dataclasses.dataclass(frozen=True)
class TraceMeta:
    """What the trees of a trace belong to.

    Attributes:
      fingerprint: Of the target's weights.
      draft: Fingerprint of the draft's.
    """

    target: str
    fingerprint: str
    precision: str
    family: str
    draft: str
    topk: int
    depth: int
    num_nodes: int

    @property
    def shape(self) -> TraceShape:
        """How wide and deep its trees are."""
        return TraceShape(self.topk, self.depth, self.num_nodes)


@struct
class Grown:
    """One tree, and what the target said next.

    Nodes stand at their places: depth by depth, those of one parent side by side.

    Attributes:
      tokens: `[b, p]`.
      parents: `[b, p]` places; -1 for the root.
      scores: `[b, p]` the draft's log-probabilities of the paths; -inf for none.
      entropies: `[b, k, w]` in nats, of what the draft said of the tokens of each depth
        at the nodes before it, the most probable path's first; NaN where the drafter
        does not tell.
      follower: `[b]` the target's token after the root.
    """

    tokens: Int[Array, "b p"]
    parents: Int[Array, "b p"]
    scores: Float[Array, "b p"]
    entropies: Float[Array, "b k w"]
    follower: Int[Array, " b"]


def build_growth(config: StepConfig, drafter: Drafter, shape: TraceShape) -> Callable:
    """Builds `(target_params, draft, state) -> (state, Grown)`, to be jitted.

    It grows a tree, keeps nothing of it, and decodes one token plainly.

    Args:
      drafter: Of the tree `shape.grown`.
    """
    plain = build_step(
        dataclasses.replace(config, tree=TreeConfig(num_steps=0)), drafter
    )
    config = dataclasses.replace(config, tree=shape.grown)

    def run(target_params: Params, draft: Draft, state):
        shared = shared_tables(target_params)
        if drafter.reads_target:
            shared = shared.replace(params=target_params, cache=state.cache)

        tree, grown_state = propose_tree(
            config, drafter, draft, shared, state, state.request_keys
        )
        scores = path_scores(tree, shape)
        entropies = _entropies(drafter, draft, shared, tree, scores, shape)
        # Scratch slots lie behind the committed ones: the next step overwrites them.
        state, output = plain(target_params, draft, grown_state)

        return state, Grown(
            tokens=tree.tokens[:, 1:],
            parents=tree.parents[:, 1:] - 1,
            scores=scores,
            entropies=entropies,
            follower=output.tokens[:, 0],
        )

    return run


def path_scores(tree: DraftTree, shape: TraceShape) -> Float[Array, "b p"]:
    """Log-probabilities of the paths to all nodes but the root; -inf for none."""
    found = jnp.zeros((tree.tokens.shape[0], 1))

    # As growing adds them up: from the root down, so that the sums are the same bits.
    for depth in range(1, shape.depth + 1):
        level = slice(1 + shape.first_place(depth), 1 + shape.first_place(depth + 1))
        above = jnp.take_along_axis(found, tree.parents[:, level], axis=1)
        score = jnp.where(
            tree.is_valid[:, level], above + tree.log_probs[:, level], -jnp.inf
        )
        found = jnp.concatenate([found, score], axis=1)

    return found[:, 1:]


def _entropies(drafter, draft, shared, tree: DraftTree, scores, shape: TraceShape):
    """Of the distributions that each depth's tokens were taken from, `[b, k, w]`."""
    b = scores.shape[0]
    if drafter.predict is None or tree.states is None:
        return jnp.full((b, shape.depth, shape.topk), jnp.nan)

    # The root, then the nodes of each depth that were expanded: the most probable ones.
    places = [jnp.zeros((b, shape.topk), jnp.int32)]
    for depth in range(1, shape.depth):
        first = shape.first_place(depth)
        level = scores[:, first : shape.first_place(depth + 1)]
        best = jax.lax.top_k(level, shape.topk)[1]
        places.append(1 + first + best)

    rows = jnp.arange(b)[:, None]
    states = tree.states[rows, jnp.concatenate(places, axis=1)]
    flat = states.reshape(-1, states.shape[-1])
    log_probs = jax.nn.log_softmax(drafter.predict(draft, shared, flat), axis=-1)
    probs = jnp.exp(log_probs)
    entropies = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)

    return entropies.reshape(b, shape.depth, shape.topk)


def right_nodes(
    tokens: np.ndarray,
    parents: np.ndarray,
    scores: np.ndarray,
    answer: Sequence[int],
    shape: TraceShape,
) -> Bool[np.ndarray, "n p"]:
    """Which nodes' paths begin the rest of the answer.

    Args:
      tokens: `[n, p]` of the trees below the answer's tokens 0 to n - 1; likewise the
        parents and scores.
    """
    count = len(tokens)
    # Behind the answer's end nothing is known, and nothing would be emitted.
    padded = np.concatenate([np.asarray(answer), np.full(shape.depth + 1, -1)])
    wanted = padded[np.arange(count)[:, None] + shape.depths]
    is_same = (tokens == wanted) & np.isfinite(scores)
    found = np.zeros(is_same.shape, bool)
    rows = np.arange(count)[:, None]

    for depth in range(1, shape.depth + 1):
        level = slice(shape.first_place(depth), shape.first_place(depth + 1))
        above = parents[:, level]
        is_right_above = (above < 0) | found[rows, np.maximum(above, 0)]
        found[:, level] = is_same[:, level] & is_right_above

    return found


@dataclasses.dataclass(frozen=True)
class _Grower:
    """What grows trees along answers, compiled."""

    engine: Engine
    draft: Draft
    shape: TraceShape
    run: Callable

    @classmethod
    def build(cls, target: Target, loaded: LoadedDraft, shape: TraceShape) -> "_Grower":
        drafter = build_drafter(
            loaded.family, loaded.architecture, shape.grown, target.numerics
        )
        config = StepConfig(
            model=target.config,
            numerics=target.numerics,
            tree=shape.grown,
            taps=loaded.taps,
            # Recorded answers end where they end.
            stop_ids=(),
        )
        menu = {Action(TreeConfig(num_steps=0)): drafter}
        engine = Engine(config, target.params, drafter, menu=menu)
        run = jax.jit(build_growth(config, drafter, shape), donate_argnums=2)
        draft = serving(target, loaded, loaded.memory_orders)(loaded.draft)
        return cls(engine, draft, shape, run)

    def grow(self, id: str, prompt: Sequence[int], answer: list[int]) -> dict:
        """Arrays of one answer, `[n, ...]`: a tree below each of its tokens but one.

        Raises:
          ConfigError: The target would have answered something else.
        """
        engine = self.engine
        request = Request(id, tuple(prompt), len(answer))
        capacity = engine.capacity_for([request])
        state, output = engine.prefill(self.draft, request, capacity)
        grown: list[Any] = []

        for _ in range(len(answer) - 1):
            state, tree = self.run(engine.target_params, self.draft, state)
            grown.append(tree)

        first = fetch(output.tokens)[0, :1]
        trees = [jax.tree.map(lambda x: x[0], tree) for tree in fetch(grown)]
        followers = [int(tree.follower) for tree in trees]
        if [*first, *followers] != answer:
            raise ConfigError(
                f"the target answers {id} with other tokens than the recorded ones; "
                f"record the prompts again on this device, into another folder"
            )

        arrays: dict[str, Any] = {
            name: np.stack([getattr(tree, name) for tree in trees])
            for name in ("tokens", "parents", "scores", "entropies")
        }
        arrays["is_right"] = right_nodes(
            arrays["tokens"], arrays["parents"], arrays["scores"], answer, self.shape
        )
        arrays["contexts"] = len(prompt) + np.arange(len(trees))
        arrays["followers"] = np.asarray(followers)

        return arrays


def trace_folder(recording: Path, shape: TraceShape) -> Path:
    """Where the trees of a width and depth lie, beside the recorded answers."""
    return recording / f"trees_{shape.topk}x{shape.depth}"


def grow_trees(
    target: Target, loaded: LoadedDraft, recording: Path, shape: TraceShape
) -> int:
    """Grows trees along all recorded answers that have none; returns how many had not.

    Args:
      recording: From `record`, with greedy answers.

    Raises:
      ConfigError: The recording, or trees that are there, are of another target; or the
        draft has suggestions or members beside it.
      Interrupted: By a signal; the same call goes on.
    """
    if loaded.mix or loaded.pool is not None:
        raise ConfigError(
            f"trees are grown by one draft alone, not {loaded!r}; leave out what "
            f"stands beside it"
        )

    store, order = open_recording(recording, target, None)
    folder = trace_folder(recording, shape)
    meta = TraceMeta(
        target=target.name,
        fingerprint=target.fingerprint,
        precision=target.numerics.precision,
        family=loaded.family.name,
        draft=low_rank.fingerprint(loaded.draft),
        **dataclasses.asdict(shape),
    )
    known = set()
    if (folder / _FILE).exists():
        _check_same(folder, read_trace_meta(folder), meta)
        known = {id for shard in _shards(folder) for id in _index(shard)["ids"]}

    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / _FILE, json.dumps(dataclasses.asdict(meta), indent=1))
    # Of an answer of one token nothing was drafted.
    missing = [
        i
        for i in order
        if store.entries[i].id not in known
        and len(whole_answer(store.recording(i))) > 1
    ]
    if not missing:
        return 0

    return _write_all(_Grower.build(target, loaded, shape), store, missing, folder)


def _write_all(
    grower: _Grower, store: FeedbackStore, entries: Sequence[int], folder: Path
) -> int:
    """Grows and writes, shard by shard; returns the number of answers."""
    number = len(_shards(folder))
    count = 0
    waiting: list[tuple[int, dict]] = []

    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("trees", total=len(entries))
        for entry in entries:
            found = store.recording(entry)
            prompt = found.arrays["tokens"][: found.num_prompt].tolist()
            waiting.append((entry, grower.grow(found.id, prompt, whole_answer(found))))
            bar.update(task, advance=1)
            is_over = bool(interrupt) or count + len(waiting) == len(entries)
            if len(waiting) == _SHARD_SIZE or is_over:
                with interrupt.held():
                    _write_shard(folder, number, store, waiting)
                count += len(waiting)
                number += 1
                waiting = []
            if interrupt:
                break

    if count < len(entries):
        interrupt.raise_if_set()

    return count


def _write_shard(
    folder: Path, number: int, store: FeedbackStore, answers: list[tuple[int, dict]]
) -> None:
    part = folder / f"shard_{number:05d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    for name, (dtype, _) in _ARRAYS.items():
        joined = np.concatenate([arrays[name] for _, arrays in answers])
        np.save(part / f"{name}.npy", joined.astype(dtype))

    entries = [store.entries[i] for i, _ in answers]
    index = {
        "ids": [entry.id for entry in entries],
        "domains": [entry.domain for entry in entries],
        "lengths": [len(arrays["followers"]) for _, arrays in answers],
    }
    (part / "index.json").write_text(json.dumps(index))
    # The folder gets its name last: whoever finds a shard finds all of it.
    part.rename(part.with_suffix(""))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard_?????"))


def _index(shard: Path) -> dict[str, list]:
    index = read_json(shard / "index.json")
    names = ("ids", "domains", "lengths")
    if not isinstance(index, dict) or any(name not in index for name in names):
        raise ConfigError(
            f"{shard / 'index.json'} is no index of trees; delete {shard.parent} and "
            f"grow them again"
        )

    return index


def read_trace_meta(folder: Path) -> TraceMeta:
    """The record of what a folder's trees belong to.

    Raises:
      FileNotFoundError: It holds none.
      ConfigError: The record is damaged.
    """
    file = folder / _FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no trees; grow some with `ospec record --trees 4,6,16`"
        )

    with naming(file):
        return from_dict(TraceMeta, read_json(file))


def _check_same(folder: Path, found: TraceMeta, wanted: TraceMeta) -> None:
    # The most nodes to verify are the reader's choice: all of them are stored.
    unsized = lambda meta: dataclasses.replace(meta, num_nodes=1)
    if unsized(found) != unsized(wanted):
        raise ConfigError(
            f"{folder} holds trees of {found}, not of {wanted}; delete it, or record "
            f"into another folder"
        )


@dataclasses.dataclass(frozen=True)
class Trace:
    """Trees at all recorded positions, answer after answer; see `Grown`.

    Attributes:
      tokens: `[n, p]`; likewise `parents`, `scores` and `is_right`.
      entropies: `[n, k, w]`.
      contexts: `[n]` tokens in the cache when the tree is verified.
      followers: `[n]` the target's token after each root.
      ids: Of the answers.
      lengths: Positions of each.
    """

    meta: TraceMeta
    tokens: Any
    parents: Any
    scores: Any
    is_right: Any
    entropies: Any
    contexts: Any
    followers: Any
    ids: tuple[str, ...]
    domains: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def shape(self) -> TraceShape:
        """How wide and deep its trees are."""
        return self.meta.shape

    @property
    def starts(self) -> np.ndarray:
        """First position of each answer, `[m]`."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int32)

    @property
    def remaining(self) -> np.ndarray:
        """Tokens that may still come at each position, `[n]`."""
        return np.concatenate([np.arange(n, 0, -1) for n in self.lengths])

    def select(self, answers: Sequence[int]) -> "Trace":
        """The trace of some of the answers alone, in this order."""
        starts = self.starts
        rows = np.concatenate(
            [np.arange(starts[i], starts[i] + self.lengths[i]) for i in answers]
        )
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[rows] for name in _ARRAYS},
            ids=tuple(self.ids[i] for i in answers),
            domains=tuple(self.domains[i] for i in answers),
            lengths=tuple(self.lengths[i] for i in answers),
        )

    def kept(self, position: int, depth: int, num_nodes: int) -> np.ndarray:
        """Places of the nodes that a smaller tree verifies, most probable first."""
        size = self.shape.first_place(depth + 1)
        scores = np.asarray(self.scores[position, :size])
        # As growing chooses them: of nodes that tie the first ones.
        return np.argsort(-scores, kind="stable")[:num_nodes]

    def emitted(self, position: int, depth: int, num_nodes: int) -> list[int]:
        """Tokens that a step emits which begins here with a smaller tree."""
        kept = self.kept(position, depth, num_nodes) if depth else []
        # One right node a depth, and the token that follows them.
        count = 1 + int(np.sum(self.is_right[position][kept]))
        count = min(count, int(self.remaining[position]))
        return self.followers[position : position + count].tolist()


def open_trace(folder: Path) -> Trace:
    """Opens the trees of a folder; a single shard's stay on disk until read.

    Raises:
      FileNotFoundError: There are none.
      ConfigError: They are damaged.
    """
    meta = read_trace_meta(folder)
    shards = _shards(folder)
    if not shards:
        raise FileNotFoundError(f"{folder} holds no complete shard of trees yet")

    indices = [_index(shard) for shard in shards]
    fields: dict[str, Any] = {}

    for name, (dtype, rank) in _ARRAYS.items():
        parts = []
        for shard, index in zip(shards, indices, strict=True):
            file = shard / f"{name}.npy"
            found = np.load(file, mmap_mode="r")
            count = sum(index["lengths"])
            if found.dtype != dtype or found.ndim != rank or len(found) != count:
                raise ConfigError(
                    f"{file} holds {found.dtype} of the shape {found.shape}, but its "
                    f"index tells of {count} positions; delete {folder} and grow the "
                    f"trees again"
                )
            parts.append(found)
        fields[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)

    joined = {
        name: tuple(value for index in indices for value in index[name])
        for name in ("ids", "domains", "lengths")
    }

    return Trace(meta, **fields, **joined)
