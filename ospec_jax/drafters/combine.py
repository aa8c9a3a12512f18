# SPDX-License-Identifier: Apache-2.0
"""Two drafters at once: a neural one, and suggestions as a drafter beside it.

`fallback` asks them in order: where suggestions are likely they are the draft, and
the neural one does not run; the plain baseline of any selection. `parallel` verifies
both chains as branches of one tree, from the root on; what they share is one branch.
`longer` goes on from `with_ngrams`, by which suggestions replace single tokens of the
neural draft: where they are likely a chain of them alone is verified, of twice as many
rows, which cost about what the neural draft does (Ouroboros' longer drafts, arXiv
2402.13720, chosen within the step instead of tried behind every draft).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter, Hints
from ospec_jax.drafters.children import UNKNOWN
from ospec_jax.drafters.hints import hinted_chain
from ospec_jax.drafters.sizing import run_one
from ospec_jax.drafters.sources import DRAFT
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    Pairs,
    Retraced,
    Roots,
    SharedTables,
    Suggested,
)

MIXES = {
    "fallback": "a chain of suggestions where they are likely, else the other draft's",
    "mixed": "both chains in one tree, verified together",
    "longer": "the other draft's with suggestions, or a longer chain of these alone",
}
_LIKELY = 0.5
"""Rate of its first suggestion from which a chain is preferred to the neural draft."""


def mixed_tree(mix: str, tree: TreeConfig) -> TreeConfig:
    """What two drafters draft together, where each would draft `tree` by itself.

    Raises:
      ConfigError: They cannot.
    """
    if mix == "mixed" and tree.is_chain:
        return dataclasses.replace(tree, kind="parallel")
    if mix != "longer" or not tree.is_chain or not tree.num_steps:
        return tree

    if tree.depths or tree.sizes:
        raise ConfigError(
            "longer:... chooses between two lengths itself; give it one length, as in "
            "--num-speculative-tokens 3, and no controller that chooses others"
        )

    # Twice as many rows of the target: eight cost about what four and a neural draft of
    # three tokens do.
    most = 2 * tree.num_steps + 1
    return dataclasses.replace(tree, num_steps=most, sizes=(tree.num_steps, most))


def inner_tree(mix: str, tree: TreeConfig) -> TreeConfig:
    """What the neural one of two drafters drafts; `mixed_tree` the other way round.

    Raises:
      ConfigError: Their drafts cannot be mixed.
    """
    if tree.kind not in ("chain", "parallel") or tree.children != "topk":
        raise ConfigError(
            f"two drafters are mixed as chains of children='topk', not as a "
            f"{tree.kind} tree of {tree.children!r} ones; use --tree chain"
        )

    num_steps = tree.sizes[0] if mix == "longer" and tree.sizes else tree.num_steps
    return TreeConfig(
        num_steps=num_steps, min_path_probability=tree.min_path_probability
    )


def combine(mix: str, drafter: Drafter, tree: TreeConfig) -> Drafter:
    """Lets chains of suggestions stand beside those of `drafter`, as `mix` says.

    Args:
      mix: One of `MIXES`.
      tree: What both draft together.
    """
    build = {"fallback": fallback, "mixed": parallel, "longer": longer}[mix]
    return build(drafter, tree)


def fallback(drafter: Drafter, tree: TreeConfig) -> Drafter:
    """Drafts suggestions where the first is likely, else what `drafter` drafts."""
    # The neural drafter keeps its cache up to date either way: `extend` is its own.
    suggested = hinted_chain(inner_tree("fallback", tree))

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: Any,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, Any]:
        chain, _ = suggested.propose(draft, shared, (), roots, hints)
        chain = _with_states(chain, drafter, roots)
        is_likely = chain.log_probs[:, 1] >= np.log(_LIKELY)

        def draft_others():
            # Without hints: they had their chance as a chain of their own.
            other, new_cache = drafter.propose(draft, shared, cache, roots)
            other = _like(chain, other)

            # Rows choose for themselves once the neural drafter has to run for any of
            # them.
            return _pick(is_likely, chain, other), new_cache

        # What this saves is the neural draft, when no row needs it.
        return jax.lax.cond(jnp.all(is_likely), lambda: (chain, cache), draft_others)

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: Any,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[Any, DraftContext, Retraced]:
        assert drafter.retrace is not None
        cache, context, found = drafter.retrace(draft, shared, cache, context, pairs)
        if suggested is None:
            return cache, context, found

        # Likely suggestions come before whatever the other one is sure of; others do
        # not come at all.
        is_likely = suggested.log_rates >= np.log(_LIKELY)
        asked = suggested.replace(log_rates=jnp.where(is_likely, 1.0, -jnp.inf))
        return cache, context, found.replace(suggested=asked)

    return drafter._replace(
        propose=propose, retrace=retrace if drafter.retrace is not None else None
    )


def longer(drafter: Drafter, tree: TreeConfig) -> Drafter:
    """Drafts a long chain of suggestions where the first is likely.

    Elsewhere it is what `drafter` makes of them, which is shorter: nodes behind that
    are not valid, and of a tree with `sizes` they cost no rows.

    Args:
      tree: Of the long chain; the neural one is as long as its smallest size.
    """
    suggested = hinted_chain(tree)

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: Any,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, Any]:
        chain, _ = suggested.propose(draft, shared, (), roots, hints)
        chain = _with_states(chain, drafter, roots)
        is_likely = chain.log_probs[:, 1] >= np.log(_LIKELY)

        def draft_others(cache):
            other, cache = drafter.propose(draft, shared, cache, roots, hints)
            return cache, _pick(is_likely, chain, _padded(chain, _like(chain, other)))

        # What is drafted for a row follows from its own past alone. Of a finished one
        # nobody reads it.
        is_needed = ~is_likely
        if roots.is_active is not None:
            is_needed &= roots.is_active
        number = jnp.any(is_needed).astype(jnp.int32)
        passes = [lambda cache: (cache, chain), draft_others]
        cache, drafted = run_one(number, passes, cache)

        return drafted, cache

    # Nobody has said how such drafts would have been accepted.
    return drafter._replace(propose=propose, retrace=None)


def _pick(is_first: Bool[Array, " b"], first: DraftTree, second: DraftTree):
    """The first tree in some rows, the second one in the others."""
    rows = is_first.shape[0]
    pick = lambda a, b: jnp.where(is_first.reshape(rows, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, first, second)


def _padded(long: DraftTree, short: DraftTree) -> DraftTree:
    """A short chain as the beginning of a long one, of which no more is valid."""
    missing = long.tokens.shape[1] - short.tokens.shape[1]

    def pad(x, fill: Any = 0):
        if x is None:
            return None
        width = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, width, constant_values=fill)

    return long.replace(
        tokens=pad(short.tokens),
        is_valid=pad(short.is_valid, False),
        log_probs=pad(short.log_probs, -jnp.inf),
        states=pad(short.states),
        has_state=pad(short.has_state, False),
        choices=pad(short.choices, UNKNOWN),
        sources=pad(short.sources, DRAFT),
    )


def _with_states(chain: DraftTree, drafter: Drafter, roots: Roots) -> DraftTree:
    """Suggestions have no state to learn a projection from, but their root may."""
    if drafter.head_inputs is None:
        return chain

    hidden = roots.context.hidden
    b, n = chain.tokens.shape
    states = jnp.zeros((b, n, hidden.shape[-1]))
    is_root = jnp.broadcast_to(np.arange(n) == 0, (b, n))
    # What the draft would have said at the root is not looked for.
    choices = jnp.full((b, n), UNKNOWN, jnp.int32) if roots.has_choices else None

    return chain.replace(
        states=states.at[:, 0].set(hidden),
        # A drafter that reads the target's cache has run over the root only to draft.
        has_state=is_root & (not drafter.reads_target),
        choices=choices,
    )


def _like(chain: DraftTree, other: DraftTree) -> DraftTree:
    """The other draft, without what a chain of suggestions has not."""
    # The draft vocabulary matters for drawn children only.
    other = other.replace(
        token_ids=None,
        seen_scores=None,
        seen_tokens=None,
        seen_parents=None,
        drafted_depth=None,
        sources=None if chain.sources is None else _sources_of(other),
    )
    if chain.states is None:
        return other.replace(states=None, has_state=None)

    return other


def parallel(drafter: Drafter, tree: TreeConfig) -> Drafter:
    """Drafts the chain of `drafter` and, beside it, one of suggestions."""
    suggested = hinted_chain(inner_tree("mixed", tree))

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: Any,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, Any]:
        chain, _ = suggested.propose(draft, shared, (), roots, hints)
        other, cache = drafter.propose(draft, shared, cache, roots)
        return merge_chains(other, chain), cache

    # Nodes of suggestions have no state to learn a projection from, and of two chains
    # at once nobody has said how they would have been accepted.
    return drafter._replace(propose=propose, head_inputs=None, retrace=None)


def _sources_of(tree: DraftTree) -> Int[Array, "b n"]:
    """Who proposed each node, where nothing else is said the draft."""
    return jnp.full_like(tree.tokens, DRAFT) if tree.sources is None else tree.sources


def merge_chains(first: DraftTree, second: DraftTree) -> DraftTree:
    """One tree `[b, 2 k + 1]` of two chains `[b, k + 1]` of the same root and depth.

    Node 2 i - 1 is the i-th of `first`, node 2 i that of `second`, which is dropped as
    long as the two agree: its successors then follow the node of `first`.
    """
    num_rows, num_nodes = first.tokens.shape
    num_steps = num_nodes - 1

    # Shared nodes: both chains have drafted the same tokens from the root on. A second
    # copy of them would be verified for nothing.
    is_both = first.is_valid & second.is_valid
    is_same = (first.tokens == second.tokens) & is_both
    is_shared = jnp.cumprod(is_same, axis=1).astype(bool)
    own = 2 * np.arange(num_nodes)  # in `second`'s numbering; the root is node 0
    # Under the root both numberings begin; 2 i - 1 would be -1 there.
    above_first = np.maximum(own[:-1] - 1, 0)
    above_second = jnp.where(is_shared[:, :-1], above_first, own[:-1])

    # Nodes in turns from both chains stand in depth order, as trees must.
    def weave(root, a, b):
        pairs = jnp.stack([a, b], axis=-1).reshape(num_rows, 2 * num_steps)
        return jnp.concatenate([root, pairs], axis=1)

    spread = lambda x: jnp.broadcast_to(x, (num_rows, num_steps))
    join = lambda a, b: weave(a[:, :1], a[:, 1:], b[:, 1:])
    root = jnp.full((num_rows, 1), topology.NO_PARENT, jnp.int32)
    parents = weave(root, spread(above_first), above_second).astype(jnp.int32)

    return DraftTree(
        tokens=join(first.tokens, second.tokens),
        parents=parents,
        depths=join(first.depths, second.depths),
        is_valid=join(first.is_valid, second.is_valid & ~is_shared),
        log_probs=join(first.log_probs, second.log_probs),
        sources=join(_sources_of(first), _sources_of(second)),
        ancestor_mask=topology.ancestor_mask(parents, num_steps),
        max_depth=num_steps,
        max_children=2,
    )
