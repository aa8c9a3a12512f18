# SPDX-License-Identifier: Apache-2.0
"""Drafts that are not finite are neither saved nor loaded, exported or trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from ospec_jax import ConfigError, LearnerConfig, Session
from ospec_jax.config import SamplingConfig, TreeConfig
from ospec_jax.distill.train import DistillConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.formats import exporting
from ospec_jax.formats.tensors import read_tensors, write_folder
from ospec_jax.learners.last_layer import HeadSamples, head_learner
from ospec_jax.learners.registry import LEARNERS
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.models import finite
from ospec_jax.models.weights import WeightsError
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

BAD = [np.nan, np.inf, -np.inf]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def made(target):
    config = tiny_draft_config(target.config, 200)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    return tiny_draft(drafter, config), Meta.create(target, config)


def spoiled(draft, value):
    kernel = draft.params["fc"]["kernel"].at[1, 2].set(value)
    return draft.replace(params={**draft.params, "fc": {"kernel": kernel}})


@pytest.mark.parametrize("value", BAD)
def test_one_number_is_enough(made, value):
    draft, _ = made
    check = jax.jit(finite.is_finite)
    assert check(draft.params)
    assert finite.find_not_finite(draft) == ""
    assert not check(spoiled(draft, value).params)
    assert finite.find_not_finite(spoiled(draft, value)) == "params/fc/kernel"
    assert finite.is_finite({"ids": jnp.arange(3), "best": jnp.float32(np.inf)})
    assert not finite.is_finite({"best": jnp.float32(np.nan)})
    assert not finite.is_finite({"w": jnp.full(2, value, jnp.bfloat16)})
    assert finite.is_finite({})


def test_a_draft_that_is_not_finite_is_not_saved(made, tmp_path):
    draft, meta = made
    checkpoint.save(tmp_path, 1, meta, draft)
    with pytest.raises(CheckpointError, match="step 2.*'fc/kernel' holds infinities"):
        checkpoint.save(tmp_path, 2, meta, spoiled(draft, np.nan))
    assert checkpoint.steps(tmp_path) == [1]


def test_nor_loaded(target, made, tmp_path):
    draft, meta = made
    checkpoint.save(tmp_path, 1, meta, draft)
    params = spoiled(draft, np.inf).params
    items = {"params": params, "token_ids": draft.token_ids}
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        stored = checkpointer.load_checkpointables(1, {"meta": None})["meta"]
        checkpointer.save_checkpointables(2, {"meta": stored, "draft": items})
    with pytest.raises(CheckpointError, match="step 2.*'fc/kernel' holds infinities"):
        load_draft(tmp_path, target)


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_nor_exported(made, tmp_path, layout):
    draft, meta = made
    export = lambda draft, dtype: exporting.write(
        tmp_path, draft, meta.draft, layout, dtype, "tiny"
    )
    with pytest.raises(WeightsError, match=r"'fc.weight', as float32, holds infin"):
        export(spoiled(draft, np.nan), "float32")
    # Or what is finite until it is narrow.
    with (
        pytest.warns(RuntimeWarning, match="overflow"),
        pytest.raises(WeightsError, match=r"as float16.*export it as float32"),
    ):
        export(spoiled(draft, 1e6), "float16")
    assert not list(tmp_path.iterdir())
    export(spoiled(draft, 1e6), "bfloat16")


def test_nor_imported(tmp_path, monkeypatch):
    tensors = {"d2t": np.arange(3), "fc.weight": np.ones((2, 2), np.float32)}
    write_folder(tmp_path, {}, tensors)
    assert read_tensors(tmp_path)["fc.weight"].sum() == 4
    tensors["fc.weight"][0, 1] = np.nan
    monkeypatch.setattr(finite, "find_not_finite", lambda tree: "")
    write_folder(tmp_path, {}, tensors)
    monkeypatch.undo()
    with pytest.raises(WeightsError, match=r"'fc.weight' holds infinities or NaNs"):
        read_tensors(tmp_path)


FLOATS = [
    (name, key)
    for name in LEARNERS
    for key, value in LearnerConfig(name=name).settings.items()
    if isinstance(value, float)
]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "key"), FLOATS)
def test_rates_are_finite(name, key, value):
    given = {"optimizer": "sgd"} if key == "learning_rate" else {}
    with pytest.raises(ConfigError, match=f"{key} is {value}"):
        LearnerConfig(name=name, **given, **{key: float(value)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_other_settings_are_finite_too(value):
    for name in ("learning_rate", "feature_weight"):
        with pytest.raises(ConfigError, match=f"{name} is {value}; use a finite"):
            DistillConfig(**{name: float(value)})
    with pytest.raises(ConfigError, match=f"temperature is {value}"):
        SamplingConfig(temperature=float(value))


def test_an_update_of_the_head_that_is_not_finite_is_none():
    learner, rng = head_learner(num_candidates=4), np.random.default_rng(0)
    state = learner.init(jnp.asarray(rng.normal(size=(9, 12)), jnp.float32))
    inputs = jnp.asarray(rng.normal(size=(5, 12)), jnp.float32)

    def learn(state, inputs):
        logits = inputs @ state.kernel.T
        labels = jnp.arange(5)
        samples = HeadSamples(inputs, logits, labels, jnp.ones(5, bool))
        return jax.jit(learner.update)(state, samples)

    state, _, info = learn(state, inputs)
    assert info.num_refused == 0
    for value in BAD:
        after, _, info = learn(state, inputs.at[2, 3].set(value))
        assert (int(info.num_refused), float(info.step_norm)) == (1, 0.0)
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_head_stops_and_its_last_good_projection_is_served(target, made, tmp_path):
    draft, meta = made
    learner = LearnerConfig(name="head")
    loaded = LoadedDraft(draft, meta)
    session = Session(target, loaded, learner=learner, ngrams=False)
    answer = lambda session, first: [
        r.token_ids
        for r in session.generate([f"What is {first + i}?" for i in range(3)], 32)
    ]
    expected = [answer(Session(target), first) for first in (0, 3, 6)]
    assert answer(session, 0) == expected[0]
    version, before = (
        session.version,
        np.array(session.draft.params["lm_head"]["kernel"]),
    )
    head = session.trainer.update.__self__
    inner = head.chunks.head_inputs

    def spoil(params, states):
        return inner(params, states) * jnp.nan

    spoilt = dataclasses.replace(head.chunks, head_inputs=spoil)
    head._learn = jax.jit(spoilt.learn, donate_argnums=(0, 1))
    with pytest.warns(UserWarning, match="'head' with head_rate 1.0 was not finite"):
        assert answer(session, 3) == expected[1]
    assert [r.decision for r in session.reports].count("stopped") == 1
    assert session.reports[-1].decision == "stopped"
    np.testing.assert_array_equal(session.draft.params["lm_head"]["kernel"], before)
    np.testing.assert_array_equal(
        session.served_draft.params["lm_head"]["kernel"], before
    )
    assert session.version == version
    session.save(tmp_path)
    resumed = Session(target, loaded, learner=learner, ngrams=False)
    with pytest.warns(UserWarning, match="learning has stopped.*lower head_rate"):
        resumed.resume(tmp_path)
    assert answer(resumed, 6) == expected[2]
    assert not resumed.reports
