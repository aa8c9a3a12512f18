# SPDX-License-Identifier: Apache-2.0
"""How much a session drafts and verifies: names of rules, and what they stand for.

A controller chooses between steps; a depth rule and a size rule choose within one. The
controllers `marginal` and `ltd:DIR` bring rules of their own for what is within.
`joint` chooses drafter and depth at once, by the tokens that each would have yielded a
second.
"""

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

from ospec_jax._platform import device_name
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.control import steered, taught
from ospec_jax.control.policy import Policies
from ospec_jax.control.registry import BuildController
from ospec_jax.drafters.sizing import (
    EvidenceFn,
    SizeFn,
    all_drafted,
    cycle_of,
    most_tokens_a_second,
    promises_of,
    taught_size_now,
)
from ospec_jax.drafters.stopping import StopFn, taught_now, unless_worth_more_now
from ospec_jax.loading import LoadedDraft
from ospec_jax.storage.policies import PolicyMeta, load_policies

MARGINAL = "marginal"
POLICIES = "ltd"
JOINT = "joint"
LOAD = "load"
_JUDGED_BY_TIME = "leader:time"


class HowMuch(NamedTuple):
    """What chooses how much is drafted and verified.

    Attributes:
      tree: How much at most; None for the session's own default.
      controller: Chooses between steps; see `Session`.
      stop_fn: When a draft grows no deeper; None to draft all of the tree.
      size_fn: How many nodes are verified, of a tree that has `sizes`.
      evidence_fn: What the controller hears of verified trees; None for nothing.
    """

    tree: TreeConfig | None
    controller: str | BuildController | None
    stop_fn: StopFn | None
    size_fn: SizeFn
    evidence_fn: EvidenceFn | None = None


def resolve(
    tree: TreeConfig | None,
    draft: LoadedDraft | None,
    controller: Any,
    stop_fn: StopFn | None,
    size_fn: SizeFn | None,
    learn_control: float = 0.0,
    batch_size: int = 1,
) -> HowMuch:
    """What a controller's name stands for, and rules that are given, checked.

    Args:
      learn_control: Share of decoding's time in which policies go on learning.
      batch_size: Requests that are decoded together.

    Raises:
      ConfigError: They do not go together, or a folder holds no policies.
    """
    name = controller if isinstance(controller, str) else ""
    kind, _, folder = name.partition(":")
    if kind in (MARGINAL, POLICIES) and (stop_fn or size_fn):
        raise ConfigError(
            f"the controller {controller!r} brings its own rules for the depth and the "
            f"size; leave out stop_fn and size_fn, or the controller"
        )
    if learn_control and (kind != POLICIES or draft is None):
        what = f"the controller is {controller!r}" if draft else "nothing is drafted"
        raise ConfigError(
            f"learn_control teaches the policies of ltd:DIR on, and {what}; give both "
            f"such a controller and a draft, or leave it out"
        )
    if controller == MARGINAL:
        return _marginal(tree, draft)
    if kind == POLICIES:
        policies, meta = load_policies(folder)
        if not learn_control:
            _warn_of_policies(folder, meta, batch_size)
        return _policies(tree, draft, policies, learn_control)
    if controller == LOAD:
        tree = _tree_or_none(tree, draft)
        controller = None
    if controller == JOINT:
        tree = tree or TreeConfig.auto()
        controller = _JUDGED_BY_TIME if draft is not None and draft.pool else None

    if size_fn is not None and (tree is None or not tree.sizes):
        raise ConfigError(
            "size_fn chooses among the sizes of a tree that has none; give some, as in "
            "TreeConfig(num_steps=4, sizes=(1, 2, 3, 4))"
        )
    if size_fn is not None and tree is not None and tree.children != "topk":
        raise ConfigError(
            f"size_fn would leave out drawn tokens after a look at them, which is not "
            f"exact for children={tree.children!r}; use children='topk', or leave it "
            f"out: what a draft that stopped early has not drafted costs no rows"
        )

    return HowMuch(tree, controller, stop_fn, size_fn or all_drafted)


