# SPDX-License-Identifier: Apache-2.0
"""Growing draft trees depth by depth, for drafters that step with a cache.

A drafter supplies a `step` over drafted nodes; `grow` makes a tree of it. What is
expanded at depth d lies in scratch slots behind the committed ones, and is dropped
afterwards. How children are drawn says `children`, when growth ends says `stopping`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config import TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.children import (
    UNKNOWN,
    Children,
    consider,
    draw,
    extend_path,
)
from ospec_jax.drafters.sources import DRAFT, TARGET
from ospec_jax.drafters.stopping import Progress, StopFn, is_stopped, rules_of
from ospec_jax.models import cache as kv
from ospec_jax.models.layers import Numerics
from ospec_jax.types import DraftTree, Roots
from ospec_jax.typing import struct


@struct
class Nodes:
    """Nodes of one depth that a drafter runs over.

    Attributes:
      tokens: `[b, w]` target ids.
      hidden: `[b, w, d]` the drafter's states at the nodes' parents.
      positions: `[b, w]` of the drafter's entries.
      bias: What each node attends to: the prefix and its own path; see `models.cache`.
      starts: `[b]` cache slot of the first node.
      depth: Of the nodes; 0 for the root.
    """

    tokens: Int[Array, "b w"]
    hidden: Float[Array, "b w d"]
    positions: Int[Array, "b w"]
    bias: Any
    starts: Int[Array, " b"]
    depth: int | Int[Array, ""]


Step = Callable[[Any, Nodes], tuple[Float[Array, "b w d"], Float[Array, "b w q"], Any]]
"""`(cache, nodes) -> (hidden [b, w, d], logits [b, w, q], cache)`."""


@struct
class Pool:
    """Every node that a tree of uniform width has seen, the root left out.

    Attributes:
      tokens: `[b, p]` target ids.
      scores: `[b, p]` log-probabilities of the paths; -inf for empty places.
      log_probs: `[b, p]` of each token, given its parent.
      parents: `[b, p]` places of the parents; -1 for the root.
      states: `[b, p, d]` the draft's states at nodes that were expanded.
      has_state: `[b, p]` which nodes these are.
      choices: `[b, p]` the most probable tokens behind them, -1 elsewhere; None unless
        they are asked for.
      sources: `[b, p]` who proposed each; None where nothing was suggested.
      draft_probs: `[b, n, q]` what a chain's children were drawn from; None for `topk`.
    """

    tokens: Int[Array, "b p"]
    scores: Float[Array, "b p"]
    log_probs: Float[Array, "b p"]
    parents: Int[Array, "b p"]
    states: Float[Array, "b p d"]
    has_state: Bool[Array, "b p"]
    choices: Int[Array, "b p"] | None
    sources: Int[Array, "b p"] | None
    draft_probs: Float[Array, "b n q"] | None


@struct
class Frontier:
    """The newest nodes, which are expanded next.

    Attributes:
      tokens: `[b, w]` target ids.
      scores: `[b, w]` log-probabilities of the paths.
      places: `[b, w]` in the pool.
      hidden: `[b, w, d]` the draft's states at their parents.
      visible: `[b, w, s]` which scratch slots their paths have filled.
      recent: `[b, w, m]` the last tokens of their paths; None without hints.
    """

    tokens: Int[Array, "b w"]
    scores: Float[Array, "b w"]
    places: Int[Array, "b w"]
    hidden: Float[Array, "b w d"]
    visible: Bool[Array, "b w s"]
    recent: Int[Array, "b w m"] | None


@struct
class _Growth:
    """A tree of uniform width while it grows.

    Attributes:
      depth: Of the frontier.
      choice: `[b, 1]` the most probable token behind the root; None unless asked for.
    """

    depth: Int[Array, ""]
    cache: Any
    pool: Pool
    frontier: Frontier
    is_stopped: Bool[Array, " b"]
    choice: Int[Array, "b 1"] | None


class _Plan(NamedTuple):
    """What stays the same while a tree grows; see `grow`."""

    step: Step
    tree: TreeConfig
    roots: Roots
    token_ids: Int[Array, " q"] | None
    hints: Hints | None
    rules: tuple[StopFn, ...]
    numerics: Numerics
    offset: int

    @property
    def recent(self) -> Int[Array, "b 1 m"] | None:
        """The last tokens up to the root."""
        return None if self.hints is None else self.hints.recent[:, None]

    @property
    def starts(self) -> Int[Array, " b"]:
        """Slot, and position, of the first drafted token."""
        return self.roots.position + self.offset

    def children(self, depth, logits, recent, count: int) -> Children:
        """The children of nodes at `depth`, as target ids."""
        kind = self.tree.children
        keys, sampling = self.roots.keys, self.roots.sampling
        found = draw(keys, depth, logits, count, kind, sampling, self.numerics)
        if self.token_ids is not None:
            found = found._replace(tokens=self.token_ids[found.tokens])
        if self.roots.has_choices:
            # Before a suggestion takes its place. Drawn children need not be the most
            # probable ones.
            own = found.tokens[..., 0]
            own = own if kind == "topk" else jnp.full_like(own, UNKNOWN)
            found = found._replace(choices=own)

        return consider(self.hints, recent, depth, found)


def num_scratch(tree: TreeConfig) -> int:
    """Cache slots that growing a tree uses behind the committed ones."""
    # Nodes of the last depth are never run over, but a level is written as a whole.
    return max(tree.num_steps - 1, 0) * max(tree.topk, tree.num_nodes) + 1


def grow(
    step: Step,
    tree: TreeConfig,
    cache: Any,
    roots: Roots,
    token_ids: Int[Array, " q"] | None = None,
    hints: Hints | None = None,
    stop_fn: StopFn | None = None,
    *,
    numerics: Numerics,
    offset: int = 0,
) -> tuple[DraftTree, Any]:
    """Drafts a tree under every root.

    Args:
      step: Runs the drafter over nodes of one depth.
      cache: Of the drafter, a `KVCache` or what has its capacity; `step` returns it.
      roots: Their contexts hold the logits of the root's children.
      token_ids: Target ids of the draft vocabulary; None for the full one.
      hints: Suggestions to consider.
      stop_fn: When a row grows no deeper, beside the tree's own rules.
      numerics: How children are chosen.
      offset: Of a drafted token's slot from the root's position: 0 for drafters that
        run over pairs of a token and its follower, 1 for those that run over tokens.

    Returns:
      The tree, and the cache with what was written to its scratch slots.

    Raises:
      ConfigError: There is a `stop_fn`, and the tree cannot stop early.
    """
    rules = rules_of(tree, stop_fn)
    plan = _Plan(step, tree, roots, token_ids, hints, rules, numerics, offset)
    if tree.kind == "static":
        return _grow_static(plan, cache)

    return _grow_uniform(plan, cache)


def _grow_static(plan: _Plan, cache) -> tuple[DraftTree, Any]:
    """Fills a fixed tree, whose nodes may have unequal numbers of children."""
    roots = plan.roots
    layout = _Layout.of(plan.tree)
    b = roots.token.shape[0]
    grown = _Grown([roots.token[:, None]], [jnp.zeros((b, 1))], [], [], [], [])
    grown.sources.append(jnp.full((b, 1), TARGET))
    # Level 0 is the root, whose logits verification left in the context.
    hidden = roots.context.hidden[:, None]
    logits = roots.context.logits[:, None]
    recent = plan.recent

    for depth in range(plan.tree.num_steps):
        above, rank = layout.below(depth)
        if depth:
            tokens = grown.tokens[-1]
            nodes = _level(plan, layout, depth, tokens, hidden, cache.capacity)
            hidden, logits, cache = plan.step(cache, nodes)

        # As many children for all nodes of a level as the widest one has; `above` and
        # `rank` pick those that the tree holds.
        children = plan.children(depth, logits, recent, int(rank.max()) + 1)
        grown.drawn_from.append(children.probs)
        grown.choices.append(children.choices)
        grown.states.append(hidden)
        grown.tokens.append(children.tokens[:, above, rank])
        grown.log_probs.append(children.log_probs[:, above, rank])
        if children.sources is not None:
            grown.sources.append(children.sources[:, above, rank])
        # A child is run with its parent's state.
        hidden = hidden[:, above]
        if recent is not None:
            recent = extend_path(recent[:, above], grown.tokens[-1])

    # Leaves were not run over: they have no state, and nothing was drawn below them.
    # Their places are filled, so that node numbers index all arrays.
    leaves = grown.tokens[-1].shape[1]
    grown.states.append(jnp.zeros((b, leaves, hidden.shape[-1])))

    return _as_tree(plan, layout, grown), cache


class _Layout(NamedTuple):
    """A static tree's nodes, all of which are known while tracing."""

    parents: np.ndarray
    depths: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, tree: TreeConfig) -> "_Layout":
        """The layout of a static tree."""
        parents = topology.static_parents(tree)
        depths = topology.static_depths(parents)
        return cls(parents, depths, topology.static_ancestor_mask(parents))

    def level(self, depth: int) -> slice:
        """Where a level's nodes are: they stand in the order of their depths."""
        first = int(np.sum(self.depths < depth))
        return slice(first, first + int(np.sum(self.depths == depth)))

    def below(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of the parents of a level's children, and which child each one is."""
        above = self.parents[self.depths == depth + 1] - self.level(depth).start
        return above, np.arange(len(above)) - np.searchsorted(above, above)

    @property
    def max_children(self) -> int:
        """The most that any node has."""
        counts = np.bincount(self.parents[1:], minlength=1)
        return max(1, int(counts.max()))


class _Grown(NamedTuple):
    """What a static tree consists of, level by level, from the root on.

    Attributes:
      drawn_from: `[b, w, q]` what the children of a level were drawn from.
      states: `[b, w, d]`; `choices`, `[b, w]`, what was most probable behind nodes.
    """

    tokens: list
    log_probs: list
    drawn_from: list
    states: list
    choices: list
    sources: list


def _level(
    plan: _Plan, layout: _Layout, depth: int, tokens, hidden, capacity: int
) -> Nodes:
    """A level's nodes, as the drafter runs over them."""
    level = layout.level(depth)
    b, width = tokens.shape
    # Node n lies in scratch slot n - 1: the root is part of the context.
    visible = jnp.broadcast_to(
        layout.mask[level, 1:], (b, width, len(layout.parents) - 1)
    )

    return Nodes(
        tokens=tokens,
        hidden=hidden,
        positions=jnp.repeat(plan.starts[:, None] + depth - 1, width, axis=1),
        bias=kv.tree_bias(plan.starts, visible, capacity),
        starts=plan.starts + level.start - 1,
        depth=depth,
    )


def _as_tree(plan: _Plan, layout: _Layout, grown: _Grown) -> DraftTree:
    """The tree that levels make."""
    tree = plan.tree
    b, leaves = grown.tokens[-1].shape
    own = None
    if plan.roots.has_choices:
        unknown = jnp.full((b, leaves), UNKNOWN, jnp.int32)
        own = jnp.concatenate([*grown.choices, unknown], axis=1)
    draft_probs = None
    if tree.children != "topk":
        unused = jnp.zeros((b, leaves, grown.drawn_from[0].shape[-1]))
        draft_probs = jnp.concatenate([*grown.drawn_from, unused], axis=1)

    sources = grown.sources
    spread = lambda x: jnp.broadcast_to(x, (b, *x.shape))

    return DraftTree(
        tokens=jnp.concatenate(grown.tokens, axis=1),
        parents=spread(layout.parents),
        depths=spread(layout.depths),
        is_valid=spread(np.ones(len(layout.parents), bool)),
        log_probs=jnp.concatenate(grown.log_probs, axis=1),
        ancestor_mask=spread(layout.mask),
        draft_probs=draft_probs,
        token_ids=plan.token_ids,
        states=jnp.concatenate(grown.states, axis=1),
        has_state=spread(layout.depths < tree.num_steps),
        choices=own,
        sources=jnp.concatenate(sources, axis=1) if sources[1:] else None,
        children=tree.children,
        max_depth=tree.num_steps,
        max_children=layout.max_children,
    )


def _grow_uniform(plan: _Plan, cache) -> tuple[DraftTree, Any]:
    """Chains, and EAGLE-2's dynamic trees (arXiv 2406.16858).

    Each depth expands a frontier of `topk` nodes into `topk` children each, of which
    the best `topk`, by the probability of their path, are the next frontier. A dynamic
    tree keeps the best `num_draft_tokens` of all nodes seen; since a child is never
    more probable than its parent, the kept ones are connected.
    """
    growth = _begin(plan, cache)
    # With one depth the loop never runs, and its body does not fit the pool's shape.
    if plan.tree.num_steps > 1:
        growth = jax.lax.while_loop(
            lambda growth: _is_going(plan, growth),
            lambda growth: _expand(plan, growth),
            growth,
        )

    return _assemble(plan, growth), growth.cache


def _begin(plan: _Plan, cache) -> _Growth:
    """The children of the root, which verification left the logits of."""
    tree = plan.tree
    context = plan.roots.context
    b = context.logits.shape[0]
    width = tree.topk
    logits = context.logits[:, None]

    # Depth 1: children of the root alone, and all of them make the first frontier.
    children = plan.children(0, logits, plan.recent, width)
    pool = _empty_pool(tree, context.hidden, children)
    none = jnp.full_like(children.tokens, topology.NO_PARENT)
    pool = _with_children(pool, 0, children, children.log_probs, none)
    pool = _with_probs(pool, 0, children.probs)

    recent = plan.recent
    if recent is not None:
        recent = extend_path(jnp.repeat(recent, width, axis=1), children.tokens[:, 0])

    # Scratch slots of expanded nodes: `width` a depth, the last depth being leaves.
    num_slots = max(tree.num_steps - 1, 1) * width
    frontier = Frontier(
        tokens=children.tokens[:, 0],
        scores=children.log_probs[:, 0],
        places=jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (b, width)),
        hidden=jnp.repeat(context.hidden[:, None], width, axis=1),
        visible=jnp.zeros((b, width, num_slots), bool),
        recent=recent,
    )
    progress = Progress(
        1,
        frontier.scores,
        logits,
        pool.scores,
        num_kept=tree.num_nodes - 1,
        node_depths=_depths_of_places(tree),
        context=plan.roots.position,
        is_active=plan.roots.is_active,
        steering=plan.roots.steering,
        tree=tree,
    )
    stopped = is_stopped(plan.rules, progress)

    return _Growth(jnp.int32(1), cache, pool, frontier, stopped, children.choices)


