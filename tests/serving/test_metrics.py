# SPDX-License-Identifier: Apache-2.0
"""What Prometheus is told, and what the dashboard shows."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import FakeService

from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.drafters.sources import SOURCES
from ospec_jax.serving.asks import ChoiceEnd, Ended, Failed, Piece, Token, Usage
from ospec_jax.serving.history import History
from ospec_jax.serving.metrics import Metrics, Recent
from ospec_jax.serving.prompting import Server
from ospec_jax.serving.schema import read_wanted
from ospec_jax.serving.settings import HttpConfig

DOCS = Path(__file__).parents[2] / "docs"
SERVER = Server(HttpConfig(), "fake", vocab_size=256)
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
VLLM = {"model_name": "fake", "engine": "0"}
STATS = DecodingStats(2, 4, 8, 5, [1, 1, 2])


@pytest.fixture
def metrics():
    """Of a service that says always the same."""
    return Metrics("fake", 100, FakeService().status)


def begin(metrics, **changes):
    """A request that is asked at time 10."""
    wanted = read_wanted(CHAT | changes, "chat", "1", SERVER)
    return metrics.begin(wanted, 7, 10.0)


def samples(metrics):
    """All samples by name and labels."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }


def value(metrics, name, **labels):
    """One sample."""
    if name.startswith("vllm:"):
        labels = VLLM | labels
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


def serve(metrics):
    """A whole answer of six tokens in two passes."""
    watch = begin(metrics, max_tokens=20)
    three = (Token(1, "draft"), Token(2, "ngrams"), Token(3))
    watch.hear(Piece(0, "abc", three), 10.5)
    watch.hear(Piece(0, "def", three), 10.8)
    watch.hear(ChoiceEnd(0, "", "stop"), 10.8)
    watch.hear(Ended(Usage(7, 6, cached=5), STATS, 3, 0.25, 0.5, 1.0), 10.8)
    watch.close()


def test_tokens_and_speculation_are_counted(metrics):
    serve(metrics)
    serve(metrics)
    expected = {
        "prompt_tokens_total": 14,
        "prefix_cache_queries_total": 14,
        "prefix_cache_hits_total": 10,
        "generation_tokens_total": 12,
        "spec_decode_num_drafts_total": 8,
        "spec_decode_num_draft_tokens_total": 16,
        "spec_decode_num_accepted_tokens_total": 10,
        "request_prompt_tokens_sum": 14,
        "request_generation_tokens_sum": 12,
        "request_params_n_sum": 2,
        "request_params_max_tokens_sum": 40,
    }
    found = {name: value(metrics, f"vllm:{name}") for name in expected}
    assert found == expected
    of_source = lambda source: value(
        metrics, "ospec_accepted_tokens_total", source=source
    )
    assert [of_source(s) for s in SOURCES] == [None, 4, 4, 0, 0]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert value(metrics, name, position="0") == 6
    assert value(metrics, name, position="1") == 4
    assert value(metrics, name, position="2") is None
    success = "vllm:request_success_total"
    assert value(metrics, success, finished_reason="stop") == 2
    assert value(metrics, success, finished_reason="abort") is None


def test_times_are_those_of_tokens_not_of_chunks(metrics):
    serve(metrics)
    get = lambda name: pytest.approx(value(metrics, f"vllm:{name}"))
    assert get("time_to_first_token_seconds_sum") == 0.5
    assert get("inter_token_latency_seconds_sum") == 0.3
    assert get("inter_token_latency_seconds_count") == 3
    assert get("request_time_per_output_token_seconds_sum") == 0.1
    assert get("e2e_request_latency_seconds_sum") == 1.0
    assert get("request_queue_time_seconds_sum") == 0.25
    assert get("request_prefill_time_seconds_sum") == 0.25
    assert get("request_decode_time_seconds_sum") == 0.5
    assert get("request_inference_time_seconds_sum") == 0.75


def test_how_requests_end(metrics):
    begin(metrics).close()
    failing = begin(metrics)
    failing.hear(Failed(RuntimeError()), 11.0)
    failing.close()
    begin(metrics, learn=False).close()
    metrics.refuse("overloaded")
    name = "vllm:request_success_total"
    assert value(metrics, name, finished_reason="abort") == 2
    assert value(metrics, name, finished_reason="error") == 1
    name = "ospec_requests_not_learned_total"
    assert value(metrics, name, reason="aborted") == 1
    assert value(metrics, name, reason="opt_out") == 1
    name = "vllm:admission_rejections_total"
    assert value(metrics, name, reason="overloaded") == 1


