# SPDX-License-Identifier: Apache-2.0
"""Arguments and output that several commands share."""

import dataclasses
import functools
import json
import runpy
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from ospec_jax import atomic, sharding
from ospec_jax.cli.notation import parse_bias, parse_tree
from ospec_jax.config import (
    ChildrenKind,
    ConfigError,
    Precision,
    SamplingConfig,
    TreeConfig,
    Verification,
    whole_number,
)
from ospec_jax.control.base import Action
from ospec_jax.control.policy import Policies
from ospec_jax.control.registry import AUTO, CONTROLLERS, is_auto
from ospec_jax.control.selectors import build_selector
from ospec_jax.control.steered import DEEPEST
from ospec_jax.decoding.judging import JUDGE_EVERY
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.learners.registry import LEARNER_NAMES
from ospec_jax.loading import LoadedDraft, check_draft, draft_folder, load_draft
from ospec_jax.models.hub import Target, load_target
from ospec_jax.reports.progress import say
from ospec_jax.session import Session
from ospec_jax.session.arguments import as_share
from ospec_jax.session.how_much import JOINT, LOAD, MARGINAL
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.storage.policies import load_policies

Own = tyro.conf.arg(prefix_name=False)
"""Of a flag in a group: its name is not that of the group and its own."""
OwnEmpty = tyro.conf.arg(prefix_name=False, help_behavior_hint="")
"""Likewise, of one that is empty by default; its help says what then happens."""

Learner = Annotated[
    str,
    tyro.conf.arg(
        help=f"{', '.join(LEARNER_NAMES)}, or a Python file with `get_config() -> "
        f"LearnerConfig`."
    ),
]
LearningRate = Annotated[
    float | None,
    tyro.conf.arg(
        help="Of the optimizer; by default 3e-4, of plain SGD 0.1, or what the learner "
        "was published with. Learners that were published with SGD (optimistic, "
        "momentum) take an --optimizer beside it."
    ),
]
Optimizer = Annotated[
    str | None,
    tyro.conf.arg(
        help="Any optax optimizer; by default adam, or what the learner was published "
        "with."
    ),
]
LearnBudget = Annotated[
    float | None,
    tyro.conf.arg(help="Share of wall-clock time for learning, by default 0.02."),
]
LearnMembers = Annotated[
    str | None,
    tyro.conf.arg(
        help="Of --draft pool:A+B+..., which members learn: all that can; chosen, of "
        "each answer the one that drafted most of it; or their numbers from 0 on, like "
        "1,3. By default none does, and n-grams alone are learned."
    ),
]
PrecisionName = Literal["auto", "float32", "bfloat16", "int8"]


AUTO_DRAFT = "auto"
"""The draft that comes with the package, for targets that it was made for."""


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """What decodes.

    Attributes:
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id.
      draft: auto, the shipped draft if it is one for this target, behind longer chains
        of n-grams (longer:ngram,shipped) for one request at a time where no flag says
        how or how much is drafted; for other targets ngram. Or none,
        shipped, shipped:NAME (`ospec drafters` lists them), ngram, suffix,
        prediction, model:TARGET (a smaller model), self:int4, self:exit-N, a checkpoint
        folder or that of a public EAGLE-3 or Hydra head, or two drafts:
        fallback:ngram,DRAFT (n-grams where they are likely), longer:ngram,DRAFT (there
        more of them), mixed:ngram,DRAFT (both in one tree). Several behind one, of
        which --select chooses: pool:A+B+...
      precision: Of weights and products, which are those of the answer; auto measures
        which is fastest on this device, mostly int8 on a CPU.
      batch_size: Requests decoded together.
      mesh: Devices to split over, like data=2,model=4; empty for a single one.
    """

    target: Annotated[str, Own] = "smollm2-135m"
    draft: Annotated[str, Own] = AUTO_DRAFT
    precision: Annotated[PrecisionName, Own] = "auto"
    batch_size: Annotated[int, Own] = 1
    mesh: Annotated[str, OwnEmpty] = ""


