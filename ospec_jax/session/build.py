# SPDX-License-Identifier: Apache-2.0
"""What a session is made of: drafters for its steps, their engine, and a trainer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from ospec_jax import sharding
from ospec_jax.config import ConfigError, DraftConfig, TreeConfig
from ospec_jax.control.base import SUGGESTIONS, Action, Controller, follow_predictions
from ospec_jax.control.registry import BuildController, find_controller
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.judging import check_judged
from ospec_jax.decoding.step import StepConfig, shared_tables
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.combine import mixed_tree
from ospec_jax.drafters.ngram import ORDERS, init_memory
from ospec_jax.drafters.pool import Members
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.sharing import caster
from ospec_jax.online.registry import build_trainer
from ospec_jax.online.trainer import Trainer
from ospec_jax.session.how_much import HowMuch
from ospec_jax.session.members import learner_of_members, trainer_of_members
from ospec_jax.types import Draft

NUM_BEHIND = 16
"""Tokens that a resting draft may be behind by. Each is a cache slot that no request
can use, and a row of the pass that catches up. Chosen, not measured."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What was built.

    Attributes:
      learner: The one that `auto` stands for, or what can be learned of such a draft;
        `trainer`, what it built. None without learning.
      serve: Makes the draft that decodes of one in float32.
    """

    engine: Engine
    controller: Controller
    learner: LearnerConfig | None
    trainer: Trainer | None
    serve: Callable[[Draft], Draft]


def fitting_tree(tree: TreeConfig | None, draft: LoadedDraft | None) -> TreeConfig:
    """How much to draft, as far as the draft can."""
    tree = _within_reach(tree or TreeConfig(num_steps=3 if draft else 0), draft)
    return mixed_tree(draft.mix, tree) if draft is not None else tree


def _within_reach(tree: TreeConfig, draft: LoadedDraft | None) -> TreeConfig:
    """Leaves out depths for which the draft has no heads, or all without a draft."""
    if not tree.depths:
        return tree
    if draft is None:
        return tree.of_depth(0)
    if draft.family.max_depth is None:
        return tree

    deepest = draft.family.max_depth(draft.architecture)
    depths = tuple(depth for depth in tree.depths if depth <= deepest)

    return dataclasses.replace(tree, num_steps=max(depths), depths=depths)


def assembled(
    target: Target,
    draft: LoadedDraft | None,
    plan: HowMuch,
    learner: LearnerConfig | None,
    ngrams: bool,
    num_predicted_tokens: int,
    has_log_probs: bool,
    judge_every: int = 1,
) -> Parts:
    """Builds the engine, a drafter for each kind of step, and what learns.

    Args:
      plan: Whose tree fits the draft; see `fitting_tree`.
    """
    tree = plan.tree
    assert tree is not None, "it fits the draft"
    drafting = _drafting_of(target, draft, plan, ngrams, num_predicted_tokens)
    orders = draft.memory_orders if draft else ORDERS
    serve = serving(target, draft, orders)
    trainer = None
    if draft is not None and learner is not None:
        assert drafting.drafter is not None
        learner = learner_for(learner, draft, drafting.drafter, target)
        _check_choices(learner, tree)
        # Remembered only where they are looked up.
        orders = orders if drafting.has_ngrams else ()
        trainer = trainer_for(
            learner,
            target,
            draft,
            drafting.drafter,
            serve,
            orders,
            num_steps=drafting.plain.num_steps,
        )

    # The long step of a held prediction is not the controller's to choose.
    actions = tuple(action for action in drafting.menu if action != drafting.long)
    rule = _rule_of(plan.controller, actions)
    num_unjudged = 0
    menu = drafting.menu
    if rule.is_judging:
        _check_judging(draft, tree, menu)
        if judge_every > 1:
            menu = _between_judgings(draft, drafting, tree, num_predicted_tokens)
            longest = max(action.tree.num_steps for action in menu) + 1
            num_unjudged = max(judge_every * (drafting.plain.num_steps + 1), longest)

    if rule.rests is not None and not num_unjudged:
        raise ConfigError(
            f"the controller would have most answers read by one member of a pool "
            f"alone (seldom), which goes with a rule that judges the others every few "
            f"steps: is_judging is {rule.is_judging}, judge_every is {judge_every}; "
            f"judge every 2 steps or more, or leave 'seldom' or `rests` out"
        )

    # The engine is specialised to what the trainer wants recorded.
    config = StepConfig(
        model=target.config,
        numerics=target.numerics,
        tree=drafting.plain,
        taps=draft.taps if draft else (),
        stop_ids=target.stop_ids,
        has_log_probs=has_log_probs,
        mesh=target.mesh,
        judged=drafting.plain if rule.is_judging else None,
        num_unjudged=num_unjudged,
        num_behind=0 if rule.is_judging else _num_behind(draft, menu),
        size_fn=plan.size_fn,
        evidence_fn=plan.evidence_fn,
        delta_rank=learner.delta_rank if learner is not None and trainer else 0,
        reads_prompts=rule.reads_prompts,
    )
    recording = trainer.recording if trainer else "nothing"
    engine = Engine(config, target.params, drafting.drafter, recording, menu)
    if drafting.long is not None:
        rule = follow_predictions(rule, drafting.long)
    if trainer is None:
        return Parts(engine, rule, None, None, serve)

    return Parts(engine, rule, learner, trainer, trainer.serve)


class _Drafting(NamedTuple):
    """Who drafts in a session's steps.

    Attributes:
      plain: The tree of the engine's own action: of several depths the deepest; the
        others share its state.
      menu: The drafter of each action; None decodes plainly.
      long: The action for held predictions, if any.
      drafter: Runs over prompts; None without a draft.
      has_ngrams: Whether n-grams are looked up.
      build: Makes a drafter of an architecture and a tree; None without a draft.
    """

    plain: TreeConfig
    menu: Mapping[Action, Drafter | None]
    long: Action | None = None
    drafter: Drafter | None = None
    has_ngrams: bool = False
    build: Callable[..., Drafter] | None = None


def _drafting_of(
    target: Target,
    draft: LoadedDraft | None,
    plan: HowMuch,
    ngrams: bool,
    num_predicted_tokens: int,
) -> _Drafting:
    """Builds the drafters."""
    tree = plan.tree
    assert tree is not None, "it fits the draft"
    plain = tree.of_depth(tree.num_steps) if tree.depths else tree
    if draft is None:
        return _Drafting(plain, {Action(plain): None})

    # Suggestions in place of drawn children would not be exact.
    has_ngrams = ngrams and tree.children == "topk" and tree.num_steps > 0
    # n-grams are then a drafter beside the other one, and lend it nothing.
    if draft.mix:
        has_ngrams = draft.needs_ngrams
    build = functools.partial(
        build_drafter,
        draft.family,
        numerics=target.numerics,
        has_ngrams=has_ngrams,
        mix=draft.mix,
        stop_fn=plan.stop_fn,
    )
    menu, long = _menu_of(build, _by_number(draft), tree, num_predicted_tokens)
    drafter = menu[Action(plain)]
    if draft.pool is not None:
        # All members run over prompts.
        everyone = dataclasses.replace(draft.pool, extends="all")
        drafter = build(everyone, plain)

    return _Drafting(plain, menu, long, drafter, has_ngrams, build)


def _between_judgings(
    draft: LoadedDraft | None,
    drafting: _Drafting,
    tree: TreeConfig,
    num_predicted_tokens: int,
) -> Mapping[Action, Drafter | None]:
    """The menu where only the one that proposes is kept up to date."""
    assert draft is not None, "several drafts are judged"
    assert drafting.build is not None, "several drafts are judged"
    architectures = _by_number(draft, extends="chosen")
    return _menu_of(drafting.build, architectures, tree, num_predicted_tokens)[0]


def _num_behind(
    draft: LoadedDraft | None, menu: Mapping[Action, Drafter | None]
) -> int:
    """Tokens that the draft may be behind by, while plain steps rest."""
    depths = {action.tree.num_steps for action in menu}
    if draft is None or not _may_rest(draft) or 0 not in depths or len(depths) == 1:
        return 0

    return NUM_BEHIND


def _may_rest(draft: LoadedDraft) -> bool:
    """Whether a draft may be behind while nothing is drafted.

    Suggestions alone take no time. Of longer ones it must be known after each token
    whether they are sure.
    """
    if draft.pool is not None or draft.suggestions == "suffix":
        return False

    return draft.meta.draft is not None or draft.model is not None


def _check_choices(learner: LearnerConfig, tree: TreeConfig) -> None:
    """Refuses a learner of most probable tokens where other ones are drafted."""
    if learner.recording == "choices" and tree.children != "topk":
        raise ConfigError(
            f"the learner {learner.name!r} learns from the draft's most probable "
            f"tokens, and children {tree.children!r} are drawn; use children 'topk', "
            f"or the learner 'head'"
        )


def _rule_of(
    controller: str | BuildController | None, actions: tuple[Action, ...]
) -> Controller:
    rule: Any = find_controller(controller, actions)(actions)
    if isinstance(rule, Controller):
        return rule

    raise ConfigError(
        f"the rule {getattr(controller, '__name__', controller)!r} returned "
        f"{type(rule).__name__}; a function from actions to a `Controller` is wanted"
    )


def _check_judging(
    draft: LoadedDraft | None, tree: TreeConfig, menu: Mapping[Action, Drafter | None]
) -> None:
    """Refuses to judge drafters of which nobody can tell how they would have drafted.

    Raises:
      ConfigError: There is one, or there is nobody to judge.
    """
    check_judged(tree)
    if draft is None or draft.pool is None:
        raise ConfigError(
            "a controller that judges drafters needs several: use a pool, as in "
            "pool:shipped+ngram"
        )
    if draft.pool.extends != "all":
        raise ConfigError(
            f"extends is {draft.pool.extends!r}: members that do not run over all "
            f"tokens cannot be judged; use 'all', or choose by ucb, exp3, thompson or "
            f"epsilon, which look at what was accepted"
        )
    if all(drafter and drafter.retrace for drafter in menu.values()):
        return

    raise ConfigError(
        "a member of the pool cannot be judged without being asked: that is so for "
        "self:... and for drafters of one's own without `retrace`; leave it out, or "
        "choose by ucb, exp3, thompson or epsilon, which look at what was accepted"
    )


def _by_number(
    draft: LoadedDraft, extends: Literal["all", "chosen"] | None = None
) -> list:
    """What a drafter is built from, for each number of the one that proposes."""
    if draft.pool is None:
        return [draft.architecture]

    extends = extends or draft.pool.extends
    pool = dataclasses.replace(draft.pool, extends=extends)
    return [pool.first(i) for i in range(len(draft.members))]


def _menu_of(
    build: Callable[..., Drafter],
    architectures: list,
    tree: TreeConfig,
    num_predicted_tokens: int,
) -> tuple[dict[Action, Drafter], Action | None]:
    """Drafters of every action: each number and depth, and while a prediction holds.

    Returns:
      The menu, for each number the deepest action last, and the action for held
      predictions, if any.
    """
    trees = [tree.of_depth(depth) for depth in tree.depths] or [tree]
    menu = {}

    for number, architecture in enumerate(architectures):
        deepest = build(architecture, trees[-1])
        for one in trees:
            # Nothing is proposed at depth 0, but the draft is kept up to date.
            drafter = build(architecture, one) if one.num_steps else deepest
            menu[Action(one, number)] = drafter

    # A chain that is no longer than the tree would gain nothing.
    if not 0 < tree.num_steps < num_predicted_tokens:
        return menu, None

    chain = TreeConfig(num_steps=num_predicted_tokens)
    long = Action(chain, SUGGESTIONS)

    return menu | {long: build(architectures[0], trees[-1], predicted=chain)}, long


def learner_for(
    learner: LearnerConfig, draft: LoadedDraft, drafter: Drafter, target: Target
) -> LearnerConfig:
    """What can be learned of a draft that is not trained, and what `auto` is.

    Raises:
      ConfigError: A rule of the user's would have nothing to train, or members of a
        pool are to learn that cannot.
    """
    if learner.members:
        return learner_of_members(learner, draft, target)

    if draft.meta.draft is None:
        if learner.rule is not None:
            raise ConfigError(
                f"the rule {learner.rule_name!r} trains a draft's parameters, and "
                f"{draft.meta.family!r} has none; give a trained draft, or leave the "
                f"rule out to learn n-grams"
            )
        return learner.renamed("memory")

    return learner.decided(drafter.head_inputs is not None)


def trainer_for(
    learner: LearnerConfig,
    target: Target,
    draft: LoadedDraft,
    drafter: Drafter,
    serve: Callable[[Draft], Draft],
    orders: tuple[int, ...] = (),
    tap_width: int = 0,
    num_steps: int = 1,
) -> Trainer:
    """What learning runs.

    Args:
      serve: Makes the draft that decodes of one in float32.
      orders: Lengths of the n-grams to remember, if any.
      tap_width: Of what is recorded, if it is more than the draft reads.
      num_steps: Tokens of a chain, for members of a pool that did not draft it.
    """
    if learner.members:
        return trainer_of_members(learner, target, draft, serve, orders, num_steps)

    width = target.config.hidden_size
    return build_trainer(
        learner,
        drafter,
        shared_tables(target.params),
        serve,
        tap_width=tap_width or len(draft.taps) * width,
        hidden_size=width,
        vocab_size=target.config.vocab_size,
        numerics=target.numerics,
        orders=orders,
        mesh=target.mesh,
    )


def serving(
    target: Target, draft: LoadedDraft | None, orders: tuple[int, ...]
) -> Callable[[Draft], Draft]:
    """From a draft in float32 to the one that decodes, in the target's precision.

    It remembers no n-grams; there is nothing in its table but their rates.
    """
    mesh = target.mesh
    members = draft.members if draft is not None else ()
    is_trained = draft is not None and draft.meta.draft is not None
    cast = caster(target.numerics.precision, mesh)
    nothing = sharding.put_params(init_memory(1, orders), mesh)

    def serve(draft: Draft) -> Draft:
        # Drafts that are not trained come ready to run, in their own precision.
        params = cast(draft.params) if is_trained else draft.params
        if members:
            drafts = zip(members, params.items, strict=True)
            served = (
                one.replace(params=cast(one.params)) if member.meta.draft else one
                for member, one in drafts
            )
            params = Members(tuple(served))

        return draft.replace(params=params, memory=nothing)

    return serve


def grouped(
    tree,
    config: DraftConfig | None,
    mesh: jax.sharding.Mesh | None,
    is_inverse: bool = False,
):
    """A draft or trainer's state in the mesh's order of rows, or back in the files'.

    Args:
      config: The draft's architecture; None for one that is not trained.
    """
    if mesh is None or config is None:
        return sharding.put_params(tree, mesh)

    sharding.check_model(mesh, config, "the draft")
    # Rows of fused products stand in the files in one order and on devices in another.
    move = lambda tree: sharding.regroup(
        tree, config, sharding.num_groups(mesh), is_inverse
    )
    return jax.jit(sharding.pinned(move, mesh, sharding.param_shardings))(
        sharding.put_params(tree, mesh)
    )
