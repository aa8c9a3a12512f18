# SPDX-License-Identifier: Apache-2.0
"""Files that the command line is given to run, or told to write over."""

import json
import sys
import warnings

import pytest
from model_files import hf_config, model_config

from ospec_jax import cli
from ospec_jax.cli import arguments
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_model_config


@pytest.fixture
def ospec(monkeypatch):
    """Exit code of `ospec` with these arguments."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["ospec", *map(str, args)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def told(capsys):
    """What stands on the error output, without its line breaks."""
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def draft(tmp_path):
    """The folder of a checkpoint."""
    config = tiny_draft_config(tiny_model_config(259), 20)
    made = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
    checkpoint.save(tmp_path / "draft", 0, Meta.create(None, config), made)
    return tmp_path / "draft"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
        ("x = 1\ny = nothing", "line 2: NameError"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("a b", "line 1: SyntaxError"),
        ("\0", "learner.py: .*null bytes"),
        ("get_config = 3", "has no get_config"),
        ("", "has no get_config"),
        ("get_config = lambda: 3", "has no get_config"),
    ],
)
def test_a_learners_file_that_fails_is_named(tmp_path, code, message):
    file = tmp_path / "learner.py"
    file.write_text(code + "\n")
    with pytest.raises(ConfigError, match=message):
        arguments.learner_config(str(file))


def test_a_learners_file_cannot_end_a_command_well(tmp_path, ospec, capsys):
    file = tmp_path / "learner.py"
    file.write_text("raise SystemExit\n")
    recording = tmp_path / "recording"
    assert ospec("replay", recording, "--learners", file) == 2
    assert "learner.py, line 1: SystemExit" in told(capsys)


def test_a_draft_is_not_exported_over_a_model(tmp_path, ospec, draft, capsys):
    model = tmp_path / "model"
    model.mkdir()
    content = json.dumps(hf_config(model_config()))
    (model / "config.json").write_text(content)
    assert ospec("export", draft, "--out", model) == 2
    assert "is not empty" in told(capsys)
    assert (model / "config.json").read_text() == content
    assert [file.name for file in model.iterdir()] == ["config.json"]

    # Nor beside a checkpoint, which would be taken for a public head from then on.
    assert ospec("export", draft, "--out", draft) == 2
    assert [file.name for file in draft.glob("[!.]*")] == ["0"]


def test_a_draft_is_not_imported_over_another(tmp_path, ospec, draft, capsys):
    public = tmp_path / "public"
    assert ospec("export", draft, "--out", public) == 0
    mark = (draft / "0").stat().st_mtime_ns
    assert ospec("import", public, "--out", draft) == 2
    assert "is not empty" in told(capsys)
    assert (draft / "0").stat().st_mtime_ns == mark
    assert ospec("import", public, "--out", tmp_path / "new") == 0


@pytest.mark.parametrize(
    ("name", "verifier", "architecture"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "LlamaForCausalLM"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "Qwen3ForCausalLM"),
        ("here", "here", "OwnForCausalLM"),
    ],
)
def test_an_exported_head_names_a_verifier_that_can_be_loaded(
    tmp_path, ospec, draft, name, verifier, architecture, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    command = ("export", draft, "--out", tmp_path / "out", "--format", "speculators")
    assert ospec(*command, "--target", name) == 0
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    found = raw["speculators_config"]["verifier"]
    expected = str(folder) if verifier == "here" else verifier
    assert found == {"name_or_path": expected, "architectures": [architecture]}


@pytest.mark.parametrize("name", [None, "tiny", "model.gguf", "nowhere/at/all"])
def test_a_verifier_that_nobody_can_load_is_refused(
    tmp_path, ospec, draft, name, capsys
):
    command = ("export", draft, "--out", tmp_path / "out", "--format", "speculators")
    target = ("--target", name) if name else ()
    assert ospec(*command, *target) == 2
    assert "pass --target" in told(capsys)
    assert not (tmp_path / "out").exists()
