# SPDX-License-Identifier: Apache-2.0
"""What all tests share: how programs are compiled, kept and counted."""

import atexit
import collections
import gc
import os
import re
from pathlib import Path

import jax
import pytest
from jax._src.interpreters import mlir

from ospec_jax.models.hub import enable_compilation_cache
from ospec_jax.models.sharing import forget_programs, keep_programs, own_programs
from ospec_jax.session import live, session

enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# An engine asks for steps and passes of each kind, of which a test runs one or two:
# with what suffices for users, those of ten engines would be all that is kept.
keep_programs(2_000)
# Nobody profiles these programs: they need not know which lines they came from.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Most time of tiny models is compilation, and theirs need not make fast code. Where
# single bits matter, and with real weights, programs are compiled as users' are.
_AS_FOR_USERS = ("optimized", "slow")
# A run that leaves the latter out does without one more pass, a quarter of the time;
# that flag is of the whole process, and newer versions no longer know it. It leaves
# programs in one piece, too, which takes a fifth less than pieces for many threads.
_AS_QUICK_AS_CAN_BE = "not (slow or optimized"
_ONE_PASS_LESS = "--xla_cpu_use_fusion_emitters=false"
_QUICK_FLAGS = [
    "--xla_cpu_parallel_codegen_split_count=1",
    *([_ONE_PASS_LESS] if jax.__version_info__ < (0, 11) else []),
]
_QUICK = "jax_disable_most_optimizations"
_QUICK_VARIABLE = _QUICK.upper()

# Linux gives a process 65,530 mappings of memory, a program of XLA's takes several, and
# one more than that ends the process. What is kept is thrown away before, which takes
# ten seconds: a module of many sessions takes some ten thousand.
_MAPS = Path("/proc/self/maps")
_MAX_MAPS_KEPT = 32_000

_PROGRAMS_IN_A_CONTEXT = 200

# The longest come first, so that no worker is left alone with one. Tests that want the
# same kind of programs stand together: a change of kind throws programs away.
_LONGEST = ("test_notebooks", "test_sharding", "test_real_model")
# Modules of a quarter of a minute and more that `make fast` does without; their laws
# are those of whole sessions, meshes and commands.
_LONG = {
    *_LONGEST,
    "test_adjusting",
    "test_asked",
    "test_asking",
    "test_cli",
    "test_depth",
    "test_distill",
    "test_drafts",
    "test_early_exit",
    "test_last_layer",
    "test_laws",
    "test_low_rank",
    "test_lowering",
    "test_outputs",
    "test_pace",
    "test_pool",
    "test_protocol",
    "test_replayer",
    "test_sampled_laws",
    "test_scan",
    "test_self_prompts",
    "test_session",
    "test_sliding_window",
    "test_trained",
    "test_trainers",
    "test_verify",
    "test_wellformed",
}


def _is_for_users(item) -> bool:
    return any(item.get_closest_marker(name) for name in _AS_FOR_USERS)


