# SPDX-License-Identifier: Apache-2.0
"""Controllers by name."""

import functools
from collections.abc import Callable

from ospec_jax.config import ConfigError
from ospec_jax.control.base import Action, Controller, fixed
from ospec_jax.control.contexts import KEYS, by_key
from ospec_jax.control.depth import PARTS_OF_DEPTHS, most_tokens_a_second
from ospec_jax.control.selectors import BANDITS, JUDGING, build_selector, is_selector
from ospec_jax.control.steered import marginal_rule

BuildController = Callable[[tuple[Action, ...]], Controller]

AUTO = "auto"


def _depths_by_key(kind: str, actions: tuple[Action, ...]) -> Controller:
    return by_key(most_tokens_a_second(actions), PARTS_OF_DEPTHS, KEYS[kind])


CONTROLLERS: dict[str, BuildController] = {
    "fixed": fixed,
    AUTO: most_tokens_a_second,
    **{f"{AUTO}:{kind}": functools.partial(_depths_by_key, kind) for kind in KEYS},
    "marginal": marginal_rule,
}
"""Rules for what to run next, each built for the actions to choose from.

`auto:scope` learns the chances of drafted tokens for each key and tenant of a server by
itself, `auto:domain` for each domain that prompts name, `auto:opening` for each
beginning of prompts.

These choose how deep to draft, and `marginal` how much within the step, by rules that a
session gives it. Of a pool's drafters they take the first. Those that choose drafters
are in `control.selectors`.
"""


def is_auto(name: str | None) -> bool:
    """Whether it names the rule for depths, for all requests alike or by their kind."""
    return name is not None and name.partition(":")[0] == AUTO


def find_controller(
    name_or_rule: str | BuildController | None, actions: tuple[Action, ...]
) -> BuildController:
    """The rule of a name, or the one that is given.

    Args:
      name_or_rule: None stands for `auto` where there is a choice, else for `fixed`.

    Raises:
      ConfigError: There is no rule of that name, or it contradicts the actions.
    """
    if callable(name_or_rule):
        return name_or_rule
    if isinstance(name_or_rule, Controller):
        raise ConfigError(
            "the controller is a `Controller` already; give the function that builds "
            "it from the session's actions"
        )
    if isinstance(name_or_rule, str) and is_selector(name_or_rule):
        selection = name_or_rule
        return lambda actions: build_selector(selection, actions)

    actions = _of_first_drafter(actions)
    if name_or_rule is None:
        name_or_rule = "auto" if len(actions) > 1 else "fixed"
    if not isinstance(name_or_rule, str) or name_or_rule not in CONTROLLERS:
        raise ConfigError(
            f"unknown controller {name_or_rule!r}; use {', '.join(CONTROLLERS)}; for "
            f"the drafters of a pool {', '.join((*JUDGING, *BANDITS))}; or a function "
            f"from actions to a `Controller`"
        )

    if name_or_rule == "fixed" and len(actions) > 1:
        depths = [action.tree.num_steps for action in actions]
        raise ConfigError(
            f"the controller 'fixed' cannot choose among the depths {depths}; give one "
            f"number of speculative tokens, or the controller 'auto'"
        )

    if is_auto(name_or_rule) and len(actions) == 1 and actions[0].tree.num_steps:
        raise ConfigError(
            f"the controller {name_or_rule!r} has nothing to choose from: only trees "
            f"of depth {actions[0].tree.num_steps} are drafted; use "
            f"num_speculative_tokens auto (in Python `TreeConfig.auto()`)"
        )

    # The rule is built later, for all actions of a session; those by name look only at
    # the first drafter's.
    rule = CONTROLLERS[name_or_rule]
    return lambda actions: rule(_of_first_drafter(actions))


def _of_first_drafter(actions: tuple[Action, ...]) -> tuple[Action, ...]:
    return tuple(action for action in actions if action.drafter == 0)