def test_the_service_s_own_numbers(metrics):
    expected = {
        "vllm:num_requests_running": 2,
        "vllm:num_requests_waiting": 1,
        "vllm:kv_cache_usage_perc": 0.5,
        "ospec_draft_version": 3,
        "ospec_learner_updates_total": 7,
        "ospec_compiles_after_warmup_total": 0,
    }
    assert {name: value(metrics, name) for name in expected} == expected
    assert value(metrics, "ospec_draft_info", family="eagle", version="3") == 1
    assert value(metrics, "ospec_learner_seconds_total", phase="update") == 1.5
    assert value(metrics, "ospec_learning_paused", reason="none") == 0


def test_an_idle_service_has_a_free_cache():
    status = {"queue": {"num_rows": 0, "num_running": 0}}
    metrics = Metrics("fake", 100, lambda: status)
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0


def test_scopes_own_drafts_are_counted_where_there_are_any():
    status = {"learning": {"own_drafts": {"num": 3, "num_drafting": 2}}}
    metrics = Metrics("fake", 100, lambda: status)
    assert value(metrics, "ospec_own_drafts") == 3
    assert value(metrics, "ospec_own_drafts_drafting") == 2
    status["learning"]["own_drafts"] = None
    assert value(metrics, "ospec_own_drafts") is None


def test_a_service_that_says_nothing_has_fewer_metrics():
    found = samples(Metrics("fake", 100, dict))
    assert ("ospec_draft_version", ()) not in found
    assert found


def test_no_label_has_no_bound(metrics):
    serve(metrics)
    begin(metrics, tenant="secret").close()
    text = metrics.render().decode()
    known = {"model_name", "engine", "le", "position", "finished_reason", "reason"}
    known |= {"source"}
    assert set(re.findall(r'(\w+)="', text)) <= known | {"family", "version", "phase"}
    assert "secret" not in text


def test_the_board_draws_metrics_that_there_are(metrics):
    serve(metrics)
    text = metrics.render().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    board = json.loads((DOCS / "grafana.json").read_text())
    queries = [
        target["expr"] for panel in board["panels"] for target in panel["targets"]
    ]
    drawn = set(re.findall(r"(?:vllm:|ospec_)\w+", " ".join(queries)))
    histograms = {
        f"{name}_bucket" for name, kind in kinds.items() if kind == "histogram"
    }

    assert len(drawn) > 15
    assert drawn <= set(kinds) | histograms


def test_apps_do_not_share_their_metrics(metrics):
    serve(metrics)
    other = Metrics("fake", 100, FakeService().status)
    assert value(other, "vllm:prompt_tokens_total") == 0


def test_percentiles_are_values_that_were_seen():
    recent = Recent()
    assert recent.percentiles()["queue"] == {"p50": None, "p99": None}
    recent.queue.extend([3.0, 1.0, 2.0])
    assert recent.percentiles()["queue"] == {"p50": 2.0, "p99": 3.0}


def test_history_samples_rates_and_marks_versions():
    service = FakeService()
    recent = Recent()
    now = [100.0]
    history = History(service.status, recent, lambda: now[0])
    history.sample()
    recent.count_pass(3, 2)
    recent.count_pass(1, 0)
    now[0] = 102.0
    service.version = 4
    history.sample()
    said = history.to_json()
    first, last = (dict(zip(said["fields"], s, strict=True)) for s in said["samples"])
    assert first["tokens_per_pass"] is None
    assert first["learning_share"] == 0
    assert last["tokens_per_second"] == 2.0
    assert last["tokens_per_pass"] == 2.0
    assert last["num_running"] == 2
    assert said["marks"] == [{"time": 102.0, "kind": "promotion", "version": 4}]
    assert history.to_json(since=100.0)["samples"] == said["samples"][1:]


def test_what_an_administrator_did_is_no_promotion():
    service = FakeService()
    history = History(service.status, Recent())
    history.sample()
    service.version = 1
    history.mark("rollback", 1)
    history.sample()
    assert [mark["kind"] for mark in history.to_json()["marks"]] == ["rollback"]
