# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what comes back, on which devices, and what is refused."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ospec_jax
from ospec_jax import atomic
from ospec_jax.config import ConfigError, TreeConfig, UnforeseenError
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError, Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def made(target):
    config = tiny_draft_config(target.config)
    draft = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
    return draft, Meta.create(target, config, card={"history": [{"step": 1}]})


def names_in(folder):
    """What lies in a folder, but for locks."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_draft_and_meta_round_trip(target, made, storage, tmp_path):
    draft, meta = made
    meta = dataclasses.replace(meta, storage=storage)
    checkpoint.save(tmp_path, 3, meta, draft)
    restored = checkpoint.load(tmp_path, target)
    assert (restored.step, restored.meta) == (3, meta)
    np.testing.assert_array_equal(restored.draft.token_ids, draft.token_ids)
    for old, new in zip(
        jax.tree.leaves(draft.params), jax.tree.leaves(restored.draft.params),
        strict=True,
    ):  # fmt: skip
        assert new.dtype == jnp.float32
        if storage == "float32":
            np.testing.assert_array_equal(old, new)
        else:
            np.testing.assert_allclose(old, new, atol=0.02 * float(jnp.abs(old).max()))
    again = checkpoint.save(tmp_path / "again", 1, meta, restored.draft)
    twice = checkpoint.load(again.parent, target)
    # Storing what was read changes nothing more than the last bit of a scale.
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(same, twice.draft, restored.draft)


def test_older_steps_are_removed(made, tmp_path):
    draft, meta = made
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, meta, draft)
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_a_step_takes_the_place_of_its_like_but_not_of_a_later_one(made, tmp_path):
    draft, meta = made
    other = jax.tree.map(lambda x: x + 1, draft.params)
    checkpoint.save(tmp_path, 3, meta, draft)
    checkpoint.save(tmp_path, 3, meta, draft.replace(params=other))
    found = checkpoint.load(tmp_path).draft.params
    jax.tree.map(np.testing.assert_array_equal, found, other)
    with pytest.raises(checkpoint.CheckpointError, match="holds step 3"):
        checkpoint.save(tmp_path, 2, meta, draft)
    checkpoint.set_aside(tmp_path, 1)
    checkpoint.save(tmp_path, 2, meta, draft)
    assert checkpoint.steps(tmp_path) == [2]


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def die(*args, **kwargs):
    raise Killed


POINTS = ["while writing", "before the swap", "within the swap", "while cleaning up"]


def kill_at(monkeypatch, point):
    """Lets the next save of a step that is there end at `point`."""
    rename = Path.rename
    doomed = {"before the swap": "3.replaced", "within the swap": "3"}

    def dying_rename(self, to):
        if Path(to).name == doomed[point]:
            raise Killed
        return rename(self, to)

    if point == "while writing":
        checkpointer = checkpoint.ocp.training.Checkpointer
        monkeypatch.setattr(checkpointer, "save_checkpointables", die)
    elif point == "while cleaning up":
        monkeypatch.setattr(shutil, "rmtree", die)
    else:
        monkeypatch.setattr(Path, "rename", dying_rename)


@pytest.mark.parametrize("point", POINTS)
def test_a_save_killed_anywhere_leaves_the_old_step_or_the_new(
    made, tmp_path, monkeypatch, point
):
    draft, meta = made
    changed = lambda by: draft.replace(
        params=jax.tree.map(lambda x: x + by, draft.params)
    )
    for step in (2, 3):
        checkpoint.save(tmp_path, step, meta, draft)
    with monkeypatch.context() as patch:
        kill_at(patch, point)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, 3, meta, changed(1))

    found = checkpoint.load(tmp_path)
    expected = changed(1) if point == "while cleaning up" else draft
    assert found.step == 3
    jax.tree.map(np.testing.assert_array_equal, found.draft, expected)
    assert checkpoint.steps(tmp_path) == [2, 3]

    checkpoint.save(tmp_path, 3, meta, changed(2))
    found = checkpoint.load(tmp_path).draft
    jax.tree.map(np.testing.assert_array_equal, found, changed(2))
    assert names_in(tmp_path) == ["2", "3"]


def test_loading_removes_no_leftovers_and_a_set_aside_step_stays_away(made, tmp_path):
    draft, meta = made
    for step in (1, 2):
        checkpoint.save(tmp_path, step, meta, draft)
    for name in ("2.replaced", "2.writing", "2.orbax-checkpoint-tmp-9"):
        shutil.copytree(tmp_path / "2", tmp_path / name)
    checkpoint.load(tmp_path)
    assert len(names_in(tmp_path)) == 5
    for name in ("2.unreadable", "2.unreadable-2"):
        checkpoint.set_aside(tmp_path, 1)
        assert checkpoint.steps(tmp_path) == [1]
        assert (tmp_path / name).is_dir()
        # It may be written again, and be unreadable again.
        checkpoint.save(tmp_path, 2, meta, draft)


def test_a_reader_may_give_the_step_its_name_back_within_the_swap(
    made, tmp_path, monkeypatch
):
    draft, meta = made
    other = draft.replace(params=jax.tree.map(lambda x: x + 1, draft.params))
    checkpoint.save(tmp_path, 3, meta, draft)
    rename, seen = Path.rename, []

    def rename_and_read(self, to):
        result = rename(self, to)
        if Path(to).name == "3.replaced" and not seen:
            seen.append(checkpoint.steps(tmp_path))
        return result

    monkeypatch.setattr(Path, "rename", rename_and_read)
    checkpoint.save(tmp_path, 3, meta, other)
    assert seen == [[3]]
    found = checkpoint.load(tmp_path).draft
    jax.tree.map(np.testing.assert_array_equal, found, other)


def test_a_step_that_takes_the_place_of_its_like_removes_older_ones(made, tmp_path):
    draft, meta = made
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, meta, draft, num_kept=3)
    checkpoint.save(tmp_path, 3, meta, draft)
    assert checkpoint.steps(tmp_path) == [2, 3]


_KILLED = """
import os, pathlib, signal, sys
from ospec_jax.storage import checkpoint

