# SPDX-License-Identifier: Apache-2.0
"""LTD (arXiv 2603.01639): policies for how much to draft, taught on recorded trees.

Each policy is taught by itself first, then in turns beside the other one. Whatever was
fastest on answers that nothing is taught on is kept; what comes later may be worse.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.control import ppo
from ospec_jax.control.ltd import Drafting, LtdConfig, PolicyKind, Reward, Stage
from ospec_jax.control.policy import Layers, Policies, PolicyShape
from ospec_jax.control.ppo import Env, Learning, Networks, Told
from ospec_jax.replay import rules
from ospec_jax.replay.cycles import Cycles
from ospec_jax.replay.episodes import (
    World,
    choices_of,
    depth_env,
    shape_of,
    size_env,
)


class Grounds(NamedTuple):
    """What policies are taught and chosen on.

    Attributes:
      best_fixed: Depth and size, by number, of most tokens a second on `training`.
      rate: These.
    """

    training: Cycles
    validation: Cycles
    best_fixed: tuple[int, int]
    rate: float


@dataclasses.dataclass(frozen=True)
class Course:
    """Where training stands.

    Attributes:
      stage: Number of the stage that is under way; that of stages once all are through.
      kept: Networks of each policy, the best of its last complete stage.
      learning: PPO's state in this stage.
      best: The best networks of this stage so far.
      best_speed: Tokens a second of these on validation answers.
      history: What validations found.
    """

    stage: int
    kept: dict[PolicyKind, Networks]
    learning: Learning | None
    best: Networks | None
    best_speed: float
    history: tuple[dict[str, Any], ...] = ()

    @property
    def arrays(self) -> Any:
        """All arrays that are needed to go on."""
        return self.kept, self.learning, self.best

    @property
    def progress(self) -> dict[str, Any]:
        """The rest, for JSON."""
        return {"stage": self.stage, "best_speed": self.best_speed}


def grounds_of(training: Cycles, validation: Cycles) -> Grounds:
    """What policies are taught and chosen on."""
    grid = rules.score_grid(training)
    # Policies always draft: the first depth is theirs without asking.
    depth, size = map(int, np.unravel_index(np.argmax(grid[1:]), grid[1:].shape))
    return Grounds(training, validation, (depth + 1, size), float(grid.max()))


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Teaches policies, stage by stage."""

    config: LtdConfig
    grounds: Grounds

    def start(self) -> Course:
        """Before anything was taught."""
        return self._enter(Course(0, {}, None, None, 0.0))

    def like(self, progress: dict[str, Any]) -> Any:
        """Shapes of the arrays of a course that has got so far."""
        stage = progress["stage"]
        kept = {
            kind: jax.eval_shape(functools.partial(self._fresh, kind))
            for kind in ("depth", "size")
            if any(one.kind == kind for one in self.config.stages[:stage])
        }
        if stage == len(self.config.stages):
            return kept, None, None

        begin = lambda: self._begin(self.config.stages[stage], stage, None)
        learning = jax.eval_shape(begin)
        return kept, learning, learning.networks

    def resume(
        self, arrays: Any, progress: dict[str, Any], history: tuple[dict, ...]
    ) -> Course:
        """A course that was interrupted."""
        kept, learning, best = arrays
        return Course(
            progress["stage"], kept, learning, best, progress["best_speed"], history
        )

    def run(
        self,
        course: Course,
        on_update: Callable[[Course, Told], None] = lambda course, told: None,
        on_validation: Callable[[Course], None] = lambda course: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Course:
        """Goes on to the end, or until it should stop.

        Args:
          on_validation: Called when a validation, or a stage, is over: time to save.
        """
        while course.stage < len(self.config.stages):
            stage = self.config.stages[course.stage]
            total = stage.ppo.num_updates
            every = max(1, -(-total // self.config.num_validations))
            update = _update_of(
                stage, self._shape, self.config.reward, self.config.drafting
            )
            world = self._world(course, stage)
            count = self._count(course)

            while count < total:
                if should_stop():
                    return course
                assert course.learning is not None
                learning, told = update(world, course.learning)
                course = dataclasses.replace(course, learning=learning)
                count += 1
                if count % every == 0 or count == total:
                    course = self._validated(course, float(told.reward))
                    if count < total:
                        on_validation(course)
                on_update(course, told)

            course = self._left(course, stage)
            if course.stage < len(self.config.stages):
                course = self._enter(course)
            on_validation(course)

        return course

    def policies(self, course: Course) -> Policies:
        """The best ones so far: those of the stage under way, and of those before."""
        networks = dict(course.kept)
        if course.stage < len(self.config.stages) and course.best is not None:
            networks[self.config.stages[course.stage].kind] = course.best

        return self._joined(networks)

    @staticmethod
    def _count(course: Course) -> int:
        assert course.learning is not None
        return int(course.learning.num_updates)

    @property
    def _shape(self) -> PolicyShape:
        return shape_of(self.grounds.training)

    @property
    def _fixed_size(self) -> int:
        """The number of the size that is verified while the depth is taught alone."""
        if not self.config.fixed_size:
            return self.grounds.best_fixed[1]

        sizes = np.asarray(self.grounds.training.sizes)
        return max(0, int(np.searchsorted(sizes, self.config.fixed_size, "right")) - 1)

    def _joined(self, networks: dict[PolicyKind, Networks]) -> Policies:
        layers: dict[PolicyKind, Layers] = {k: n.actor for k, n in networks.items()}
        return Policies(
            layers.get("depth"),
            layers.get("size"),
            self.grounds.best_fixed[0],
            self._fixed_size,
            self._shape,
            # Both have the same, which PPO's settings are checked for.
            self.config.depth.activation,
        )

    def _partner(self, course: Course, stage: Stage) -> dict[PolicyKind, Networks]:
        """The other policy, as it is; none while one is taught by itself."""
        if stage.is_apart:
            return {}

        return {k: n for k, n in course.kept.items() if k != stage.kind}

    def _world(self, course: Course, stage: Stage) -> World:
        policies = self._joined(self._partner(course, stage))
        return World(self.grounds.training, policies, jnp.float32(self.grounds.rate))

    def _env(self, stage: Stage) -> Env:
        return _env_of(stage, self._shape, self.config.reward, self.config.drafting)

    def _fresh(self, kind: PolicyKind) -> Networks:
        stage = next(one for one in self.config.stages if one.kind == kind)
        return ppo.init_networks(jax.random.key(0), stage.ppo, self._env(stage))

    def _begin(self, stage: Stage, number: int, networks: Networks | None) -> Learning:
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        # The other policy is not asked yet: a request's first cycle is drafted as if
        # this one were taught by itself, so that settings alone tell the shapes that a
        # checkpoint has.
        world = self._world(Course(number, {}, None, None, 0.0), stage)
        env = self._env(dataclasses.replace(stage, is_apart=True))
        return ppo.begin(stage.ppo, env, world, key, networks)

    def _enter(self, course: Course) -> Course:
        """Begins a stage; what it begins with is looked at, too."""
        stage = self.config.stages[course.stage]
        learning = self._begin(stage, course.stage, course.kept.get(stage.kind))
        course = dataclasses.replace(course, learning=learning, best=None)

        return self._validated(course, None)

    def _left(self, course: Course, stage: Stage) -> Course:
        """Keeps what a stage found."""
        assert course.best is not None
        return dataclasses.replace(
            course,
            stage=course.stage + 1,
            kept=course.kept | {stage.kind: course.best},
            learning=None,
            best=None,
        )

    def _validated(self, course: Course, reward: float | None) -> Course:
        """Looks at how fast the policies are by now, and keeps them if they are best.

        Args:
          reward: That the last update's episodes were paid; None before the first.
        """
        stage = self.config.stages[course.stage]
        assert course.learning is not None
        networks = course.learning.networks
        joined = self._joined(
            self._partner(course, stage) | {stage.kind: networks}  # type: ignore[arg-type]
        )
        cycles = self.grounds.validation
        score = rules.run_choices(cycles, _choices(joined, cycles), str(stage))
        is_best = course.best is None or score.tokens_per_second > course.best_speed
        row = {
            "stage": str(stage),
            "steps": self._count(course) * stage.ppo.rollout,
            "reward": reward,
            "tokens_per_second": score.tokens_per_second,
            "acceptance_length": score.acceptance_length,
            "depth": score.depth,
            "rows": score.rows,
            "is_best": is_best,
        }
        course = dataclasses.replace(course, history=(*course.history, row))
        if not is_best:
            return course

        return dataclasses.replace(
            course, best=networks, best_speed=score.tokens_per_second
        )


def _env_of(
    stage: Stage, shape: PolicyShape, reward: Reward, drafting: Drafting
) -> Env:
    if stage.kind == "depth":
        return depth_env(shape, reward)

    return size_env(shape, reward, drafting if stage.is_apart else "policy")


@functools.lru_cache(maxsize=32)
def _update_of(
    stage: Stage, shape: PolicyShape, reward: Reward, drafting: Drafting
) -> Callable:
    """PPO's update, which is compiled once for stages that are alike."""
    return jax.jit(ppo.build_update(stage.ppo, _env_of(stage, shape, reward, drafting)))


_choices = jax.jit(choices_of)
"""Of all positions at once; compiled once for networks of one shape."""


def run_policies(cycles: Cycles, policies: Policies, name: str = "LTD") -> rules.Score:
    """Replays what policies choose."""
    return rules.run_choices(cycles, _choices(policies, cycles), name)
