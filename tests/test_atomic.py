# SPDX-License-Identifier: Apache-2.0
"""Result files: whole or as before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ospec_jax import atomic


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "result.json"
    atomic.write_text(file, "old")

    def write_half(part):
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic.replacing(file) as part:
        write_half(part)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_part_is_not_taken_for_a_result(tmp_path):
    with atomic.replacing(tmp_path / "a.safetensors") as part:
        part.write_bytes(b"half")
        assert list(tmp_path.glob("*")) == [part]
        assert not list(tmp_path.glob("*.safetensors"))


def test_links_and_permissions_stay(tmp_path):
    file, link = tmp_path / "folder" / "file", tmp_path / "link"
    atomic.write_bytes(file, b"old")
    file.chmod(0o600)
    link.symlink_to(file)
    atomic.write_bytes(link, b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o600


def test_pipes_are_written_to():
    reader, writer = os.pipe()
    atomic.write_text(Path(f"/dev/fd/{writer}"), "text")
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert lines.read() == "text"


def test_figures_are_of_the_kind_that_their_name_says(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    png = atomic.write_figure(plt.figure(), tmp_path / "plots" / "a.png")
    svg = atomic.write_figure(plt.figure(), tmp_path / "a.svg")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in svg.read_bytes()
    assert not plt.get_fignums()


def test_a_full_disk_is_named(tmp_path):
    file = tmp_path / "result.json"
    with pytest.raises(OSError, match="result.json") as caught, atomic.replacing(file):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(file)


def test_what_is_set_aside_is_never_written_over(tmp_path):
    file = tmp_path / "lines"
    assert atomic.set_aside(file) is None
    names = []
    for text in ("one", "two"):
        file.write_text(text)
        names.append(atomic.set_aside(file))
    assert [place.name for place in names] == ["lines.before", "lines.before-2"]
    assert [place.read_text() for place in names] == ["one", "two"]
    assert not file.exists()


def test_a_lock_tells_who_holds_it_and_ends_with_its_process(tmp_path):
    lock = tmp_path / "deep" / ".lock"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ospec_jax import atomic\n"
        "with atomic.locked(Path(sys.argv[1]), 'it'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        told = []
        message = f"it is used by process {process.pid} on .*; wait until that ends"
        with (
            pytest.raises(atomic.InUseError, match=message),
            atomic.locked(lock, "it", 0.01, told.append),
        ):
            pass
        assert f"waiting for it, which is used by process {process.pid}" in told[0]
        process.kill()
    with atomic.locked(lock, "it"):
        pass


def test_where_no_lock_can_be_nothing_is_kept_from_anybody(tmp_path):
    (tmp_path / "file").touch()
    with atomic.locked(tmp_path / "file" / ".lock", "it"):
        pass


def test_what_can_be_made_again_need_not_be_kept(tmp_path):
    assert atomic.keep(tmp_path / "a", b"content")
    assert not atomic.keep(tmp_path / "a" / "b", b"content")
