# SPDX-License-Identifier: Apache-2.0
"""Metrics for Prometheus: vLLM's names as it means them, `ospec_*` for learning.

vLLM's boards and load tools then work unchanged. Nothing is labelled with requests,
keys or tenants: their number has no bound, and they are nobody else's business.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)

from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.sources import SOURCES
from ospec_jax.serving.asks import ChoiceEnd, Ended, Event, Failed, Piece
from ospec_jax.serving.schema import Wanted

_LABELS = ("model_name", "engine")
_ENGINE = "0"
_NUM_RECENT = 512

# vLLM's bounds, and for the small models of CPUs some below them.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_CHOICES = (1, 2, 5, 10, 20)


class Metrics:
    """What is counted since the start; a registry of its own.

    Args:
      status: Of the service, as JSON; asked whenever metrics are.
    """

    def __init__(
        self, model: str, max_model_len: int, status: Callable[[], dict[str, Any]]
    ):
        self.registry = CollectorRegistry()
        self.recent = Recent()
        self._labels = (model, _ENGINE)
        self._num_positions = 0
        self._count_drafting()
        self._count_requests()
        self._time_requests()
        self._measure_lengths(tuple(_one_two_five(max_model_len)))
        self.registry.register(_Status(self._labels, status))

    def _count_drafting(self) -> None:
        """Counters of what was drafted and accepted."""
        self.num_drafts = self._counter("spec_decode_num_drafts", "Passes that verify")
        self.num_draft_tokens = self._counter(
            "spec_decode_num_draft_tokens", "Tokens drafted"
        )
        self.num_accepted = self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that were accepted"
        )
        self.accepted_per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Passes that accepted the token at a position",
            (*_LABELS, "position"),
            registry=self.registry,
        )
        self.accepted_by_source = Counter(
            "ospec_accepted_tokens",
            "Drafted tokens that were accepted, by who proposed them",
            ("source",),
            registry=self.registry,
        )
        # A rate of what has not come yet is 0, and not unknown.
        for source in SOURCES:
            if source != "target":
                self.accepted_by_source.labels(source)

    def _count_requests(self) -> None:
        """Counters of requests and their tokens."""
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cache_queries = self._counter(
            "prefix_cache_queries", "Tokens of prompts that were looked for in caches"
        )
        self.cache_hits = self._counter(
            "prefix_cache_hits", "Tokens of prompts that were found in caches"
        )
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers")
        self.request_success = Counter(
            "vllm:request_success",
            "Answers by how they ended",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self.rejections = Counter(
            "vllm:admission_rejections",
            "Requests that were refused before they were queued",
            (*_LABELS, "reason"),
            registry=self.registry,
        )
        self.not_learned = Counter(
            "ospec_requests_not_learned",
            "Requests from which nothing was to be learned",
            ("reason",),
            registry=self.registry,
        )

    def _time_requests(self) -> None:
        """Histograms of seconds."""
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From being asked to a token", _FIRST_TOKEN
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds",
            "Between two tokens; a pass that brings several shares its time among them",
            _BETWEEN_TOKENS,
        )
        self.per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a token after the first",
            _BETWEEN_TOKENS,
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From being asked to the end", _REQUEST
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "Until the prompt's pass", _REQUEST
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds", "From there to the first token", _REQUEST
        )
        self.decode = self._histogram(
            "request_decode_time_seconds", "From there to the end", _REQUEST
        )
        self.inference = self._histogram(
            "request_inference_time_seconds", "Without the queue", _REQUEST
        )

    def _measure_lengths(self, lengths: tuple[float, ...]) -> None:
        """Histograms of tokens, in these buckets, and of what was asked for."""
        self.prompt_length = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt", lengths
        )
        self.answer_length = self._histogram(
            "request_generation_tokens", "Tokens of a request's answers", lengths
        )
        self.asked_choices = self._histogram(
            "request_params_n", "Answers asked for", _CHOICES
        )
        self.asked_tokens = self._histogram(
            "request_params_max_tokens", "New tokens asked for", lengths
        )

    def _counter(self, name: str, text: str):
        counter = Counter(f"vllm:{name}", text, _LABELS, registry=self.registry)
        return counter.labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]):
        histogram = Histogram(
            f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry
        )
        return histogram.labels(*self._labels)

    def refuse(self, reason: str) -> None:
        """Counts a request that was not taken."""
        self.rejections.labels(*self._labels, reason).inc()

    def begin(self, wanted: Wanted, num_prompt_tokens: int, now: float) -> "Watch":
        """Counts a request that was taken, and watches it."""
        ask = wanted.asks[0]
        self.prompt_tokens.inc(num_prompt_tokens)
        self.prompt_length.observe(num_prompt_tokens)
        self.asked_choices.observe(ask.num_choices)
        if ask.max_new_tokens is not None:
            self.asked_tokens.observe(ask.max_new_tokens)
        if not ask.can_teach:
            self.not_learned.labels("opt_out").inc()

        return Watch(self, now, ask.can_teach)

    def finish(self, reason: str) -> None:
        """Counts an answer by how it ended."""
        self.request_success.labels(*self._labels, reason).inc()

    def count_stats(self, stats: DecodingStats) -> None:
        """Counts what was drafted for a request."""
        self.num_drafts.inc(stats.num_drafts)
        self.num_draft_tokens.inc(stats.num_draft_tokens)
        self.num_accepted.inc(stats.num_accepted_tokens)

        survived = stats.num_drafts
        for position, count in enumerate(stats.acceptance_histogram[:-1]):
            survived -= count
            label = str(position)
            self.accepted_per_position.labels(*self._labels, label).inc(survived)

    def render(self) -> bytes:
        """All of it, in Prometheus's text."""
        return generate_latest(self.registry)


