# SPDX-License-Identifier: Apache-2.0
"""Growing draft trees depth by depth, for drafters that step with a cache.

A drafter supplies `step(cache, hidden, tokens, positions, bias, starts) -> (hidden,
logits, cache)`; what is expanded at depth d lies in scratch slots behind the committed
ones and is dropped afterwards.

How much is drafted may depend on the past and on tokens that will be verified. A
*drawn* token is never dropped after a look at its value: with p = (.5, .5) and
q = (.9, .1), dropping improbable drafts would emit (.55, .45).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Hints
from ospec_jax.models import cache as kv
from ospec_jax.sampling import (
    argmax,
    processed_probs,
    sample,
    sample_without_replacement,
)
from ospec_jax.types import DraftTree

StopFn = Callable[[jax.Array, jax.Array], jax.Array]
"""`(depth, log_probs [b, w] of the newest nodes' paths) -> is_stopped [b]`."""


def num_scratch(tree: TreeConfig) -> int:
    """Cache slots that growing a tree uses behind the committed ones."""
    return max(tree.num_steps - 1, 0) * max(tree.topk, tree.num_nodes) + 1


def stop_below(min_path_probability: float) -> StopFn | None:
    """Stops rows whose most probable path falls below a probability; None for 0."""
    if not min_path_probability:
        return None
    lowest = float(np.log(min_path_probability))
    return lambda depth, log_probs: jnp.max(log_probs, axis=-1) < lowest


def _to_target(ids, token_ids):
    return ids if token_ids is None else token_ids[ids]


def _log_softmax_top(logits, count):
    """The `count` most probable entries of each row with their log-probabilities."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    if count == 1:
        best = argmax(logits)[..., None]
        return jnp.max(logits, axis=-1, keepdims=True) - total, best
    values, ids = jax.lax.top_k(logits, count)
    return values - total, ids.astype(jnp.int32)


def _fold(keys, data):
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def _flat_params(sampling, width):
    """Repeats each row's sampling parameters for `width` nodes."""
    return jax.tree.map(lambda x: jnp.repeat(x, width), sampling)


def _draw(keys, logits, count, children, sampling, is_row_invariant):
    """Draws children of `[b, w]` nodes: ids and log-probabilities `[b, w, count]`.

    Also returns the distributions drawn from, `[b, w, q]`, or None for `topk`.
    """
    b, w, q = logits.shape
    if children == "topk":
        log_probs, ids = _log_softmax_top(logits, count)
        return ids, log_probs, None
    probs = processed_probs(
        logits.reshape(b * w, q), _flat_params(sampling, w), is_row_invariant
    ).reshape(b, w, q)
    split = jax.vmap(lambda key: jax.random.split(key, (w, count)))(keys)
    if children in ("topk_sampled", "hub"):
        draw = _draw_topk_sampled if children == "topk_sampled" else _draw_hub
        rows = split[:, :, :2].reshape(b * w, -1)
        ids, probs = draw(rows, probs.reshape(b * w, q), count)
        ids, probs = ids.reshape(b, w, count), probs.reshape(b, w, q)
        return ids, jnp.log(jnp.take_along_axis(probs, ids, axis=-1)), probs
    if children == "without_replacement":
        flat = split[:, :, 0].reshape(b * w)
        ids = sample_without_replacement(flat, probs.reshape(b * w, q), count)
    else:
        repeated = jnp.repeat(probs.reshape(b * w, q), count, axis=0)
        ids = sample(split.reshape(b * w * count), repeated)
    ids = ids.reshape(b, w, count)
    return ids, jnp.log(jnp.take_along_axis(probs, ids, axis=-1)), probs


def _draw_topk_sampled(keys, probs, count):
    """One draw from all but the `count - 1` most probable tokens, then these."""
    top = jax.lax.top_k(probs, count - 1)[1].astype(jnp.int32)
    is_top = jnp.any(top[..., None] == jnp.arange(probs.shape[-1]), axis=1)
    others = jnp.where(is_top, 0.0, probs)
    others = others / jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1e-30)
    drawn = sample(keys[:, 0], others)
    return jnp.concatenate([drawn[:, None], top], axis=1), others


def _draw_hub(keys, probs, count):
    """SpecHub's pairs: a draw and the most probable token, or the other way round."""
    assert count == 2, "TreeConfig lets pairs through only"
    top = jnp.argmax(probs, axis=-1).astype(jnp.int32)
    first = sample(keys[:, 0], probs)
    others = jnp.where(jnp.arange(probs.shape[-1]) == top[:, None], 0.0, probs)
    other = sample(keys[:, 1], others)
    return jnp.stack([first, jnp.where(first == top, other, top)], axis=1), probs


