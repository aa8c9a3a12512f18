# SPDX-License-Identifier: Apache-2.0
"""Many replicas serve, one learner learns: how stale may a draft be, and what is sent?

    python tools/fleet.py --curve replay.json --plot fleet.png

A simulation by events, along a learning curve that `ospec replay --json` recorded.
Replicas serve all the time, and send what verification said at intervals; a learner
takes it in turn, an update at a time; at intervals its draft is sent back to all. Now
and then the traffic shifts to another domain, and learning begins anew. What is sent is
counted from the shapes of the arrays. docs/fleet.md says what is assumed.
"""

import dataclasses
import heapq
import itertools
import json
from collections import deque
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ospec_jax.config import TreeConfig
from ospec_jax.drafters.registry import build_drafter, default_draft_config
from ospec_jax.models.architectures import ARCHITECTURES
from ospec_jax.models.quantization import cast_params
from ospec_jax.online.ring import init_ring
from ospec_jax.online.samples import HEAD
from ospec_jax.storage import low_rank
from ospec_jax.types import Feedback

_WINDOW = 20
"""Answers over which the recorded gain is a mean."""
_RATES = (10.0, 30.0, 100.0, 300.0, 1000.0, 10_000.0)
"""Tokens a second, of learners that are compared."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is simulated. Times are in seconds, links in gigabits a second.

    Attributes:
      curve: From `ospec replay --learners static,LEARNER --json FILE`.
      learner: Of these runs.
      plot: A PNG of both tables.
      replicas: Sizes of the fleet.
      stale_replicas: Sizes for which the interval between drafts is varied.
      rows: Requests that a replica decodes at once.
      step_seconds: Of a step of so many rows.
      shift_seconds: Between two shifts of the traffic.
      num_shifts: Domains in all.
      ship_seconds: Between two shipments of a replica's feedback.
      draft_seconds: Between two drafts that are sent back.
      update_tokens: Of an update.
      learner_rate: Tokens a second that the learner learns from.
      target_rate: Tokens a second over which the learner runs the target, where
        replicas send token ids alone.
      link: Into the learner, and out of it.
      target: Whose shapes are counted, of `ospec_jax.models.architectures`.
      draft: A trained family.
      draft_vocab_size: Tokens that it can draft.
      rank: Of a difference of drafts.
    """

    curve: Path
    learner: str = "gradient"
    plot: Path | None = None
    replicas: tuple[int, ...] = (1, 10, 100, 1000)
    stale_replicas: tuple[int, ...] = (1, 100)
    rows: int = 8
    step_seconds: float = 8.3e-3
    shift_seconds: float = 600.0
    num_shifts: int = 8
    ship_seconds: float = 10.0
    draft_seconds: float = 10.0
    update_tokens: float = 256
    learner_rate: float = 20_000.0
    target_rate: float = 20_000.0
    link: float = 100.0
    target: str = "llama-3.1-8b"
    draft: str = "eagle3"
    draft_vocab_size: int = 32000
    rank: int = 16


class Curve(NamedTuple):
    """Mean acceptance length by what a draft has learned from.

    Attributes:
      tokens: `[n]` of answers learned from, ascending from 0.
      lengths: `[n]` from that many tokens on, until the next.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def at(self, tokens: float) -> float:
        """The length of a draft that learned from so many tokens."""
        return float(self.lengths[np.searchsorted(self.tokens, tokens, "right") - 1])


def read_curve(runs: list[dict], learner: str) -> Curve:
    """What a recorded learner gained over the static draft, as its answers came in.

    Each run's lengths are means over `_WINDOW` answers; their ratio, since prompts
    differ, times the static draft's mean over all. The ratio is then made monotone by
    least squares: a draft that has learned more is taken to be no worse.

    Raises:
      ValueError: There is no such run, or no static one.
    """
    found = {run["learner"]: run["answers"] for run in runs}
    missing = {"static", learner} - set(found)
    if missing:
        raise ValueError(
            f"the file has runs of {', '.join(found)}, but not of "
            f"{' and '.join(sorted(missing))}; use --learners static,{learner}"
        )

    static, learned = found["static"], found[learner]
    ratio = _running_length(learned) / _running_length(static)
    ratio = np.maximum(_monotone(ratio), 1.0)
    tokens = np.cumsum([0, *learned["num_tokens"]])[:-1]

    return Curve(tokens, _length(static) * ratio)


def _length(answers: dict) -> float:
    return 1 + sum(answers["num_accepted_tokens"]) / sum(answers["num_drafts"])


def _running_length(answers: dict) -> np.ndarray:
    """`[n]` mean acceptance length of the answers around each."""
    whole = np.ones(_WINDOW)
    mean = lambda name: np.convolve(np.asarray(answers[name], float), whole, "same")
    return 1 + mean("num_accepted_tokens") / mean("num_drafts")


def _monotone(values: np.ndarray) -> np.ndarray:
    """The nearest series that never falls: neighbours that do are averaged."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]

    return np.concatenate([np.full(count, value) for value, count in blocks])


