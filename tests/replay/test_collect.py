# SPDX-License-Identifier: Apache-2.0
"""Prompts of any length are recorded together, each in a cache of its size."""

import pytest

from ospec_jax import Session
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.engine import Engine
from ospec_jax.replay.collect import collect, rows_of
from ospec_jax.replay.record import record
from ospec_jax.replay.score import whole_answer
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.sharding import abstract_mesh
from ospec_jax.testing import tiny_target

TAPS = (1, 2)
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def target():
    """It has 512 positions."""
    return tiny_target()


def prompt(name, num_bytes):
    text = (f"{name} counts. " * num_bytes)[:num_bytes]
    return parse_prompt({"prompt": text, "id": name}, "")


LONG = prompt("long", 300)
PROMPTS = [prompt("a", 20), LONG, prompt("b", 30), prompt("c", 25)]


def test_every_prompt_has_a_cache_of_its_size(target, tmp_path, monkeypatch):
    """A long one costs the short ones nothing, and answers are those of each alone."""
    calls = []
    serve = Engine.serve

    def spied(engine, requests, **how):
        calls.append((how["capacity"], [r.id for r in requests], how["ordinals"]))
        return serve(engine, requests, **how)

    monkeypatch.setattr(Engine, "serve", spied)
    sampling = SamplingConfig()
    args = {"max_new_tokens": NEW_TOKENS, "batch_size": 2, "sampling": sampling}
    assert record(target, PROMPTS, tmp_path, TAPS, **args) == 4
    assert [call[:2] for call in calls] == [(256, ["a", "b", "c"]), (512, ["long"])]
    # Else two sampled answers would share their random numbers.
    assert calls[0][2] is calls[1][2]
    monkeypatch.undo()

    store = FeedbackStore(tmp_path)
    recordings = [store.recording(i) for i in range(len(store.entries))]
    found = {r.id: whole_answer(r) for r in recordings}
    alone = Session(target).generate(PROMPTS, NEW_TOKENS)
    assert found == {r.prompt.id: r.token_ids for r in alone}


def test_what_the_target_has_no_positions_for_is_left_out(target, tmp_path):
    prompts = [PROMPTS[0], prompt("longest", 600)]
    args = {"max_new_tokens": NEW_TOKENS, "batch_size": 2}
    with pytest.warns(UserWarning, match="1 of 2 .* more than 504 .* 512 positions"):
        assert record(target, prompts, tmp_path, TAPS, **args) == 1
    fitting = PROMPTS[:2]
    with pytest.warns(UserWarning, match="1 of 2 .* left out; raise --capacity"):
        assert record(target, fitting, tmp_path, TAPS, capacity=256, **args) == 0
    with pytest.raises(ConfigError, match="the capacity is 300; use one of"):
        record(target, prompts, tmp_path, TAPS, capacity=300, **args)
    args["max_new_tokens"] = 512
    with pytest.raises(ConfigError, match="no room for prompts in the 512 tokens of"):
        record(target, prompts, tmp_path / "other", TAPS, **args)


def test_features_of_other_layers_are_not_added(target, tmp_path):
    args = {"max_new_tokens": NEW_TOKENS, "batch_size": 2}
    assert collect(target, PROMPTS[:1], tmp_path, TAPS, **args) == 1
    with pytest.raises(ConfigError, match=r"layers \(1, 2\), not \(0, 1\)"):
        collect(target, PROMPTS[:2], tmp_path, (0, 1), **args)
    # What is there already is read by drafts that read no such features, too.
    assert collect(target, PROMPTS[:1], tmp_path, (0, 1), **args) == 0


def test_long_caches_hold_fewer_rows():
    assert [rows_of(c, 32) for c in (256, 1024, 2048, 4096)] == [32, 32, 16, 8]
    assert rows_of(32_768, 32) == 1
    assert rows_of(4096, 5) == 5
    mesh = abstract_mesh("data=3,model=1")
    assert [rows_of(c, 30, mesh) for c in (256, 2048, 32_768)] == [30, 15, 3]