def _tree_or_none(tree: TreeConfig | None, draft: LoadedDraft | None) -> TreeConfig:
    """A tree that a step may leave out, as a whole."""
    tree = tree or TreeConfig(num_steps=3 if draft else 0)
    if tree.depths:
        raise ConfigError(
            f"the controller {LOAD!r} drafts a tree or nothing, and this one's depth "
            f"is chosen from {tree.depths}; give a number of speculative tokens, or "
            f"use the controller 'auto'"
        )
    if draft is None or not tree.num_steps:
        return tree

    return dataclasses.replace(tree, depths=(0, tree.num_steps))


def _marginal(tree: TreeConfig | None, draft: LoadedDraft | None) -> HowMuch:
    """The marginal rule, for a chain of `steered.DEEPEST` unless a tree is given."""
    if draft is None:
        return HowMuch(TreeConfig(num_steps=0), None, None, all_drafted)
    if draft.mix == "mixed":
        raise ConfigError(
            "the controller 'marginal' weighs one draft, and mixed:... has two side by "
            "side; use fallback:..., or another controller"
        )

    if draft.family.config is None:
        raise ConfigError(
            f"the controller 'marginal' weighs what a draft thinks of its tokens, and "
            f"suggestions as of {draft.family.name!r} have no logits; use 'auto'"
        )

    deepest = steered.DEEPEST
    if draft.family.max_depth is not None:
        deepest = min(deepest, draft.family.max_depth(draft.architecture))
    tree = tree or TreeConfig(num_steps=deepest)

    return HowMuch(
        steered.steerable(tree),
        MARGINAL,
        unless_worth_more_now,
        most_tokens_a_second,
        promises_of,
    )


def _warn_of_policies(folder: str, meta: PolicyMeta, batch_size: int) -> None:
    """Says where policies are likely to draft too much or too little.

    Those that go on learning find out by themselves what steps take here.
    """
    here = device_name()
    taught_on = meta.clock_device
    if taught_on and taught_on != here:
        warnings.warn(
            f"the policies of {folder} were taught by another clock ({taught_on}) than "
            f"this machine's ({here}), so they may draft too much or too little; teach "
            f"them again (`ospec train-control --clock again`), or let them go on with "
            f"learn_control=0.02",
            stacklevel=4,
        )
    if batch_size > 1:
        warnings.warn(
            f"the policies of {folder} know one request at a time, and {batch_size} "
            f"are decoded together: they draft on where that does not pay; use the "
            f"controller 'auto', which weighs all rows",
            stacklevel=4,
        )


def _policies(
    tree: TreeConfig | None,
    draft: LoadedDraft | None,
    policies: Policies,
    learn_control: float,
) -> HowMuch:
    """LTD's policies, for the trees that they were taught on unless one is given."""
    tree = tree or tree_of(policies)
    if draft is None or not tree.num_steps:
        return HowMuch(tree, None, None, all_drafted)

    # Of drawn children none is left out, whatever the policy for the size says.
    if not tree.sizes:
        most = tree.num_nodes - 1
        sizes = (*(size for size in policies.shape.sizes if size < most), most)
        tree = dataclasses.replace(tree, sizes=sizes)

    rule = functools.partial(taught.asked, policies)
    evidence = None
    if learn_control:
        taught.check_fits(policies.shape, tree)
        rule = functools.partial(taught.learning, policies, budget=learn_control)
        evidence = cycle_of

    return HowMuch(tree, rule, taught_now, taught_size_now, evidence)


def tree_of(policies: Policies) -> TreeConfig:
    """The largest tree that policies know."""
    shape = policies.shape
    if shape.topk == 1:
        return TreeConfig(num_steps=shape.depth)

    return TreeConfig("dynamic", shape.depth, shape.topk, max(shape.sizes))
