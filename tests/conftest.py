# SPDX-License-Identifier: Apache-2.0
"""What all tests share: compiled programs are kept between runs."""

import jax

from ospec_jax.models.hub import enable_compilation_cache

enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that no worker is left alone with one."""
    longest = ("test_notebooks", "test_sharding", "test_real_model")
    rank = {name: i for i, name in enumerate(longest)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
