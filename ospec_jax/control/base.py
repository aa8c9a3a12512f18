# SPDX-License-Identifier: Apache-2.0
"""What the next step shall run, chosen from what earlier ones came to.

A controller is a function of stored state: of what was accepted before, never of the
clock nor of what the step in question drafts. So whatever it chooses, output stays
exact; only its speed depends on the choice.

What is chosen within a step, by what was drafted, are the rules of `drafters.stopping`
and `drafters.sizing`; a controller may tell them something (`Controller.steer`).
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from ospec_jax.config import ConfigError, TreeConfig, from_dict
from ospec_jax.control.drift import Drift
from ospec_jax.control.lengths import Windows

SUGGESTIONS = -1
"""In place of a drafter's number: suggestions alone, in the state of the first one."""


@dataclasses.dataclass(frozen=True)
class Action:
    """What one step of decoding runs; the key of the engine's compiled steps.

    Attributes:
      tree: How much is drafted, and in which shape.
      drafter: Number of the drafter that proposes, among those of a pool, or
        `SUGGESTIONS`.
    """

    tree: TreeConfig
    drafter: int = 0

    def __str__(self) -> str:
        who = "suggestions" if self.drafter == SUGGESTIONS else f"draft {self.drafter}"
        return f"{self.tree.kind} of depth {self.tree.num_steps} by {who}"


class Context(NamedTuple):
    """What a request says of itself before it is answered.

    Attributes:
      scope: Whose it is; see `Request.scope`.
      domain: Of its prompt; empty if it names none.
      opening: Names how its prompt begins; see `control.contexts.opening_of`.
      embedding: What the target makes of its prompt, for a controller that
        `reads_prompts`; see `control.similar.embedding_of`. Empty until that is read.
    """

    scope: int = 0
    domain: str = ""
    opening: str = ""
    embedding: str = ""


class Row(NamedTuple):
    """What is known of a running request when its next step is chosen.

    Attributes:
      is_sure: A long chain of suggestions is likely to be right next.
      num_tokens: Of its prompt and of the answer, as far as the host has read it.
      num_remaining: Tokens that may still come.
      context: Of its request.
    """

    is_sure: bool
    num_tokens: int
    num_remaining: int
    context: Context = Context()


class Outcome(NamedTuple):
    """What one step came to.

    Attributes:
      num_accepted: Draft tokens, of each row that the step did not end. How many there
        were to accept is not said: a drafter may have found fewer than the tree holds.
      windows: What the emitted tokens complete of the evidence on every drafter of a
        pool, of all rows; None unless the controller `is_judging`.
      expected: For each row of `num_accepted`, the chances that its drafter was judged
        to have at each depth that the draft got to; empty where nobody judges.
      num_ended: Rows whose answer ended with this step. A controller that `hears_ends`
        is told of steps of which there is nothing else to say.
      evidence: `StepOutput.evidence` of the verified trees, with a row for each of
        `num_accepted`; None of steps that were not steered.
      seconds: That the step took; None where nobody looks at the clock, or something
        else was done meanwhile.
      parts: The same for each row that there is something to hear of, with its
        context; without `evidence` and `seconds`, which are of the whole step.
    """

    num_accepted: tuple[int, ...]
    windows: Windows | None = None
    num_ended: int = 0
    expected: tuple[tuple[float, ...], ...] = ()
    evidence: Any = None
    seconds: float | None = None
    parts: "tuple[tuple[Context, Outcome], ...]" = ()


class Learning(NamedTuple):
    """How a controller learns between answers; its time is learning's.

    Attributes:
      is_due: `state -> bool`, after an answer.
      update: `state -> state`: learns from what was observed, and waits until that is
        done.
      rehearse: `state -> None`: does all that an update does, to be compiled and timed,
        and waits likewise.
      set_cost: `(state, seconds) -> state`: told once what an update takes; it says how
        often that may be.
      is_ready: `state -> bool`: whether it knows, from a checkpoint.
    """

    is_due: Callable[[Any], bool]
    update: Callable[[Any], Any]
    rehearse: Callable[[Any], None]
    set_cost: Callable[[Any, float], Any]
    is_ready: Callable[[Any], bool]