found = checkpoint.load(sys.argv[1])
rename = pathlib.Path.rename

def die_within_the_swap(self, to):
    if pathlib.Path(to).name == "3":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, to)

pathlib.Path.rename = die_within_the_swap
checkpoint.save(sys.argv[1], 3, found.meta, found.draft)
"""


def test_a_save_that_is_really_killed_loses_nothing(made, tmp_path):
    draft, meta = made
    checkpoint.save(tmp_path, 3, meta, draft)
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "3").exists()
    found = checkpoint.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.draft, draft)
    checkpoint.save(tmp_path, 3, meta, draft)
    assert names_in(tmp_path) == ["3"]


def test_corrupt_step_falls_back_to_the_one_before_and_says_so(target, made, tmp_path):
    draft, meta = made
    for step in (1, 2):
        checkpoint.save(tmp_path, step, meta, draft)
    for file in (tmp_path / "2" / "draft").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="step 2.*going on from step 1"):
        assert checkpoint.load(tmp_path, target).step == 1


def test_half_written_step_is_not_taken_for_one(target, made, tmp_path):
    draft, meta = made
    checkpoint.save(tmp_path, 1, meta, draft)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "meta")
    with pytest.warns(UserWarning, match="going on from step 1"):
        assert checkpoint.load(tmp_path, target).step == 1


def test_no_readable_step_is_an_error(made, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "vocabulary size"),
        ({"target_hidden_size": 64}, "hidden size"),
        ({"taps": (1, 2, 9)}, "reads layers"),
    ],
)
def test_draft_for_another_target_is_refused(target, made, changes, message):
    meta = dataclasses.replace(
        made[1], draft=dataclasses.replace(made[1].draft, **changes)
    )
    with pytest.raises(CheckpointError, match=message):
        meta.check(target)


def test_other_tokenizer_is_refused_other_weights_warn(target, made):
    with pytest.raises(CheckpointError, match="tokenizer"):
        dataclasses.replace(made[1], tokenizer_hash="other").check(target)
    with pytest.warns(UserWarning, match="other weights"):
        made[1].check(dataclasses.replace(target, fingerprint="other"))


def test_unknown_meta_key_is_an_error(made):
    values = dataclasses.asdict(made[1]) | {"draft_versoin": 3}
    with pytest.raises(ConfigError, match="did you mean 'draft_version'"):
        checkpoint.read_meta(values)


_ON_FOUR_DEVICES = """
import jax, sys
from jax.sharding import NamedSharding, PartitionSpec as P
from ospec_jax.storage import checkpoint
from ospec_jax.config import TreeConfig
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

