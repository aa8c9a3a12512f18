# SPDX-License-Identifier: Apache-2.0
"""Regret against the number of drafters: pools of any size, made of one recording.

HedgeSpec's regret is to grow with the logarithm of the number of drafters N, a bandit's
with N or its root. To see that by replay a pool is filled up with copies of its
members, each of which loses tokens by chance that its original had right. So the best
drafter stays the best, and every copy is a further one to tell from it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ospec_jax import atomic
from ospec_jax.config import ConfigError
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.selection import replay

NOISE = 0.3
"""Chance that a copy loses a token: enough that no copy comes near its original."""


def with_copies(
    meta: PoolMeta,
    answers: Sequence[PoolAnswer],
    num_drafters: int,
    noise: float = NOISE,
    seed: int = 0,
) -> tuple[PoolMeta, list[PoolAnswer]]:
    """The recording of a pool of so many drafters.

    The best member on the recorded answers comes first, then the others in their order,
    then copies of all of them in turn. Pools of fewer drafters are beginnings of those
    of more, with the same copies.

    Args:
      noise: Chance that a copy loses each token, for every draft that had it right.
      seed: Of what is lost.

    Raises:
      ConfigError: There are fewer than two drafters, or the chance is none.
    """
    if num_drafters < 2:
        raise ConfigError(
            f"a pool of {num_drafters} drafters leaves nothing to select; use 2 or more"
        )
    if not 0 < noise < 1:
        raise ConfigError(
            f"copies lose each token with the chance {noise}; use one in (0, 1)"
        )

    width = len(meta.drafters)
    steps = [replay(meta, answers, f"fixed:{i}").steps.sum() for i in range(width)]
    best = int(np.argmin(steps))
    order = [best, *(i for i in range(width) if i != best)]
    originals = [order[i % width] for i in range(num_drafters)]
    numbers = [i // width for i in range(num_drafters)]
    names = tuple(
        meta.drafters[original] + (f", copy {number}" if number else "")
        for original, number in zip(originals, numbers, strict=True)
    )

    found = []
    for place, answer in enumerate(answers):
        hits, accepted = [], []
        for original, number in zip(originals, numbers, strict=True):
            own = answer.hits[:, original], answer.accepted[:, original]
            if number:
                rng = np.random.default_rng((seed, place, original, number))
                own = _losing(*own, rng.uniform(size=len(own[0])) < noise)
            hits.append(own[0])
            accepted.append(own[1])
        found.append(
            dataclasses.replace(
                answer,
                hits=np.stack(hits, axis=1),
                accepted=np.stack(accepted, axis=1),
            )
        )

    return dataclasses.replace(meta, drafters=names), found


def _losing(
    hits: np.ndarray, accepted: np.ndarray, is_lost: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hits and chains of a drafter that has these tokens wrong, whoever asks it when.

    A chain ends in front of the first token that is lost.
    """
    places = np.arange(len(is_lost))
    lost = np.append(np.flatnonzero(is_lost), len(is_lost) + accepted.max(initial=0))
    to_next = lost[np.searchsorted(lost, places)] - places

    return hits * ~is_lost, np.minimum(accepted, to_next)


def as_experts(
    meta: PoolMeta,
    answers: Sequence[PoolAnswer],
    noise: float = NOISE,
    seed: int = 0,
) -> tuple[PoolMeta, list[PoolAnswer]]:
    """The recording of made-up experts: the best member, at home in one domain each.

    Elsewhere an expert loses tokens as copies do. What a rule could come to where
    drafters are experts is seen by it, not how good trained ones would be.

    Args:
      noise: Chance that an expert loses each token outside its domain.
      seed: Of what is lost.
    """
    width = len(meta.drafters)
    steps = [replay(meta, answers, f"fixed:{i}").steps.sum() for i in range(width)]
    best = int(np.argmin(steps))
    domains = sorted({one.domain for one in answers})

    found = []
    for place, answer in enumerate(answers):
        own = answer.hits[:, best], answer.accepted[:, best]
        columns = []
        for number, domain in enumerate(domains):
            rng = np.random.default_rng((seed, place, number))
            is_lost = rng.uniform(size=len(own[0])) < noise
            is_home = domain == answer.domain
            columns.append(own if is_home else _losing(*own, is_lost))
        hits, accepted = zip(*columns, strict=True)
        found.append(
            dataclasses.replace(
                answer,
                hits=np.stack(hits, axis=1),
                accepted=np.stack(accepted, axis=1),
            )
        )

    names = tuple(f"made up, at home in {domain}" for domain in domains)
    return dataclasses.replace(meta, drafters=names), found


def regret_by_size(
    meta: PoolMeta,
    answers: Sequence[PoolAnswer],
    names: Sequence[str],
    sizes: Sequence[int],
    seeds: Sequence[int] = (0,),
    noise: float = NOISE,
) -> list[dict]:
    """Passes of the target beyond those of the best fixed drafter, for pools of sizes.

    Each seed has losses of its own, and an order of the answers of its own.

    Returns:
      For each rule and size a JSON object: `name`, `num_drafters`, `regret` for each
      seed, `best_steps` likewise, of the best fixed drafter.
    """
    rows = []
    for size in sizes:
        pools = []
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(len(answers))
            pool = with_copies(meta, [answers[i] for i in order], size, noise, seed)
            # Copies only lose, so the best member is the best of all.
            best = int(replay(pool[0], pool[1], "fixed:0").steps.sum())
            pools.append((pool, best))

        for name in names:
            found = [replay(pool[0], pool[1], name) for pool, _ in pools]
            steps = [int(one.steps.sum()) for one in found]
            best = [own for _, own in pools]
            rows.append(
                {
                    "name": name,
                    "num_drafters": size,
                    "regret": [a - b for a, b in zip(steps, best, strict=True)],
                    "best_steps": best,
                }
            )

    return rows


def markdown_table(rows: list[dict]) -> str:
    """Mean regret and its standard deviation over seeds, a line a rule."""
    sizes = sorted({row["num_drafters"] for row in rows})
    head = ["selector", *(f"N = {size}" for size in sizes)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {
            row["num_drafters"]: row["regret"] for row in rows if row["name"] == name
        }
        cells = [spread_of(own[size], digits=0) for size in sizes]
        lines.append("| " + " | ".join([name, *cells]) + " |")

    return "\n".join(lines)


def spread_of(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, as tables have them; of one value that alone."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean

    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def plot(rows: list[dict], path: Path) -> Path:
    """Draws regret against the number of drafters, a line a rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    sizes = sorted({row["num_drafters"] for row in rows})
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {
            row["num_drafters"]: row["regret"] for row in rows if row["name"] == name
        }
        means = [np.mean(own[size]) for size in sizes]
        spreads = [np.std(own[size]) for size in sizes]
        axes.errorbar(sizes, means, spreads, label=name, marker="o", capsize=3)

    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(
        title="Passes of the target beyond those of the best fixed drafter",
        xlabel="drafters in the pool",
        ylabel="passes; below 0 is better",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)

    return atomic.write_figure(figure, path)