class Controller(NamedTuple):
    """A rule for what to run next.

    Its state is None, or a frozen dataclass of numbers, strings and tuples, which a
    checkpoint keeps as JSON.

    Attributes:
      actions: What it weighs; each is compiled once, and timed if it wants costs.
      init: `num_rows -> state`, for batches of so many rows.
      choose: `(state, rows) -> Action`. `rows` are the running requests, or none where
        two of them share their random numbers: a choice that followed from what one
        had accepted would then bias the other.
      observe: `(state, action, outcome) -> state`. Rows whose numbers may come again
        are left out of the outcome. The host is one step ahead of what it has read: a
        step's outcome is observed when the next one has been chosen already.
      set_costs: `(state, seconds) -> state`: told once what a step of each of
        `actions`, or of `timed`, takes, before the first choice; None if that does not
        matter.
      has_costs: `state -> bool`: whether it knows them, from a checkpoint.
      resume: `(fresh, saved) -> state`: where to go on, given the state that it begins
        with here and one that was saved; the fresh one where the other does not fit.
      is_judging: It wants to know how every drafter of a pool would have been accepted
        (`Outcome.windows`), which costs each step some time.
      hears_ends: It wants to know of steps that ended an answer, too.
      reads_prompts: It wants to know what the target makes of each prompt
        (`Context.embedding`), which is read with the answer's first token.
      report: `state -> dict` of numbers and lists of them: what it thinks, for
        telemetry; None for nothing to tell.
      steer: `(state, rows) -> arrays`: what rules within a step are told, of actions
        whose tree has `sizes`; `rows` as for `choose`. None for nothing.
      timed: Steps that are timed in place of `actions`: each an action, and what its
        rules are told.
      learning: What it learns between answers; None for what it does at once.
      kind_of: `(state, action, outcome) -> (number, seconds)`: which of `kinds` a step
        was like, and what it was to take by the costs that were told last; None where
        that cannot be said. By default steps are of their action's kind.
      forget: `(state, scopes) -> state`: without what is kept of some scopes alone, by
        their numbers, which may be given to others; of None, without all that is kept
        of any kind of request. None where nothing is.
      rests: `(state, context, ordinal) -> bool`: whether the answer to such a request
        need not say anything of the drafters of a pool: the one that is chosen for its
        first step runs over it alone. `ordinal` is the request's number among all. None
        where all shall.
      pack: `state -> dict` for JSON; by default its fields.
      unpack: `dict -> state`: back again.
    """

    actions: tuple[Action, ...]
    init: Callable[[int], Any]
    choose: Callable[[Any, Sequence[Row]], Action]
    observe: Callable[[Any, Action, Outcome], Any]
    set_costs: Callable[[Any, Sequence[float]], Any] | None = None
    has_costs: Callable[[Any], bool] = lambda state: True
    resume: Callable[[Any, Any], Any] = lambda fresh, saved: saved
    is_judging: bool = False
    hears_ends: bool = False
    reads_prompts: bool = False
    report: Callable[[Any], dict[str, Any]] | None = None
    steer: Callable[[Any, Sequence[Row]], Any] | None = None
    timed: tuple[tuple[Action, Any], ...] = ()
    learning: Learning | None = None
    kind_of: Callable[[Any, Action, Outcome], tuple[int, float] | None] | None = None
    forget: Callable[[Any, Collection[int] | None], Any] | None = None
    rests: Callable[[Any, Context, int], bool] | None = None
    pack: Callable[[Any], dict] | None = None
    unpack: Callable[[dict], Any] | None = None

    @property
    def kinds(self) -> tuple[tuple[Action, Any], ...]:
        """Steps whose times it wants to know, and what their rules are told."""
        return self.timed or tuple((action, None) for action in self.actions)


