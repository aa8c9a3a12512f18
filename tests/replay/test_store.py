# SPDX-License-Identifier: Apache-2.0
"""Recordings on disk: none is read by half without a word."""

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.replay.store import shard_folders


@pytest.fixture
def recording(tmp_path):
    for number in range(3):
        shard = tmp_path / f"shard_{number:05d}"
        shard.mkdir()
        (shard / "index.json").write_text("{}")
    (tmp_path / "shard_00003.part").mkdir()  # that was being written at a kill
    return tmp_path


def test_complete_shards_are_found_in_order(recording):
    assert [path.name[-1] for path in shard_folders(recording)] == ["0", "1", "2"]


def test_a_shard_without_its_index_is_named(recording):
    (recording / "shard_00001" / "index.json").unlink()
    with pytest.raises(ConfigError, match="at shard_00001: a shard is missing or"):
        shard_folders(recording)


def test_a_missing_shard_is_named(recording):
    (recording / "shard_00000" / "index.json").unlink()
    (recording / "shard_00000").rmdir()
    with pytest.raises(
        ConfigError, match="lacks a part .* at shard_00000, shard_00002"
    ):
        shard_folders(recording)
