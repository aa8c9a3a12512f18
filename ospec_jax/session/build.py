# SPDX-License-Identifier: Apache-2.0
"""What a session is made of: drafters for its steps, their engine, and adaptation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from ospec_jax.config import LearnerConfig, TreeConfig
from ospec_jax.control.base import SUGGESTIONS, Action, Controller, follow_predictions
from ospec_jax.control.registry import BuildController, find_controller
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.step import StepConfig, shared_tables
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.tokenizer import stop_token_ids
from ospec_jax.online.last_layer import HeadAdaptation
from ospec_jax.online.windows import Adaptation


@dataclasses.dataclass(frozen=True)
class Parts:
    """What was built.

    Attributes:
      learner: The one that `auto` stands for, or what can be learned of such a draft.
      has_ngrams: Whether n-grams suggest tokens.
    """

    engine: Engine
    controller: Controller
    drafter: Drafter | None
    learner: LearnerConfig | None
    has_ngrams: bool


def fitting_tree(tree: TreeConfig | None, draft: LoadedDraft | None) -> TreeConfig:
    """How much to draft, as far as the draft can."""
    tree = _within_reach(tree or TreeConfig(num_steps=3 if draft else 0), draft)
    if draft is not None and draft.mix == "mixed" and tree.is_chain:
        return dataclasses.replace(tree, kind="parallel")
    return tree


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
    target: Target, draft: LoadedDraft | None, tree: TreeConfig,
    learner: LearnerConfig | None, ngrams: bool, num_predicted_tokens: int,
    has_log_probs: bool, controller: str | BuildController | None,
) -> Parts:  # fmt: skip
    """Builds the engine, and a drafter for each kind of step; see `Session`."""
    has_ngrams = ngrams and tree.children == "topk" and tree.num_steps > 0
    drafter, recording = None, "nothing"
    plain = tree.of_depth(tree.num_steps) if tree.depths else tree
    menu: Mapping[Action, Drafter | None] = {Action(plain): None}
    long = None
    if draft is not None:
        if draft.mix:
            has_ngrams = draft.suggestions != "prediction"
        build = functools.partial(
            build_drafter, draft.family, draft.architecture,
            numerics=target.numerics, has_ngrams=has_ngrams, mix=draft.mix,
        )  # fmt: skip
        drafters, long = _menu_of(build, tree, num_predicted_tokens)
        menu = drafters
        drafter = drafters[Action(plain)]
        learner = learner and learner_for(learner, draft, drafter, target)
        recording = learner.recording if learner else recording
    config = StepConfig(
        model=target.config, numerics=target.numerics, tree=plain,
        taps=draft.taps if draft else (), stop_ids=stop_token_ids(target.tokenizer),
        has_log_probs=has_log_probs, mesh=target.mesh,
    )  # fmt: skip
    engine = Engine(config, target.params, drafter, recording, menu)
    actions = tuple(action for action in menu if action != long)
    rule = find_controller(controller, actions)(actions)
    if long is not None:
        rule = follow_predictions(rule, long)
    return Parts(engine, rule, drafter, learner, has_ngrams)


def _menu_of(
    build: Callable[..., Drafter], tree: TreeConfig, num_predicted_tokens: int
) -> tuple[dict[Action, Drafter], Action | None]:
    """Drafters of every action: one a depth, and one while a prediction holds.

    Returns:
      The menu, deepest action last, and the action for held predictions, if any.
    """
    trees = [tree.of_depth(depth) for depth in tree.depths] or [tree]
    deepest = build(tree=trees[-1])
    # Nothing is proposed at depth 0, but the draft is kept up to date.
    menu = {
        Action(tree): build(tree=tree) if tree.num_steps else deepest
        for tree in trees[:-1]
    }
    menu[Action(trees[-1])] = deepest
    if not 0 < tree.num_steps < num_predicted_tokens:
        return menu, None

    chain = TreeConfig(num_steps=num_predicted_tokens)
    long = Action(chain, SUGGESTIONS)
    return menu | {long: build(tree=trees[-1], predicted=chain)}, long


def learner_for(
    learner: LearnerConfig, draft: LoadedDraft, drafter: Drafter, target: Target
) -> LearnerConfig:
    """What can be learned of a draft that is not trained, and what `auto` is."""
    if draft.meta.draft is None:
        return learner.renamed("memory")
    if learner.name != "auto":
        return learner
    can_learn_head = drafter.head_inputs is not None and target.mesh is None
    is_head = can_learn_head and not learner.asks_for_gradients
    return learner.renamed("head" if is_head else "gradient")


def build_adaptation(
    target: Target, draft: LoadedDraft, drafter: Drafter, learner: LearnerConfig,
    has_ngrams: bool, orders: tuple[int, ...] = (), tap_width: int = 0,
) -> Adaptation:  # fmt: skip
    """What learning runs.

    Args:
      has_ngrams: Remember n-grams, of these `orders`.
      tap_width: Of what is recorded, if it is more than the draft reads.
    """
    width = target.config.hidden_size
    adaptation = Adaptation(
        learner, drafter.unroll, shared_tables(target.params),
        tap_width or len(draft.taps) * width, width, has_ngrams, target.mesh, orders,
    )  # fmt: skip
    if learner.name == "head":
        adaptation.head = HeadAdaptation(
            learner, drafter.head_inputs, target.numerics, target.config.vocab_size
        )
    return adaptation