@dataclasses.dataclass(frozen=True)
class DraftingFlags:
    """How much is drafted; it changes the speed, never a greedy answer.

    Attributes:
      num_speculative_tokens: Depth of the draft, K, by default 3; 0 decodes plainly;
        auto is short for --controller auto.
      controller: What each step drafts: fixed, always the tree, which is the default;
        auto, a chain of the depth that pays; auto:scope, auto:domain and auto:opening,
        the same by what is known of each tenant, domain or beginning of prompts; load,
        the tree or nothing, whichever pays with as many requests as run, which is the
        default of a server with several rows; joint, like auto, and of a pool's members
        the one that pays; marginal, as much as pays, by what the step has drafted so
        far: within a chain of 5, or up to --num-speculative-tokens and --tree; ltd:DIR,
        as policies of `ospec train-control` say, within the trees that they were taught
        on, or --tree dynamic:TOPK,NUM_TOKENS.
      learn_control: Share of decoding's time in which the policies of --controller
        ltd:DIR go on learning, from every verified step, like 0.01; by default they
        stay as they are.
      follow_clock: Time every step while serving, for --controller auto, load, marginal
        and joint: what steps take changes as others use the machine.
      select: Which member of a pool drafts, for --draft pool:A+B: normalhedge,
        adanormalhedge, hedge, share, leader, which judge every member by every token;
        ucb, exp3, metasd, thompson, epsilon, which hear of the one that drafted;
        fixed:N. Behind colons may follow length (the default loss), time, request
        (begin anew with every answer), sample, product, raw, acceptance; scope, domain,
        opening (weights of their own for each of these), similar (each request begins
        with a vote of similar ones), seldom (of known kinds of requests one answer in
        16 is judged). By default the first drafts.
      judge_every: Steps after which the members of a pool are judged together, for
        --select, by default 8; until then only the one that drafts runs.
      tree: chain, static:3,2,1 (children by depth), dynamic:TOPK,NUM_TOKENS, or the
        best tree of so many tokens: opt:NUM_TOKENS,MIN_GAIN (grown while it pays),
        sequoia:NUM_TOKENS,P1,P2,... (static, from the chances of first, second, ...
        children).
      min_path_probability: Draft no deeper once the draft gives its most probable path
        less than this.
      draft_sample_method: How children are drawn when sampling.
      verification: token by token, or by whole paths: block (chains), traversal (static
        trees).
      ngrams: Let n-grams of the request, and of learned traffic, suggest tokens.
      num_predicted_tokens: Tokens verified at once while a prediction holds.
    """

    num_speculative_tokens: Annotated[int | Literal["auto"] | None, OwnEmpty] = None
    controller: Annotated[str | None, OwnEmpty] = None
    learn_control: Annotated[float, Own] = 0.0
    follow_clock: Annotated[bool, Own] = False
    select: Annotated[str | None, OwnEmpty] = None
    judge_every: Annotated[int | None, OwnEmpty] = None
    tree: Annotated[str, Own] = "chain"
    min_path_probability: Annotated[float, Own] = 0.0
    draft_sample_method: Annotated[ChildrenKind, Own] = "topk"
    verification: Annotated[Verification, Own] = "token"
    ngrams: Annotated[bool, Own] = True
    num_predicted_tokens: Annotated[int, Own] = 12


