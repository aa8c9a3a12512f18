# SPDX-License-Identifier: Apache-2.0
"""What all tests share: how programs are compiled, kept and counted."""

import os

import jax
import pytest

from ospec_jax.decoding.engine import forget_programs
from ospec_jax.models.hub import cache_folder, enable_compilation_cache

# A folder for each worker: jax writes programs in place, and one that is read while
# another process writes it ends the reader.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    folder = cache_folder() / "compilations" / worker
    jax.config.update("jax_compilation_cache_dir", str(folder))
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Most time of tiny models is compilation, and theirs need not make fast code. Where
# single bits matter, and with real weights, programs are compiled as users' are.
_AS_FOR_USERS = ("optimized", "slow")
_QUICK = "jax_disable_most_optimizations"
_QUICK_VARIABLE = _QUICK.upper()

# The longest come first, so that no worker is left alone with one. Tests that want the
# same kind of programs stand together: a change of kind throws programs away.
_LONGEST = ("test_notebooks", "test_sharding", "test_real_model")


def _is_for_users(item) -> bool:
    return any(item.get_closest_marker(name) for name in _AS_FOR_USERS)


def pytest_collection_modifyitems(items):
    """Sorts by length, and by how programs are compiled."""
    rank = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(
        key=lambda item: (
            rank.get(item.path.stem, len(rank)),
            not _is_for_users(item),
        )
    )


def pytest_runtest_setup(item):
    """Compiles as the test wants it, in this process and in those that it starts."""
    is_quick = not _is_for_users(item)
    # Subprocesses read the variable.
    os.environ[_QUICK_VARIABLE] = str(int(is_quick))
    if jax.config.read(_QUICK) != is_quick:
        forget_programs()
        jax.clear_caches()
        jax.config.update(_QUICK, is_quick)


@pytest.fixture
def own_programs():
    """Gives a test that counts programs its own ones."""
    forget_programs()