def _consider(hints: Hints | None, recent, depth, tokens, log_probs):
    """Puts likelier suggestions in the place of the least probable children.

    Args:
      recent: `[b, w, m]` the last tokens of the nodes' paths, None without hints.
      depth: Of the nodes.
      tokens: `[b, w, count]` the nodes' children; likewise `log_probs`.
    """
    if hints is None:
        return tokens, log_probs
    hint, rate = hints.suggest(recent, depth)
    hint, rate = hint[..., None], rate[..., None]
    is_drafted = tokens == hint
    is_taken = (rate > log_probs[..., -1:]) & ~jnp.any(is_drafted, -1, keepdims=True)
    is_last = jnp.arange(tokens.shape[-1]) == tokens.shape[-1] - 1
    tokens = jnp.where(is_taken & is_last, hint, tokens)
    log_probs = jnp.where(is_taken & is_last, rate, log_probs)
    return tokens, jnp.where(is_drafted, jnp.maximum(log_probs, rate), log_probs)


def extend_path(recent, tokens):
    """The last tokens of the children's paths, `[b, w, m]`."""
    return jnp.concatenate([recent[..., 1:], tokens[..., None]], axis=-1)


def propose_static(
    step, config: TreeConfig, cache, context, root, starts, keys, sampling, token_ids,
    is_row_invariant, hints: Hints | None = None,
):  # fmt: skip
    """Fills a fixed tree, whose nodes may have unequal numbers of children."""
    parents = topology.static_parents(config)
    depths = topology.static_depths(parents)
    mask = topology.static_ancestor_mask(parents)
    b = root.shape[0]
    tokens, log_probs = [root[:, None]], [jnp.zeros((b, 1))]
    # Level 0 is the root, whose logits verification left in the context.
    hidden, logits = context.hidden[:, None], context.logits[:, None]
    recent = None if hints is None else hints.recent[:, None]
    drawn_from, states, first, most = [], [], 0, 1
    for depth in range(config.num_steps):
        width = int(np.sum(depths == depth))
        above = parents[depths == depth + 1] - first
        rank = np.arange(len(above)) - np.searchsorted(above, above)
        branches = int(rank.max()) + 1
        most = max(most, branches)
        if depth:
            level = slice(first, first + width)
            # Node n lies in scratch slot n - 1: the root is part of the context.
            visible = jnp.broadcast_to(mask[level, 1:], (b, width, len(parents) - 1))
            positions = jnp.repeat(starts[:, None] + depth - 1, width, axis=1)
            hidden, logits, cache = step(
                cache, hidden, tokens[-1], positions,
                kv.tree_bias(starts, visible, cache.capacity), starts + first - 1,
            )  # fmt: skip
        ids, chosen, probs = _draw(
            _fold(keys, depth), logits, branches, config.children, sampling,
            is_row_invariant,
        )  # fmt: skip
        drawn_from.append(probs)
        states.append(hidden)
        children = _to_target(ids, token_ids)
        children, chosen = _consider(hints, recent, depth, children, chosen)
        tokens.append(children[:, above, rank])
        log_probs.append(chosen[:, above, rank])
        hidden = hidden[:, above]
        if recent is not None:
            recent = extend_path(recent[:, above], tokens[-1])
        first += width
    leaves = tokens[-1].shape[1]
    draft_probs = None
    if config.children != "topk":
        unused = jnp.zeros((b, leaves, drawn_from[0].shape[-1]))
        draft_probs = jnp.concatenate([*drawn_from, unused], axis=1)
    spread = lambda x: jnp.broadcast_to(x, (b, *x.shape))
    states.append(jnp.zeros((b, leaves, hidden.shape[-1])))
    tree = DraftTree(
        tokens=jnp.concatenate(tokens, axis=1),
        parents=spread(parents),
        depths=spread(depths),
        is_valid=spread(np.ones(len(parents), bool)),
        log_probs=jnp.concatenate(log_probs, axis=1),
        ancestor_mask=spread(mask),
        draft_probs=draft_probs,
        token_ids=token_ids,
        states=jnp.concatenate(states, axis=1),
        has_state=spread(depths < config.num_steps),
        children=config.children,
        max_depth=config.num_steps,
        max_children=most,
    )
    return tree, cache