class Sizes(NamedTuple):
    """Bytes of what is sent.

    Attributes:
      up: Of a token, by what is sent of it.
      down: Of a draft, by what is sent of it.
    """

    up: dict[str, int]
    down: dict[str, int]


def sizes_of(settings: Settings) -> Sizes:
    """Counted from shapes: nothing is allocated.

    Features are what the ring of recent traffic holds of a token, states what the
    learner `head` reads of it, drafts are bfloat16 as they decode, differences float32
    as checkpoints have them.
    """
    model = ARCHITECTURES[settings.target]
    config = default_draft_config(model, settings.draft_vocab_size, settings.draft)
    drafter = build_drafter(settings.draft, config, TreeConfig(num_steps=1))
    params = jax.eval_shape(lambda: drafter.init_params(jax.random.key(0)))
    served = jax.eval_shape(lambda: cast_params(_zeros(params), "bfloat16"))
    change = jax.eval_shape(lambda: low_rank.empty(_zeros(params), settings.rank))
    width = len(config.taps) * model.hidden_size
    ring = jax.eval_shape(lambda: init_ring(1, 1, width, model.hidden_size))
    features = ring.segments.feedback
    states = jax.eval_shape(
        lambda: Feedback(
            jnp.zeros((1, 1), jnp.int32),
            states=jnp.zeros((1, 1, served[HEAD]["kernel"].shape[1]), jnp.float16),
            has_state=jnp.zeros((1, 1), bool),
        )
    )
    up = {"features": features, "states": states, "ids": features.tokens}
    down = {"draft": served, "head": served[HEAD], "low-rank": change}

    return Sizes(
        {name: _bytes(tree) for name, tree in up.items()},
        {name: _bytes(tree) for name, tree in down.items()},
    )


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass
class Outcome:
    """What came of a fleet.

    Attributes:
      num_tokens: Served by all replicas.
      num_passes: Of the target, a row counted as one.
      num_learned: Tokens that the learner learned from.
      bytes_up: That replicas sent, without what they had to drop.
      bytes_down: That the learner sent.
      busy_seconds: In which the learner learned.
    """

    num_tokens: float = 0.0
    num_passes: float = 0.0
    num_learned: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    busy_seconds: float = 0.0

    @property
    def length(self) -> float:
        """The mean acceptance length of all that was served."""
        return self.num_tokens / self.num_passes


@dataclasses.dataclass
class _Replica:
    """Attributes:
    since: When it was last looked at.
    domain: Of the draft that it serves.
    learned: Tokens of that domain that the draft has learned from.
    kept: Tokens served since the last shipment.
    """

    since: float = 0.0
    domain: int = 0
    learned: float = 0.0
    kept: float = 0.0


