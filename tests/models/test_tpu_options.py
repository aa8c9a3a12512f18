# SPDX-License-Identifier: Apache-2.0
"""A compiler is told only what it knows."""

import jax
import pytest

from ospec_jax.models import tpu_options
from ospec_jax.models.tpu_options import compiler_options


@pytest.fixture(autouse=True)
def _no_memory():
    compiler_options.cache_clear()
    yield
    compiler_options.cache_clear()


def test_other_platforms_are_told_nothing():
    assert compiler_options() is None


def test_a_compiler_that_does_not_know_an_option_is_not_told(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    # What compiles here is not the TPU's, and refuses it.
    assert compiler_options() is None
    known = {"xla_cpu_enable_fast_min_max": True}
    monkeypatch.setattr(tpu_options, "OPTIONS", known)
    compiler_options.cache_clear()
    assert compiler_options() == known
