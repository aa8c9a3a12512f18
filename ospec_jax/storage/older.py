# SPDX-License-Identifier: Apache-2.0
"""What learning remembers, as older versions stored it."""

from typing import Any

import jax

_ADDED = (
    "is_stopped",
    "guard/",
    "learner/opt_state/is_overdue",
    "memory/owners",
    "ring/numbers",
    "ring/owners",
)
"""What older versions did not store, or how its path begins."""
_RETIRED = (
    # Evidence on an iterate that moved on.
    "guard/count",
    "guard/total",
    "guard/total_square",
    # Counts of windows, where none were learned from.
    "num_waiting",
    "num_fresh",
    "update_interval",
    "learner/num_updates",
)
"""What they stored and nothing reads now."""
_MOVED = {"learner/opt_state/": "learner/"}
"""How paths began, and begin now: the last layer's learner lay in another's state."""


def stored_like(like: Any, stored: Any) -> Any:
    """What to ask of a checkpoint that an older version may have written.

    Args:
      like: Shapes of the learner's state, or of its traffic, now.
      stored: Shapes of what is stored, in nested dictionaries and lists.

    Returns:
      Shapes in the stored structure, which may lack what is new, were it only a None;
      `like` if it is not known how the two belong together.
    """
    # Both structures as flat paths: what is new, what is gone, and whether all of it is
    # accounted for.
    ours = _by_path(like)
    theirs = _under_new_names(ours, stored)
    added = ours.keys() - theirs.keys()
    retired = theirs.keys() - ours.keys()
    # Something else differs: Orbax then says what does not fit.
    if not all(name.startswith(_ADDED) for name in added) or retired - {*_RETIRED}:
        return like

    def shape_of(path, leaf):
        wanted = ours.get(_new_name(ours, _name(path)), leaf)
        return jax.ShapeDtypeStruct(wanted.shape, wanted.dtype)

    return jax.tree_util.tree_map_with_path(shape_of, stored)


def brought_up(like: Any, restored: Any) -> Any:
    """A restored state in today's structure; what it lacks is a shape, as in `like`."""
    found = _under_new_names(_by_path(like), restored)
    take = lambda path, shape: found.get(_name(path), shape)
    return jax.tree_util.tree_map_with_path(take, like)


def _under_new_names(ours: dict[str, Any], stored: Any) -> dict[str, Any]:
    """Stored leaves by the paths that they have now."""
    return {_new_name(ours, name): leaf for name, leaf in _by_path(stored).items()}


def _new_name(ours: dict[str, Any], name: str) -> str:
    """The path that a stored leaf has now; its old one, if it has none."""
    if name in ours:
        return name

    for old, new in _MOVED.items():
        moved = new + name.removeprefix(old)
        if name.startswith(old) and moved in ours:
            return moved

    return name


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