def _is_going(plan: _Plan, growth: _Growth) -> Bool[Array, ""]:
    return (growth.depth < plan.tree.num_steps) & ~jnp.all(growth.is_stopped)


def _expand(plan: _Plan, growth: _Growth) -> _Growth:
    """Runs the drafter over the frontier and adds its children."""
    depth = growth.depth
    pool = growth.pool
    frontier = growth.frontier
    b, width = frontier.tokens.shape

    slots = jnp.arange(frontier.visible.shape[-1])
    # Frontier node i of depth d is written to scratch slot `(d - 1) * width + i`, where
    # its descendants find it.
    is_own = slots == (depth - 1) * width + jnp.arange(width)[:, None]
    frontier = frontier.replace(visible=frontier.visible | is_own)
    starts = plan.starts + (depth - 1) * width
    capacity = growth.cache.capacity
    # A chain's node sees all in front of it, so the cheaper causal bias serves.
    if plan.tree.is_chain:
        bias = kv.causal_bias(starts, 1, capacity)
    else:
        bias = kv.tree_bias(plan.starts, frontier.visible, capacity)

    nodes = Nodes(
        tokens=frontier.tokens,
        hidden=frontier.hidden,
        positions=jnp.broadcast_to(plan.starts[:, None] + depth - 1, (b, width)),
        bias=bias,
        starts=starts,
        depth=depth,
    )
    hidden, logits, cache = plan.step(growth.cache, nodes)

    children = plan.children(depth, logits, frontier.recent, width)
    scores = frontier.scores[..., None] + children.log_probs

    # Children of a row that has stopped get no probability: they are never kept. The
    # row runs along as long as another one grows.
    scores = jnp.where(growth.is_stopped[:, None, None], -jnp.inf, scores)
    # The pool holds `width` nodes of depth 1 and `width ** 2` of each depth below.
    first = width + (depth - 1) * width**2
    parents = jnp.repeat(frontier.places[..., None], width, axis=-1)
    grown = _with_states(pool, frontier.places, hidden, children.choices)
    grown = _with_children(grown, first, children, scores, parents)
    grown = _with_probs(grown, depth, children.probs)
    frontier = _next_frontier(frontier, first, hidden, children.tokens, scores)

    # Rules compare the tree as it would be verified now with that of the depth before.
    num_kept = plan.tree.num_nodes - 1
    progress = Progress(
        depth + 1,
        frontier.scores,
        logits,
        grown.scores,
        pool.scores,
        num_kept,
        _depths_of_places(plan.tree),
        plan.roots.position,
        plan.roots.is_active,
        plan.roots.steering,
        plan.tree,
    )
    stopped = growth.is_stopped | is_stopped(plan.rules, progress)

    return _Growth(depth + 1, cache, grown, frontier, stopped, growth.choice)