def pytest_configure(config):
    """Sets what must be set before the first program is compiled."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A worker has told all by then. Taking thousands of programs apart one by one
        # would keep the others waiting for seconds.
        atexit.register(os._exit, 0)
    if config.option.markexpr.startswith(_AS_QUICK_AS_CAN_BE):
        flags = [os.environ.get("XLA_FLAGS", ""), *_QUICK_FLAGS]
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def _values_of(item) -> set[tuple]:
    """What a case sets each parameter to; those of one `parametrize` go together."""
    params = item.callspec.params
    together = [mark.args[0] for mark in item.iter_markers("parametrize")]
    lists = [x.split(",") if isinstance(x, str) else x for x in together]
    groups = [tuple(name.strip() for name in names) for names in lists]
    named = {name for names in groups for name in names}
    # The others are parameters of fixtures.
    groups += [(name,) for name in params if name not in named]

    return {(names, *(repr(params[name]) for name in names)) for names in groups}


def _is_beyond_cover(items) -> list[bool]:
    """For one test's cases: which bring no value of a parameter for the first time.

    The cases that bring most come first, so that few suffice.
    """
    values = [_values_of(item) for item in items]
    missing = set().union(*values)
    is_beyond = [True] * len(items)

    while missing:
        best = max(range(len(items)), key=lambda i: len(values[i] & missing))
        is_beyond[best] = False
        missing -= values[best]

    return is_beyond


def _mark_thorough(items, is_thorough: bool):
    """Leaves `make test` a cover of the cases of tests that are marked `crossed`.

    What a test leaves to `thorough` itself covers nothing.

    Of a cover that looks at bits the first case is compiled as it is for users, unless
    the mark says that other tests suffice for that.
    """
    cases = collections.defaultdict(list)
    for item in items:
        is_left_out = item.get_closest_marker("thorough")
        if item.get_closest_marker("crossed") and not is_left_out:
            cases[item.nodeid.partition("[")[0]].append(item)

    for group in cases.values():
        for item, is_beyond in zip(group, _is_beyond_cover(group), strict=True):
            if is_beyond:
                item.add_marker("thorough")

    for group in cases.values():
        cover = [item for item in group if not item.get_closest_marker("thorough")]
        for item in [] if is_thorough else cover[1:]:
            item.add_marker("quick")

    for item in items:
        bits = item.get_closest_marker("bits")
        is_left_to_others = bits and bits.kwargs.get("others_suffice")
        if is_left_to_others and not is_thorough:
            item.add_marker("quick")
        if bits and not item.get_closest_marker("quick"):
            item.add_marker("optimized")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """Marks what takes long; sorts by length, and by how programs are compiled."""
    _mark_thorough(items, "thorough" not in config.option.markexpr)
    for item in items:
        if item.path.stem in _LONG:
            item.add_marker("long")
    for path in {item.path for item in items if _is_for_users(item)}:
        # The Makefile looks for them by this.
        if not re.search(r"mark\.(slow|optimized|bits)", path.read_text()):
            raise pytest.UsageError(f"{path}: write its marks out, as pytest.mark.slow")

    rank = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(
        key=lambda item: (
            rank.get(item.path.stem, len(rank)),
            not _is_for_users(item),
        )
    )


def pytest_collection_finish(session):
    """Lets the collector of garbage leave alone what stays, and come less often.

    Tracing makes many objects that live on; each round over all of them takes longer.
    A run of tiny models does without those over all, unless it throws programs away.
    """
    gc.collect()
    gc.freeze()
    is_tiny = session.config.option.markexpr.startswith(_AS_QUICK_AS_CAN_BE)
    gc.set_threshold(50_000, 20, 1_000 if is_tiny else 20)


@pytest.fixture(autouse=True, scope="session")
def _contexts_are_shared():
    """Lowers many programs in one context of MLIR.

    jax makes one for each, which takes as long as all else of lowering one operation,
    of which a run lowers ten thousand. A context keeps the constants of its programs,
    so it is not kept for ever.
    """
    make = getattr(mlir, "make_ir_context", None)
    if make is None:  # of a jax whose insides are others
        yield
        return

    latest, uses = make(), 0

    def find():
        nonlocal latest, uses
        uses += 1
        if uses % _PROGRAMS_IN_A_CONTEXT == 0:
            latest = make()
        return latest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", find)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_memory_is_handed_back():
    """Leaves out the collection of garbage with which each warm-up ends.

    A process of many tests holds millions of objects, among which it takes a second
    each time; `test_platform.py` holds what it does.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (live, session):
            patch.setattr(module, "release_memory", lambda: None)
        yield


def _throw_programs_away():
    forget_programs()
    jax.clear_caches()
    # Engines and their programs hold each other.
    gc.collect()


def _has_many_maps() -> bool:
    if not _MAPS.exists():
        return False
    with _MAPS.open("rb") as lines:
        return sum(1 for _ in lines) > _MAX_MAPS_KEPT


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Lets a module's tests begin with few programs in memory."""
    if _has_many_maps():
        _throw_programs_away()


def pytest_runtest_setup(item):
    """Compiles as the test wants it, in this process and in those that it starts."""
    is_quick = not _is_for_users(item)
    # Subprocesses read the variable.
    os.environ[_QUICK_VARIABLE] = str(int(is_quick))
    if jax.config.read(_QUICK) != is_quick:
        _throw_programs_away()
        jax.config.update(_QUICK, is_quick)


@pytest.fixture(name="own_programs")
def _own_programs():
    """Gives a test that counts programs its own ones."""
    with own_programs():
        yield
