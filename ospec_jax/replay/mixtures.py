# SPDX-License-Identifier: Apache-2.0
"""Selections on every domain alone and on mixtures of them: the paper's main table.

HedgeSpec's table 1 has a row a method and a column a domain. Here each domain's stream
is served alone, by selections that begin anew, and then the domains together: one after
the other, and shuffled. Fixed drafters and the best ones in hindsight stand above. What
depends on the order is measured in several.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.replay.copies import spread_of
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.router import Routes
from ospec_jax.replay.selection import BEST, Selected, hindsight, replay

BLOCKS = "mixed, in blocks"
SHUFFLED = "mixed, shuffled"
NUM_FIRST = 100

Streams = dict[str, list[PoolAnswer]]


def streams_of(answers: Sequence[PoolAnswer], seed: int) -> Streams:
    """The streams of one order of the answers, by name.

    Raises:
      ConfigError: The answers are of one domain.
    """
    domains = sorted({one.domain for one in answers})
    if len(domains) < 2:
        raise ConfigError(
            f"the recorded answers are of the domain {domains[0] if domains else ''!r} "
            f"alone; a mixture needs two or more, named by `domain` in the prompts"
        )

    rng = np.random.default_rng(seed)
    shuffled = [answers[i] for i in rng.permutation(len(answers))]
    of_domain = lambda domain: [one for one in shuffled if one.domain == domain]
    turns = [domains[i] for i in rng.permutation(len(domains))]

    return {
        **{domain: of_domain(domain) for domain in domains},
        BLOCKS: [one for domain in turns for one in of_domain(domain)],
        SHUFFLED: shuffled,
    }


def compare_mixtures(
    meta: PoolMeta,
    answers: Sequence[PoolAnswer],
    names: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    routes: Routes | None = None,
    on_seed: Callable[[int], None] = lambda number: None,
) -> list[dict]:
    """Tokens a pass of every selection on every stream.

    Args:
      seeds: Of orders.
      routes: Of a router that was trained on other prompts; None leaves it out.
      on_seed: Called with how many orders are done.

    Returns:
      For each row a JSON object: `name`, and by stream under `streams` a list of tokens
      a pass, one of each seed; under `regret` likewise the passes beyond the best
      fixed drafter's.
    """
    rows: dict[str, dict] = {}
    first = f"first {min(NUM_FIRST, len(answers))} of {SHUFFLED}"

    for number, seed in enumerate(seeds, 1):
        for stream, ordered in streams_of(answers, seed).items():
            found = _on_stream(meta, ordered, names, routes)
            _book(rows, stream, found)
            if stream == SHUFFLED:
                begun = [_beginning(one, NUM_FIRST) for one in found]
                fixed = begun[: len(meta.drafters)]
                # Who is best in hindsight is another one for the beginning alone.
                rest = begun[len(fixed) + 2 :]
                _book(rows, first, [*fixed, *hindsight(fixed), *rest])
        on_seed(number)

    return list(rows.values())


def _on_stream(
    meta: PoolMeta,
    answers: Sequence[PoolAnswer],
    names: Sequence[str],
    routes: Routes | None,
) -> list[Selected]:
    """Fixed drafters, the best in hindsight, the router, and the rules."""
    fixed = []
    for number, name in enumerate(meta.drafters):
        one = replay(meta, answers, f"fixed:{number}")
        one.name = name
        fixed.append(one)

    routed = [] if routes is None else [routes.select(fixed, answers)]
    chosen = [replay(meta, answers, name) for name in names]
    return [*fixed, *hindsight(fixed), *routed, *chosen]


def _beginning(one: Selected, count: int) -> Selected:
    return Selected(
        one.name,
        one.steps[:count],
        one.tokens[:count],
        one.seconds[:count],
        one.shares[:count],
    )


def _book(rows: dict[str, dict], stream: str, found: Sequence[Selected]) -> None:
    best = next(one for one in found if one.name.startswith(BEST))
    for one in found:
        # Its own name says which one was best, which differs from stream to stream.
        name = BEST if one is best else one.name
        row = rows.setdefault(name, {"name": name, "streams": {}, "regret": {}})
        lengths = row["streams"].setdefault(stream, [])
        lengths.append(one.mean_acceptance_length)
        regret = row["regret"].setdefault(stream, [])
        regret.append(int(one.steps.sum() - best.steps.sum()))


def markdown_table(rows: list[dict]) -> str:
    """Mean tokens a pass and their standard deviation over orders, a line a row."""
    streams = list(rows[0]["streams"])
    lines = [
        "| " + " | ".join(["selector", *streams]) + " |",
        "|---" * (1 + len(streams)) + "|",
    ]
    for row in rows:
        cells = [spread_of(row["streams"][stream], digits=3) for stream in streams]
        # Sums over a whole stream do not depend on its order where nothing is learned.
        cells = [cell.removesuffix(" ± 0.000") for cell in cells]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")

    return "\n".join(lines)
