# SPDX-License-Identifier: Apache-2.0
"""Training a draft of any trained family on recorded outputs of its target."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ospec_jax.config import ConfigError, DraftConfig, TreeConfig, check_types
from ospec_jax.config.learner import check
from ospec_jax.decoding.step import shared_tables
from ospec_jax.distill.evaluate import (
    describe_score,
    evaluate_held_out,
    is_held_out,
    plot_history,
)
from ospec_jax.distill.vocabulary import coverage_by_domain, frequent_tokens
from ospec_jax.drafters.base import Drafter, Family
from ospec_jax.drafters.registry import (
    build_drafter,
    default_draft_config,
    find_family,
)
from ospec_jax.drafters.starts import start_warm
from ospec_jax.learners.base import Learner, LearnerInfo, LearnerState
from ospec_jax.learners.gradient import gradient
from ospec_jax.learners.losses import named_loss
from ospec_jax.learners.objective import build_objective
from ospec_jax.loading import LoadedDraft
from ospec_jax.models import finite
from ospec_jax.models.hub import Target
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.reports.progress import Interrupt, progress_bar, say
from ospec_jax.storage import checkpoint
from ospec_jax.types import Draft

_NUM_CONTEXT = 128


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How a draft is trained offline.

    Attributes:
      num_updates: Optimizer steps in all; the learning rate falls to zero over the
        last `decay_share` of them, so a run may be resumed with more.
      num_context: Pairs before each window that are attended to; None for all that the
        draft's `sliding_window` lets it see, or 128 without one.
      window: Pairs trained in a window.
      num_steps: Unrolled draft steps (training-time test), or Hydra's heads.
      loss: One of `learners.losses.LOSSES`, on tokens.
      feature_weight: Of the loss on predicted states, for families that predict them;
        None stands for the family's published one.
      domains: Learn from answers of these alone; empty for all. Held-out scores are of
        every domain that was recorded.
    """

    num_updates: int = 1200
    batch_size: int = 16
    num_context: int | None = None
    window: int = 64
    num_steps: int = 3
    loss: str = "forward_kl"
    feature_weight: float | None = None
    learning_rate: float = 1e-3
    warm_up: int = 20
    decay_share: float = 0.4
    holdout_share: float = 0.05
    save_every: int = 100
    evaluate_every: int = 100
    seed: int = 0
    domains: tuple[str, ...] = ()

    def __post_init__(self):
        check_types(self)
        counts = "batch_size window num_steps save_every evaluate_every"
        check(self, counts, lambda x: x >= 1, "1 or more")
        check(self, "num_updates num_context", lambda x: x >= 0, "0 or more")
        for name in ("learning_rate", "feature_weight"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value):
                raise ConfigError(f"{name} is {value}; use a finite number")

    def for_draft(self, draft: DraftConfig) -> "DistillConfig":
        """The settings with `num_context` decided.

        Raises:
          ConfigError: Training would show the draft less than it sees when it serves.
        """
        seen = draft.sliding_window
        if self.num_context is None:
            return dataclasses.replace(self, num_context=seen or _NUM_CONTEXT)
        if seen and self.num_context < seen - 1:
            raise ConfigError(
                f"num_context is {self.num_context}, but this draft sees {seen} tokens "
                f"(sliding_window); use {seen} or more, None for what it needs, or a "
                f"shorter window"
            )

        return self

    def learns_from(self, entry) -> bool:
        """Whether an answer of the store is in the training set."""
        is_wanted = not self.domains or entry.domain in self.domains
        return is_wanted and not is_held_out(entry.id, self.holdout_share)


def distill_learner(config: DistillConfig, drafter: Drafter, family: Family) -> Learner:
    """The learner that offline training runs.

    Args:
      config: From `for_draft`.
    """
    feature_weight = config.feature_weight
    if feature_weight is None:
        feature_weight = family.feature_weight

    decay_steps = max(1, int(config.num_updates * config.decay_share))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warm_up),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        ],
        [config.warm_up, config.num_updates - decay_steps],
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95)
    )
    assert config.num_context is not None, "it is decided"
    objective = build_objective(
        drafter.unroll,
        config.num_context,
        config.num_steps,
        named_loss(config.loss),
        unroll_features=drafter.unroll_outputs if drafter.has_features else None,
        feature_weight=feature_weight,
    )

    return gradient(objective, optimizer)


