# SPDX-License-Identifier: Apache-2.0
"""Recording a target's answers and training a draft on them."""

import dataclasses
import shutil
import signal

import jax
import numpy as np
import pytest

from ospec_jax import Session, load_draft
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.distill import train as train_module
from ospec_jax.distill.train import DistillConfig, train
from ospec_jax.drafters.registry import (
    FAMILIES,
    TRAINED,
    build_drafter,
    default_draft_config,
)
from ospec_jax.drafters.starts import start_warm
from ospec_jax.loading import LoadedDraft, with_sliding_window
from ospec_jax.models import finite
from ospec_jax.models.llama import head_table
from ospec_jax.replay.collect import collect
from ospec_jax.replay.store import FeedbackStore, recorded_ids
from ospec_jax.reports.progress import Interrupted
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.testing import tiny_draft, tiny_target

NEW_TOKENS = 24
CONFIG = DistillConfig(
    num_updates=12, batch_size=2, num_context=64, window=16, learning_rate=3e-3,
    warm_up=2, decay_share=0.2, holdout_share=0.3, save_every=6, evaluate_every=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def prompts():
    row = lambda i: {"prompt": f"count to {i}", "id": f"p{i}", "domain": "ab"[i % 2]}
    return [parse_prompt(row(i), "unnamed") for i in range(14)]


@pytest.fixture(scope="module")
def draft_config(target):
    return default_draft_config(target.config, draft_vocab_size=128)


@pytest.fixture(scope="module")
def folder(target, prompts, draft_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    collected = lambda rows: collect(
        target, rows, folder, draft_config.taps, max_new_tokens=NEW_TOKENS,
        batch_size=4, shard_size=4,
    )  # fmt: skip
    assert collected(prompts[:6]) == 6
    assert collected(prompts) == 8  # the first six are not answered again
    assert collected(prompts) == 0
    return folder


@pytest.fixture(scope="module")
def trained(target, folder, draft_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("draft")
    return out, train(target, folder, out, CONFIG, draft_config)


def test_store_holds_what_decoding_gives(target, prompts, folder):
    store = FeedbackStore(folder)
    assert recorded_ids(folder) == {p.id for p in prompts}
    expected = {
        r.prompt.id: r.token_ids for r in Session(target).generate(prompts, NEW_TOKENS)
    }
    for i, entry in enumerate(store.entries):
        # Nothing was verified after the last token, which is therefore not recorded.
        assert store.answer(i).tolist() == expected[entry.id][:-1]


def test_windows_cover_each_answer_once(folder):
    store = FeedbackStore(folder)
    everything = range(len(store.entries))
    windows = store.windows(everything, CONFIG.window)
    segments = store.segments(windows, CONFIG.num_context, CONFIG.window, num_steps=1)
    first = CONFIG.num_context + 1  # the row whose distribution the first pair learns
    trained = segments.weight[:, first : first + CONFIG.window]
    # Each answer's last token was verified but is not stored.
    assert trained.sum() == store.num_answer_tokens + len(store.entries)


def test_training_improves_the_held_out_score(trained, folder, draft_config):
    _, history = trained
    assert history[-1]["step"] == CONFIG.num_updates
    assert set(history[-1]["mean_acceptance_length"]) <= {"a", "b"}
    assert np.isfinite(history[-1]["held_out_loss"])
    assert history[-1]["num_answer_tokens"] == FeedbackStore(folder).num_answer_tokens


def test_interrupted_training_resumes_bitwise(
    target, folder, draft_config, trained, tmp_path
):
    out, _ = trained
    whole = checkpoint.load(out, target)
    assert checkpoint.steps(out) == [6, 12]
    shutil.copytree(out / "6", tmp_path / "6")
    train(target, folder, tmp_path, CONFIG, draft_config)
    resumed = checkpoint.load(tmp_path, target)
    assert resumed.step == whole.step == 12
    jax.tree.map(np.testing.assert_array_equal, whole.draft, resumed.draft)


def test_a_signal_saves_and_tells_that_training_is_unfinished(
    target, folder, draft_config, tmp_path, monkeypatch
):
    describe = train_module._describe

    def terminated(info):
        signal.raise_signal(signal.SIGTERM)
        return describe(info)

    monkeypatch.setattr(train_module, "_describe", terminated)
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(target, folder, tmp_path, CONFIG, draft_config)
    assert checkpoint.steps(tmp_path) == [1]


def test_a_draft_that_is_not_finite_ends_training(
    target, folder, draft_config, tmp_path
):
    # The first step is as long as float32 goes, so that the second has no loss.
    config = dataclasses.replace(
        CONFIG, learning_rate=3e38, warm_up=1, num_updates=6, save_every=1
    )
    with pytest.raises(FloatingPointError, match=r"at update \d .*lower learning_rate"):
        train(target, folder, tmp_path, config, draft_config)
    for step in checkpoint.steps(tmp_path):
        draft = checkpoint.load(tmp_path, step=step).draft
        assert not finite.find_not_finite(draft)


@pytest.mark.thorough
def test_training_goes_on_from_a_draft(target, folder, trained, tmp_path):
    out, history = trained
    start = checkpoint.load(out, target)
    longer = dataclasses.replace(CONFIG, num_updates=4, save_every=4, evaluate_every=4)
    initial = LoadedDraft(start.draft, start.meta)
    again = train(target, folder, tmp_path, longer, initial=initial)
    result = checkpoint.load(tmp_path, target)
    np.testing.assert_array_equal(result.draft.token_ids, start.draft.token_ids)
    assert result.meta.card["started_from"]["num_updates"] == CONFIG.num_updates
    assert again[-1]["train_loss"] < history[0]["train_loss"] + 0.5


def test_a_domain_is_learned_alone(target, folder, trained, tmp_path, monkeypatch):
    """From a draft for all of them, of which every domain's score is kept."""
    seen, windows = [], FeedbackStore.windows

    def watched(self, entries, length):
        seen.append({self.entries[i].domain for i in entries})
        return windows(self, entries, length)

    monkeypatch.setattr(FeedbackStore, "windows", watched)
    start = checkpoint.load(trained[0], target)
    config = dataclasses.replace(CONFIG, num_updates=2, domains=("b",))
    initial = LoadedDraft(start.draft, start.meta)
    history = train(target, folder, tmp_path, config, initial=initial)
    assert {"b"} in seen  # the batches', beside one for each held-out answer
    assert max(map(len, seen)) == 1
    assert [row["step"] for row in history] == [0, 2]
    result = checkpoint.load(tmp_path, target)
    np.testing.assert_array_equal(result.draft.token_ids, start.draft.token_ids)
    assert result.meta.card["started_from"]["num_updates"] == CONFIG.num_updates
    before, after = (row["mean_acceptance_length"] for row in history)
    assert before == trained[1][-1]["mean_acceptance_length"]
    assert set(after) == set(before)
    config = dataclasses.replace(config, domains=("c",))
    with pytest.raises(ConfigError, match="domains c is there .* 'a', 'b'"):
        train(target, folder, tmp_path / "c", config)


def test_a_window_is_trained_behind_all_that_it_sees(
    target, folder, draft_config, trained, tmp_path
):
    """A start draft brings its window, or is given another; its record says which."""
    windowed = dataclasses.replace(draft_config, sliding_window=90)
    undecided = dataclasses.replace(CONFIG, num_context=None, num_updates=1)
    assert undecided.for_draft(draft_config).num_context == 128
    assert undecided.for_draft(windowed).num_context == 90
    assert CONFIG.for_draft(draft_config) == CONFIG
    with pytest.raises(ConfigError, match="num_context is 64, .* sees 90 tokens"):
        train(target, folder, tmp_path / "refused", CONFIG, windowed)
    initial = with_sliding_window(load_draft(trained[0], target), 90)
    train(target, folder, tmp_path / "run", undecided, initial=initial)
    meta = checkpoint.load(tmp_path / "run", target).meta
    assert meta.draft == windowed
    assert meta.card["config"]["num_context"] == 90


# EAGLE-1 is built as EAGLE-3 is, which the other tests train. Hydra and P-EAGLE are
# trained by command (`cli/test_cli.py`), all of them without a run in
# `learners/test_conformance.py`.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param("eagle1", marks=pytest.mark.thorough),
        pytest.param("hydra", marks=pytest.mark.thorough),
        "exit",
        pytest.param("dflash", marks=pytest.mark.thorough),
        pytest.param("peagle", marks=pytest.mark.thorough),
    ],
)
def test_every_family_is_trained(target, folder, prompts, family, tmp_path):
    """They train, resume bitwise, and load as what they are."""
    eagle3_folder = folder
    if family == "exit":  # one recording serves all but this one
        folder = tmp_path / "store"
        taps = default_draft_config(target.config, 128, family).taps
        collect(
            target, prompts, folder, taps, max_new_tokens=NEW_TOKENS, batch_size=4
        )  # fmt: skip
    config = dataclasses.replace(CONFIG, num_updates=4, save_every=2, evaluate_every=2)
    head = default_draft_config(target.config, 128, family)
    out = tmp_path / "whole"
    history = train(target, folder, out, config, head, family=family)
    assert [row["step"] for row in history] == [2, 4]
    assert (out / "training.png").stat().st_size > 10_000
    whole = checkpoint.load(out, target)
    assert (whole.meta.family, whole.meta.draft) == (family, head)
    shutil.copytree(out / "2", tmp_path / "part" / "2")
    train(target, folder, tmp_path / "part", config, head, family=family)
    resumed = checkpoint.load(tmp_path / "part", target)
    jax.tree.map(np.testing.assert_array_equal, whole.draft, resumed.draft)
    session = Session(target, load_draft(out, target))
    assert next(session.generate(["hello"], 8)).stats.num_draft_tokens > 0
    with pytest.raises(CheckpointError, match=f"family '{family}', not 'eagle3'"):
        train(target, eagle3_folder, out, config)


@pytest.mark.parametrize("family", TRAINED)
def test_drafts_start_from_the_targets_last_layer(target, family):
    """Where shapes allow: a draft of another width starts at random."""
    config = default_draft_config(target.config, 128, family)
    ids = np.arange(128)
    drafter = build_drafter(family, config, TreeConfig(num_steps=1))
    params = tiny_draft(drafter, config).params
    started = start_warm(FAMILIES[family], params, target, ids)
    places = {"hydra": "prefix", "dflash": "layers_1", "peagle": "further_0"}
    layer = started[places[family]] if family in places else started
    last = target.params[f"layers_{target.config.num_layers - 1}"]
    kernel = layer["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, last["mlp"]["down_proj"]["kernel"])
    head = head_table(target.params)["kernel"][ids]
    np.testing.assert_array_equal(started["lm_head"]["kernel"], head)
    narrow = dataclasses.replace(config, intermediate_size=16)
    drafter = build_drafter(family, narrow, TreeConfig(num_steps=1))
    params = tiny_draft(drafter, narrow).params
    assert start_warm(FAMILIES[family], params, target, ids) is params


def test_features_of_other_layers_are_refused(target, folder, tmp_path):
    config = dataclasses.replace(default_draft_config(target.config, 128), taps=(0, 2))
    with pytest.raises(ConfigError, match="recorded for another draft"):
        train(target, folder, tmp_path, CONFIG, config)
    with pytest.raises(ConfigError, match="recorded for another draft"):
        train(target, folder, tmp_path, CONFIG, family="exit")


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [
        ("exit", 2, "exit_layer is 2; .* from 1 to 1"),
        ("exit", -1, "exit_layer is -1; .* from 1 to 1"),
        ("hydra", 2, "exit_layer is 2, but .* 'hydra' do not belong to one layer"),
    ],
)
def test_exits_that_cannot_be_are_refused(target, family, layer, message):
    with pytest.raises(ConfigError, match=message):
        default_draft_config(target.config, 128, family, layer=layer)


def test_unknown_families_and_losses_are_refused(target, folder, tmp_path):
    with pytest.raises(ConfigError, match="are not trained; use eagle3"):
        train(target, folder, tmp_path, CONFIG, family="ngram")
    config = dataclasses.replace(CONFIG, loss="regret")
    with pytest.raises(ConfigError, match="unknown loss 'regret'"):
        train(target, folder, tmp_path, config)


def test_an_empty_store_says_so(tmp_path):
    with pytest.raises(ConfigError, match="collect some first"):
        FeedbackStore(tmp_path)
