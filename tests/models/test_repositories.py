# SPDX-License-Identifier: Apache-2.0
"""What is named as on the hub: found in the hub's own cache, refused with a remedy."""

import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from public_heads import flat_config, tensors, write

from ospec_jax import Session, load_draft
from ospec_jax.cli.make import import_draft
from ospec_jax.config import TreeConfig
from ospec_jax.loading import check_draft
from ospec_jax.models.hub import resolve
from ospec_jax.models.repositories import from_hub, is_hub_id
from ospec_jax.testing import tiny_target

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(name="cache")
def _cache(tmp_path, monkeypatch):
    """The hub's cache, and no hub."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def publish(cache, name, revision="main"):
    """The folder of a repository's snapshot, as the hub's client lays it out."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", True),
        ("owner/name@refs/pr/3", True),
        ("owner/name@", False),
        ("shipped", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("../b", False),
        ("/a/b", False),
        ("~/b", False),
        ("a b/c", False),
    ],
)
def test_names_of_the_hub_are_told_from_paths(name, is_one):
    assert is_hub_id(name) == is_one


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_a_public_head_is_taken_from_the_hub(cache, tmp_path, revision):
    target = tiny_target(32, num_layers=7)
    name = "someone/eagle3-head" + ("" if revision == "main" else f"@{revision}")
    made = tmp_path / "head"
    write(made, flat_config(32), tensors(32))
    shutil.copytree(
        made, publish(cache, "someone/eagle3-head", revision), dirs_exist_ok=True
    )
    check_draft(name)
    here = load_draft(made, target)
    found = load_draft(name, target)
    assert found.meta.draft == here.meta.draft
    assert found.taps == here.taps
    np.testing.assert_array_equal(
        found.draft.params["fc"]["kernel"], here.draft.params["fc"]["kernel"]
    )
    assert found.meta.card["imported_from"] == name.split("/")[1]
    import_draft(Path(name), tmp_path / "imported", taps=here.taps)
    assert load_draft(tmp_path / "imported", target).taps == here.taps


def test_a_draft_that_learned_is_taken_from_the_hub(cache, tmp_path):
    target = tiny_target(32, num_layers=7)
    made = tmp_path / "head"
    write(made, flat_config(32), tensors(32))
    draft = load_draft(made, target)
    session = Session(target, draft, tree=TreeConfig(num_steps=2))
    session.save(tmp_path / "learned")
    snapshot = publish(cache, "someone/learned")
    shutil.copytree(tmp_path / "learned", snapshot, dirs_exist_ok=True)
    found = load_draft("someone/learned", target)
    assert found.meta.draft == draft.meta.draft


def test_a_folder_comes_before_the_hub(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    write(tmp_path / "my" / "head", flat_config(32), tensors(32))
    assert load_draft("my/head", tiny_target(32, num_layers=7)).taps


def test_what_is_not_there_is_said_with_the_remedy(cache):
    message = "'someone/nothing' is nothing here.*the hub cannot be reached"
    with pytest.raises(FileNotFoundError, match=message):
        load_draft("someone/nothing", tiny_target(32, num_layers=7))
    with pytest.raises(FileNotFoundError, match=message):
        resolve("someone/nothing")


def _refusal(kind):
    """An error of the hub's client, whose versions make them in different ways."""
    error = kind.__new__(kind)
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "accept its conditions.*hf auth login"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.RepositoryNotFoundError, "none of that name, or it is private"),
    ],
)
def test_the_hub_s_refusals_say_what_would_help(monkeypatch, kind, message):
    def refuse(*args, **kwargs):
        raise _refusal(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=message):
        from_hub("owner/name@v9")