def _depths_of_places(tree: TreeConfig) -> Int[Array, " p"]:
    """Depth of the node at each place of the pool."""
    return jnp.asarray(topology.depths_of_places(tree.topk, tree.num_steps))


def _empty_pool(tree: TreeConfig, root_state, children: Children) -> Pool:
    """Room for every node that the tree may see; `children` are the root's."""
    probs = children.probs
    b = root_state.shape[0]
    num_pool = tree.topk + (tree.num_steps - 1) * tree.topk**2
    draft_probs = None
    if probs is not None:
        draft_probs = jnp.zeros((b, tree.num_steps + 1, probs.shape[-1]))
    choices = None
    if children.choices is not None:
        choices = jnp.full((b, num_pool), UNKNOWN, jnp.int32)
    sources = None
    if children.sources is not None:
        sources = jnp.full((b, num_pool), DRAFT)

    return Pool(
        tokens=jnp.zeros((b, num_pool), jnp.int32),
        scores=jnp.full((b, num_pool), -jnp.inf),
        log_probs=jnp.zeros((b, num_pool)),
        parents=jnp.full((b, num_pool), topology.NO_PARENT, jnp.int32),
        states=jnp.zeros((b, num_pool, root_state.shape[-1])),
        has_state=jnp.zeros((b, num_pool), bool),
        choices=choices,
        sources=sources,
        draft_probs=draft_probs,
    )


