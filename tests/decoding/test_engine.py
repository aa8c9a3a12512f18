# SPDX-License-Identifier: Apache-2.0
"""The host's side: an oracle for the plain path, stops, capacities, one read a step."""

import collections
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from reference import forward, random_params

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding import batch as batches
from ospec_jax.decoding.engine import KINDS, Engine
from ospec_jax.decoding.request import PromptTooLongError, Request, StopPoint
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.models.layers import Numerics
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config

VOCAB = 16
PLAIN = TreeConfig(num_steps=0)
# Wide enough that a random draft is often right.
WIDE = TreeConfig("static", 2, branching=(8, 4))
CONFIG = tiny_model_config(VOCAB, tie_embeddings=False)
PROMPTS = [(1, 2, 3), (7,), tuple(np.random.default_rng(0).integers(0, VOCAB, 70))]


@pytest.fixture(scope="module")
def params():
    # Large matrices make the output depend on more than the last token.
    return random_params(CONFIG, gain=2.5)


def engine_for(params, tree, stop_ids=()):
    config = tiny_draft_config(CONFIG, draft_vocab_size=0)
    drafter = eagle3(config, tree) if tree.num_steps else None
    step = StepConfig(CONFIG, Numerics(), tree, config.taps, stop_ids)
    return Engine(step, params, drafter), tiny_draft(
        drafter, config
    ) if drafter else None


@pytest.fixture(scope="module")
def plain(params):
    return engine_for(params, PLAIN)[0]


@pytest.fixture(scope="module")
def wide(params):
    """An engine and a draft."""
    return engine_for(params, WIDE)


def requests(count=24, **changes):
    ids = enumerate(PROMPTS)
    return [Request(str(i), tuple(map(int, p)), count, **changes) for i, p in ids]


def answers(engine, draft=None, batch_size=1, count=24, **kwargs):
    done = engine.serve(requests(count), lambda: draft, batch_size, **kwargs)
    return [c.token_ids for c in sorted(done, key=lambda c: c.request.id)]


@pytest.fixture(scope="module")
def expected(plain):
    return answers(plain)


def test_plain_decoding_equals_a_numpy_loop(params, expected):
    for prompt, found in zip(PROMPTS, expected, strict=True):
        ids = [int(i) for i in prompt]
        for _ in range(24):
            ids.append(int(np.argmax(forward(params, CONFIG, ids)[0][-1])))
        assert found == ids[len(prompt) :]
    assert min(len(set(found)) for found in expected) > 3, "too dull to prove much"


def test_a_stop_token_inside_an_accepted_run(params, wide, expected):
    """Found by looking for a draft that was accepted with more tokens behind it."""
    engine, draft = wide
    runs = []  # (request, tokens before the run, the run)
    so_far = {request.id: [] for request in requests()}

    def on_tokens(request, emitted):
        runs.append((request.id, list(so_far[request.id]), emitted.token_ids))
        so_far[request.id] += emitted.token_ids

    list(engine.serve(requests(), lambda: draft, on_tokens=on_tokens))
    assert list(so_far.values()) == expected
    inside = [
        (request, before, token, position)
        for request, before, run in runs
        for position, token in enumerate(run[:-1])
        if token not in before + run[:position]
    ]
    assert inside, "no new token was accepted with others behind it"
    request, before, stop, position = inside[-1]
    stopping, _ = engine_for(params, WIDE, stop_ids=(stop,))
    cut = lambda ids: ids[: ids.index(stop) + 1] if stop in ids else ids
    for batch_size in (1, 3):
        assert answers(stopping, draft, batch_size) == [cut(ids) for ids in expected]
    done = {c.request.id: c for c in stopping.serve(requests(), lambda: draft)}
    assert done[request].finish_reason == "stop"
    assert len(done[request].token_ids) == len(before) + position + 1


@pytest.mark.parametrize("has_log_probs", [False, True])
def test_what_each_pass_added_is_told_with_facts_on_each_token(
    params, wide, has_log_probs
):
    engine, draft = wide
    config = dataclasses.replace(engine.config, has_log_probs=has_log_probs)
    engine = Engine(config, params, engine.drafter)
    heard = {request.id: [] for request in requests()}
    hear = lambda request, emitted: heard[request.id].append(emitted)

    for done in engine.serve(requests(23), lambda: draft, 3, on_tokens=hear):
        told = heard[done.request.id]
        joined = lambda name, told=told: sum((getattr(e, name) for e in told), [])
        assert joined("token_ids") == done.token_ids
        assert joined("log_probs") == done.log_probs
        assert bool(done.log_probs) == has_log_probs
        # Accepted tokens come first, and behind them one that the target chose.
        for one in told:
            assert one.is_drafted == sorted(one.is_drafted, reverse=True)
        assert sum(joined("is_drafted")) == done.stats.num_accepted_tokens > 0
        assert not told[0].is_drafted[0]


