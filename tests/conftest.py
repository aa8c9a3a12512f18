# SPDX-License-Identifier: Apache-2.0
"""What all tests share: compiled programs are kept between runs."""

import jax

from ospec_jax.models.hub import enable_compilation_cache

enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that no worker is left alone with one."""
    items.sort(key=lambda item: "test_sharding" not in item.nodeid)
