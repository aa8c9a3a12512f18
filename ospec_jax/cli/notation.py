# SPDX-License-Identifier: Apache-2.0
"""The command line's notation of draft trees, and of biases."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from ospec_jax.config import ChildrenKind, ConfigError, TreeConfig, Verification
from ospec_jax.drafters.topology import best_parents, static_depths


def parse_bias(texts: Iterable[str]) -> tuple[tuple[int, float], ...]:
    """Reads the command line's `--logit-bias`: `ID:VALUE`, one a token.

    Raises:
      ConfigError: One cannot be read.
    """
    pairs = []
    for text in texts:
        token, _, value = text.partition(":")
        try:
            pairs.append((int(token), float(value)))
        except ValueError as error:
            raise ConfigError(
                f"cannot read {text!r} of --logit-bias; write ID:VALUE, like 11:-100"
            ) from error

    return tuple(pairs)


def parse_tree(
    text: str,
    num_steps: int | Literal["auto"],
    children: ChildrenKind = "topk",
    min_path_probability: float = 0.0,
    verification: Verification = "token",
):
    """Reads the command line's `--tree`.

    `chain`; `static:3,2,1` (children of each node by depth); `dynamic:4,12` (topk and
    number of draft tokens, with depth `num_steps`). A static tree has its full depth
    whatever `min_path_probability`. With `num_steps` `auto` a chain has the depth that
    pays.
    """
    kind, _, numbers = text.partition(":")
    if num_steps == "auto":
        if text != "chain":
            raise ConfigError(
                f"only chains vary their depth: give --tree {text} a number of "
                f"speculative tokens instead of auto"
            )
        return TreeConfig.auto(
            children=children,
            min_path_probability=min_path_probability,
            verification=verification,
        )

    if kind in ("opt", "sequoia"):
        found = _parse_optimal(text, kind, numbers, num_steps)
        return dataclasses.replace(
            found,
            children=children,
            verification=verification,
            min_path_probability=min_path_probability,
        )

    try:
        values = tuple(int(x) for x in numbers.split(",")) if numbers else ()
    except ValueError:
        values = None

    if kind == "chain" and values == ():
        return TreeConfig(
            "chain",
            num_steps,
            children=children,
            min_path_probability=min_path_probability,
            verification=verification,
        )
    if kind == "static" and values:
        return TreeConfig(
            "static",
            len(values),
            branching=values,
            children=children,
            verification=verification,
        )

    if kind == "dynamic" and values and len(values) == 2:
        topk, nodes = values
        return TreeConfig(
            "dynamic",
            num_steps,
            topk,
            nodes,
            children=children,
            min_path_probability=min_path_probability,
            verification=verification,
        )

    raise ConfigError(
        f"unknown tree {text!r}; use chain, static:3,2,1, dynamic:TOPK,NUM_TOKENS, "
        f"opt:NUM_TOKENS,MIN_GAIN or sequoia:NUM_TOKENS,P1,P2,..."
    )


def _parse_optimal(text, kind, numbers, num_steps):
    """Reads trees that are built for the most accepted tokens."""
    try:
        count, *values = numbers.split(",")
        size = int(count)
        rates = tuple(float(x) for x in values)
        if not rates:
            raise ValueError("no numbers")
    except ValueError as error:
        raise ConfigError(
            f"cannot read the tree {text!r}; use opt:NUM_TOKENS,MIN_GAIN, opt:12,0.2, "
            f"or sequoia:NUM_TOKENS,P1,P2,... with the chances of a node's first, "
            f"second, ... child, as sequoia:12,0.6,0.15,0.05"
        ) from error

    # OPT-Tree: a dynamic tree as wide as it has tokens, which stops once a depth adds
    # too little.
    if kind == "opt" and len(rates) == 1:
        return TreeConfig("dynamic", num_steps, size, size, min_gain=rates[0])

    parents = best_parents(rates, size, num_steps)
    return TreeConfig("static", int(max(static_depths(parents))), parents=parents)
