# SPDX-License-Identifier: Apache-2.0
"""Policies that are taught on made-up trees: how well, in which order, and again."""

import dataclasses

import jax
import numpy as np
import pytest
from test_rules import CLOCK, MENU, made_up_trace

from ospec_jax.config import ConfigError
from ospec_jax.control.ltd import LtdConfig
from ospec_jax.control.ppo import PpoConfig
from ospec_jax.replay import rules
from ospec_jax.replay.cycles import build_cycles
from ospec_jax.replay.ltd import Teacher, grounds_of, run_policies
from ospec_jax.storage.policies import (
    PolicyMeta,
    load_course,
    load_policies,
    save_policies,
)

PPO = PpoConfig(
    num_steps=32_768,
    rollout=2048,
    num_envs=128,
    minibatch=256,
    num_epochs=4,
    learning_rate=5e-3,
    actor=(16,),
    critic=(16,),
)
CONFIG = LtdConfig(depth=PPO, size=PPO, turn=0.25, num_validations=2)


@pytest.fixture(scope="module")
def grounds():
    """Trees that are right as often as they say: whoever reads that is ahead."""
    cycles = [
        build_cycles(made_up_trace((120,) * 3, seed), CLOCK, MENU) for seed in (3, 4)
    ]
    return grounds_of(*cycles)


@pytest.fixture(scope="module")
def courses(grounds):
    """Where training stood whenever it could have been saved; the last one is over."""
    teacher = Teacher(CONFIG, grounds)
    found = [teacher.start()]
    found.append(teacher.run(found[0], on_validation=found.append))
    return found


def equal(one, other):
    raw = lambda x: jax.random.key_data(x) if _is_key(x) else x
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), one, other)


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_taught_policies_beat_every_fixed_choice(grounds, courses):
    policies = Teacher(CONFIG, grounds).policies(courses[-1])
    test = build_cycles(made_up_trace((150,) * 4, 9), CLOCK, MENU)
    speed = run_policies(test, policies).tokens_per_second
    assert speed > 1.01 * rules.score_grid(test).max()
    assert speed < rules.run_oracle(test).tokens_per_second


def test_stages_come_in_order_and_keep_what_was_best(courses):
    history = courses[-1].history
    stages = list(dict.fromkeys(row["stage"] for row in history))
    assert stages == [
        "size by itself",
        "depth by itself",
        "size in turn",
        "depth in turn",
    ]
    # The last turn has the name of the first one.
    assert [row["steps"] for row in history] == [0, 16_384, 32_768] * 2 + [
        0,
        4096,
        8192,
    ] * 3
    best = [row for row in history if row["is_best"]][-1]
    assert courses[-1].best_speed == best["tokens_per_second"]
    # A turn begins with what there was, and never ends with less.
    first = history[6]["tokens_per_second"]
    for turn in range(6, 15, 3):
        speeds = [row["tokens_per_second"] for row in history[turn : turn + 3]]
        assert speeds[0] >= first
        first = max(speeds)
    assert first == courses[-1].best_speed


def test_the_other_policy_is_frozen(grounds, courses):
    """Each stage ends with the other policy's networks as they were."""
    after = [c for c in courses if c.learning is not None and c.stage >= 2]
    for one, other in zip(after[:-1], after[1:], strict=True):
        changed = CONFIG.stages[one.stage].kind
        for kind in {"depth", "size"} - {changed}:
            equal(one.kept[kind], other.kept[kind])


@pytest.mark.parametrize("number", [1, 4])
def test_what_is_saved_goes_on_bit_by_bit(grounds, courses, tmp_path, number):
    teacher = Teacher(CONFIG, grounds)
    course = courses[number]
    meta = PolicyMeta(progress=course.progress, history=course.history)
    save_policies(tmp_path, number, teacher.policies(course), meta, course.arrays)

    found, told = load_policies(tmp_path)
    equal(found, teacher.policies(course))
    assert told.progress is not None
    arrays = load_course(tmp_path, teacher.like(told.progress))
    equal(arrays, course.arrays)
    again = teacher.run(teacher.resume(arrays, told.progress, told.history))
    equal(again.arrays, courses[-1].arrays)
    assert again.history == courses[-1].history


def test_a_run_stops_between_updates_and_goes_on(grounds, courses):
    teacher = Teacher(CONFIG, grounds)
    asked = []
    stop = lambda: asked.append(0) or len(asked) == 14
    course = teacher.run(courses[0], should_stop=stop)
    assert (course.stage, int(course.learning.num_updates)) == (0, 13)
    equal(teacher.run(course).arrays, courses[-1].arrays)


def test_one_policy_alone(grounds):
    """The other one is the best fixed choice, or the size that is asked for."""
    small = dataclasses.replace(PPO, num_steps=2048)
    config = LtdConfig(small, small, apart=("depth",), in_turns=(), fixed_size=5)
    teacher = Teacher(config, grounds)
    policies = teacher.policies(teacher.run(teacher.start()))
    assert policies.size is None
    assert MENU[policies.fixed_size] == 4
    assert policies.fixed_depth == grounds.best_fixed[0]

    config = LtdConfig(small, small, apart=("size",), in_turns=())
    teacher = Teacher(config, grounds)
    policies = teacher.policies(teacher.run(teacher.start()))
    assert policies.depth is None
    assert policies.fixed_size == grounds.best_fixed[1]


def test_policies_of_other_settings_are_no_course(grounds, courses, tmp_path):
    teacher = Teacher(CONFIG, grounds)
    course = courses[1]
    meta = PolicyMeta(progress=course.progress)
    save_policies(tmp_path, 1, teacher.policies(course), meta, course.arrays)
    wider = dataclasses.replace(PPO, critic=(32,))
    other = Teacher(LtdConfig(wider, wider), grounds)
    with pytest.raises(ConfigError, match="made with other settings"):
        load_course(tmp_path, other.like(course.progress))
    with pytest.raises(ConfigError, match="holds no policies"):
        load_policies(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apart": ()}, "apart is"),
        ({"apart": ("size",)}, "never taught"),
        ({"drafting": "policy"}, "not there yet"),
        ({"turn": 0.0}, "turn is 0.0"),
        ({"num_validations": 0}, "num_validations is 0"),
        ({"depth": PpoConfig(activation="tanh")}, "use one for both"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LtdConfig(**settings)