def _with_children(pool: Pool, first, children: Children, scores, parents) -> Pool:
    """Adds nodes from place `first` on; `scores` and `parents` are `[b, w, c]`."""

    def put(buffer, new):
        # Children of one node lie side by side, nodes in the order of the frontier.
        flat = new.reshape(new.shape[0], -1).astype(buffer.dtype)
        return jax.lax.dynamic_update_slice(buffer, flat, (0, first))

    if pool.sources is not None:
        pool = pool.replace(sources=put(pool.sources, children.sources))

    return pool.replace(
        tokens=put(pool.tokens, children.tokens),
        scores=put(pool.scores, scores),
        log_probs=put(pool.log_probs, children.log_probs),
        parents=put(pool.parents, parents),
    )


def _with_states(pool: Pool, places, states, choices) -> Pool:
    """Keeps what the draft made of the nodes at `places`, `[b, w]`."""
    # A place is expanded at most once, so nothing is overwritten.
    rows = jnp.arange(places.shape[0])[:, None]
    if pool.choices is not None:
        pool = pool.replace(choices=pool.choices.at[rows, places].set(choices))

    return pool.replace(
        states=pool.states.at[rows, places].set(states),
        has_state=pool.has_state.at[rows, places].set(True),
    )


def _with_probs(pool: Pool, depth, probs) -> Pool:
    """Keeps the distributions `[b, w, q]` that the children of a depth come from."""
    if probs is None:
        return pool

    assert pool.draft_probs is not None, "the pool was made for drawn children"
    place = (0, depth, 0)
    kept = jax.lax.dynamic_update_slice(pool.draft_probs, probs, place)
    return pool.replace(draft_probs=kept)


