# SPDX-License-Identifier: Apache-2.0
"""Streams of prompts whose domain drifts, from prompts sorted by domain.

A stream is a *schedule*, one domain a prompt, filled with prompts of each domain in
an order drawn by seed. No prompt occurs twice.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import Prompt


def single(names: Sequence[str], num_prompts: int, block: int, rng) -> list[str]:
    """One domain throughout.

    Raises:
      ConfigError: There are several.
    """
    if len(names) != 1:
        raise ConfigError(
            f"a single stream has one domain, not {', '.join(names)}; leave out the "
            f"others, or choose another kind"
        )

    return [names[0]] * num_prompts


def shifts(names: Sequence[str], num_prompts: int, block: int, rng) -> list[str]:
    """Each domain once, in one long block; blocks differ by one prompt at most."""
    # Rounded ends, not lengths: so the rounding never adds up.
    ends = [round(num_prompts * (i + 1) / len(names)) for i in range(len(names))]
    lengths = np.diff([0, *ends])
    pairs = zip(names, lengths, strict=True)
    return [name for name, length in pairs for _ in range(length)]


def alternating(names: Sequence[str], num_prompts: int, block: int, rng) -> list[str]:
    """Blocks of `block` prompts, in turn: what was left comes back."""
    return [names[(i // block) % len(names)] for i in range(num_prompts)]


def gradual(names: Sequence[str], num_prompts: int, block: int, rng) -> list[str]:
    """From each domain to the next, with linearly moving odds.

    At time s from 0 to the number of domains less one, the domain is floor(s) or the
    one after it, the latter with the chance that s is beyond the former.
    """
    times = np.linspace(0, len(names) - 1, num_prompts)
    # At the very end the time is the last domain's own: the one before it, with odds of
    # 1.
    before = np.minimum(times.astype(int), max(len(names) - 2, 0))
    is_next = rng.random(num_prompts) < times - before
    return [names[int(i)] for i in before + is_next]


def fast(names: Sequence[str], num_prompts: int, block: int, rng) -> list[str]:
    """Another domain with every prompt, drawn evenly: nothing learned helps next.

    Raises:
      ConfigError: There is only one domain.
    """
    if len(names) < 2:
        raise ConfigError(f"a fast stream changes its domain; {names[0]!r} is alone")

    current = int(rng.integers(len(names)))
    found = []

    for _ in range(num_prompts):
        # One to n - 1 domains on: never the same again.
        current = (current + 1 + int(rng.integers(len(names) - 1))) % len(names)
        found.append(names[current])

    return found


KINDS: dict[str, Callable] = {
    "single": single,
    "shifts": shifts,
    "gradual": gradual,
    "alternating": alternating,
    "fast": fast,
}
"""Schedules `(names, num_prompts, block, rng) -> [domain]` by name."""


def build_stream(
    domains: Mapping[str, Sequence[Prompt]],
    kind: str,
    num_prompts: int,
    seed: int = 0,
    block: int = 40,
) -> list[Prompt]:
    """A stream of `num_prompts` prompts, a function of its arguments alone.

    Args:
      domains: Prompts by domain; in the stream they carry its name.
      kind: One of `KINDS`.
      block: Prompts in a row of the same domain, for `alternating`.

    Raises:
      ConfigError: There is no such kind, a domain has fewer prompts than the stream
        asks of it, or two prompts share an id.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown stream {kind!r}; use one of {', '.join(KINDS)}")
    if num_prompts < 1 or block < 1 or not domains:
        raise ConfigError(
            f"a stream needs domains, prompts and blocks: found {len(domains)} "
            f"domains, num_prompts {num_prompts}, block {block}"
        )

    _check_ids(domains)
    # One generator for schedule and order, in this order: the stream is a function of
    # the seed.
    rng = np.random.default_rng(seed)
    schedule = KINDS[kind](list(domains), num_prompts, block, rng)
    _check_lengths(domains, schedule, kind)
    order = {name: iter(rng.permutation(len(rows))) for name, rows in domains.items()}

    return [
        dataclasses.replace(domains[name][next(order[name])], domain=name)
        for name in schedule
    ]


def _check_ids(domains: Mapping[str, Sequence[Prompt]]) -> None:
    ids = Counter(prompt.id for prompt in itertools.chain(*domains.values()))
    for repeated, count in ids.most_common(1):
        if count > 1:
            raise ConfigError(
                f"{count} prompts have the id {repeated!r}; a stream needs ids that "
                f"tell prompts of all domains apart"
            )


def _check_lengths(domains, schedule: list[str], kind: str) -> None:
    for name, needed in Counter(schedule).items():
        if needed > len(domains[name]):
            raise ConfigError(
                f"domain {name!r} has {len(domains[name])} prompts, but this {kind} "
                f"stream of {len(schedule)} needs {needed} of them: each is used "
                f"once; add prompts, or lower num_prompts"
            )