class Watch:
    """One request's way through the metrics."""

    def __init__(self, metrics: Metrics, now: float, can_teach: bool):
        self._metrics = metrics
        self._asked = now
        self._can_teach = can_teach
        self._last: dict[int, float] = {}
        self._is_over = False

    def hear(self, event: Event, now: float) -> None:
        """Counts an event.

        Args:
          now: When it came, by the monotonic clock.
        """
        metrics = self._metrics
        if isinstance(event, Piece):
            self._hear_tokens(event, now)
        elif isinstance(event, ChoiceEnd):
            metrics.finish(event.finish_reason)
        elif isinstance(event, Failed):
            self._is_over = True
            metrics.finish("error")
        else:
            self._is_over = True
            self._hear_end(event)

    def _hear_tokens(self, piece: Piece, now: float) -> None:
        count = len(piece.tokens)
        if not count:
            return

        metrics = self._metrics
        metrics.generation_tokens.inc(count)
        accepted = [token.source for token in piece.tokens if token.is_drafted]
        metrics.recent.count_pass(count, len(accepted))
        for source in accepted:
            metrics.accepted_by_source.labels(source).inc()
        before = self._last.get(piece.choice)
        if before is None and not self._last:
            metrics.first_token.observe(now - self._asked)
            metrics.recent.first_token.append(now - self._asked)
        elif before is not None:
            share = (now - before) / count
            metrics.recent.between_tokens.extend([share] * count)
            for _ in range(count):
                metrics.between_tokens.observe(share)

        self._last[piece.choice] = now

    def _hear_end(self, ended: Ended) -> None:
        metrics = self._metrics
        count = ended.usage.completion
        decode = max(ended.seconds - ended.first_token_seconds, 0.0)
        metrics.count_stats(ended.stats)
        metrics.cache_queries.inc(ended.usage.prompt)
        metrics.cache_hits.inc(ended.usage.cached)
        metrics.answer_length.observe(count)
        metrics.whole.observe(ended.seconds)
        metrics.queue.observe(ended.queue_seconds)
        metrics.prefill.observe(
            max(ended.first_token_seconds - ended.queue_seconds, 0.0)
        )
        metrics.decode.observe(decode)
        metrics.inference.observe(max(ended.seconds - ended.queue_seconds, 0.0))
        # Answers beside each other share their time: of these it says nothing.
        if count > 1 and len(self._last) == 1:
            metrics.per_output_token.observe(decode / (count - 1))
        metrics.recent.queue.append(ended.queue_seconds)
        metrics.recent.whole.append(ended.seconds)

    def close(self) -> None:
        """Counts a request whose client has gone."""
        if self._is_over:
            return

        self._is_over = True
        self._metrics.finish("abort")
        if self._can_teach:
            self._metrics.not_learned.labels("aborted").inc()


