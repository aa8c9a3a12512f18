# SPDX-License-Identifier: Apache-2.0
"""Rules for which drafter of a pool drafts, by name: `normalhedge`, `ucb:time`, ..."""

import functools
from collections.abc import Callable
from typing import Any

from ospec_jax.config import ConfigError
from ospec_jax.control.bandits import (
    agreement,
    bandit,
    epsilon_greedy,
    exp3,
    meta_sd,
    share_accepted,
    thompson,
    ucb,
)
from ospec_jax.control.base import Action, Controller, fixed
from ospec_jax.control.contexts import KEYS, by_key
from ospec_jax.control.depth import most_tokens_a_second
from ospec_jax.control.normal_hedge import ada_normal_hedge, normal_hedge
from ospec_jax.control.selection import check_choice, parts_of_selections, select
from ospec_jax.control.similar import by_similarity
from ospec_jax.control.weighting import anytime_hedge, fixed_share, follow_leader

JUDGING: dict[str, Callable] = {
    "normalhedge": normal_hedge,
    "adanormalhedge": ada_normal_hedge,
    "hedge": anytime_hedge,
    "share": functools.partial(fixed_share, rate=1.0, share=0.01),
    "leader": functools.partial(follow_leader, discount=0.99),
}
"""Rules for weights, which learn of every drafter at every emitted token."""

META_SD = "metasd"
BANDITS = {
    "ucb": ucb,
    "exp3": exp3,
    META_SD: meta_sd,
    "thompson": thompson,
    "epsilon": epsilon_greedy,
}
"""Rules that learn only of the drafter that drafted."""

FIXED = "fixed"
"""`fixed:N`: the drafter of number N, always."""

OPTIONS = {
    "length": "drafts are worth the tokens that they yield (the default)",
    "time": "the tokens that they yield a second; steps are timed before serving",
    "acceptance": "whether their first token is right; not for bandits",
    "product": "lengths as products of chances, as published; not for bandits",
    "raw": "deep tokens are judged as first ones are, as published; not for bandits",
    "sample": "drafters are drawn from the weights; not for bandits",
    "request": "everything is forgotten at the end of an answer",
    "scope": "each key and tenant of a server has weights of its own; not for bandits",
    "domain": "likewise each domain that prompts name; not for bandits",
    "opening": "likewise each beginning of prompts, of 32 tokens; not for bandits",
    "similar": "likewise each prompt, from a vote of similar ones; not for bandits",
    "seldom": "of known kinds of requests one answer in 16 is judged; not for bandits",
}
"""What may follow a name, behind colons."""

_SIMILAR = "similar"
_KINDS = (*KEYS, _SIMILAR)
_OF_BANDITS = ("length", "time", "request")
_LOSSES = ("length", "time", "acceptance")


def is_selector(name: str) -> bool:
    """Whether a name is that of a rule for drafters, with or without options."""
    first, *options = name.split(":")
    return first in (*JUDGING, *BANDITS) or (first == FIXED and bool(options))


def build_selector(name: str, actions: tuple[Action, ...]) -> Controller:
    """The controller of a name with its options.

    Raises:
      ConfigError: There is none, its options mean nothing or contradict each other, or
        the actions leave nothing to choose.
    """
    first, *options = name.split(":")
    if first == FIXED:
        return _always(options, actions)

    known = OPTIONS if first in JUDGING else _OF_BANDITS
    unknown = [option for option in options if option not in known]
    if first not in (*JUDGING, *BANDITS) or unknown:
        raise ConfigError(
            f"cannot read the selection {name!r}: use one of {', '.join(JUDGING)}, "
            f"with {', '.join(OPTIONS)} behind colons if wanted; or one of "
            f"{', '.join(BANDITS)}, with {', '.join(_OF_BANDITS)}; or fixed:N"
        )

    losses = [option for option in options if option in _LOSSES]
    if len(set(losses)) > 1:
        raise ConfigError(f"{name!r} gives {len(losses)} losses; leave one of them")
    loss: Any = losses[0] if losses else "length"
    if loss == "acceptance" and "product" in options:
        raise ConfigError(
            f"{name!r}: 'acceptance' looks at one token, of which there is no product; "
            f"leave one of the two out"
        )

    begins_anew = "request" in options
    if first in BANDITS:
        if first == META_SD and loss == "time":
            raise ConfigError(
                f"{name!r}: {META_SD} rewards agreement with the target, which is no "
                f"number of tokens a second; leave 'time' out, or use ucb:time"
            )
        return bandit(
            actions,
            BANDITS[first],
            reward=agreement if first == META_SD else share_accepted,
            loss=loss,
            begins_anew=begins_anew,
        )

    kinds = [option for option in options if option in _KINDS]
    if len(set(kinds)) > 1 or (kinds and begins_anew):
        raise ConfigError(
            f"{name!r} tells requests apart in more than one way, or forgets what it "
            f"learned of them; leave one of {', '.join((*_KINDS, 'request'))}"
        )

    _check_seldom(name, options)
    selection = select(
        actions,
        JUDGING[first](),
        loss=loss,
        estimator="product" if "product" in options else "coupled",
        draws="sample" in options,
        corrects="raw" not in options,
        begins_anew=begins_anew,
        is_seldom="seldom" in options,
    )
    if _SIMILAR in kinds:
        return by_similarity(selection)

    if kinds:
        return by_key(selection, parts_of_selections(), KEYS[kinds[0]])

    return selection


def _check_seldom(name: str, options: list[str]) -> None:
    """Refuses to look seldom where what is known of an answer comes with it."""
    clashing = [one for one in ("request", "sample", _SIMILAR) if one in options]
    if "seldom" in options and clashing:
        raise ConfigError(
            f"{name!r}: {clashing[0]!r} chooses by what an answer shows, and most of "
            f"them are not looked at with 'seldom'; leave one of the two out"
        )


def _always(options: list[str], actions: tuple[Action, ...]) -> Controller:
    check_choice(actions, "time")
    numbers = sorted({action.drafter for action in actions})
    if len(options) != 1 or options[0] not in map(str, numbers):
        raise ConfigError(
            f"the drafter is {':'.join(options)!r}; the pool's are {FIXED}:0 to "
            f"{FIXED}:{numbers[-1]}, in the order of their names"
        )

    own = tuple(a for a in actions if a.drafter == int(options[0]))
    return fixed(own) if len(own) == 1 else most_tokens_a_second(own)