def test_the_last_run_is_cut_at_the_limit(wide, expected):
    engine, draft = wide
    for count in (1, 2, 3, 11):
        assert answers(engine, draft, 3, count) == [ids[:count] for ids in expected]


def test_stop_strings_cut_the_answer(plain, expected):
    find_stop = lambda ids: StopPoint(5) if len(ids) >= 7 else None
    done = list(plain.serve(requests(find_stop=find_stop)))
    assert [c.token_ids for c in done] == [ids[:5] for ids in expected]
    assert {c.finish_reason for c in done} == {"stop"}


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_lag_changes_nothing(plain, expected, lag):
    assert answers(plain, batch_size=2, lag=lag) == expected


class _Timeline:
    """A device that runs what it is sent in order, and a host that takes time, too.

    A pass takes the device 1. Between two passes the host takes `host`: half of it to
    read one, half of it to send another.

    Attributes:
      begins: When each pass began, and `ends` when it ended.
      unread: When those end that were not read.
    """

    def __init__(self, monkeypatch, engine, host: float):
        self.now = 0.0
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.unread: list[float] = []
        self._half = host / 2
        # A prompt is a pass, too.
        for name in ("step", "read_on"):
            wrapped = functools.partial(self._send, getattr(engine, name))
            monkeypatch.setattr(engine, name, wrapped)
        wrapped = functools.partial(self._read, batches.fetch)
        monkeypatch.setattr(batches, "fetch", wrapped)

    def _send(self, original, *args):
        """A pass: sent once the host has prepared it, run behind all before it."""
        found = original(*args)
        self.now += self._half
        self.begins.append(max([self.now, *self.ends[-1:]]))
        self.ends.append(self.begins[-1] + 1)
        # Of a prompt that takes several passes only the last one is read.
        if getattr(found, "is_done", True):
            self.unread.append(self.ends[-1])
        return found

    def _read(self, original, output):
        """The oldest pass, for which the host waits."""
        self.now = max(self.now, self.unread.pop(0)) + self._half
        return original(output)

    def idle_share(self, first: int, last: int) -> float:
        """Of the time between the beginnings of two passes."""
        return 1 - (last - first) / (self.begins[last] - self.begins[first])


@pytest.mark.parametrize("host", [0.4, 1.6])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_device_waits_for_the_host_only_where_that_is_slower(
    plain, monkeypatch, lag, host
):
    line = _Timeline(monkeypatch, plain, host)
    list(plain.serve([requests(41)[0]], lag=lag))
    assert len(line.begins) == 41
    # One after the other they take both's time, side by side that of the slower one.
    # The first passes are sent before any is read; it takes some until that is even.
    period = max(1, host) if lag else 1 + host
    assert line.idle_share(10, 40) == pytest.approx(1 - 1 / period)


@pytest.fixture(scope="module")
def cut(wide):
    """Within a run of accepted tokens of the last prompt's answer, not at its end."""
    engine, draft = wide
    ends = [0]
    hear = lambda request, emitted: ends.append(ends[-1] + len(emitted.token_ids))
    list(engine.serve(requests()[-1:], lambda: draft, on_tokens=hear))
    inside = [end - 1 for begin, end in itertools.pairwise(ends) if end - begin > 1]
    assert inside, "no run had two tokens"
    return inside[len(inside) // 2]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_host_that_is_ahead_hears_late_and_says_the_same(
    wide, expected, cut, monkeypatch, lag
):
    """Of a stop string within a step; and rows are cancelled and given to others."""
    engine, draft = wide
    line = _Timeline(monkeypatch, engine, host=0.8)
    under_way = []

    def find_stop(ids):
        if len(ids) < cut:
            return None
        under_way.append(len(line.unread))
        return StopPoint(cut)

    cancelled, going_on, stopped = requests()
    going_on = dataclasses.replace(going_on, max_new_tokens=60)
    stopped = dataclasses.replace(stopped, find_stop=find_stop)
    again = [dataclasses.replace(one, id=f"{one.id} again") for one in requests()[::2]]
    told = collections.defaultdict(list)
    batch = batches.Batch(
        engine,
        3,
        engine.capacity_for(requests()),
        on_tokens=lambda request, emitted: told[request.id].extend(emitted.token_ids),
    )
    for request in (cancelled, going_on, stopped):
        batch.admit(request, draft)

    answers = {}
    num_ahead = None
    for turn in itertools.count():
        if turn == 5:
            assert batch.cancel(cancelled)
        while again and batch.num_free:
            batch.admit(again.pop(0), draft)
        # Once no row is sure to want another step, the host reads all before it sends.
        if not batch.has_work and num_ahead is None:
            num_ahead = len(line.begins)
        if batch.is_idle:
            break

        has_work = batch.has_work
        if has_work:
            batch.dispatch(draft, engine.action)
        for done in batch.collect(lag if has_work else 0):
            answers[done.request.id] = done.token_ids

    # It is heard once, with as many passes under way. What these say of a row that has
    # ended, or was cancelled, is told to nobody.
    assert len(under_way) == 1
    assert under_way[0] == lag
    alone = dict(zip("012", expected, strict=True))
    assert answers.pop("1")[:24] == alone["1"]
    assert answers == {
        "2": alone["2"][:cut],
        "0 again": alone["0"],
        "2 again": alone["2"],
    }
    assert all(told[id] == ids for id, ids in answers.items())
    assert 0 < len(told["0"]) < 24
    assert told["0"] == alone["0"][: len(told["0"])]

    # All this leaves no gap between passes.
    assert num_ahead > 40
    is_idle = line.idle_share(0, num_ahead - 1) > 1e-9
    assert is_idle == (lag == 0)


