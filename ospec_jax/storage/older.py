# SPDX-License-Identifier: Apache-2.0
"""What learning remembers, as older versions stored it."""

from typing import Any

import jax

_ADDED = ("is_stopped", "guard/", "learner/opt_state/is_overdue")
"""What older versions did not store, or how its path begins."""
_RETIRED = ("guard/count", "guard/total", "guard/total_square")
"""What they stored and nothing reads now: evidence on an iterate that moved on."""


def stored_like(like: Any, stored: Any) -> Any:
    """What to ask of a checkpoint that an older version may have written.

    Args:
      like: Shapes of the learner's state, or of its traffic, now.
      stored: Shapes of what is stored, in nested dictionaries and lists.

    Returns:
      Shapes in the stored structure, which may lack what is new, were it only a None;
      `like` if it is not known how the two belong together.
    """
    ours, theirs = _by_path(like), _by_path(stored)
    added, retired = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    if not all(name.startswith(_ADDED) for name in added) or retired - {*_RETIRED}:
        return like

    def shape_of(path, leaf):
        wanted = ours.get(_name(path), leaf)
        return jax.ShapeDtypeStruct(wanted.shape, wanted.dtype)

    return jax.tree_util.tree_map_with_path(shape_of, stored)


def brought_up(like: Any, restored: Any) -> Any:
    """A restored state in today's structure; what it lacks is a shape, as in `like`."""
    found = _by_path(restored)
    take = lambda path, shape: found.get(_name(path), shape)
    return jax.tree_util.tree_map_with_path(take, like)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
