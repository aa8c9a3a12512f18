# SPDX-License-Identifier: Apache-2.0
"""How a draft learns: an update rule's settings, and those that learners share."""

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from ospec_jax.config.base import ConfigError, whole_number
from ospec_jax.config.learner import (
    Batches,
    Effort,
    Loss,
    Method,
    Recording,
    Schedule,
)
from ospec_jax.learners.base import Learner, LearnerInfo, LearnerState, Segments
from ospec_jax.learners.losses import named_loss
from ospec_jax.learners.method import OptimizedMethod
from ospec_jax.learners.objective import Objective, build_objective
from ospec_jax.learners.optimizers import is_parameter_free
from ospec_jax.learners.registry import LEARNER_NAMES, LEARNERS
from ospec_jax.models.sharing import share
from ospec_jax.types import SharedTables
from ospec_jax.typing import Params

Rule = Callable[[Objective], Learner]
"""An update rule that a user wrote."""

_SHARED: dict[str, Any] = {
    "memory_slots": 65536,
    "delta_rank": 0,
    "seed": 0,
    "members": "",
}
"""What every learner reads."""
_PARTS = {
    "effort": Effort,
    "schedule": Schedule,
    "batches": Batches,
    "objective": Loss,
}


@dataclasses.dataclass(frozen=True)
class UserMethod(Method):
    """A rule of the user's own, whose settings are its own affair.

    Attributes:
      rule: From an `Objective` to a `Learner`.
    """

    rule: Rule

    def __post_init__(self):
        if not callable(self.rule):
            raise ConfigError(
                f"rule is {self.rule!r}; use a function from an `Objective` to a "
                f"`Learner`"
            )

    def build(self, objective: Objective) -> Learner:
        """What the rule returns.

        Raises:
          ConfigError: It is no learner.
        """
        learner = self.rule(objective)
        if not isinstance(learner, Learner):
            raise ConfigError(
                f"the rule {_name_of(self.rule)!r} returned {learner!r}; it must "
                f"return a `learners.base.Learner` for the `Objective` that it is given"
            )

        return _with_checks(learner, _name_of(self.rule))