assert jax.device_count() == 4
target = tiny_target()
config = tiny_draft_config(target.config)
draft = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
split = lambda x: jax.device_put(x, NamedSharding(mesh, P("model" if x.shape[0] % 4 == 0 else None)))
draft = draft.replace(params=jax.tree.map(split, draft.params))
checkpoint.save(sys.argv[1], 1, checkpoint.Meta.create(target, config), draft)
"""  # noqa: E501


@pytest.mark.thorough
def test_checkpoint_of_four_devices_restores_on_one(target, made, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _ON_FOUR_DEVICES, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    restored = checkpoint.load(tmp_path, target)
    jax.tree.map(np.testing.assert_array_equal, restored.draft, made[0])


def test_the_logger_of_others_is_as_it_was(tmp_path):
    logger = logging.getLogger("absl")
    before = logger.level
    try:
        for level in (logging.DEBUG, logging.CRITICAL):
            logger.setLevel(level)
            with checkpoint._open(tmp_path):
                assert logger.level == max(level, logging.ERROR)
            assert logger.level == level
    finally:
        logger.setLevel(before)


def rewrite_record(folder, **changes):
    """Changes values of a stored record, as an editor might."""
    file = folder / "meta" / "_strings.json"
    strings = json.loads(file.read_text())
    (name,) = (key for key, value in strings.items() if isinstance(value, str))
    strings[name] = json.dumps(json.loads(strings[name]) | changes)
    file.write_text(json.dumps(strings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_version": "3"}, "draft_version is '3'; use a whole number"),
        ({"answered": [1]}, "answered is .1.*; use a list of which each is text"),
        ({"storage": "int2"}, "storage is 'int2'"),
        ({"card": None}, "card is None"),
        ({"num_admitted": -1}, "a count below 0"),
        ({"draft": 3}, "has draft 3"),
        ({"family": None}, "has null for 'family'"),
    ],
)
def test_a_damaged_record_is_named_and_an_earlier_step_taken(
    made, tmp_path, changes, message
):
    draft, meta = made
    for step in (1, 2):
        checkpoint.save(tmp_path, step, meta, draft)
    rewrite_record(tmp_path / "2", **changes)
    with pytest.warns(UserWarning, match=message):
        assert checkpoint.load(tmp_path).step == 1
    rewrite_record(tmp_path / "1", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert not isinstance(caught.value, UnforeseenError)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"intermediate_size": 10**9}, {"num_heads": 2}]
)
def test_arrays_of_other_shapes_than_recorded_are_named(made, tmp_path, changes):
    """Not padded, nor cut; and nothing of their size is made."""
    draft, meta = made
    checkpoint.save(tmp_path, 1, meta, draft)
    rewrite_record(tmp_path / "1", draft=dataclasses.asdict(meta.draft) | changes)
    with pytest.raises(CheckpointError, match="is stored with the shape"):
        checkpoint.load(tmp_path)


def test_a_save_waits_for_another_one_and_tells_whose(made, tmp_path, monkeypatch):
    draft, meta = made
    monkeypatch.setattr(checkpoint, "_PATIENCE", 0.01)
    message = f"used by process {os.getpid()} on "
    with (
        atomic.locked(tmp_path / ".save.lock", "held"),
        pytest.warns(UserWarning, match=message),
        pytest.raises(atomic.InUseError, match=message),
    ):
        checkpoint.save(tmp_path, 3, meta, draft)
    assert checkpoint.save(tmp_path, 3, meta, draft).is_dir()


def test_what_is_shipped_names_no_folder_of_whoever_made_it():
    shipped = Path(ospec_jax.__file__).parent / "shipped"
    notes = list(shipped.rglob("commit_success.txt"))
    assert len(notes) > 2
    assert not [note for note in notes if "/" in note.read_text()]