def _next_frontier(frontier: Frontier, first, hidden, tokens, scores) -> Frontier:
    """The best of the frontier's children, as many as it had nodes.

    Args:
      first: Place of the first child in the pool.
      hidden: `[b, w, d]` the draft's states of the frontier.
      tokens: `[b, w, w]` of the children; likewise `scores`.
    """
    b, width = frontier.tokens.shape
    best, slot = jax.lax.top_k(scores.reshape(b, -1), width)
    # Child c of node i has slot `i * width + c`.
    of_parent = lambda x: jax.vmap(lambda x, i: x[i])(x, slot // width)
    newest = jnp.take_along_axis(tokens.reshape(b, -1), slot, axis=1)
    recent = frontier.recent
    if recent is not None:
        recent = extend_path(of_parent(recent), newest)

    return Frontier(
        tokens=newest,
        scores=best,
        places=first + slot.astype(jnp.int32),
        hidden=of_parent(hidden),
        visible=of_parent(frontier.visible),
        recent=recent,
    )


def _assemble(plan: _Plan, growth: _Growth) -> DraftTree:
    """The tree of the pool's best nodes; the best first if some may be left out."""
    pool = growth.pool
    tree = plan.tree
    roots = plan.roots
    b, num_pool = pool.tokens.shape
    kept = tree.num_nodes - 1
    is_reranked = kept < num_pool
    # A chain's nodes stand in this order already.
    is_best_first = bool(tree.sizes) and not tree.is_chain
    if is_reranked or is_best_first:
        # top_k is stable, so parents win over children that tie with them.
        places = jax.lax.top_k(pool.scores, kept)[1]
        # Places ascend with depth, so sorting them is the depth order that trees have.
        if not is_best_first:
            places = jnp.sort(places, axis=1)
        rows = jnp.arange(b)[:, None]
        take = lambda x: x[rows, places]
        above = take(pool.parents)
        # Parents are places in the pool; their numbers in the tree are where these were
        # sorted to, the root being 0.
        is_parent = places[:, None, :] == above[:, :, None]
        parents = jnp.where(above < 0, 0, jnp.argmax(is_parent, axis=-1) + 1)
    else:
        take = lambda x: x
        parents = pool.parents + 1

    join = lambda first, rest: jnp.concatenate([first, rest], axis=1)
    column = lambda value, dtype: jnp.full((b, 1), value, dtype)
    choices = None
    if pool.choices is not None:
        assert growth.choice is not None, "both are asked for, or none"
        choices = join(growth.choice, take(pool.choices))
    sources = None
    if pool.sources is not None:
        sources = join(column(TARGET, jnp.int32), take(pool.sources))
    parents = join(column(topology.NO_PARENT, jnp.int32), parents.astype(jnp.int32))
    if tree.is_chain:
        static = topology.static_ancestor_mask(topology.static_parents(tree))
        mask = jnp.broadcast_to(static, (b, *static.shape))
    else:
        mask = topology.ancestor_mask(parents, tree.num_steps)

    return DraftTree(
        tokens=join(roots.token[:, None], take(pool.tokens)),
        parents=parents,
        depths=(jnp.sum(mask, axis=-1) - 1).astype(jnp.int32),
        is_valid=join(column(True, bool), take(pool.scores) > -jnp.inf),
        log_probs=join(column(0.0, jnp.float32), take(pool.log_probs)),
        ancestor_mask=mask,
        draft_probs=pool.draft_probs,
        token_ids=plan.token_ids,
        states=join(roots.context.hidden[:, None], take(pool.states)),
        has_state=join(column(True, bool), take(pool.has_state)),
        choices=choices,
        sources=sources,
        seen_scores=pool.scores if tree.sizes else None,
        seen_tokens=pool.tokens if tree.sizes else None,
        seen_parents=pool.parents if tree.sizes else None,
        drafted_depth=growth.depth if tree.sizes else None,
        children=tree.children,
        max_depth=tree.num_steps,
        max_children=tree.topk,
        is_chain=tree.is_chain,
        is_reranked=is_reranked,
    )
