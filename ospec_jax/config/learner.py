# SPDX-License-Identifier: Apache-2.0
"""How a draft learns."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from ospec_jax.config.base import ConfigError

Recording = Literal["nothing", "features", "states"]
LearnerName = Literal[
    "gradient",
    "momentum",
    "optimistic",
    "ensemble",
    "shared_ensemble",
    "osd",
    "head",
    "memory",
    "auto",
]
LEARNER_NAMES: tuple[str, ...] = get_args(LearnerName)

_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": "sgd", "loss": "forward_kl"},
    "optimistic": {"optimizer": "sgd"},
    # An update is a request, of which its buffer holds so many: never an interval.
    "osd": {"learning_rate": 1e-4, "update_every_prompts": 1, "loss": "forward_kl"},
    # The paper's rule never forgets; this one is for streams that shift.
    "shared_ensemble": {"meta_rate": 3.0, "meta_discount": 0.8},
}

_OF_GRADIENTS = {
    "optimizer": "", "learning_rate": 0.0, "update_interval": 0,
    "update_every_prompts": 0, "promotion": "always", "loss": "",
}  # fmt: skip
"""Settings that `head` and `memory` would not read, unset."""

_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("memory_slots update_interval", lambda x: x >= 0, "0 or more"),
    ("radius expert_pull update_every_prompts", lambda x: x >= 0, "0 (off) or more"),
    ("momentum hint_decay replay_share", lambda x: 0 <= x < 1, "0 to below 1"),
    ("head_rate head_damping", lambda x: x > 0, "above 0"),
    ("budget promotion_level", lambda x: 0 < x < 1, "above 0 and below 1"),
    ("token_share meta_discount", lambda x: 0 < x <= 1, "above 0, and at most 1"),
    ("forward_share", lambda x: 0 <= x <= 1, "0 to 1"),
    ("num_experts", lambda x: x >= 2, "2 (the static draft and another) or more"),
    ("step_ratio", lambda x: x > 1, "above 1"),
    ("learning_rate", lambda x: x >= 0, "0 (the default one) or more"),
    ("meta_rate temperature", lambda x: x > 0, "above 0"),
    ("decay position_decay", lambda x: x > 0, "above 0"),
    (
        "buffer_requests num_epochs num_scored round_length batch_size window "
        "num_steps promotion_patience head_candidates",
        lambda x: x >= 1,
        "1 or more",
    ),
)


Rule = Callable[[Any], Any]
"""An update rule that a user wrote: `learners.objective.Objective -> Learner`."""


def _usual_rate(optimizer: str) -> float:
    """Of an optimizer whose rate is not given; Adam's steps are normalised."""
    return 0.1 if optimizer == "sgd" else 3e-4


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """How a draft learns from the traffic it serves.

    Attributes:
      name: `gradient` steps along gradients; `momentum` is SGD with heavy-ball momentum
        (OnlineSPEC's released code); `optimistic` plays where the next gradient is
        expected to lead (its paper); `ensemble` averages experts of several step sizes,
        each with its own gradient; `shared_ensemble` with one gradient for all; `osd`
        is Online Speculative Decoding, the baseline; `head` trains the draft's output
        projection alone, after every answer, at next to no cost; `memory` only
        remembers n-grams, as all of them do; `auto` is `head` where the draft has an
        output projection of its own, on a single device, and nothing is set that
        only gradients keep to (`asks_for_gradients`; guarded promotion is one of them,
        `pace` is not), else `gradient`. A rule of your own gives its name.
      memory_slots: n-grams of each order that are remembered; 0 for none.
      optimizer: Any optax optimizer that takes a learning rate, or finds its own step
        size: mechanize, cocob, dog, prodigy, ... By default adam, or what the learner
        was published with.
      learning_rate: By default 3e-4, with plain SGD 0.1, of osd 1e-4. An ensemble's is
        the middle of its grid. With `momentum` and `optimistic`, which were published
        with SGD, it takes an `optimizer` beside it.
      momentum: Of the momentum learner.
      hint_decay: Optimistic: the hint is the last gradient (0), or an average of past
        ones that keeps this part of its old value at each update.
      radius: Optimistic, shared ensemble: parameters stay in the ball of this radius
        around the first ones; 0 for no bound.
      num_experts: Of an ensemble, the static draft counted.
      step_ratio: Between neighbours in an ensemble's grid of step sizes.
      static_expert: Whether the static draft may get weight.
      reset_experts: Experts begin each round at their average (released code).
      meta: How experts are weighed: `hedge` on their cumulative normalised losses, or
        `last_chunk`, softmax of their mean loss in the last round (released code).
      meta_rate: Of Hedge; see `learners.meta`. By default 1, of the shared
        ensemble 3.
      meta_discount: Of older losses at each update, in Hedge; 1 never forgets, the
        default but of the shared ensemble, 0.8.
      temperature: Of `last_chunk`, in units of the loss.
      expert_pull: Shared ensemble: part of the way that an expert of the middle step is
        drawn to the played parameters at each update.
      num_scored: Shared ensemble: windows of each batch that experts are judged on.
      round_length: Shared ensemble: updates between two judgements; directions add up
        in between, and experts move once for all of them.
      buffer_requests: OSD: requests between two steps; each update is one request, so
        that a batch should hold the windows of one.
      loss: forward_kl, reverse_kl, jsd, total_variation or acceptance_length. The
        default is jsd, whose acceptance length was 1.0 to 2.7% longer than forward_kl's
        on eight real streams; for `momentum` and `osd` forward_kl, as published. All
        of them compare raw logits; total_variation and acceptance_length are chances of
        acceptance at temperature 1, whatever the traffic is sampled at.
      forward_share: Of forward KL in jsd, the rest is reverse KL.
      decay: Weight of each depth relative to the one before.
      position_decay: Weight of each position of a window relative to the one before.
      positions: Learn from all positions, or where the draft would be `rejected`.
      token_share: Share of positions that are learned from, drawn at random.
      update_interval: Answer tokens between two updates; 0 derives it from `budget`.
      update_every_prompts: Instead: prompts between two rounds of learning, each of
        `num_epochs` over all their windows, as far as the ring holds them; 0 for off.
      budget: Share of wall-clock time that learning may take, turned into an interval
        of target passes by a measurement at the start and then kept.
      pace: `always` learns on every occasion (an interval, a chunk of prompts, for
        `head` an answer); `pays` on ever fewer while the gain of learning is less than
        the time it takes, and on all of them again after a shift; see `online.pace`.
      batch_size: Windows in one update.
      window: Pairs trained in a window.
      num_context: Pairs before each window that are attended to.
      num_steps: Unrolled draft steps.
      num_candidates: Draft tokens that an update looks at, the likeliest ones; its loss
        knows no others, and it tells `candidate_agreement` and `candidate_acceptance`
        instead of `agreement` and `acceptance`. 0 for all, at twice the cost.
      num_epochs: Updates done at each interval; or see `update_every_prompts`. An
        ensemble weighs its experts in the first of them only.
      replay_share: Part of each batch drawn from older windows.
      promotion: `always` serves each iterate; `guarded` only proven ones.
      promotion_level: Probability that a run with guarded promotion ever serves an
        iterate that is no better than the one before; see `online.promotion`.
      promotion_patience: Requests on which a candidate is scored before the newest
        iterate takes its place: each of a chunk of prompts, one for each interval.
      ring_capacity: Windows remembered.
      head_rate: Step size of `head`; 1 is a whole Newton step for a token.
      head_damping: Of its preconditioner; see `learners.last_layer`.
      head_candidates: Draft tokens whose rows of the projection one step may change.
      rule: An update rule of your own, from an `Objective` to a `Learner`, in place of
        one by name; `optimizer` and `learning_rate` are its own affair. A checkpoint
        stores its name (`rule_name`), not its code: give the same one to resume.
    """

    name: LearnerName | str = "gradient"
    memory_slots: int = 65536
    optimizer: str = ""
    learning_rate: float = 0.0
    momentum: float = 0.9
    hint_decay: float = 0.0
    radius: float = 0.0
    num_experts: int = 4
    step_ratio: float = 2.0
    static_expert: bool = True
    reset_experts: bool = False
    meta: Literal["hedge", "last_chunk"] = "hedge"
    meta_rate: float = 0.0
    meta_discount: float = 0.0
    temperature: float = 0.2
    expert_pull: float = 0.2
    num_scored: int = 1
    round_length: int = 4
    buffer_requests: int = 8
    loss: str = ""
    forward_share: float = 0.9
    decay: float = 0.8
    position_decay: float = 1.0
    positions: Literal["all", "rejected"] = "all"
    token_share: float = 1.0
    update_interval: int = 0
    update_every_prompts: int = 0
    budget: float = 0.02
    pace: Literal["always", "pays"] = "always"
    batch_size: int = 4
    window: int = 64
    num_context: int = 64
    num_steps: int = 3
    num_candidates: int = 1024
    num_epochs: int = 1
    replay_share: float = 0.0
    promotion: Literal["always", "guarded"] = "always"
    promotion_level: float = 0.1
    promotion_patience: int = 128
    ring_capacity: int = 64
    head_rate: float = 1.0
    head_damping: float = 0.1
    head_candidates: int = 256
    seed: int = 0
    rule: Rule | None = None

    def __post_init__(self):
        if self.rule is not None:
            self._check_rule()
        elif self.name not in LEARNER_NAMES:
            raise ConfigError(
                f"unknown learner {self.name!r}; use one of {', '.join(LEARNER_NAMES)}"
            )
        self._fill_in()
        self._check_ranges()
        choices = {
            "meta": ("hedge", "last_chunk"),
            "positions": ("all", "rejected"),
            "pace": ("always", "pays"),
            "promotion": ("always", "guarded"),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"{key} is {getattr(self, key)!r}; use {' or '.join(known)}"
                )
        if self.batch_size > self.ring_capacity:
            raise ConfigError(
                f"batch_size {self.batch_size} exceeds ring_capacity "
                f"{self.ring_capacity}"
            )
        if self.num_scored > self.batch_size:
            raise ConfigError(
                f"num_scored {self.num_scored} exceeds batch_size {self.batch_size}"
            )
        if round(self.batch_size * self.replay_share) >= self.batch_size:
            raise ConfigError(
                f"replay_share {self.replay_share} of a batch_size of "
                f"{self.batch_size} leaves no window to new traffic"
            )
        if self.num_context < 64:
            raise ConfigError(
                f"num_context is {self.num_context}; at least 64 pairs of context are "
                f"needed for a window's first pairs to see what they saw when serving"
            )

    def _check_rule(self):
        """Takes the name of the user's rule."""
        if not callable(self.rule):
            raise ConfigError(
                f"rule is {self.rule!r}; use a function from an `Objective` to a "
                f"`Learner`"
            )
        if self.name in LEARNER_NAMES and self.name != LearnerConfig.name:
            raise ConfigError(
                f"both the learner {self.name!r} and the rule {self.rule_name!r} are "
                f"set; leave one of them out"
            )
        if self.optimizer or self.learning_rate:
            raise ConfigError(
                f"optimizer and learning_rate are not read by the rule "
                f"{self.rule_name!r}; leave them out, and set them in the rule"
            )
        _, _, name = self.rule_name.partition(":")
        object.__setattr__(self, "name", name)

    def _fill_in(self):
        """What is unset becomes the learner's own default; `auto` leaves it open."""
        defaults: dict[str, Any] = {"meta_rate": 1.0, "meta_discount": 1.0}
        if self.rule is not None:
            defaults["loss"] = "jsd"
        elif self.name in ("head", "memory"):
            if self._sets_unread:
                raise ConfigError(
                    f"the learner {self.name!r} reads none of "
                    f"{', '.join(_OF_GRADIENTS)}, of which some are set; leave them "
                    f"out, or use the learner 'gradient'"
                )
        elif self.name != "auto":
            defaults |= {"optimizer": "adam", "loss": "jsd"}
        defaults |= _OWN_DEFAULTS.get(self.name, {})
        self._check_optimizer(defaults.get("optimizer", ""))
        optimizer = self.optimizer or defaults.get("optimizer")
        if optimizer:
            defaults = {"learning_rate": _usual_rate(optimizer)} | defaults
        for key, value in defaults.items():
            if not getattr(self, key):
                object.__setattr__(self, key, value)

    def _check_optimizer(self, own: str):
        """Refuses a rate that does not say whose it is, and what a rule cannot use.

        Rates differ by orders of magnitude between optimizers: what suits Adam would
        leave a rule that was published with plain SGD without any visible step.

        Args:
          own: The optimizer that the rule has by default.
        """
        if self.name == "momentum" and self.optimizer not in ("", own):
            raise ConfigError(
                f"the momentum learner is SGD with momentum, not {self.optimizer!r}; "
                f"leave the optimizer out, or use the gradient learner"
            )
        if self.optimizer or not self.learning_rate or own in ("", "adam"):
            return
        others = "" if self.name == "momentum" else ", or 'adam' (--optimizer adam)"
        raise ConfigError(
            f"the learner {self.name!r} was published with {own!r} at a rate of "
            f"{_usual_rate(own)}, and learning_rate {self.learning_rate} does not say "
            f"which optimizer it is for: set optimizer {own!r} (--optimizer {own})"
            f"{others} beside it, or leave the rate out"
        )

    @property
    def _sets_unread(self) -> bool:
        return any(getattr(self, key) != v for key, v in _OF_GRADIENTS.items())

    @property
    def asks_for_gradients(self) -> bool:
        """Whether something is set that only learning along gradients keeps to."""
        return self._sets_unread or self.budget != LearnerConfig.budget

    def renamed(self, name: LearnerName) -> "LearnerConfig":
        """Another learner with these settings, as far as it reads them."""
        unread = _OF_GRADIENTS if name in ("head", "memory") else {}
        return dataclasses.replace(self, name=name, rule=None, **unread)

    @property
    def rule_name(self) -> str:
        """Where the user's rule comes from; empty for a learner by name."""
        return "" if self.rule is None else _name_of(self.rule)

    def to_json(self) -> dict[str, Any]:
        """All settings; of a rule, if there is one, the name."""
        fields = [field.name for field in dataclasses.fields(self)]
        settings = {name: getattr(self, name) for name in fields}
        del settings["rule"]
        return settings | ({"rule": self.rule_name} if self.rule else {})

    @property
    def recording(self) -> Recording:
        """What it needs to know of verified tokens."""
        needed: dict[str, Recording] = {"memory": "nothing", "head": "states"}
        return needed.get(self.name, "features")

    def _check_ranges(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name} is {value}; use a finite number")
        for keys, is_good, wanted in _LIMITS:
            for key in keys.split():
                if not is_good(getattr(self, key)):
                    raise ConfigError(f"{key} is {getattr(self, key)}; use {wanted}")

    @property
    def budget_share(self) -> float:
        """Time for learning that goes with a second of decoding."""
        return self.budget / (1 - self.budget)

    @property
    def is_training(self) -> bool:
        """Whether the draft is trained as a whole, along gradients."""
        return self.recording == "features"


def _name_of(rule: Rule) -> str:
    """`module:name`, with the arguments that a `functools.partial` adds."""
    if isinstance(rule, functools.partial):
        given = [*map(repr, rule.args)]
        given += [f"{key}={value!r}" for key, value in rule.keywords.items()]
        return f"{_name_of(rule.func)}({', '.join(given)})"
    owner: Any = rule if hasattr(rule, "__qualname__") else type(rule)
    return f"{owner.__module__}:{owner.__qualname__}"


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
        return LearnerConfig(rule=learner)
    raise ConfigError(
        f"learner is {learner!r}; use a LearnerConfig(...), the name of a learner "
        f"({', '.join(LEARNER_NAMES)}), or a function from an `Objective` to a "
        f"`Learner`"
    )