@dataclasses.dataclass(frozen=True)
class AnswerFlags:
    """What is answered.

    Attributes:
      max_new_tokens: Longest answer, in tokens.
      temperature: 0 takes the most probable token (greedy); above 0 tokens are sampled.
      top_p: Sample from the most probable tokens of so much probability; 1 takes all.
      top_k: Sample from so many of the most probable tokens; 0 takes all.
      min_p: Sample from tokens that have at least this share of the most probable one's
        probability.
      presence_penalty: Takes this off the logits of tokens that the answer has; -2 to
        2.
      frequency_penalty: Likewise, once for each time that the answer has the token.
      repetition_penalty: Divides positive logits of tokens that prompt or answer have
        by this, and multiplies negative ones; 1 does nothing.
      logit_bias: What to add to the logits of some tokens, as ID:VALUE, like 11:-100;
        none by default.
      seed: Of the random numbers of sampling; each answer draws its own.
      stop: Strings that end an answer, by default none; it ends in front of them.
      raw: Skip the chat template.
    """

    max_new_tokens: Annotated[int, Own] = 128
    temperature: Annotated[float, Own] = 0.0
    top_p: Annotated[float, Own] = 1.0
    top_k: Annotated[int, Own] = 0
    min_p: Annotated[float, Own] = 0.0
    presence_penalty: Annotated[float, Own] = 0.0
    frequency_penalty: Annotated[float, Own] = 0.0
    repetition_penalty: Annotated[float, Own] = 1.0
    logit_bias: Annotated[tuple[str, ...], OwnEmpty] = ()
    seed: Annotated[int, Own] = 0
    stop: Annotated[tuple[str, ...], OwnEmpty] = ()
    raw: Annotated[bool, Own] = False


def _fitting_draft(target: Target, has_longer_chains: bool) -> LoadedDraft:
    """The shipped draft if the target is one that it can draft for, else n-grams."""
    try:
        name = "longer:ngram,shipped" if has_longer_chains else "shipped"
        return load_draft(name, target)
    except CheckpointError:
        # One that is damaged fails here, too: then it is not the target's fault.
        checkpoint.load(draft_folder("shipped"))
        say(
            f"no draft comes with the package for {target.name}: n-grams of requests "
            f"draft (--draft ngram); `ospec distill` trains one"
        )
        return load_draft("ngram", target)


