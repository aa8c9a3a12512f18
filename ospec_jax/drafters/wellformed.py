# SPDX-License-Identifier: Apache-2.0
"""Drafters that the package does not know: their trees are taken at their tokens.

What verification reads off a tree, who follows whom and how deep, it must be able to
rely on. Of an unknown drafter only tokens, parents and validity are taken; the rest is
made from these, and a tree that says what cannot be is refused while the step is
compiled. So a slip makes drafts worse, or an error, but never another output.

One thing cannot be checked: that drawn children were drawn from what `draft_probs`
says, and none was left out after a look at it. Greedy output does not depend on it;
sampled output does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter, Family, Hints
from ospec_jax.drafters.sources import DRAFT, SOURCES
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models.layers import Numerics
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    Pairs,
    Roots,
    SharedTables,
)

_PACKAGE = "ospec_jax."


def build_checked(
    family: Family,
    config: Any,
    tree: TreeConfig,
    numerics: Numerics,
    stop_fn: StopFn | None,
) -> Drafter:
    """Builds a family's drafter; what is not of this package is held to its word.

    Raises:
      ConfigError: What it builds is no drafter.
    """
    drafter: Any = family.build(config, tree, numerics, stop_fn)
    if not isinstance(drafter, Drafter):
        raise ConfigError(
            f"`build` of the family {family.name!r} returned "
            f"{type(drafter).__name__}, not a Drafter"
        )
    if getattr(family.build, "__module__", "").startswith(_PACKAGE):
        return drafter

    return with_checks(drafter, tree, family.name)


def with_checks(drafter: Drafter, tree: TreeConfig, name: str) -> Drafter:
    """The same drafter, whose trees are well formed whatever it says.

    Args:
      tree: What it was built for.
      name: Of its family, for errors.
    """

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: Any,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, Any]:
        proposed: Any = drafter.propose(draft, shared, cache, roots, hints)
        is_pair = isinstance(proposed, tuple) and len(proposed) == 2
        if not is_pair or not isinstance(proposed[0], DraftTree):
            raise ConfigError(
                f"`propose` of the drafter {name!r} returned "
                f"{type(proposed).__name__}; return (DraftTree, cache)"
            )

        # Shapes are known while tracing, so a wrong one is an error; values are not, so
        # they are put right instead.
        drafted, cache = proposed
        _check_shapes(drafted, tree, roots.token.shape[0], name)

        num_tokens = shared.embedding["kernel"].shape[0]
        return _rebuilt(drafted, tree, roots.token, num_tokens), cache

    def extend(
        draft: Draft, shared: SharedTables, cache: Any, pairs: Pairs
    ) -> tuple[Any, DraftContext]:
        extended: Any = drafter.extend(draft, shared, cache, pairs)
        is_pair = isinstance(extended, tuple) and len(extended) == 2
        if is_pair and isinstance(extended[1], DraftContext):
            return extended

        raise ConfigError(
            f"`extend` of the drafter {name!r} returned {type(extended).__name__}; "
            f"return (cache, DraftContext)"
        )

    return drafter._replace(propose=propose, extend=extend)


def _check_shapes(drafted: DraftTree, tree: TreeConfig, num_rows: int, name: str):
    """Refuses arrays that are not those of the tree that was asked for."""
    shape = (num_rows, tree.num_nodes)
    wanted = {"tokens": jnp.integer, "parents": jnp.integer, "is_valid": jnp.bool_}
    if drafted.children != "topk":
        wanted |= {"log_probs": jnp.floating, "draft_probs": jnp.floating}
    if drafted.sources is not None:
        wanted |= {"sources": jnp.integer}

    for field, kind in wanted.items():
        values = getattr(drafted, field)
        found = None if values is None else (jnp.shape(values), jnp.result_type(values))
        fits = found is not None and jnp.issubdtype(found[1], kind)
        if found is None or not fits or found[0][:2] != shape:
            raise ConfigError(
                f"{field} of the tree that the drafter {name!r} proposes is "
                f"{'missing' if found is None else f'{found[1]} of shape {found[0]}'}; "
                f"it must be {kind.__name__} of shape {shape}: a row a request, and "
                f"in it the root and {tree.num_nodes - 1} drafted nodes"
            )

    if drafted.children != tree.children:
        raise ConfigError(
            f"the drafter {name!r} says that its children are {drafted.children!r}, "
            f"where {tree.children!r} ones were asked for"
        )


def _rebuilt(
    drafted: DraftTree, tree: TreeConfig, root: jax.Array, num_tokens: int
) -> DraftTree:
    """A tree of the same tokens and parents, all else following from these."""
    shape = drafted.tokens.shape
    place = np.arange(shape[1], dtype=np.int32)
    is_root = place == 0
    if tree.is_chain:
        parents = jnp.broadcast_to(place - 1, shape)
        depths = jnp.broadcast_to(place, shape)
        mask = jnp.broadcast_to(np.tri(shape[1], dtype=bool), (*shape, shape[1]))
    else:
        # Nobody stands before its parent; the first one has none.
        parents = jnp.clip(drafted.parents, 0, np.maximum(place - 1, 0))
        parents = jnp.where(is_root, topology.NO_PARENT, parents).astype(jnp.int32)
        # A tree of n nodes may be n - 1 deep: what is deeper than was asked for is
        # found by its depth, and dropped.
        mask = topology.ancestor_mask(parents, shape[1] - 1)
        depths = jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1

    # A token that there is not would be given the probability of another one.
    is_token = (drafted.tokens >= 0) & (drafted.tokens < num_tokens)
    is_valid = drafted.is_valid & is_token & (depths <= tree.num_steps)

    # They are names for people: one that there is not would be nobody's.
    sources = drafted.sources
    if sources is not None:
        sources = jnp.clip(sources, DRAFT, len(SOURCES) - 1).astype(jnp.int32)

    return drafted.replace(
        tokens=jnp.where(is_root, root[:, None], drafted.tokens).astype(jnp.int32),
        parents=parents,
        depths=depths,
        ancestor_mask=mask,
        is_valid=is_valid | is_root,
        sources=sources,
        max_depth=tree.num_steps,
        max_children=1 if tree.is_chain else shape[1] - 1,
        is_chain=tree.is_chain,
    )