@dataclasses.dataclass(frozen=True)
class Auto(Method):
    """`head` or `gradient`, before it is decided which.

    Attributes:
      given: What was set, sorted by name.
    """

    parts: ClassVar[tuple[type, ...]] = ()

    given: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a `LearnerConfig` holds; None for parts that its method does not read."""

    name: str
    method: Method
    effort: Effort | None
    schedule: Schedule | None
    batches: Batches | None
    objective: Loss | None
    memory_slots: int
    delta_rank: int
    seed: int
    members: str


class LearnerConfig(_Parts):
    """How a draft learns from the traffic it serves.

    It is written flat, `LearnerConfig(name="optimistic", radius=1.0, budget=0.05)`, and
    read flat, `config.radius`, or by its parts. A setting that the learner does not
    read is refused. None means unset: the learner's own default. Of another learner,
    or of other settings, see `renamed` and `replace`.

    Attributes:
      name: `gradient` steps along gradients; `momentum` is SGD with heavy-ball momentum
        (OnlineSPEC's released code); `optimistic` plays where the next gradient is
        expected to lead (its paper); `ensemble` averages experts of several step sizes,
        each with its own gradient; `shared_ensemble` with one gradient for all; `osd`
        is Online Speculative Decoding, the baseline; `head` trains the draft's output
        projection alone, after every answer, at next to no cost, `preference` the same
        from the draft's wrong tokens, without any logits; `memory` only remembers
        n-grams, as all of them do; `auto` is `head` where the draft has an output
        projection of its own and nothing is set that `head` does not keep to, else
        `gradient`. A rule of your own gives its name.
      method: The rule's own settings: a class of `learners.registry.LEARNERS`.
      effort: How much time learning may take (`config.learner.Effort`).
      schedule: When updates are done, and which are served.
      batches: What an update trains on.
      objective: What it makes smaller (`config.learner.Loss`).
      memory_slots: n-grams of each order that are remembered; 0 for none.
      delta_rank: Of a difference to the draft that each scope has for itself, learned
        from its answers alone (`learners.deltas`); 0 for none.
      seed: Of the choice of older windows.
      members: Of a pool, which members learn, each by itself (`online.members`): `all`
        that can, of an answer the one that was `chosen` for most of its steps, or their
        numbers, like `1,3`. None by default: of a pool n-grams alone are learned.
    """

    def __init__(self, name: str | None = None, rule: Rule | None = None, **settings):
        """Builds the parts.

        Args:
          name: Of the learner, by default `gradient`.
          rule: An update rule of your own, from an `Objective` to a `Learner`, in place
            of one by name; `optimizer` and `learning_rate` are its own affair. A
            checkpoint stores its name (`rule_name`), not its code: give the same one to
            resume.
          settings: Of the learner's class in `learners.registry.LEARNERS`, and of the
            parts that it reads.

        Raises:
          ConfigError: There is no such learner, it does not read a setting, or a
            setting is out of its range.
        """
        # Parts are taken apart first, so that every setting has one place, whoever
        # gives it.
        given = _flattened(settings)
        used = given.pop("rule", None)
        rule = used if rule is None else rule
        shared = {key: given.pop(key, usual) for key, usual in _SHARED.items()}
        _check_shared(shared)

        # Whose settings they are: a rule of the user's, one to be decided on, one by
        # name.
        parts: dict[str, Any] = dict.fromkeys(_PARTS)
        if rule is not None:
            name = _name_for_rule(name, rule)
            kind = UserMethod
            given["rule"] = rule
        elif name == "auto":
            kind = Auto
            given = {"given": _of_auto(given)}
        else:
            name = name or "gradient"
            kind = _kind_of(name)

        # A setting that the rule fixes may be repeated, but not changed.
        given = {key: x for key, x in given.items() if kind.fixed.get(key) != x}
        if unread := given.keys() - _readable(kind):
            raise _refusal(name, kind, sorted(unread))

        method = kind(**_taken(kind, given)).settled()

        # Later ones win: the rule's defaults, what was given, what the rule fixes.
        for part, cls in _PARTS.items():
            if cls in kind.parts:
                values = kind.defaults | given | kind.fixed
                parts[part] = cls(**_taken(cls, values))

        method.check_parts(**parts)
        super().__init__(name=name, method=method, **parts, **shared)

    def __getattr__(self, setting: str) -> Any:
        """A setting of the method or of a part; raises where the learner reads none."""
        # One that is only being built has no parts yet.
        if not setting.startswith("_") and "method" in self.__dict__:
            for part in (self.method, *(getattr(self, key) for key in _PARTS)):
                if setting in _names(part):
                    return getattr(part, setting)
            given = dict(getattr(self.method, "given", ()))
            if setting in given:
                return given[setting]

        raise AttributeError(
            f"the learner {self.__dict__.get('name')!r} has no setting {setting!r}"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All settings but the name, flat."""
        values = _flattened({key: getattr(self, key) for key in ("method", *_PARTS)})
        values = {k: x for k, x in values.items() if k not in self.method.fixed}
        return values | {key: getattr(self, key) for key in _SHARED}

    def replace(self, **changes) -> "LearnerConfig":
        """The same learner with other settings; None puts back a default.

        Settings that a learner has by default stay as they are: a rate stays where the
        optimizer changes, if it is not set to None or another one beside it.
        """
        settings: dict[str, Any] = {"name": self.name} | self.settings | changes
        return LearnerConfig(**settings)

    def renamed(self, name: str, **changes) -> "LearnerConfig":
        """Another learner with these settings, as far as it reads them.

        Args:
          changes: Settings that win over them, all of which it must read.
        """
        known = _readable(_kind_of(name)) | _SHARED.keys()
        kept = {key: x for key, x in self.settings.items() if key in known}
        return LearnerConfig(name, **(kept | changes))

    def decided(self, can_learn_head: bool) -> "LearnerConfig":
        """What `auto` is; any other learner is itself.

        Args:
          can_learn_head: The draft's output projection can be learned alone.
        """
        if self.name != "auto":
            return self

        # Without `pace` a budget says nothing to `head`; with it, it asks for updates.
        read_by_head = {*_names(LEARNERS["head"]), "pace"}
        is_head = can_learn_head and read_by_head.issuperset(self.given)

        return self.renamed("head" if is_head else "gradient")

    @classmethod
    def from_flat(
        cls, settings: dict[str, Any], rule: Rule | None = None
    ) -> "LearnerConfig":
        """Reads what `to_json` wrote, of older versions, too.

        These wrote the settings of all learners, whether they were read or not. What is
        not read is left out, with a warning if it was set.

        Args:
          rule: The user's, if the settings name one.

        Raises:
          ConfigError: There is no such learner, or a setting is out of its range.
        """
        settings = dict(settings)
        name = settings.pop("name", None)
        settings.pop("rule", None)
        # Guarded promotion once waited for so many windows.
        settings.pop("min_windows", None)

        kind = UserMethod if rule is not None else _kind_of(name)
        known = (_readable(kind) | _SHARED.keys()) - kind.fixed.keys()
        if kind is not Auto:
            unread = {key: x for key, x in settings.items() if key not in known}
            settings = {key: x for key, x in settings.items() if key in known}
            # A loss was written once for learners that did not read it.
            unread.pop("loss", None)
            # Older versions wrote all settings; only what somebody had set is worth a
            # warning.
            odd = [key for key, x in unread.items() if x not in _usual_values(key)]
            if odd:
                warnings.warn(
                    f"the learner {name!r} does not read {', '.join(sorted(odd))}, "
                    f"which an older version stored; left out",
                    stacklevel=2,
                )

        return cls(None if rule is not None else name, rule, **settings)

    def to_json(self) -> dict[str, Any]:
        """All settings, flat; of a rule, if there is one, the name."""
        values = {"name": self.name} | self.settings
        return values | ({"rule": self.rule_name} if self.rule else {})

    @property
    def rule(self) -> Rule | None:
        """The user's rule; None for a learner by name."""
        return self.method.rule if isinstance(self.method, UserMethod) else None

    @property
    def rule_name(self) -> str:
        """Where the user's rule comes from; empty for a learner by name."""
        return "" if self.rule is None else _name_of(self.rule)

    @property
    def given(self) -> tuple[str, ...]:
        """Of `auto`: the settings that were given."""
        return tuple(key for key, _ in getattr(self.method, "given", ()))

    @property
    def budget_share(self) -> float:
        """Time for learning that goes with a second of decoding."""
        return self.budget / (1 - self.budget)

    @property
    def recording(self) -> Recording:
        """What it needs to know of verified tokens."""
        return self.method.recording

    @property
    def is_training(self) -> bool:
        """Whether the draft is trained as a whole, along gradients."""
        return self.recording == "features"


def build_learner(config: LearnerConfig, unroll: Callable) -> Learner | None:
    """The learner that a configuration describes; None where a trainer needs none.

    Args:
      unroll: The drafter's training forward pass.

    Raises:
      ConfigError: The configuration names something that there is not, or that does
        not go together, or the user's rule makes no learner.
    """
    batches = config.batches
    objective = config.objective
    if batches is None or objective is None:
        return None

    return _build_rule(
        config.method, objective, batches.num_context, batches.num_steps, unroll
    )


# The same settings give the same object, so that trainers find its programs again.
@share
def _build_rule(
    method: Method, loss: Loss, num_context: int, num_steps: int, unroll: Callable
) -> Learner:
    return method.build(
        build_objective(
            unroll,
            num_context,
            num_steps,
            named_loss(loss.loss, loss.forward_share),
            loss.decay,
            loss.num_candidates,
            loss.positions,
            loss.position_decay,
            loss.token_share,
        )
    )


def as_learner_config(learner: Any) -> LearnerConfig | None:
    """What `Session(learner=...)` takes: settings, a name, a rule, or None.

    Raises:
      ConfigError: It is something else.
    """
    if learner is None or isinstance(learner, LearnerConfig):
        return learner
    if isinstance(learner, str):
        return LearnerConfig(name=learner)

    if callable(learner) and not isinstance(learner, type):
        rule: Any = learner
        return LearnerConfig(rule=rule)

    raise ConfigError(
        f"learner is {learner!r}; use a LearnerConfig(...), the name of a learner "
        f"({', '.join(LEARNER_NAMES)}), or a function from an `Objective` to a "
        f"`Learner`"
    )


def optimizer_of(config: LearnerConfig | None) -> dict[str, Any]:
    """What a learner follows gradients with, as JSON; None where it does not."""
    method = None if config is None else config.method
    if not isinstance(method, OptimizedMethod):
        return {"optimizer": None, "learning_rate": None}

    has_rate = not is_parameter_free(method.optimizer or "")
    return {
        "optimizer": method.optimizer,
        "learning_rate": method.learning_rate if has_rate else None,
    }


def _flattened(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without parts: a part's fields take its place, and may be set beside it.

    So `dataclasses.replace` works, which hands on parts. What is None is left out.
    """
    values: dict[str, Any] = {}

    for part in ("method", *_PARTS):
        if settings.get(part) is not None:
            given = settings[part]
            if not dataclasses.is_dataclass(given):
                raise ConfigError(
                    f"{part} is {given!r:.60}; leave it out, and give its settings one "
                    f"by one, or name a learner: LearnerConfig(name=...)"
                )
            values |= {name: getattr(given, name) for name in _names(given)}
            # Settings of `auto` are held in pairs; they are as flat as all others.
            values |= dict(values.pop("given", ()))
            values = {k: x for k, x in values.items() if x is not None}

    values |= {k: x for k, x in settings.items() if k not in ("method", *_PARTS)}
    return {key: x for key, x in values.items() if x is not None}


def _names(config: Any) -> tuple[str, ...]:
    """Fields of a dataclass or its class; of None, no fields."""
    if config is None:
        return ()

    return tuple(field.name for field in dataclasses.fields(config))


def _taken(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a part's settings."""
    names = _names(cls)
    return {key: x for key, x in values.items() if key in names}


def _kind_of(name: str) -> type[Method]:
    if name == "auto":
        return Auto
    if not isinstance(name, str) or name not in LEARNERS:
        raise ConfigError(
            f"unknown learner {name!r:.60}; use one of {', '.join(LEARNER_NAMES)}"
        )

    return LEARNERS[name]


def _readable(kind: type[Method]) -> frozenset[str]:
    """Settings that a learner reads, beside those that all of them read."""
    if kind is Auto:
        return frozenset({"given"}).union(*map(_readable, LEARNERS.values()))

    names = frozenset(_names(kind)).union(*map(_names, kind.parts))
    return names - kind.fixed.keys()


def _refusal(name: str | None, kind: type[Method], unread: list[str]) -> ConfigError:
    """Settings that there are not, or that others read."""
    known = _readable(Auto) | _SHARED.keys()

    for key in unread:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return ConfigError(f"learners have no setting {key!r}{hint}")

    readers = [n for n, other in LEARNERS.items() if {*unread} <= _readable(other)]
    others = " or ".join(f"`{reader}`" for reader in readers)
    remedy = f", or use the learner {others}" if readers else ""
    kind_name = "rule" if kind is UserMethod else "learner"

    return ConfigError(
        f"the {kind_name} {name!r} does not read {', '.join(unread)}; leave out what "
        f"it does not read{remedy}"
    )


def _of_auto(given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings of `auto`: those of a learner that it may become."""
    for name in ("gradient", "head"):
        if given.keys() <= _readable(LEARNERS[name]):
            LearnerConfig(name, **given)
            return tuple(sorted(given.items()))

    unread = sorted(given.keys() - _readable(LEARNERS["gradient"]))
    raise _refusal("auto", Auto, unread)


def _usual_values(key: str) -> list[Any]:
    """What older versions stored for a setting that nobody had set."""
    kinds: Iterable[Any] = (*LEARNERS.values(), *_PARTS.values())
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    return ["", 0, *(field.default for field in fields if field.name == key)]


def _check_shared(shared: dict[str, Any]) -> None:
    for key, value in shared.items():
        if key != "members":
            shared[key] = whole_number(key, value, least=0)

    members = shared["members"]
    is_text = isinstance(members, str)
    numbers = members.split(",") if is_text and members else []
    is_list = all(n.isdecimal() and n.isascii() for n in numbers)
    if not is_text or not (is_list or members in ("all", "chosen")):
        raise ConfigError(
            f"members is {members!r:.60}; use 'all', 'chosen', or numbers of a pool's "
            f"members with commas between them, like '1,3'"
        )


def _name_for_rule(name: str | None, rule: Rule) -> str:
    """The learner's name, which is that of the user's function."""
    UserMethod(rule)
    if name in LEARNER_NAMES and name != "gradient":
        raise ConfigError(
            f"both the learner {name!r} and the rule {_name_of(rule)!r} are set; leave "
            f"one of them out"
        )

    return _name_of(rule).partition(":")[2]


def _with_checks(learner: Learner, name: str) -> Learner:
    """The same learner, which is refused where it returns something else.

    Args:
      name: Of its rule, for errors.
    """

    def init(params: Params) -> LearnerState:
        state: Any = learner.init(params)
        if isinstance(state, LearnerState):
            return state

        raise ConfigError(
            f"`init` of the rule {name!r} returned {type(state).__name__}; return a "
            f"LearnerState, as `learners.base.new_state` makes it"
        )

    def update(
        state: LearnerState, segments: Segments, shared: SharedTables, token_ids: Any
    ) -> tuple[LearnerState, LearnerInfo]:
        updated: Any = learner.update(state, segments, shared, token_ids)
        is_pair = isinstance(updated, tuple) and len(updated) == 2
        if is_pair and isinstance(updated[0], LearnerState):
            return updated

        raise ConfigError(
            f"`update` of the rule {name!r} returned {type(updated).__name__}; return "
            f"(LearnerState, LearnerInfo)"
        )

    # A rule that replaced the update of another one has the other's slices, which do
    # something else.
    return learner._replace(init=init, update=update, given=None)


def _name_of(rule: Rule) -> str:
    """`module:name`, with the arguments that a `functools.partial` adds."""
    if isinstance(rule, functools.partial):
        given = [*map(repr, rule.args)]
        given += [f"{key}={value!r}" for key, value in rule.keywords.items()]
        return f"{_name_of(rule.func)}({', '.join(given)})"

    owner: Any = rule if hasattr(rule, "__qualname__") else type(rule)
    return f"{owner.__module__}:{owner.__qualname__}"