@dataclasses.dataclass(frozen=True)
class Decoding(AnswerFlags, DraftingFlags, ModelFlags):
    """Arguments that `generate`, `learn` and `bench` share."""

    @property
    def sampling(self) -> SamplingConfig:
        """How the target's tokens are chosen."""
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=parse_bias(self.logit_bias),
        )

    @property
    def depth(self) -> int | Literal["auto"]:
        """The chain's, or `auto`.

        Raises:
          ConfigError: The flags contradict each other.
        """
        asked = self.num_speculative_tokens
        known = (*CONTROLLERS, JOINT, LOAD)
        if self.controller not in (None, *known) and not self.policies:
            raise ConfigError(
                f"unknown controller {self.controller!r}; use {', '.join(known)} or "
                f"ltd:DIR"
            )
        if self.policies and asked is None:
            return self.policies.shape.depth
        if self.is_within_step and asked == "auto":
            raise ConfigError(
                f"--controller {self.controller} contradicts --num-speculative-tokens "
                f"auto; leave one of the two out"
            )
        if self.controller in ("fixed", LOAD) and asked == "auto":
            raise ConfigError(
                f"--controller {self.controller} contradicts --num-speculative-tokens "
                f"auto; give a number, or leave one of the two out"
            )
        if is_auto(self.controller) and asked not in (None, "auto"):
            raise ConfigError(
                f"--controller {self.controller} contradicts --num-speculative-tokens "
                f"{asked}; leave one of the two out"
            )
        if is_auto(self.controller) or (self.controller == JOINT and asked is None):
            return "auto"

        if asked is None:
            return DEEPEST if self.controller == MARGINAL else 3

        return asked

    @property
    def is_within_step(self) -> bool:
        """Whether the controller chooses within the step."""
        return self.controller == MARGINAL or self.policies is not None

    @property
    def _is_keyed(self) -> bool:
        """Whether it chooses depths by the kind of request."""
        return is_auto(self.controller) and self.controller != AUTO

    @property
    def session_controller(self) -> str | None:
        """The controller that a session is given; the tree says the rest."""
        is_own = self.is_within_step or self._is_keyed
        is_own |= self.controller in (JOINT, LOAD)
        return self.controller if is_own else self.select

    @functools.cached_property
    def policies(self) -> Policies | None:
        """What `--controller ltd:DIR` names; None for another controller.

        Raises:
          ConfigError: There are none, or they are damaged.
        """
        kind, _, folder = (self.controller or "").partition(":")
        return load_policies(Path(folder))[0] if kind == "ltd" else None

    @property
    def tree_config(self) -> TreeConfig:
        """How much is drafted."""
        if self.draft == "none":
            return TreeConfig(num_steps=0)

        tree = self.tree
        if self.policies and tree == "chain" and self.policies.shape.topk > 1:
            nodes = max(self.policies.shape.sizes)
            tree = f"dynamic:{self.policies.shape.topk},{nodes}"

        return parse_tree(
            tree,
            self.depth,
            self.draft_sample_method,
            self.min_path_probability,
            self.verification,
        )

    @property
    def _takes_longer_chains(self) -> bool:
        """Whether n-grams that are likely may be the draft, more than it would have.

        With one request at a time that pays; in batches so many rows do not. Whoever
        says how or how much is drafted has it so.
        """
        given = vars(self)
        defaults = dict(vars(DraftingFlags()))
        # That is of predictions, and goes with either.
        del defaults["num_predicted_tokens"]
        is_said = any(given[name] != value for name, value in defaults.items())
        return self.batch_size == 1 and not is_said

    def load(self, is_compared: bool = False):
        """The target and its draft; bad arguments are refused before the loading.

        Args:
          is_compared: Modes say what the draft is combined with.
        """
        # Read for their checks alone.
        _ = self.tree_config, self.sampling
        self._check_select()
        self._check_learn_control()
        whole_number("--max-new-tokens", self.max_new_tokens, least=1)
        whole_number("--batch-size", self.batch_size, least=1)
        if self.draft not in ("none", AUTO_DRAFT):
            check_draft(self.draft)
        mesh = sharding.make_mesh(self.mesh) if self.mesh else None
        sharding.check_batch(mesh, self.batch_size)
        target = load_target(self.target, as_precision(self.precision), mesh)
        if self.draft == AUTO_DRAFT:
            has_longer = self._takes_longer_chains and not is_compared
            return target, _fitting_draft(target, has_longer)

        draft = None if self.draft == "none" else load_draft(self.draft, target)

        return target, draft

    def _check_learn_control(self) -> None:
        """Refuses to teach where nothing can be taught.

        Raises:
          ConfigError: There are no policies, nothing is drafted, or it is no share.
        """
        if not as_share("--learn-control", self.learn_control):
            return
        if self.policies is None or self.draft == "none":
            asked = "--draft none" if self.policies else f"{self.controller!r}"
            raise ConfigError(
                f"--learn-control {self.learn_control} teaches the policies of "
                f"--controller ltd:DIR on, not {asked}; give such a controller and a "
                f"draft, or leave it out"
            )

    def _check_select(self) -> None:
        """Refuses a selection that means nothing.

        Raises:
          ConfigError: It has nothing to select from, or contradicts another flag.
        """
        if self.judge_every is not None:
            whole_number("--judge-every", self.judge_every, least=1)
        if self.select is None and self.judge_every is not None:
            raise ConfigError(
                f"--judge-every {self.judge_every} says how often --select judges, and "
                f"nothing is selected; give --select, or leave it out"
            )
        if self.select is None:
            return
        if not self.draft.startswith("pool:"):
            raise ConfigError(
                f"--select {self.select} chooses among the drafts of a pool, and "
                f"--draft is {self.draft!r}; use --draft pool:A+B"
            )
        if self.controller in ("fixed", JOINT, LOAD) or self._is_keyed:
            raise ConfigError(
                f"--select {self.select} contradicts --controller {self.controller}; "
                f"leave one of the two out"
            )
        if self.is_within_step:
            raise ConfigError(
                f"--select {self.select} chooses between steps, and --controller "
                f"{self.controller} within them, of one draft; leave one of the two out"
            )

        # Built for as many drafters of the same trees, to read its name and options.
        tree = self.tree_config
        trees = [tree.of_depth(depth) for depth in tree.depths] or [tree]
        number = max(1, self.draft.count("+"))
        actions = tuple(Action(one, i) for i in range(number + 1) for one in trees)
        build_selector(self.select, actions)

    def open(
        self,
        target,
        draft: LoadedDraft | None,
        learner=None,
        has_log_probs=False,
        learn_idle: int = 0,
        promote: Literal["automatic", "manual"] = "automatic",
    ) -> Session:
        """A session with these settings."""
        return Session(
            target,
            draft,
            learner=learner,
            tree=self.tree_config,
            batch_size=self.batch_size,
            stop=self.stop,
            has_log_probs=has_log_probs,
            ngrams=self.ngrams,
            num_predicted_tokens=self.num_predicted_tokens,
            controller=self.session_controller,
            judge_every=self.judge_every or JUDGE_EVERY,
            learn_control=self.learn_control,
            follow_clock=self.follow_clock,
            learn_idle=learn_idle,
            promote=promote,
        )


