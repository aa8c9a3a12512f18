# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that are kept: damaged ones are compiled again."""

import os
import signal
import subprocess
import sys

import jax
import pytest
from jax._src import compilation_cache

from ospec_jax.models.programs import CheckedCache, keep_programs

_COMPILED = """
import sys
from pathlib import Path
import jax
from ospec_jax.models import programs

programs.keep_programs(Path(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_raise_persistent_cache_errors", True)
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
assert jax.jit(lambda x: x * 3 + 1)(2.0) == 7
print(sum(name == "/jax/compilation_cache/cache_hits" for name in seen))
"""


def count_hits(folder) -> int:
    """Programs that a process found in a folder."""
    command = [sys.executable, "-W", "error", "-c", _COMPILED, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_a_damaged_program_is_compiled_again(tmp_path):
    assert count_hits(tmp_path) == 0
    files = sorted(tmp_path.glob("*.program"))
    assert files
    assert count_hits(tmp_path) == len(files)

    whole = [file.read_bytes() for file in files]
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content[: len(content) // 2])
    assert count_hits(tmp_path) == 0
    # They were put in place again.
    assert count_hits(tmp_path) == len(files)


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 100])
def test_what_is_damaged_is_as_if_it_were_not_there(tmp_path, damage):
    cache = CheckedCache(tmp_path)
    cache.put("a", b"program")
    assert cache.get("a") == b"program"
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + damage)
    assert cache.get("a") is None
    cache.put("a", b"program")
    assert cache.get("a") == b"program"
    assert cache.get("b") is None


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    code = (
        "import os, pathlib, signal, sys\n"
        "from ospec_jax.models.programs import CheckedCache\n"
        "write = pathlib.Path.write_bytes\n"
        "def write_half(self, content):\n"
        "    write(self, content[: len(content) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path.write_bytes = write_half\n"
        "CheckedCache(sys.argv[1]).put('a', b'program')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    cache = CheckedCache(tmp_path)
    assert cache.get("a") is None
    cache.put("a", b"program")
    assert cache.get("a") == b"program"


def test_no_room_is_said_once(tmp_path):
    (tmp_path / "file").touch()
    cache = CheckedCache(tmp_path / "file")
    with pytest.warns(UserWarning, match="are not kept .*OSPEC_CACHE_DIR"):
        cache.put("a", b"program")
    cache.put("b", b"program")  # else this warning were an error
    assert cache.get("a") is None


def test_folders_of_the_users_own_choice_stay_with_jax(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        keep_programs(tmp_path / "ours")
        ours = compilation_cache.get_file_cache(str(tmp_path / "ours"))
        theirs = compilation_cache.get_file_cache(str(tmp_path / "theirs"))
        assert ours is not None
        assert theirs is not None
        assert isinstance(ours[0], CheckedCache)
        assert not isinstance(theirs[0], CheckedCache)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