def propose_uniform(
    step, config: TreeConfig, cache, context, root, starts, keys, sampling, token_ids,
    is_row_invariant, hints: Hints | None = None, stop_fn: StopFn | None = None,
):  # fmt: skip
    """Chains, and EAGLE-2's dynamic trees (arXiv 2406.16858).

    Each depth expands a frontier of `topk` nodes into `topk` children each, of which
    the best `topk`, by the probability of their path, are the next frontier. A dynamic
    tree keeps the best `num_draft_tokens` of all nodes seen; since a child is never
    more probable than its parent, the kept ones are connected.

    Args:
      stop_fn: When a row grows no deeper; by default `config.min_path_probability`.
    """
    b, width, num_steps = root.shape[0], config.topk, config.num_steps
    num_scratch = max(num_steps - 1, 1) * width
    if stop_fn is None:
        stop_fn = stop_below(config.min_path_probability)

    def children(depth, logits, recent):
        """`[b, w, width]` tokens and log-probabilities; and distributions, or None."""
        ids, log_probs, probs = _draw(
            _fold(keys, depth), logits, width, config.children, sampling,
            is_row_invariant,
        )  # fmt: skip
        tokens = _to_target(ids, token_ids)
        return *_consider(hints, recent, depth, tokens, log_probs), probs

    def stopped(depth, front):
        if stop_fn is None:
            return jnp.zeros((b,), bool)
        return stop_fn(depth, front["scores"])

    def promise(pool):
        """Expected accepted tokens of the tree that the pool's best nodes make."""
        best = jax.lax.top_k(pool["scores"], config.num_nodes - 1)[0]
        return jnp.sum(jnp.exp(best), axis=-1)

    def deeper(carry):
        depth, cache, pool, front, is_stopped = carry
        before = promise(pool) if config.min_gain else 0.0
        own = (
            jnp.arange(num_scratch) == (depth - 1) * width + jnp.arange(width)[:, None]
        )
        front = front | {"visible": front["visible"] | own}
        positions = jnp.broadcast_to(starts[:, None] + depth - 1, (b, width))
        bias = kv.tree_bias(starts, front["visible"], cache.capacity)
        hidden, logits, cache = step(
            cache, front["hidden"], front["tokens"], positions, bias,
            starts + (depth - 1) * width,
        )  # fmt: skip
        tokens, log_probs, probs = children(depth, logits, front.get("recent"))
        scores = front["scores"][..., None] + log_probs
        scores = jnp.where(is_stopped[:, None, None], -jnp.inf, scores)
        offset = width + (depth - 1) * width**2
        pool = _with_states(pool, front["index"], hidden)
        parents = jnp.repeat(front["index"][..., None], width, axis=-1)
        pool = _with_nodes(pool, offset, tokens, scores, log_probs, parents)
        pool = _with_probs(pool, depth, probs)
        front = _next_frontier(front, offset, hidden, tokens, scores)
        is_stopped = is_stopped | stopped(depth + 1, front)
        if config.min_gain:
            is_stopped |= promise(pool) - before < config.min_gain
        return depth + 1, cache, pool, front, is_stopped

    recent = None if hints is None else hints.recent[:, None]
    first, log_probs, probs = children(0, context.logits[:, None], recent)
    pool = _empty_pool(config, context.hidden, probs)
    none = jnp.full_like(first, topology.NO_PARENT)
    pool = _with_nodes(pool, 0, first, log_probs, log_probs, none)
    pool = _with_probs(pool, 0, probs)
    frontier = {
        "tokens": first[:, 0],
        "scores": log_probs[:, 0],
        "index": jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (b, width)),
        "hidden": jnp.repeat(context.hidden[:, None], width, axis=1),
        "visible": jnp.zeros((b, width, num_scratch), bool),
    }
    if recent is not None:
        recent = jnp.repeat(recent, width, axis=1)
        frontier["recent"] = extend_path(recent, first[:, 0])
    grown = (jnp.int32(1), cache, pool, frontier, stopped(1, frontier))
    is_going = lambda carry: (carry[0] < num_steps) & ~jnp.all(carry[4])
    if num_steps > 1:  # the pool of a single depth has no room to trace the loop
        grown = jax.lax.while_loop(is_going, deeper, grown)
    _, cache, pool, _, _ = grown
    return _assemble(config, pool, root, context.hidden, token_ids), cache