def _batches(store_folder: Path, config: DistillConfig, first: int) -> Iterator:
    """Endless batches; the order is a function of seed and position alone."""
    assert config.num_context is not None, "it is decided"
    epoch = 0
    position = 0
    while True:
        # Read again each epoch: collection may still be adding shards.
        store = FeedbackStore(store_folder)
        train = [i for i, e in enumerate(store.entries) if config.learns_from(e)]
        windows = store.windows(train, config.window)
        np.random.default_rng((config.seed, epoch)).shuffle(windows)
        num_batches = max(1, len(windows) // config.batch_size)
        for i in range(num_batches):
            if position >= first:
                chosen = windows[i * config.batch_size : (i + 1) * config.batch_size]
                chosen += windows[: config.batch_size - len(chosen)]
                yield store.segments(
                    chosen, config.num_context, config.window, config.num_steps
                )
            position += 1
        epoch += 1


def train(
    target: Target,
    store_folder: Path,
    out: Path,
    config: DistillConfig = DistillConfig(),
    draft_config: DraftConfig | None = None,
    initial: LoadedDraft | None = None,
    family: str | Family = "eagle3",
) -> list[dict]:
    """Trains, or goes on training, the draft in `out`; returns the history.

    Beside its checkpoints lies `training.png`.

    Args:
      initial: A trained draft to start from; it brings its own family, architecture
        and draft vocabulary.
      family: What to train, by its name or record.

    Raises:
      ConfigError: The family is not trained, or the recorded features are not those
        that it reads.
      Interrupted: By Ctrl-C or another signal, before the last update. All is saved,
        and the same call goes on.
    """
    store = FeedbackStore(store_folder)
    family = find_family(family)
    if initial is not None:
        family = initial.family
        draft_config = initial.meta.draft

    draft_config = draft_config or default_draft_config(
        target.config, family=family, num_steps=config.num_steps
    )
    config = config.for_draft(draft_config)
    _check_taps(family, draft_config, store)
    _check_domains(config, store)
    drafter = build_drafter(family, draft_config, TreeConfig(num_steps=1))
    learner = distill_learner(config, drafter, family)
    shared = shared_tables(target.params)
    if checkpoint.steps(out):

        def like(meta, draft):
            if meta.draft != draft_config:
                raise checkpoint.CheckpointError(
                    f"{out} holds a draft of another shape, {meta.draft}, not "
                    f"{draft_config}; choose another folder"
                )

            return jax.eval_shape(learner.init, draft.params)

        restored = checkpoint.load(out, target, learner_like=like, family=family)
        checkpoint.set_aside(out, restored.step)
        draft = restored.draft
        state = restored.learner
        card = restored.meta.card
    elif initial is not None:
        # Training donates what it starts from: the caller's draft stays whole.
        draft = jax.tree.map(jnp.copy, initial.draft)
        card = {"started_from": initial.meta.card}
        state = learner.init(draft.params)
    else:
        token_ids = None
        if draft_config.has_own_head:
            size = draft_config.draft_vocab_size
            token_ids = jnp.asarray(
                frequent_tokens(store, target.config.vocab_size, size)
            )
        params = jax.jit(drafter.init_params)(jax.random.key(config.seed))
        draft = Draft(start_warm(family, params, target, token_ids), token_ids)
        state = learner.init(draft.params)
        card = {}

    run = _Run(
        target, store_folder, out, config, family, draft_config, learner, draft, shared
    )

    return run.loop(state, card)


def score(
    target: Target, store_folder: Path, draft: LoadedDraft, config: DistillConfig
) -> dict[str, float]:
    """Held-out acceptance length by domain of any draft of a trained family."""
    meta = draft.meta
    assert meta.draft is not None, "drafts of trained families have parameters"
    config = config.for_draft(meta.draft)
    drafter = build_drafter(draft.family, meta.draft, TreeConfig(num_steps=1))
    return evaluate_held_out(
        distill_learner(config, drafter, draft.family),
        draft.draft.params,
        FeedbackStore(store_folder),
        config,
        shared_tables(target.params),
        draft.draft.token_ids,
    ).rounded


def _check_taps(family: Family, config: DraftConfig, store: FeedbackStore) -> None:
    """Some families read the final state instead, which is always recorded."""
    found = store.entries[0].arrays["taps"].shape[-1]
    needed = len(config.taps) * config.target_hidden_size
    if family.reads_taps and found != needed:
        raise ConfigError(
            f"the recorded features are {found} wide, but layers {config.taps} give "
            f"{needed}: they were recorded for another draft; record into a new folder"
        )

    # As wide may be those of other layers. Older recordings do not tell.
    known = {entry.taps for entry in store.entries if entry.taps is not None}
    others = known - {config.taps}
    if family.reads_taps and others:
        raise ConfigError(
            f"the recorded features are those of layers {others.pop()}, but the draft "
            f"reads {config.taps}: they were recorded for another draft; record into a "
            f"new folder"
        )


def _check_domains(config: DistillConfig, store: FeedbackStore) -> None:
    if not any(config.learns_from(entry) for entry in store.entries):
        found = sorted({entry.domain for entry in store.entries})
        raise ConfigError(
            f"no recorded answer of the domains {', '.join(config.domains)} is there "
            f"to learn from; there are {', '.join(map(repr, found))}"
        )


@dataclasses.dataclass(frozen=True)
class _Run:
    target: Target
    store_folder: Path
    out: Path
    config: DistillConfig
    family: Family
    draft_config: DraftConfig
    learner: Learner
    draft: Draft
    shared: object

    def loop(self, state: LearnerState, card: dict) -> list[dict]:
        config = self.config
        token_ids = self.draft.token_ids
        history = list(card.get("history", []))

        def update_and_check(state, *data):
            state, info = self.learner.update(state, *data)
            return state, info, finite.is_finite((state.params, state.opt_state))

        update = jax.jit(update_and_check, donate_argnums=0)
        step = int(state.num_updates)
        saved = step
        batches = _batches(self.store_folder, config, step)

        def save():
            with interrupt.held():
                self._save(state, step, card | {"history": history})

        with Interrupt() as interrupt, progress_bar() as bar:
            task = bar.add_task("distill", total=config.num_updates, completed=step)
            if step == 0 and "started_from" in card:
                history.append(self._score(state, step, None))
                say(describe_score(history[-1]))
            while step < config.num_updates and not interrupt:
                state, info, is_good = update(
                    state, next(batches), self.shared, token_ids
                )
                step += 1
                bar.update(task, completed=step, description=_describe(info))
                if not np.isfinite(info.loss) or not bool(is_good):
                    raise FloatingPointError(
                        f"at update {step} the loss is {info.loss}, and the draft is "
                        f"{'' if bool(is_good) else 'not '}finite behind it; the last "
                        f"checkpoint in {self.out} is kept: lower learning_rate, "
                        f"{self.config.learning_rate}"
                    )
                is_last = step == config.num_updates
                if step % config.evaluate_every == 0 or is_last:
                    history.append(self._score(state, step, info))
                    plot_history(history, self.out / "training.png")
                    say(describe_score(history[-1]))
                if step % config.save_every == 0 or is_last:
                    save()
                    saved = step
            if step > saved:
                save()

        if step < config.num_updates:
            interrupt.raise_if_set()

        return history

    def _score(self, state, step, info: LearnerInfo | None) -> dict:
        store = FeedbackStore(self.store_folder)
        score = evaluate_held_out(
            self.learner,
            state.params,
            store,
            self.config,
            self.shared,
            self.draft.token_ids,
        )
        return {
            "step": step,
            "train_loss": None if info is None else round(float(info.loss), 4),
            "held_out_loss": None if score.loss is None else round(score.loss, 4),
            "mean_acceptance_length": score.rounded,
            "num_answer_tokens": store.num_answer_tokens,
        }

    def _save(self, state, step, card: dict) -> None:
        store = FeedbackStore(self.store_folder)
        card = card | {
            "num_answers": len(store.entries),
            "num_answer_tokens": store.num_answer_tokens,
            "num_updates": step,
            "config": dataclasses.asdict(self.config),
        }
        if self.draft.token_ids is not None:
            ids = np.asarray(self.draft.token_ids)
            card["coverage"] = coverage_by_domain(store, ids)

        meta = checkpoint.Meta.create(
            self.target, self.draft_config, self.family.name, card=card
        )
        draft = Draft(state.params, self.draft.token_ids)
        checkpoint.save(self.out, step, meta, draft, learner=state)


def _describe(info: LearnerInfo) -> str:
    """Of the batch just learned from, all of the draft vocabulary considered."""
    assert info.agreement is not None, "training looks at all tokens"
    length = 1 + float(np.cumprod(info.agreement).sum())
    return f"loss {float(info.loss):.3f}, teacher-forced length {length:.2f}"