class Recent:
    """The latest values, for a board that is looked at now."""

    def __init__(self):
        self.num_tokens = 0
        self.num_drafted = 0
        self.num_passes = 0
        self.first_token: deque[float] = deque(maxlen=_NUM_RECENT)
        self.between_tokens: deque[float] = deque(maxlen=_NUM_RECENT)
        self.queue: deque[float] = deque(maxlen=_NUM_RECENT)
        self.whole: deque[float] = deque(maxlen=_NUM_RECENT)

    def count_pass(self, num_tokens: int, num_drafted: int) -> None:
        """Counts what one pass added to one answer."""
        self.num_passes += 1
        self.num_tokens += num_tokens
        self.num_drafted += num_drafted

    def percentiles(self) -> dict[str, dict[str, float | None]]:
        """Medians and 99th percentiles, in seconds."""
        lists = {
            "first_token": self.first_token,
            "between_tokens": self.between_tokens,
            "queue": self.queue,
            "whole": self.whole,
        }

        return {
            name: {"p50": _percentile(found, 0.5), "p99": _percentile(found, 0.99)}
            for name, found in lists.items()
        }


class _Status:
    """Metrics that are the service's own, read when they are asked for."""

    def __init__(self, labels: tuple[str, str], status: Callable[[], dict[str, Any]]):
        self._labels = labels
        self._status = status

    def describe(self) -> list[Metric]:
        """Nothing: else the service were asked before it is there."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What the service says at the moment."""
        status = self._status()
        queue = status.get("queue", {})
        yield from self._gauges(
            {
                "vllm:num_requests_running": queue.get("num_running"),
                "vllm:num_requests_waiting": queue.get("num_waiting"),
                "vllm:kv_cache_usage_perc": _share(queue),
            }
        )
        yield from _own(status)

    def _gauges(self, values: dict[str, Any]) -> Iterator[Metric]:
        for name, value in values.items():
            if value is not None:
                gauge = GaugeMetricFamily(name, _TEXTS[name], labels=_LABELS)
                gauge.add_metric(self._labels, value)
                yield gauge


_TEXTS = {
    "vllm:num_requests_running": "Answers that have a row",
    "vllm:num_requests_waiting": "Answers that wait for one",
    "vllm:kv_cache_usage_perc": "Share of rows that are taken, 0 to 1",
}

_COUNTERS = {
    "ospec_learner_updates": (
        "learning.num_updates",
        "Updates of the draft that is learned",
    ),
    "ospec_learner_answers": ("learning.num_answers", "Answers learned from"),
    "ospec_practice_exercises": (
        "learning.practice.num_exercises",
        "Answers of the target to itself that were learned from",
    ),
    "ospec_practice_tokens": (
        "learning.practice.num_tokens",
        "Tokens that the target wrote for itself",
    ),
    "ospec_steps": ("totals.num_steps", "Steps of the batch"),
    "ospec_busy_seconds": ("totals.busy_seconds", "Time in steps"),
}
"""Name of a counter: where the status has it, and what it counts."""


def _value_at(status: dict[str, Any], path: str) -> float | None:
    """A figure of the status; None where it has none."""
    found: Any = status
    for key in path.split("."):
        found = (found or {}).get(key)

    return found