def test_one_read_a_step(plain, monkeypatch):
    reads, original = [], batches.fetch
    monkeypatch.setattr(batches, "fetch", lambda x: reads.append(1) or original(x))
    list(plain.serve(requests(10)[:1]))
    assert len(reads) == 10  # the prefill's and nine steps'


@pytest.mark.parametrize(("batch_size", "lag"), [(1, 0), (3, 1)])
def test_one_read_a_speculative_step(wide, monkeypatch, batch_size, lag):
    """However many tokens it drafts and emits, and however many rows it has."""
    engine, draft = wide
    reads, steps, original = [], [], batches.fetch
    monkeypatch.setattr(batches, "fetch", lambda x: reads.append(1) or original(x))
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda *args: steps.append(1) or step(*args))
    found = answers(engine, draft, batch_size, lag=lag)
    assert len(reads) == len(steps) + len(PROMPTS)
    assert len(steps) < sum(map(len, found)) - len(PROMPTS)


@pytest.mark.gpu
def test_nothing_else_is_read(wide):
    """`fetch` reads explicitly; on the CPU the guard sees nothing."""
    assert jax.default_backend() != "cpu"
    engine, draft = wide
    before = answers(engine, draft, 3)
    with jax.transfer_guard_device_to_host("disallow"):
        assert answers(engine, draft, 3) == before


@pytest.mark.usefixtures("own_programs")
def test_one_trace_for_each_shape(params):
    engine = engine_for(params, PLAIN)[0]
    for _ in range(2):
        for count in (3, 9):
            answers(engine, count=count)
    for kind in KINDS:
        for function in (
            engine.compiled(engine.action, kind),
            engine.compiled_prefill(kind),
        ):
            assert function._cache_size() == (kind == "greedy")


def test_recorded_feedback_is_what_one_pass_says(params, expected):
    config = tiny_draft_config(CONFIG, 0)
    step = StepConfig(CONFIG, Numerics(), PLAIN, config.taps)
    done = next(Engine(step, params, recording="features").serve(requests()[:1]))
    num_prompt, num_recorded = len(PROMPTS[0]), done.num_recorded
    ids = [*PROMPTS[0], *expected[0]]
    assert num_recorded == len(ids) - 1
    feedback = jax.tree.map(lambda x: np.asarray(x[0, :num_recorded]), done.feedback)
    assert feedback.tokens.tolist() == ids[:-1]
    logits, taps = forward(params, CONFIG, ids[:-1], config.taps)
    np.testing.assert_allclose(feedback.taps, taps, rtol=2e-3, atol=2e-3)
    total = np.log(np.sum(np.exp(logits), axis=-1))
    known = slice(num_prompt - 1, None)
    np.testing.assert_allclose(feedback.logsumexp[known], total[known], atol=1e-3)
    assert not feedback.logsumexp[: num_prompt - 1].any()
    head = np.asarray(params["lm_head_kernel"])
    np.testing.assert_allclose(feedback.hidden @ head.T, logits, atol=0.1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_cache_that_is_too_small_is_refused(plain, batch_size):
    with pytest.raises(PromptTooLongError):
        answers(plain, batch_size=batch_size, capacity=64)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_cache_of_any_size_that_fits_will_do(plain, expected, batch_size):
    """Even if prefill's last chunk reaches beyond it."""
    try:
        found = answers(plain, batch_size=batch_size, capacity=100)
    except PromptTooLongError:
        return
    assert found == expected


def test_prompts_beyond_the_context_are_refused(plain):
    long = Request("long", (1,) * CONFIG.max_position, 1)
    with pytest.raises(PromptTooLongError, match="long"):
        list(plain.serve([long]))
    with pytest.raises(ConfigError, match="empty"):
        list(plain.serve([Request("none", (), 1)]))