Config = TypeVar("Config")
"""What a configuration file gives."""

GROUPS = (ModelFlags, DraftingFlags, AnswerFlags)
"""Of the shared flags, as they are shown."""


def _grouped(
    model: ModelFlags = ModelFlags(),
    drafting: DraftingFlags = DraftingFlags(),
    answer: AnswerFlags = AnswerFlags(),
) -> Decoding:
    """Joins the groups, which help shows in a box each."""
    return Decoding(**vars(model), **vars(drafting), **vars(answer))


Shared = Annotated[Decoding, tyro.conf.arg(name="", constructor=_grouped)]


def _grouped_for_server(
    model: ModelFlags = ModelFlags(batch_size=8),
    drafting: DraftingFlags = DraftingFlags(),
) -> Decoding:
    """Likewise without what each request says for itself."""
    return Decoding(**vars(model), **vars(drafting))


Served = Annotated[Decoding, tyro.conf.arg(name="", constructor=_grouped_for_server)]
Given: Any = tyro.MISSING
"""In place of a default of `Shared`, whose flags have their own."""


def as_precision(name: str) -> Precision | None:
    return None if name == "auto" else name  # type: ignore[return-value]


def learner_config(name_or_file: str, **flags) -> LearnerConfig:
    """A learner by name or from a configuration file; flags that are given win.

    A rate that is given alone is for the optimizer of the file.

    Raises:
      ConfigError: There is no such learner or file, or the file gives something else,
        or the flags do not go together.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if name_or_file in LEARNER_NAMES:
        return LearnerConfig(name=name_or_file, **given)
    if not Path(name_or_file).is_file():
        raise ConfigError(
            f"unknown learner {name_or_file!r}: use {', '.join(LEARNER_NAMES)}, or a "
            f"Python file with get_config()"
        )

    config = run_config(name_or_file, LearnerConfig)
    if "optimizer" in given:
        # The file's suits the file's optimizer.
        given = {"learning_rate": None} | given
    # The two are alternatives: the flag's takes the place of the file's.
    if "update_interval" in given:
        given = {"update_every_prompts": None} | given

    return config.replace(**given)


def run_config(file: str, kind: type[Config]) -> Config:
    """What a file's `get_config` returns; the file is run, as any program is.

    Raises:
      ConfigError: It fails, ends the program, or gives something else.
    """
    try:
        get_config = runpy.run_path(file).get("get_config")
        config = get_config() if callable(get_config) else None
    except (Exception, SystemExit) as error:
        # Where in the file, which a line of text can say as well as a traceback.
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if frame.filename == file]
        line = getattr(error, "lineno", None) or (own[-1] if own else None)
        where = f"{file}, line {line}" if line else file
        raise ConfigError(
            f"{where}: {type(error).__name__}: {error}; the file must give a "
            f"get_config() -> {kind.__name__}"
        ) from error

    if not isinstance(config, kind):
        raise ConfigError(f"{file} has no get_config() -> {kind.__name__}")

    return config


def write_json(file: Path | None, rows: list, is_list: bool) -> None:
    if file is None:
        return

    text = json.dumps(rows if is_list else rows[0], indent=1, ensure_ascii=False)
    if str(file) == "-":
        print(text)
    else:
        write_text(file, text)


def write_text(file: Path, text: str) -> None:
    atomic.write_text(file, text + "\n")