def _empty_pool(config: TreeConfig, root_state, probs) -> dict:
    """Room for every node that a tree of uniform width may see, the root left out."""
    b = root_state.shape[0]
    num_pool = config.topk + (config.num_steps - 1) * config.topk**2
    pool = {
        "tokens": jnp.zeros((b, num_pool), jnp.int32),
        "scores": jnp.full((b, num_pool), -jnp.inf),
        "log_probs": jnp.zeros((b, num_pool)),
        "parents": jnp.full((b, num_pool), topology.NO_PARENT, jnp.int32),
        "states": jnp.zeros((b, num_pool, root_state.shape[-1])),
        "has_state": jnp.zeros((b, num_pool), bool),
    }
    if probs is not None:
        pool["probs"] = jnp.zeros((b, config.num_steps + 1, probs.shape[-1]))
    return pool


def _with_nodes(pool, offset, tokens, scores, log_probs, parents) -> dict:
    """Adds nodes, `[b, w, width]`, from slot `offset` on."""
    new = {
        "tokens": tokens, "scores": scores, "log_probs": log_probs, "parents": parents
    }  # fmt: skip
    flat = lambda x: x.reshape(x.shape[0], -1)
    return pool | {n: _place(pool[n], flat(x), offset) for n, x in new.items()}


def _with_states(pool, index, states) -> dict:
    """Keeps what the draft made of the nodes at `index`, `[b, w]`."""
    rows = jnp.arange(index.shape[0])[:, None], index
    return pool | {
        "states": pool["states"].at[rows].set(states),
        "has_state": pool["has_state"].at[rows].set(True),
    }


def _with_probs(pool, depth, probs) -> dict:
    """Keeps the distributions `[b, w, q]` that the children of a depth come from."""
    if probs is None:
        return pool
    place = (0, depth, 0)
    return pool | {"probs": jax.lax.dynamic_update_slice(pool["probs"], probs, place)}


def _next_frontier(front, offset, hidden, tokens, scores) -> dict:
    """The best of the frontier's children, as many as it had nodes.

    Args:
      offset: Of the children's slots in the pool.
      hidden: `[b, w, d]` the draft's states of the frontier.
      tokens: `[b, w, w]` of the children; likewise `scores`.
    """
    b, width = front["tokens"].shape
    best, slot = jax.lax.top_k(scores.reshape(b, -1), width)
    of_parent = lambda x: jax.vmap(lambda x, i: x[i])(x, slot // width)
    newest = jnp.take_along_axis(tokens.reshape(b, -1), slot, axis=1)
    path = {}
    if "recent" in front:
        path["recent"] = extend_path(of_parent(front["recent"]), newest)
    return path | {
        "tokens": newest,
        "scores": best,
        "index": offset + slot.astype(jnp.int32),
        "hidden": of_parent(hidden),
        "visible": of_parent(front["visible"]),
    }


def _place(buffer, new, offset):
    return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (0, offset))


def _assemble(config: TreeConfig, pool, root, root_state, token_ids) -> DraftTree:
    """The tree of the pool's best nodes, in depth order."""
    b, num_pool = pool["tokens"].shape
    kept = config.num_nodes - 1
    is_reranked = kept < num_pool
    if is_reranked:
        # top_k is stable, so parents win over children that tie with them.
        index = jnp.sort(jax.lax.top_k(pool["scores"], kept)[1], axis=1)
        rows = jnp.arange(b)[:, None]
        take = lambda x: x[rows, index]
        above = take(pool["parents"])
        is_parent = index[:, None, :] == above[:, :, None]
        parents = jnp.where(above < 0, 0, jnp.argmax(is_parent, axis=-1) + 1)
    else:
        take = lambda x: x
        parents = pool["parents"] + 1
    join = lambda first, rest: jnp.concatenate([first, rest], axis=1)
    column = lambda value, dtype: jnp.full((b, 1), value, dtype)
    parents = join(column(topology.NO_PARENT, jnp.int32), parents.astype(jnp.int32))
    if config.is_chain:
        static = topology.static_ancestor_mask(topology.static_parents(config))
        mask = jnp.broadcast_to(static, (b, *static.shape))
    else:
        mask = topology.ancestor_mask(parents, config.num_steps)
    return DraftTree(
        tokens=join(root[:, None], take(pool["tokens"])),
        parents=parents,
        depths=(jnp.sum(mask, axis=-1) - 1).astype(jnp.int32),
        is_valid=join(column(True, bool), take(pool["scores"]) > -jnp.inf),
        log_probs=join(column(0.0, jnp.float32), take(pool["log_probs"])),
        ancestor_mask=mask,
        draft_probs=pool.get("probs"),
        token_ids=token_ids,
        states=join(root_state[:, None], take(pool["states"])),
        has_state=join(column(True, bool), take(pool["has_state"])),
        children=config.children,
        max_depth=config.num_steps,
        max_children=config.topk,
        is_chain=config.is_chain,
        is_reranked=is_reranked,
    )