class Fleet:
    """One simulation; `run` is called once."""

    def __init__(
        self,
        settings: Settings,
        curve: Curve,
        num_replicas: int,
        bytes_up: float,
        bytes_down: float,
        learner_rate: float | None = None,
    ):
        """Sets up a fleet.

        Args:
          bytes_up: Of a token.
          bytes_down: Of a draft, to one replica.
          learner_rate: In place of the settings'.
        """
        self.settings = settings
        self.curve = curve
        self.bytes_up = bytes_up
        self.bytes_down = bytes_down
        self.rate = settings.learner_rate if learner_rate is None else learner_rate
        self.replicas = [_Replica() for _ in range(num_replicas)]
        self.found = Outcome()
        # Bytes a second of the learner's link, each way.
        self._speed = settings.link * 1e9 / 8
        self._events: list = []
        self._order = itertools.count()
        self._link_is_free = 0.0
        # Feedback that was not learned yet: its domain, and tokens.
        self._queue: deque[tuple[int, float]] = deque()
        self._is_busy = False
        self._domain = 0
        self._learned = 0.0

    def run(self) -> Outcome:
        """All shifts, from the first request on."""
        settings = self.settings
        end = settings.shift_seconds * settings.num_shifts
        count = len(self.replicas)
        # First of all that happens at their times.
        for number in range(1, settings.num_shifts):
            self._at(number * settings.shift_seconds, self._shift)
        for number in range(count):
            # Replicas began at different times.
            first = settings.ship_seconds * (number + 1) / count
            self._at(first, self._ship, number)
        self._at(settings.draft_seconds, self._publish)

        while self._events and self._events[0][0] < end:
            now, _, handle, args = heapq.heappop(self._events)
            handle(now, *args)
        for replica in self.replicas:
            self._serve(replica, end)

        return self.found

    def _at(self, when: float, handle, *args) -> None:
        heapq.heappush(self._events, (when, next(self._order), handle, args))

    def _now_asked(self, now: float) -> int:
        """The domain of the traffic."""
        return int(now // self.settings.shift_seconds)

    def _serve(self, replica: _Replica, now: float) -> None:
        """What a replica served since it was last looked at: its draft did not change,
        and neither did the traffic."""
        asked = self._now_asked(replica.since)
        is_at_home = replica.domain == asked
        length = self.curve.at(replica.learned if is_at_home else 0.0)
        passes = (now - replica.since) / self.settings.step_seconds * self.settings.rows
        replica.kept += passes * length
        replica.since = now
        self.found.num_passes += passes
        self.found.num_tokens += passes * length

    def _shift(self, now: float) -> None:
        """The traffic changes; what was not sent of the old one is of no use."""
        for replica in self.replicas:
            self._serve(replica, now)
            replica.kept = 0.0

    def _ship(self, now: float, number: int) -> None:
        """A replica sends its feedback, unless the link is an interval behind."""
        replica = self.replicas[number]
        self._serve(replica, now)
        tokens, replica.kept = replica.kept, 0.0
        interval = self.settings.ship_seconds
        self._at(now + interval, self._ship, number)
        backlog = max(self._link_is_free - now, 0.0)
        if backlog > interval:
            return

        size = tokens * self.bytes_up
        self.found.bytes_up += size
        self._link_is_free = now + backlog + size / self._speed
        self._at(self._link_is_free, self._arrive, self._now_asked(now), tokens)

    def _arrive(self, now: float, domain: int, tokens: float) -> None:
        """Feedback reaches the learner, which keeps no more than it learns from in an
        interval: newer feedback takes the place of the oldest."""
        self._queue.append((domain, tokens))
        waiting = sum(tokens for _, tokens in self._queue)
        room = max(self.rate * self.settings.ship_seconds, self.settings.update_tokens)
        while waiting > room:
            domain, oldest = self._queue.popleft()
            dropped = min(oldest, waiting - room)
            waiting -= dropped
            if oldest > dropped:
                self._queue.appendleft((domain, oldest - dropped))
        self._begin(now)

    def _begin(self, now: float) -> None:
        """The next update, if there is anything to learn from."""
        if self._is_busy or not self._queue:
            return

        domain, tokens = self._queue.popleft()
        taken = min(tokens, self.settings.update_tokens)
        if tokens > taken:
            self._queue.appendleft((domain, tokens - taken))
        self._is_busy = True
        seconds = taken / self.rate
        self.found.busy_seconds += seconds
        self._at(now + seconds, self._learn, domain, taken)

    def _learn(self, now: float, domain: int, tokens: float) -> None:
        """An update ends."""
        if domain != self._domain:
            self._domain = domain
            self._learned = 0.0
        self._learned += tokens
        self.found.num_learned += tokens
        self._is_busy = False
        self._begin(now)

    def _publish(self, now: float) -> None:
        """The draft goes to one replica after the other; the next one when all have it,
        or an interval later."""
        each = self.bytes_down / self._speed
        for number in range(len(self.replicas)):
            when = now + each * (number + 1)
            self._at(when, self._adopt, number, self._domain, self._learned)
        self.found.bytes_down += self.bytes_down * len(self.replicas)
        takes = max(self.settings.draft_seconds, each * len(self.replicas))
        self._at(now + takes, self._publish)

    def _adopt(self, now: float, number: int, domain: int, learned: float) -> None:
        """A replica serves another draft."""
        replica = self.replicas[number]
        self._serve(replica, now)
        replica.domain, replica.learned = domain, learned


def fresh_length(settings: Settings, curve: Curve, num_replicas: int) -> float:
    """The mean acceptance length where every pass has a draft of all tokens before."""
    speed = settings.rows * num_replicas / settings.step_seconds
    left = speed * settings.shift_seconds
    tokens = 0.0

    # Between two points of the curve the length stays as it is.
    ends = [*curve.tokens[1:], np.inf]
    for begin, end, length in zip(curve.tokens, ends, curve.lengths, strict=True):
        passes = min((end - begin) / length, left)
        tokens += passes * length
        left -= passes

    return tokens / (speed * settings.shift_seconds)


def share_of_gain(
    settings: Settings, curve: Curve, num_replicas: int, found: Outcome
) -> float:
    """Of what drafts that are never stale would gain over the static one."""
    static = curve.lengths[0]
    return (found.length - static) / (
        fresh_length(settings, curve, num_replicas) - static
    )


def by_staleness(settings: Settings, curve: Curve) -> list[dict]:
    """Shares of the gain by the interval between drafts, all else at once."""
    rows = []
    # Shifts come at ever other moments between two drafts, as they do where nobody
    # knows of them, since these intervals have no whole ratio to theirs.
    golden = (np.sqrt(5) - 1) / 2
    for count in settings.stale_replicas:
        for seconds in settings.shift_seconds * golden * 2.0 ** np.arange(-5, 3):
            # Feedback comes four times as often as drafts, and nothing else takes time.
            how = dataclasses.replace(
                settings,
                draft_seconds=float(seconds),
                ship_seconds=min(settings.ship_seconds, float(seconds) / 4),
                learner_rate=np.inf,
                update_tokens=np.inf,
            )
            found = Fleet(how, curve, count, 0, 0).run()
            share = share_of_gain(how, curve, count, found)
            rows.append({"replicas": count, "seconds": float(seconds), "share": share})

    return rows


def half_life(rows: list[dict], num_replicas: int) -> float:
    """The interval between drafts at which half of the gain is gone.

    Args:
      rows: Of `by_staleness`, shortest interval first.
    """
    mine = [row for row in rows if row["replicas"] == num_replicas]
    for before, after in itertools.pairwise(mine):
        if after["share"] < 0.5 <= before["share"]:
            part = (before["share"] - 0.5) / (before["share"] - after["share"])
            return before["seconds"] + part * (after["seconds"] - before["seconds"])

    return float("nan")


def by_rate(settings: Settings, curve: Curve) -> list[dict]:
    """Shares of the gain by how fast the learner is; nothing takes time to be sent."""
    rows = []
    for count in settings.stale_replicas:
        for rate in _RATES:
            found = Fleet(settings, curve, count, 0, 0, rate).run()
            rows.append(
                {
                    "replicas": count,
                    "rate": rate,
                    "share": share_of_gain(settings, curve, count, found),
                    "learned": found.num_learned / found.num_tokens,
                }
            )

    return rows


def by_size(settings: Settings, curve: Curve) -> list[dict]:
    """What fleets gain and send, by what is sent."""
    sizes = sizes_of(settings)
    rereading = 1 / (1 / settings.learner_rate + 1 / settings.target_rate)
    rates: dict[str, float] = {"features": settings.learner_rate, "ids": rereading}
    seconds = settings.shift_seconds * settings.num_shifts
    rows = []
    for up, down in itertools.product(("features", "ids"), ("draft", "low-rank")):
        for count in settings.replicas:
            found = Fleet(
                settings, curve, count, sizes.up[up], sizes.down[down], rates[up]
            ).run()
            rows.append(
                {
                    "up": up,
                    "down": down,
                    "replicas": count,
                    "length": found.length,
                    "share": share_of_gain(settings, curve, count, found),
                    "learned": found.num_learned / found.num_tokens,
                    "busy": found.busy_seconds / seconds,
                    "gbits_up": found.bytes_up * 8e-9 / seconds,
                    "gbits_down": found.bytes_down * 8e-9 / seconds,
                }
            )

    return rows


class Rows(NamedTuple):
    """Results of `by_staleness`, `by_rate` and `by_size`."""

    stale: list[dict]
    rate: list[dict]
    size: list[dict]


def tables(settings: Settings, rows: Rows) -> str:
    """All of them, in Markdown."""
    sizes = sizes_of(settings)
    counts = settings.stale_replicas
    of_each = [_named(count) for count in counts]

    sent = _table(
        ["what is sent", "bytes"],
        [[f"{name}, a token", f"{size:,}"] for name, size in sizes.up.items()]
        + [[name, f"{size:,}"] for name, size in sizes.down.items()],
    )
    stale = _table(
        ["a draft every", *of_each],
        [
            [f"{seconds:.0f} s", *(f"{row['share']:.0%}" for row in same)]
            for seconds, same in _grouped(rows.stale, "seconds")
        ]
        + [["half is gone at", *(f"{half_life(rows.stale, n):.0f} s" for n in counts)]],
    )
    rate = _table(
        ["tokens a second", *of_each, *(f"learned, {name}" for name in of_each)],
        [
            [
                f"{rate:,.0f}",
                *(f"{row['share']:.0%}" for row in same),
                *(f"{row['learned']:.2%}" for row in same),
            ]
            for rate, same in _grouped(rows.rate, "rate")
        ],
    )
    size = _table(
        ["up", "down", "replicas", "length", "of the gain", "of the tokens learned",
         "learner busy", "Gbit/s up", "Gbit/s down"],
        [
            [
                row["up"],
                row["down"],
                f"{row['replicas']:,}",
                f"{row['length']:.3f}",
                f"{row['share']:.0%}",
                f"{row['learned']:.1%}",
                f"{row['busy']:.0%}",
                f"{row['gbits_up']:.3g}",
                f"{row['gbits_down']:.3g}",
            ]
            for row in rows.size
        ],
    )  # fmt: skip

    return "\n\n".join([sent, stale, rate, size])


def _named(count: int) -> str:
    return f"{count:,} replica{'s' * (count > 1)}"


def _grouped(rows: list[dict], name: str) -> list[tuple[float, list[dict]]]:
    """Rows of one value, for each of the values."""
    values = sorted({row[name] for row in rows})
    return [(value, [row for row in rows if row[name] == value]) for value in values]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def draw(settings: Settings, rows: Rows, path: Path) -> None:
    """The gain by staleness, by the learner's speed, and by what is sent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained", sharey=True
    )
    for count in settings.stale_replicas:
        _curve(left, rows.stale, "seconds", _named(count), replicas=count)
        _curve(middle, rows.rate, "rate", _named(count), replicas=count)
    for up, down in dict.fromkeys((row["up"], row["down"]) for row in rows.size):
        label = f"{up} up, {down} down"
        _curve(right, rows.size, "replicas", label, up=up, down=down)

    left.axhline(0.5, color="0.7", lw=1)
    left.set(
        ylim=(0, 1.02),
        xlabel=f"seconds between drafts, {settings.shift_seconds:g} between shifts",
        ylabel="share of the gain",
    )
    middle.set(xlabel="tokens a second of the learner")
    right.set(xlabel=f"replicas, over {settings.link:g} Gbit/s")
    for axes in (left, middle, right):
        axes.set_xscale("log")
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(axes, rows: list[dict], name: str, label: str, **wanted) -> None:
    """Shares of the rows that have these values."""
    mine = [row for row in rows if all(row[key] == wanted[key] for key in wanted)]
    shares = [row["share"] for row in mine]
    # Dashed, those over others can be told from them.
    style = "o--" if "ids" in label else "o-"
    axes.plot([row[name] for row in mine], shares, style, ms=3, label=label)


def main(settings: Settings) -> None:
    """Prints the tables, and draws them."""
    runs = json.loads(settings.curve.read_text("utf-8"))["runs"]
    curve = read_curve(runs, settings.learner)
    print(
        f"the curve: {curve.lengths[0]:.3f} tokens a pass without learning, "
        f"{curve.lengths[-1]:.3f} after {curve.tokens[-1]:,} tokens\n"
    )
    rows = Rows(
        by_staleness(settings, curve),
        by_rate(settings, curve),
        by_size(settings, curve),
    )
    print(tables(settings, rows))
    if settings.plot:
        draw(settings, rows, settings.plot)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