def fixed(actions: tuple[Action, ...]) -> Controller:
    """Runs the only action, or the last of several, at every step."""
    return Controller(
        actions=actions[-1:],
        init=lambda num_rows: None,
        choose=lambda state, rows: actions[-1],
        observe=lambda state, action, outcome: state,
    )


def follow_predictions(inner: Controller, long: Action) -> Controller:
    """Takes a longer step where all rows' suggestions are sure to be right.

    Args:
      inner: Chooses elsewhere; it does not hear what longer steps had accepted.
      long: The longer step, of suggestions alone.
    """

    def choose(state, rows: Sequence[Row]) -> Action:
        # One compiled step runs all rows: a single one that is not sure would pay for a
        # long chain in vain.
        if rows and all(row.is_sure for row in rows):
            return long

        return inner.choose(state, rows)

    def observe(state, action: Action, outcome: Outcome):
        # Its chain is not one of the inner rule's trees, and says nothing about them.
        # What was emitted still is evidence on drafters, if anybody asks.
        if action == long:
            rest = _without_accepted(outcome)
            is_asked = inner.is_judging or inner.hears_ends
            return inner.observe(state, action, rest) if is_asked else state

        return inner.observe(state, action, outcome)

    # The inner rule weighs its own actions: it is not asked when the longer one comes.
    return inner._replace(choose=choose, observe=observe)


def _without_accepted(outcome: Outcome) -> Outcome:
    """What is left to hear of a step whose draft was nobody's."""
    nothing: dict = {"num_accepted": (), "expected": (), "evidence": None}
    parts = tuple(
        (context, part._replace(**nothing)) for context, part in outcome.parts
    )
    return outcome._replace(**nothing, parts=parts)


