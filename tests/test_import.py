# SPDX-License-Identifier: Apache-2.0
"""Importing the package changes nothing for others, but for XLA's documented flags."""

import json
import os
import subprocess
import sys

import pytest

from ospec_jax import _platform

# What others do at import is theirs to answer for: they are imported first.
LOOK = """
import importlib, json, logging, os, pkgutil, signal, sys, warnings
import flax.linen, gguf, huggingface_hub, jax, jaxtyping, optax, orbax.checkpoint
import beartype, rich.console, safetensors, tokenizers, tyro

def look():
    named = logging.root.manager.loggerDict
    return {
        "environment": dict(os.environ),
        "levels": {name: logging.getLogger(name).level for name in ["root", *named]},
        "disabled": logging.root.manager.disable,
        "handlers": len(logging.root.handlers),
        "filters": [str(x) for x in warnings.filters],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "excepthook": str(sys.excepthook),
        "settings": {k: str(v) for k, v in jax.config.values.items()},
    }

before = look()
import ospec_jax
for module in pkgutil.walk_packages(ospec_jax.__path__, "ospec_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = look()
after["levels"] = {name: after["levels"][name] for name in before["levels"]}
print(json.dumps([before, after]))
"""


def test_importing_changes_nothing_for_others():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(done.stdout)
    assert len(before["levels"]) > 5
    flags = after["environment"].pop("XLA_FLAGS", "")
    assert flags == f"{_platform._FLAG}={_platform._VALUE}"
    assert after == before
    assert not done.stderr


@pytest.mark.parametrize("chosen", ["LIBRARY_FUSION_TYPE_INVALID", "whatever"])
def test_a_flag_that_the_user_chose_stands(monkeypatch, chosen):
    flags = f"--xla_dump_to=here {_platform._FLAG}={chosen}"
    monkeypatch.setenv("XLA_FLAGS", flags)
    _platform.set_flags()
    assert os.environ["XLA_FLAGS"] == flags


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        ("0.9.2", ""),
        ("0.10.2", f"{_platform._FLAG}={_platform._VALUE}"),
        ("0.11.0", f"{_platform._FLAG}={_platform._VALUE}"),
        ("0.12.0.1", f"{_platform._FLAG}={_platform._VALUE}"),
        ("0.13.0", ""),
        ("1.0.10.2", ""),
    ],
)
def test_versions_that_know_the_flag_get_it(monkeypatch, version, flags):
    monkeypatch.setattr(_platform.importlib.metadata, "version", lambda name: version)
    monkeypatch.setenv("XLA_FLAGS", "")
    _platform.set_flags()
    assert os.environ["XLA_FLAGS"] == flags