def _own(status: dict[str, Any]) -> Iterator[Metric]:
    """`ospec_*`."""
    learning = status.get("learning") or {}
    yield from _of_draft(status.get("draft") or {})
    for name, (path, text) in _COUNTERS.items():
        value = _value_at(status, path)
        if value is not None:
            yield CounterMetricFamily(name, text, value=value)

    yield from _of_learning(learning)
    kept = _value_at(status, "kept.num_bytes")
    if kept is not None:
        yield GaugeMetricFamily(
            "ospec_kept_bytes", "Caches of answered requests", value=kept
        )

    yield from _of_own_drafts(learning.get("own_drafts"))
    yield from _of_promotions(learning.get("promotions"))
    # Named as it is read: it does not fall, but for a restart.
    compiles = _value_at(status, "totals.num_compiles_after_warm_up")
    if compiles is not None:
        yield CounterMetricFamily(
            "ospec_compiles_after_warmup",
            "Programs compiled after the start; each delays what runs",
            value=compiles,
        )


def _of_draft(draft: dict[str, Any]) -> Iterator[Metric]:
    """Which draft is served, and what waits to be."""
    version = draft.get("version")
    if version is not None:
        yield GaugeMetricFamily(
            "ospec_draft_version", "Version of the served draft", value=version
        )
        info = GaugeMetricFamily(
            "ospec_draft_info", "The served draft", labels=("family", "version")
        )
        info.add_metric((str(draft.get("family")), str(version)), 1)
        yield info

    waiting = draft.get("waiting")
    if waiting is not None:
        yield GaugeMetricFamily(
            "ospec_draft_updates_waiting",
            "Updates that were learned and are not served",
            value=waiting["num_updates"],
        )


def _of_learning(learning: dict[str, Any]) -> Iterator[Metric]:
    """How long was learned, and whether anything is."""
    if learning.get("seconds") is not None:
        seconds = CounterMetricFamily(
            "ospec_learner_seconds", "Time spent learning", labels=("phase",)
        )
        seconds.add_metric(("update",), learning["seconds"])
        yield seconds

    paused = GaugeMetricFamily(
        "ospec_learning_paused", "1 while nothing is learned", labels=("reason",)
    )
    reason = learning.get("paused_for")
    paused.add_metric((str(reason or "none"),), float(reason is not None))
    yield paused


def _of_own_drafts(own: dict[str, Any] | None) -> Iterator[Metric]:
    """How many scopes have drafts of their own."""
    if own is None:
        return

    yield GaugeMetricFamily(
        "ospec_own_drafts", "Scopes that have a draft of their own", own["num"]
    )
    yield GaugeMetricFamily(
        "ospec_own_drafts_drafting",
        "Of these, scopes whose own draft has been right more often of late",
        own["num_drafting"],
    )


def _of_promotions(outcomes: Any) -> Iterator[Metric]:
    """What became of candidates, where they are judged."""
    if not isinstance(outcomes, dict):
        return

    promotions = CounterMetricFamily(
        "ospec_promotions", "Candidates by what became of them", labels=("outcome",)
    )
    for outcome, count in outcomes.items():
        promotions.add_metric((str(outcome),), count)
    yield promotions


def _share(queue: dict[str, Any]) -> float | None:
    """Share of rows that are taken: a row's cache is as large as it may become."""
    num_rows = queue.get("num_rows")
    if num_rows is None or queue.get("num_running") is None:
        return None

    # An idle batch has no rows at all.
    return min(queue["num_running"] / max(num_rows, 1), 1.0)


def _percentile(values: deque[float], share: float) -> float | None:
    """The least value that is at least as large as a share of all."""
    if not values:
        return None

    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def _one_two_five(most: int) -> Iterator[float]:
    """1, 2, 5, 10, ... up to the context."""
    for power in itertools.count():
        for digit in (1, 2, 5):
            value = digit * 10**power
            if value > most:
                return
            yield float(value)