@dataclasses.dataclass
class Chooser:
    """A session's controller, and where it stands.

    Attributes:
      costs: What a step of each of its `kinds` takes, by the number of rows, where
        batches of several sizes come; no part of what a checkpoint keeps.
      now: A clock, to follow what steps take while serving; None goes by what was
        measured before. What is chosen then depends on time, and a run that is
        repeated may take other steps.
      drift: What steps take by now, once they were timed.
    """

    controller: Controller
    state: Any
    costs: dict[int, Sequence[float]] = dataclasses.field(default_factory=dict)
    now: Callable[[], float] | None = None
    drift: Drift | None = None
    _probe: Any = None

    @classmethod
    def start(cls, controller: Controller, num_rows: int) -> "Chooser":
        """One that has seen nothing.

        Raises:
          ConfigError: Its state is none that a checkpoint could keep.
        """
        state = controller.init(num_rows)
        if state is not None and not dataclasses.is_dataclass(state):
            raise ConfigError(
                f"the controller's state is {state!r:.60}; use None, or a frozen "
                f"dataclass of numbers, strings and tuples, which a checkpoint keeps"
            )

        return cls(controller, state)

    @property
    def has_costs(self) -> bool:
        """Whether it knows what steps take, or does not want to."""
        if self.controller.set_costs is None:
            return True
        # What a checkpoint holds may be what they took while others used the machine.
        if self.now is not None and self.drift is None:
            return False

        return self.controller.has_costs(self.state)

    def set_costs(self, seconds: Sequence[float]) -> None:
        """Tells what a step of each of the controller's `kinds` takes."""
        if self.controller.set_costs is None:
            return

        self.state = self.controller.set_costs(self.state, seconds)
        if self.now is not None:
            self.drift = Drift.start(seconds)

    def weigh(self, num_rows: int) -> None:
        """Goes on with what steps of so many rows take, if that is known."""
        if num_rows in self.costs:
            self.set_costs(self.costs[num_rows])

    def _follow(self, action: Action, outcome: Outcome) -> None:
        """Books what a step took, and tells the controller if that is news."""
        if self.drift is None or not outcome.seconds:
            return

        found = self._kind_of(action, outcome)
        # Of steps that were said to take nothing no factor is known.
        if found is None or not found[1] > 0:
            return

        number, expected = found
        # The controller goes by what it was told last: measured, times that factor.
        factor = outcome.seconds / expected * math.exp(self.drift.told[number])
        self.drift = self.drift.observe(number, factor)
        if self.drift.is_news:
            assert self.controller.set_costs is not None
            self.state = self.controller.set_costs(self.state, self.drift.now)
            self.drift = self.drift.tell()

    def _kind_of(self, action: Action, outcome: Outcome) -> tuple[int, float] | None:
        """Which kind of step it was, and what it was to take."""
        if self.controller.kind_of is not None:
            return self.controller.kind_of(self.state, action, outcome)

        assert self.drift is not None
        for number, (known, _) in enumerate(self.controller.kinds):
            if known == action:
                log = self.drift.told[number]
                return number, self.drift.seconds[number] * math.exp(log)

        return None

    def learn(self) -> float:
        """Learns from what was observed, if that is due; returns the seconds."""
        learning = self.controller.learning
        if learning is None or not learning.is_due(self.state):
            return 0.0

        start = time.perf_counter()
        self.state = learning.update(self.state)
        return time.perf_counter() - start

    def to_json(self) -> dict:
        """The state as a checkpoint keeps it; empty for a rule without any."""
        if self.state is None:
            return {}
        if self.controller.pack is not None:
            return self.controller.pack(self.state)

        return dataclasses.asdict(self.state)

    def resume(self, saved: dict) -> None:
        """Goes on from a checkpoint's state, if it is one of this rule."""
        if not saved or self.state is None:
            return
        # A state of another rule, or of another version of it: begin anew.
        if set(saved) != set(self.to_json()):
            return

        unpack = self.controller.unpack or functools.partial(
            from_dict, type(self.state)
        )
        self.state = self.controller.resume(self.state, unpack(saved))

    def choose(self, rows: Sequence[Row]) -> Action:
        """What to run next.

        Raises:
          ConfigError: The rule chose something else than an action.
        """
        self._probe = None
        if self.drift is not None and rows:
            number, self.drift = self.drift.choose()
            if number is not None:
                action, self._probe = self.controller.kinds[number]
                return action

        action: Any = self.controller.choose(self.state, rows)
        if not isinstance(action, Action):
            raise ConfigError(
                f"`choose` of the controller returned {action!r:.60}; return one of "
                f"its actions, whose depth is `action.tree.num_steps`"
            )

        return action

    def rests(self, row: Row, ordinal: int) -> int | None:
        """The drafter that alone shall run over a request; None for all of a pool.

        Args:
          ordinal: The request's number among all that were ever admitted.
        """
        rests = self.controller.rests
        if rests is None or not rests(self.state, row.context, ordinal):
            return None

        return self.controller.choose(self.state, (row,)).drafter

    def steer(self, action: Action, rows: Sequence[Row]) -> Any:
        """What the rules within a step of this action are told; None for nothing."""
        if self.controller.steer is None or not action.tree.sizes:
            return None
        if self._probe is not None:
            return self._probe

        return self.controller.steer(self.state, rows)

    def forget(self, scopes: Collection[int] | None) -> bool:
        """Drops what is kept of some scopes alone, or of all; whether there was any."""
        if self.controller.forget is None:
            return False

        before = self.state
        self.state = self.controller.forget(before, scopes)
        return self.state != before

    def report(self) -> dict[str, Any] | None:
        """What it thinks, for telemetry; None for nothing to tell."""
        if self.controller.report is None:
            return None

        return self.controller.report(self.state)

    def observe(self, action: Action, outcome: Outcome) -> None:
        """Books a step.

        Raises:
          ConfigError: The rule returned another kind of state than it began with.
        """
        self._follow(action, outcome)
        # A rule that asked for nothing else hears of accepted tokens alone.
        wants_more = self.controller.is_judging or self.controller.hears_ends
        if not outcome.num_accepted and not wants_more:
            return

        state = self.controller.observe(self.state, action, outcome)
        if type(state) is not type(self.state):
            raise ConfigError(
                f"`observe` of the controller returned {type(state).__name__}; return "
                f"its state, a {type(self.state).__name__}"
            )

        self.state = state
