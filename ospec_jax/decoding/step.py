# SPDX-License-Identifier: Apache-2.0
"""One step of speculative decoding: propose, score, verify, commit, feedback.

With a tree of depth 0 the same code is plain autoregressive decoding: the oracle of the
tests and the baseline of the benchmarks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax import sharding
from ospec_jax.config import (
    MAX_ALTERNATIVES,
    RECORDS_STATES,
    ConfigError,
    ModelConfig,
    Recording,
    StepKind,
    TreeConfig,
)
from ospec_jax.decoding import adjusting
from ospec_jax.decoding.judging import judge_all
from ospec_jax.decoding.verify import verify_chosen, verify_drawn
from ospec_jax.drafters import topology
from ospec_jax.drafters.base import Drafter, take_row
from ospec_jax.drafters.children import UNKNOWN, most_probable
from ospec_jax.drafters.deltas import no_rows, rows_of
from ospec_jax.drafters.prediction import (
    LONG_RUN,
    follow,
    init_prediction,
    prediction_hints,
    prediction_suggested,
)
from ospec_jax.drafters.sizing import (
    EvidenceFn,
    SizeFn,
    Verified,
    all_drafted,
    choose_size,
    first_nodes,
    run_one,
)
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.layers import Numerics
from ospec_jax.sampling import argmax, is_any_of, processed_probs, sample
from ospec_jax.types import (
    Backlog,
    DecodeState,
    Draft,
    DraftTree,
    Feedback,
    Pairs,
    Roots,
    SamplingParams,
    SharedTables,
    StepOutput,
    Unjudged,
    Verdict,
)
from ospec_jax.typing import Params, struct

# Beyond this float16 is infinite, and what is trained on infinities is not finite.
_FLOAT16_MAX = 65504.0


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What one compiled step is specialised to.

    Attributes:
      taps: Target layers whose inputs the draft reads.
      stop_ids: Tokens that end a request.
      kind: `greedy` where all rows are, `sampled` where rows follow their
        `SamplingParams`, `full` where they follow their `Extras`, too.
      has_log_probs: Report the emitted tokens' log-probabilities; `full` always does.
      mesh: Devices that the state is split over; see `sharding`.
      judged: Report how every member of a pool would have been accepted, if it had
        drafted such a tree; None reports nothing.
      num_unjudged: Emitted tokens of a row that may wait to be judged together; with 0
        each step judges its own.
      num_behind: Emitted tokens of a row that the draft may be behind by, while plain
        steps rest; with 0 it runs over them in every step.
      is_resting: Of a plain step: put its tokens behind those that the draft is behind
        by.
      size_fn: How many nodes are verified, of a tree that has `sizes`; see
        `drafters.sizing`.
      evidence_fn: What steered steps report of such a tree; None for nothing.
      delta_rank: Of the differences that the draft has by row; 0 for none.
      reads_prompts: Report what the target makes of each prompt.
    """

    model: ModelConfig
    numerics: Numerics
    tree: TreeConfig
    taps: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    kind: StepKind = "greedy"
    has_log_probs: bool = False
    mesh: sharding.AnyMesh | None = None
    judged: TreeConfig | None = None
    num_unjudged: int = 0
    num_behind: int = 0
    is_resting: bool = False
    size_fn: SizeFn = all_drafted
    evidence_fn: EvidenceFn | None = None
    delta_rank: int = 0
    reads_prompts: bool = False

    def __post_init__(self):
        window = self.model.attention_window
        if 0 < window <= self.tree.num_steps:
            raise ConfigError(
                f"this target's tokens see {window} of those before them, fewer than "
                f"the {self.tree.num_steps} that are drafted one after the other; "
                f"draft {window - 1} at most"
            )

    @property
    def max_emitted(self) -> int:
        """Tokens that one step can emit."""
        return self.tree.num_steps + 1

    @property
    def is_full(self) -> bool:
        """Whether rows follow their `Extras`."""
        return self.kind == "full"

    @property
    def reports_log_probs(self) -> bool:
        """Whether log-probabilities come with the tokens."""
        return self.has_log_probs or self.is_full


def position_keys(request_key: Any, position: Any) -> Any:
    """Keys `[2]` of a position: the draft's, and that of the token that comes there."""
    return jax.random.split(jax.random.fold_in(request_key, position))


def shared_tables(target_params: Params) -> SharedTables:
    """The target's embedding and head, which drafts read and never change."""
    return SharedTables(
        embedding=llama.embedding_table(target_params),
        head=llama.head_table(target_params),
    )


def _with_rows(draft: Any, state: DecodeState) -> Any:
    """The draft with the differences of the rows, in place of those of all scopes."""
    if state.deltas is None:
        return draft

    return draft.replace(deltas=state.deltas)


def build_target(config: StepConfig) -> Callable:
    """Builds the target's pass; what it hands on is split by rows alone."""
    run = llama.build(config.model, config.numerics, config.taps)
    return sharding.pinned(run, config.mesh, *[sharding.row_shardings] * 3)


def build_step(config: StepConfig, drafter: Drafter | None) -> Callable:
    """Builds `(target_params, draft, state) -> (state, StepOutput)`, to be jitted.

    It takes a further argument, or none: `steering`, what rules for how much to draft
    are told from outside.

    Args:
      drafter: None decodes plainly; its tree must have depth 0 then.
    """
    target = build_target(config)

    def speculative_step(
        target_params: Params,
        draft: Draft | None,
        state: DecodeState,
        steering: Any = None,
    ) -> tuple[DecodeState, StepOutput]:
        shared = shared_tables(target_params)
        draft = _with_rows(draft, state)
        # A row's randomness is a function of its request and its position alone, so its
        # neighbours cannot change what is drawn. A finished row stays at its position
        # and repeats its numbers, but emits nothing with them.
        keys = jax.vmap(position_keys)(state.request_keys, state.lengths)
        key_draft, key_verify = jnp.unstack(keys, axis=1)

        # The cache holds verified tokens only: the root is not among them yet.
        if drafter is not None and drafter.reads_target:
            shared = shared.replace(params=target_params, cache=state.cache)

        # Propose, score, verify, commit. The order is that of the data: what the target
        # says is never known to the drafter of the same step.
        tree, state = propose_tree(
            config, drafter, draft, shared, state, key_draft, steering
        )
        if config.is_full:
            tree = _without_drafts(tree, state)
        tree, scored = _score_tree(config, target, target_params, tree, state, steering)
        verdict = _verify(config, tree, scored, key_verify)
        # A finished row's cache is rewritten behind its length, where nobody reads it.
        kept = _keep_accepted(config, scored.cache, state, verdict)
        state = state.replace(cache=kept)
        emitted = emit(config, tree, verdict, state)
        evidence = _evidence_of(config, tree, scored, emitted, state, steering)

        # From here on values lie along the accepted path, `[b, m, ...]`; entries beyond
        # the accepted ones repeat the last node, and `num_valid` cuts them off. The
        # i-th accepted node and the token emitted after it are a pair; the last of them
        # is the accepted leaf with the recovered or bonus token.
        taps = _gather(scored.taps, verdict.path)
        inputs = _gather(tree.tokens, verdict.path)
        pairs = Pairs(inputs, emitted.tokens, taps, state.lengths, emitted.num)
        state = _record_path(config, tree, scored, verdict, pairs, state)
        side = None if drafter is None else _DraftSide(drafter, draft, shared)
        state, judged = _hand_on(config, side, state, scored, verdict, pairs)
        log_probs = _log_probs_on(config, scored, verdict, emitted)
        alternatives, state = _report_fully(config, scored, verdict, emitted, state)

        # Finished rows ran along, because the shape is fixed: they count for nothing.
        was_active = ~state.is_finished
        output = StepOutput(
            tokens=emitted.tokens,
            num_emitted=emitted.num,
            num_accepted=jnp.minimum(verdict.num_accepted, emitted.num),
            num_drafted=jnp.where(was_active, jnp.sum(tree.is_valid, axis=1) - 1, 0),
            is_finished=emitted.is_finished,
            log_probs=log_probs,
            judged=judged,
            alternatives=alternatives,
            evidence=evidence,
            sources=_sources_on(tree, verdict),
        )
        state = moved_on(state, emitted, was_active)

        # A draft that is behind knows nothing of the newest tokens.
        return _look_ahead(None if config.is_resting else drafter, draft, state, output)

    return speculative_step


class _DraftSide(NamedTuple):
    """What a step runs the draft with.

    Attributes:
      draft: With the rows' differences.
      shared: What it reads of the target.
    """

    drafter: Drafter
    draft: Draft | None
    shared: SharedTables


class _Emitted(NamedTuple):
    """What a step adds to the answers.

    Attributes:
      tokens: `[b, m]`, of which the first `num`, `[b]`, count.
      is_finished: `[b]` behind them.
    """

    tokens: Any
    num: Any
    is_finished: Any


def _gather(values, path):
    """Values of nodes, `[b, n, ...]`, along each row's path, `[b, m, ...]`."""
    return jax.vmap(lambda values, path: values[path])(values, path)


def _evidence_of(config, tree: DraftTree, scored, emitted: _Emitted, state, steering):
    """What steered steps report of a tree that was verified in part; None of others."""
    if scored.size is None or steering is None or not config.evidence_fn:
        return None

    return config.evidence_fn(
        Verified(
            tree,
            config.tree,
            scored.size,
            emitted.tokens,
            emitted.num,
            state.lengths,
        )
    )


def _record_path(
    config, tree: DraftTree, scored, verdict: Verdict, pairs: Pairs, state: DecodeState
) -> DecodeState:
    """Records what a learner reads of the accepted path, if any learns."""
    if state.feedback is None:
        return state

    if _has_features(state):
        recorded = Feedback(
            tokens=pairs.inputs,
            taps=pairs.taps,
            hidden=_gather(scored.hidden, verdict.path),
            logsumexp=_gather(scored.logsumexp, verdict.path),
        )
    # Only the draft's own states are recorded: they come with the tree, not with the
    # target's pass.
    else:
        recorded = _drafting_states(tree, verdict, pairs.inputs, state.feedback)

    is_batched = config.numerics.has_batched_writes
    feedback = record(state.feedback, recorded, state.lengths, is_batched)

    return state.replace(feedback=feedback)


def _hand_on(
    config, side: _DraftSide | None, state: DecodeState, scored, verdict, pairs: Pairs
) -> tuple[DecodeState, Any]:
    """Runs the draft over what was emitted, or puts it off.

    Returns:
      The state, and what each member of a pool would have drafted, if it is judged now.
    """
    is_batched = config.numerics.has_batched_writes
    if config.is_resting:
        assert state.backlog is not None
        backlog = _put_off(state.backlog, pairs, is_batched)
        return state.replace(backlog=backlog), None

    if side is None:
        return state, None

    if state.unjudged is not None:
        on_way = _gather(scored.hidden, verdict.path)
        unjudged = _wait(state.unjudged, pairs, on_way, is_batched)
        state = state.replace(unjudged=unjudged)

    on_path = None
    if scored.probs is not None:
        on_path = _gather(scored.probs, verdict.path)
    draft_cache, context, judged = _catch_up(
        config, side, state, pairs, on_path, scored.number
    )

    return _extended(side.drafter, state, draft_cache, context), judged


def _log_probs_on(config, scored, verdict: Verdict, emitted: _Emitted):
    """Log-probabilities of the emitted tokens, `[b, m]`; None where nobody asks."""
    if not config.reports_log_probs:
        return None

    chosen = jax.vmap(lambda row, path, token: row[path, token])
    of_node = scored.logits - scored.logsumexp[..., None]
    return chosen(of_node, verdict.path, emitted.tokens)


def _report_fully(config, scored, verdict: Verdict, emitted: _Emitted, state):
    """What `full` steps report beside the tokens, and the state that counted these."""
    if not config.is_full:
        return None, state

    assert state.extras is not None
    alternatives = _alternatives(
        config,
        _gather(scored.logits, verdict.path),
        _gather(scored.logsumexp, verdict.path),
    )
    extras = adjusting.count_emitted(state.extras, emitted.tokens, emitted.num)

    return alternatives, state.replace(extras=extras)


def moved_on(state: DecodeState, emitted: _Emitted, was_active) -> DecodeState:
    """The state behind the emitted tokens."""
    # The newest token is emitted but not cached: it is the next step's root.
    newest = take_row(emitted.tokens, jnp.maximum(emitted.num - 1, 0))
    return state.replace(
        lengths=state.lengths + emitted.num,
        last_token=jnp.where(was_active, newest, state.last_token),
        num_remaining=state.num_remaining - emitted.num,
        is_finished=emitted.is_finished,
    )


def _catch_up(config, side: _DraftSide, state, pairs: Pairs, probs, number=None):
    """Runs the draft over the emitted tokens; what each member would have drafted.

    Args:
      probs: `[b, m, v]` that the tokens were drawn from; None for greedy ones.
      number: Of the size that was verified, where it was chosen.
    """
    drafter, draft, shared = side
    if config.judged is None or config.num_unjudged:
        if number is None:
            return *drafter.extend(draft, shared, state.draft_cache, pairs), None

        return *_extend_first(config, side, state, pairs, number), None

    assert drafter.retrace is not None
    cache, context, found = drafter.retrace(
        draft,
        shared,
        state.draft_cache,
        state.draft_context,
        pairs,
        prediction_suggested(state.prediction, pairs.tokens),
    )
    judged = judge_all(
        found,
        config.judged,
        pairs.tokens,
        probs,
        state.sampling,
        config.numerics,
    )

    return cache, context, judged


def _wait(unjudged: Unjudged, pairs: Pairs, hidden, is_batched: bool) -> Unjudged:
    """Puts newly emitted tokens behind those that wait to be judged."""
    hidden = kv.write_rows(
        unjudged.hidden, hidden, unjudged.count, is_batched=is_batched
    )
    num_valid = jnp.where(unjudged.is_judged, pairs.num_valid, 0)
    pairs = pairs.replace(num_valid=num_valid)
    return _put_off(unjudged.replace(hidden=hidden), pairs, is_batched)


def _put_off(waiting: Any, pairs: Pairs, is_batched: bool) -> Any:
    """Puts new pairs behind those that wait, of an `Unjudged` or a `Backlog`."""
    write = lambda old, new: kv.write_rows(
        old, new, waiting.count, is_batched=is_batched
    )
    column = lambda old, new: write(old[..., None], new[..., None])[..., 0]

    return waiting.replace(
        inputs=column(waiting.inputs, pairs.inputs),
        tokens=column(waiting.tokens, pairs.tokens),
        taps=write(waiting.taps, pairs.taps),
        count=waiting.count + pairs.num_valid,
    )


def build_catching_up(config: StepConfig, drafter: Drafter) -> Callable:
    """Builds `(target_params, draft, state) -> (state, None)`, to be jitted.

    The draft runs over all tokens that it is behind by, as one chunk.
    """

    def catch_up(
        target_params: Params, draft: Draft, state: DecodeState
    ) -> tuple[DecodeState, None]:
        backlog = state.backlog
        assert backlog is not None
        shared = shared_tables(target_params)
        draft = _with_rows(draft, state)
        if drafter.reads_target:
            shared = shared.replace(params=target_params, cache=state.cache)

        starts = state.lengths - backlog.count
        pairs = Pairs(
            backlog.inputs, backlog.tokens, backlog.taps, starts, backlog.count
        )
        cache, context = drafter.extend(draft, shared, state.draft_cache, pairs)
        context = _where_any(backlog.count, context, state.draft_context)
        state = _extended(drafter, state, cache, context)
        backlog = backlog.replace(count=jnp.zeros_like(backlog.count))

        return state.replace(backlog=backlog), None

    return catch_up


def _where_any(counts, new, old):
    """A row of which nothing waits stands where it stood."""
    pick = lambda new, old: jnp.where(
        (counts > 0).reshape(-1, *[1] * (new.ndim - 1)), new, old
    )
    return jax.tree.map(pick, new, old)


def build_judging(config: StepConfig, drafter: Drafter) -> Callable:
    """Builds `(target_params, draft, state) -> (state, judged)`, to be jitted.

    All members of the pool run over the emitted tokens that wait, and are judged by
    them; `judged` has `Judged` of each, `[b, w, k]`. Whoever did not propose meanwhile
    is up to date again.
    """
    judged_tree = config.judged
    assert judged_tree is not None
    assert drafter.retrace is not None

    def judge_waiting(
        target_params: Params, draft: Draft, state: DecodeState
    ) -> tuple[DecodeState, Any]:
        waiting = state.unjudged
        assert waiting is not None
        assert drafter.retrace is not None
        starts = state.lengths - waiting.count
        pairs = Pairs(
            waiting.inputs, waiting.tokens, waiting.taps, starts, waiting.count
        )
        cache, context, found = drafter.retrace(
            draft,
            shared_tables(target_params),
            state.draft_cache,
            waiting.context,
            pairs,
            prediction_suggested(waiting.prediction, pairs.tokens),
        )
        context = _where_any(waiting.count, context, state.draft_context)
        probs = _probs_of_waiting(config, target_params, state)
        judged = judge_all(
            found,
            judged_tree,
            pairs.tokens,
            probs,
            state.sampling,
            config.numerics,
        )
        waiting = waiting.replace(
            count=jnp.zeros_like(waiting.count),
            context=context,
            prediction=state.prediction,
        )
        state = state.replace(
            draft_cache=cache, draft_context=context, unjudged=waiting
        )

        return state, judged

    return judge_waiting


def _probs_of_waiting(config, target_params, state: DecodeState):
    """What the tokens that wait were drawn from, `[b, w, v]`; None of greedy ones."""
    if config.kind == "greedy":
        return None

    waiting = state.unjudged
    assert waiting is not None
    logits = llama.target_logits(target_params, waiting.hidden, config.numerics)
    counts = None
    if config.is_full:
        assert state.extras is not None
        counts = adjusting.count_between(state.extras, waiting.tokens, waiting.count)

    return _target_probs(config, logits, state, counts)


def _extended(drafter: Drafter, state: DecodeState, draft_cache, context):
    """The state behind the newest tokens; logits only if they cannot be had later."""
    # Shapes of the state are fixed, so the old logits stay as a placeholder.
    if drafter.predict is not None:
        assert state.draft_context is not None
        context = context.replace(logits=state.draft_context.logits)

    return state.replace(draft_cache=draft_cache, draft_context=context)


def _look_ahead(drafter, draft, state: DecodeState, output: StepOutput):
    """Holds the prediction against what was emitted; is a longer chain worth it?"""
    votes = []
    if drafter is not None and drafter.is_sure is not None:
        votes.append(drafter.is_sure(draft, state.draft_cache, state.lengths))

    if state.prediction is not None:
        prediction = follow(state.prediction, output.tokens, output.num_emitted)
        state = state.replace(prediction=prediction)
        votes.append(prediction.run >= LONG_RUN)

    # One voice is enough: a wrong guess costs a longer pass, never a wrong token.
    votes = [vote for vote in votes if vote is not None]
    is_sure = functools.reduce(jnp.logical_or, votes) if votes else None

    return state, output.replace(is_sure=is_sure)


def propose_tree(
    config: StepConfig,
    drafter: Drafter | None,
    draft: Draft | None,
    shared: SharedTables,
    state: DecodeState,
    keys: Any,
    steering: Any = None,
) -> tuple[DraftTree, DecodeState]:
    """The tree to verify; the root alone when nothing is drafted.

    Args:
      shared: With the target's parameters and cache for drafters that read them.
      keys: `[b]` what drawn children are drawn with.
      steering: What depth rules are told from outside, or None.

    Returns:
      The tree, and the state with what was written to the draft's scratch slots.
    """
    root = state.last_token
    if drafter is None or config.tree.num_steps == 0:
        one = lambda value: jnp.full((root.shape[0], 1), value)
        tree = DraftTree(
            tokens=root[:, None],
            parents=one(np.int32(topology.NO_PARENT)),
            depths=one(np.int32(0)),
            is_valid=one(True),
            log_probs=one(0.0),
            ancestor_mask=one(True)[:, :, None],
            is_chain=True,
        )
        return tree, state

    # The logits of the root's children were put off until now, since a plain step does
    # not need them.
    context = state.draft_context
    if drafter.predict is not None:
        context = context.replace(logits=drafter.predict(draft, shared, context.hidden))

    roots = Roots(
        root,
        state.lengths,
        keys,
        context,
        state.sampling,
        is_active=~state.is_finished,
        steering=steering,
        has_choices=_has_choices(state.feedback),
    )
    hints = prediction_hints(state.prediction)
    tree, draft_cache = drafter.propose(draft, shared, state.draft_cache, roots, hints)

    return tree, state.replace(draft_cache=draft_cache)


@struct
class Scored:
    """What the target says of a tree's nodes.

    Attributes:
      hidden: `[b, n, d]` final normed states.
      taps: `[b, n, f]`.
      cache: With the nodes' entries.
      chosen: `[b, n]` the target's token after each node, the most probable one or a
        drawn one; None where a rule of acceptance draws.
      probs: `[b, n, v]` what tokens are drawn from, where a rule or a judge reads it.
      logsumexp: `[b, n]`, where somebody records or reports it.
      logits: `[b, n, v]`, where somebody reports them.
      number: `[]` of the size that was scored, of a tree that has several.
      size: `[]` that size: nodes beside the root.
    """

    hidden: Any
    taps: Any
    cache: kv.KVCache
    chosen: Any = None
    probs: Any = None
    logsumexp: Any = None
    logits: Any = None
    number: Any = None
    size: Any = None


def _has_features(state: DecodeState) -> bool:
    """Whether the target's states are recorded."""
    return state.feedback is not None and state.feedback.taps is not None


def _has_choices(feedback: Feedback | None) -> bool:
    """Whether it is recorded what the draft took for most probable."""
    return feedback is not None and feedback.choices is not None


def _score_tree(
    config: StepConfig, target, target_params, tree: DraftTree, state, steering
) -> tuple[DraftTree, Scored]:
    """Scores all nodes, or as many as a rule says: the others are then not valid."""
    if not config.tree.sizes:
        return tree, score_nodes(config, target, target_params, tree, state)

    number = _size_of(config, tree, state, steering)
    scored = _score_first(config, target, target_params, tree, state, number)
    size = jnp.asarray(config.tree.sizes, jnp.int32)[number]
    is_verified = jnp.arange(tree.tokens.shape[1]) <= size
    tree = tree.replace(is_valid=tree.is_valid & is_verified)

    return tree, scored.replace(number=number, size=size)


def score_nodes(
    config: StepConfig, target, target_params, tree: DraftTree, state: DecodeState
) -> Scored:
    """The target's one pass over all nodes, and its word on what follows each."""
    hidden, taps, cache = _run_target(target, target_params, tree, state)
    logits = llama.target_logits(target_params, hidden, config.numerics)
    scored = Scored(hidden, taps, cache)
    if config.kind == "greedy":
        # One native pass over the vocabulary is four times as fast as XLA's two.
        _, best = most_probable(logits, 1, config.numerics)
        scored = scored.replace(chosen=best[..., 0])
    else:
        counts = _counts_at(config, tree, state)
        probs = _target_probs(config, logits, state, counts)
        # Suggestions alone make chains of `topk` children whatever the tree's own are.
        is_drawn = tree.children != "topk"
        judges_now = config.judged is not None and not config.num_unjudged
        if not is_drawn:
            scored = scored.replace(chosen=_draw_at(tree, probs, state))
        if is_drawn or judges_now:
            scored = scored.replace(probs=probs)

    if config.reports_log_probs or _has_features(state):
        scored = scored.replace(logsumexp=jax.nn.logsumexp(logits, axis=-1))
    if config.reports_log_probs:
        scored = scored.replace(logits=logits)

    return scored


def _draw_at(tree: DraftTree, probs, state: DecodeState):
    """The target's own draw after each node, `[b, n]`.

    A position's numbers are the request's, whichever node stands there and whichever
    step finds it. So what a request is answered does not depend on what was drafted.
    """
    positions = state.lengths[:, None] + tree.depths
    at_all = jax.vmap(position_keys, in_axes=(None, 0))
    keys = jax.vmap(at_all)(state.request_keys, positions)
    _, keys = jnp.unstack(keys, axis=2)
    b, n, v = probs.shape

    return sample(keys.reshape(b * n), probs.reshape(b * n, v)).reshape(b, n)


def _size_of(config: StepConfig, tree: DraftTree, state: DecodeState, steering):
    """How many of a tree's nodes are verified, by number into its sizes."""
    number = choose_size(
        config.size_fn,
        tree,
        config.tree,
        state.lengths,
        ~state.is_finished,
        steering,
    )
    return number.astype(jnp.int32)


def _score_first(
    config: StepConfig,
    target,
    target_params,
    tree: DraftTree,
    state: DecodeState,
    number,
) -> Scored:
    """The target's pass over as many of the nodes as a rule says.

    Each number of nodes is a program of its own within the step. A row has the same
    bits in all of them (`models.layers`), so the choice changes no token. What stands
    in the place of other nodes is not to be read.
    """
    num_nodes = tree.tokens.shape[1]

    def score(count: int, cache: kv.KVCache) -> tuple[kv.KVCache, Scored]:
        part = first_nodes(tree, count)
        found = state.replace(cache=cache)
        scored = score_nodes(config, target, target_params, part, found)
        missing = (0, num_nodes - count)
        pad = lambda x: jnp.pad(x, ((0, 0), missing, *[(0, 0)] * (x.ndim - 2)))
        return scored.cache, jax.tree.map(pad, scored.replace(cache=None))

    passes = [functools.partial(score, size + 1) for size in config.tree.sizes]
    cache, scored = run_one(number, passes, state.cache)

    return scored.replace(cache=cache)


def _extend_first(
    config: StepConfig, side: _DraftSide, state: DecodeState, pairs: Pairs, number
):
    """Runs the draft over the first pairs alone: of fewer nodes fewer are emitted."""
    drafter, draft, shared = side

    def extend(count: int, cache):
        first = pairs.replace(
            inputs=pairs.inputs[:, :count],
            tokens=pairs.tokens[:, :count],
            taps=pairs.taps[:, :count],
        )
        return drafter.extend(draft, shared, cache, first)

    # One token a depth at most, and the one that follows.
    counts = [min(size, config.tree.num_steps) + 1 for size in config.tree.sizes]
    menu = sorted(set(counts))
    number = jnp.asarray([menu.index(count) for count in counts], jnp.int32)[number]
    passes = [functools.partial(extend, count) for count in menu]

    return run_one(number, passes, state.draft_cache)


def _run_target(target, target_params, tree: DraftTree, state: DecodeState):
    """The target's pass over a tree."""
    # The root's position is the number of committed tokens; siblings share a position
    # and differ in what they attend to.
    positions = state.lengths[:, None] + tree.depths
    capacity = state.cache.capacity
    # A chain's nodes see one another in order, so the cheaper causal bias serves.
    if tree.is_chain:
        bias = kv.causal_bias(state.lengths, tree.tokens.shape[1], capacity)
    else:
        bias = kv.tree_bias(state.lengths, tree.ancestor_mask, capacity)

    return target(
        target_params,
        tree.tokens,
        positions,
        bias,
        state.cache,
        state.lengths,
    )


def _without_drafts(tree: DraftTree, state: DecodeState) -> DraftTree:
    """The root alone in rows for which nothing is drafted."""
    # Which rows these are follows from nothing that was drawn, so no law changes.
    assert state.extras is not None
    can_speculate = state.extras.can_speculate[:, None]
    return tree.replace(is_valid=tree.is_valid & (can_speculate | (tree.depths == 0)))


def _counts_at(config, tree: DraftTree, state: DecodeState):
    """How often the answers have each token at each node; None where nobody asks."""
    if not config.is_full:
        return None

    assert state.extras is not None
    return adjusting.count_on_paths(state.extras, tree)


def _alternatives(config, logits, logsumexp):
    """Ids and log-probabilities of the most probable tokens, each `[b, m, a]`.

    The emitted token's own log-probability is made of the same sum, `[b, m]`: where it
    is one of these, both are the same number.
    """
    count = min(MAX_ALTERNATIVES, logits.shape[-1])
    _, ids = most_probable(logits, count, config.numerics)
    values = jnp.take_along_axis(logits, ids, axis=-1)
    return ids, values - logsumexp[..., None]


def _target_probs(config, logits, state, counts=None):
    """What the target's tokens are drawn from after each node, `[b, n, v]`.

    Args:
      counts: For `full` passes, `[b, n, v]`; see `adjusting.adjust`.
    """
    # Every node of a row is processed by its row's temperature, top-k and top-p: `[b *
    # n]` parameters for `[b * n, v]` logits.
    b, n, v = logits.shape
    sampling = state.sampling
    if counts is not None:
        logits = adjusting.adjust(logits, state.extras, counts)
        sampling = sampling.replace(min_p=state.extras.min_p)

    params = jax.tree.map(lambda x: jnp.repeat(x, n), sampling)
    probs = processed_probs(
        logits.reshape(b * n, v), params, config.numerics.is_row_invariant
    )
    return probs.reshape(b, n, v)


def _verify(config, tree, scored: Scored, keys) -> Verdict:
    if scored.chosen is not None:
        return verify_chosen(tree, scored.chosen)

    return verify_drawn(keys, tree, scored.probs, config.tree.verification)


def _keep_accepted(config, cache, state, verdict: Verdict) -> kv.KVCache:
    """In a chain the accepted entries lie in place already."""
    if config.tree.is_chain:
        return cache

    # Node i lies in slot `lengths + i`. The accepted ones are scattered, and must be
    # moved up before the next step writes its own nodes there.

    is_batched = config.numerics.has_batched_writes
    return kv.keep_path(cache, state.lengths, verdict.path, is_batched)


def emit(
    config: StepConfig, tree: DraftTree, verdict: Verdict, state: DecodeState
) -> _Emitted:
    """Accepted tokens and the next one, cut at stop tokens and at the limit."""
    # `[b, m]`: accepted tokens, then the next one up to the end. Node 0 is the root,
    # which was emitted by the step before.
    depth = jnp.arange(config.max_emitted)
    accepted = jnp.take_along_axis(tree.tokens, verdict.path, axis=1)
    accepted = jnp.pad(accepted[:, 1:], ((0, 0), (0, 1)))
    is_accepted = depth < verdict.num_accepted[:, None]
    emitted = jnp.where(is_accepted, accepted, verdict.next_token[:, None])

    # A stop token counts only where it is emitted: entries behind the next token are
    # its copies.
    is_stop = is_any_of(emitted, config.stop_ids)
    is_stop &= depth <= verdict.num_accepted[:, None]
    until_stop = jnp.where(
        jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1) + 1, config.max_emitted
    )
    # Cut first at the stop token, then at the limit: a stop token beyond the limit is
    # not emitted, and then the answer ended by length.
    num_emitted = jnp.minimum(verdict.num_accepted + 1, until_stop)
    has_stopped = jnp.any(is_stop, axis=1) & (until_stop <= state.num_remaining)
    num_emitted = jnp.minimum(num_emitted, state.num_remaining)
    num_emitted = jnp.where(state.is_finished, 0, num_emitted).astype(jnp.int32)
    is_spent = state.num_remaining - num_emitted <= 0

    is_finished = state.is_finished | has_stopped | is_spent

    return _Emitted(emitted, num_emitted, is_finished)


def _sources_on(tree: DraftTree, verdict: Verdict) -> Any:
    """Who proposed each token of the accepted path, `[b, k]`; None as in the tree."""
    if tree.sources is None:
        return None

    # The root was emitted before. All nodes of a path are within the tree.
    drafted = verdict.path[:, 1:]
    mode = "promise_in_bounds"
    return jnp.take_along_axis(tree.sources, drafted, axis=1, mode=mode)


def _drafting_states(tree: DraftTree, verdict, inputs, feedback) -> Feedback:
    """The draft's states on the accepted path."""
    rows, length = inputs.shape
    choices = None
    # A step that drafted nothing has no states. Its tokens are recorded all the same.
    if tree.states is None:
        if _has_choices(feedback):
            choices = jnp.full((rows, length), UNKNOWN, jnp.int32)
        width = feedback.states.shape[-1]
        return Feedback(
            tokens=inputs,
            states=jnp.zeros((rows, length, width)),
            has_state=jnp.zeros((rows, length), bool),
            choices=choices,
        )

    # Behind the accepted nodes the path repeats its last one, whose state would be
    # booked under the positions of tokens that are yet to come.
    is_on_path = jnp.arange(length) <= verdict.num_accepted[:, None]
    if _has_choices(feedback):
        choices = _gather(tree.choices, verdict.path)

    return Feedback(
        tokens=inputs,
        states=_gather(tree.states, verdict.path),
        has_state=_gather(tree.has_state, verdict.path) & is_on_path,
        choices=choices,
    )


def narrow(features):
    """Features of any shape as they are recorded, in float16."""
    return jnp.clip(features, -_FLOAT16_MAX, _FLOAT16_MAX).astype(jnp.float16)


def record(
    feedback: Feedback, scored: Feedback, starts, is_batched: bool = False
) -> Feedback:
    """Writes verified tokens into the slots of their positions.

    Args:
      feedback: `[b, s, ...]` in each field.
      scored: `[b, m, ...]` of consecutive tokens.
      starts: `[b]` position of the first of them.
    """
    # Features are narrowed; ids, flags and the logsumexp have no feature axis, and keep
    # their type.
    write = lambda old, new: kv.write_rows(old, new, starts, is_batched=is_batched)
    wide = lambda old, new: write(old, narrow(new))
    column = lambda old, new: write(old[..., None], new[..., None])[..., 0]
    columns = ("tokens", "logsumexp", "has_state", "choices")
    return feedback.replace(
        **{
            name: (column if name in columns else wide)(getattr(feedback, name), new)
            for name, new in vars(scored).items()
            if new is not None
        }
    )


def _sum_prompt(hidden, num_valid, state: DecodeState) -> DecodeState:
    """Adds a chunk's final states to those of the prompt, if anybody reads them."""
    if state.prompt_states is None:
        return state

    # What stands behind the prompt's end is junk.
    is_real = (jnp.arange(hidden.shape[1]) < num_valid)[:, None]
    summed = jnp.sum(jnp.where(is_real, hidden, 0.0), axis=1)
    return state.replace(prompt_states=state.prompt_states + summed)


def build_prefill(config: StepConfig, drafter: Drafter | None) -> Callable:
    """Builds the pass over one chunk of one prompt.

    The function maps `(target_params, draft, state, tokens [1, t], following [1],
    num_valid [1], num_ahead, scopes [1])` to `(state, StepOutput)`. `following` is the
    first token of the next chunk, and `num_ahead` how many come in it and later ones;
    the last chunk, with 0, emits the first token of the answer instead. `scopes` is the
    request's, by default nobody's.
    """
    target = build_target(config)

    def prefill(
        target_params,
        draft,
        state,
        tokens,
        following,
        num_valid,
        num_ahead,
        scopes=None,
    ):
        is_last = num_ahead == 0
        shared = shared_tables(target_params)
        if state.deltas is not None and scopes is not None:
            state = state.replace(deltas=rows_of(draft.deltas, scopes))
        draft = _with_rows(draft, state)
        starts = state.lengths
        hidden, taps, cache = _run_chunk(
            target, target_params, tokens, num_valid, state
        )

        # Logits of one token: of the others nobody reads any, and the head is large.
        last_hidden = take_row(hidden, num_valid - 1)
        logits = llama.target_logits(
            target_params, last_hidden[:, None], config.numerics
        )
        # Chunks before the last choose a token, too, which nobody uses: one program
        # serves them all.
        first = _first_token(config, logits[:, 0], state, starts + num_valid - 1)
        following = jnp.where(is_last, first, following)

        state = state.replace(cache=cache)
        is_end = jnp.arange(tokens.shape[1]) == num_valid - 1
        logsumexp = jax.nn.logsumexp(logits[:, 0], axis=-1)
        scored = Scored(hidden, taps, cache, logsumexp=logsumexp)
        state = _record_chunk(config, tokens, scored, is_end, is_last, state)

        # Padding is paired with junk, but `num_valid` says how far the pairs are real.
        if drafter is not None:
            successors = jnp.where(is_end, following[:, None], jnp.roll(tokens, -1, 1))
            pairs = Pairs(
                tokens, successors, taps, starts, num_valid, num_ahead, scopes
            )
            state = _read_chunk(_DraftSide(drafter, draft, shared), pairs, state)

        # Before the last chunk nothing is emitted, and so nothing can be finished.
        num_emitted = jnp.where(is_last, 1, 0) * jnp.ones_like(starts)
        num_remaining = state.num_remaining - num_emitted
        has_stopped = is_any_of(first[:, None], config.stop_ids)[:, 0]
        is_finished = is_last & (has_stopped | (num_remaining <= 0))
        log_probs = None
        alternatives = None
        if config.reports_log_probs:
            log_probs = take_row(logits[:, 0], first)[:, None] - logsumexp[:, None]
        if config.is_full:
            alternatives = _alternatives(config, logits, logsumexp[:, None])
            assert state.extras is not None
            extras = adjusting.count_emitted(state.extras, first[:, None], num_emitted)
            state = state.replace(extras=extras)

        state = state.replace(
            lengths=starts + num_valid,
            last_token=first,
            num_remaining=num_remaining,
            is_finished=is_finished,
        )
        state = _sum_prompt(hidden, num_valid, state)
        zero = jnp.zeros_like(starts)
        output = StepOutput(
            tokens=first[:, None],
            num_emitted=num_emitted,
            num_accepted=zero,
            num_drafted=zero,
            is_finished=is_finished,
            log_probs=log_probs,
            alternatives=alternatives,
            prompt_states=state.prompt_states,
        )

        return _look_ahead(drafter, draft, state, output)

    return prefill


def _run_chunk(target, target_params, tokens, num_valid, state: DecodeState):
    """The target's pass over a chunk of one prompt."""
    starts = state.lengths
    chunk = tokens.shape[1]
    bias = kv.causal_bias(starts, chunk, state.cache.capacity)
    positions = starts[:, None] + jnp.arange(chunk)

    return target(
        target_params, tokens, positions, bias, state.cache, starts, num_valid
    )


def _record_chunk(
    config, tokens, scored: Scored, is_end, is_last, state: DecodeState
) -> DecodeState:
    """Records what a learner reads of a prompt, if any learns.

    It is context for training on the answer; only the prompt's last token has a
    distribution that a draft is held against.

    Args:
      scored: With the last token's logsumexp alone, `[1]`.
      is_end: `[1, t]` at the chunk's last token; `is_last`, if the chunk is.
    """
    if state.feedback is None:
        return state

    found = Feedback(tokens=tokens)
    if state.feedback.taps is not None:
        at_end = jnp.where(is_end & is_last, scored.logsumexp[:, None], 0.0)
        found = Feedback(tokens, scored.taps, scored.hidden, at_end)

    is_batched = config.numerics.has_batched_writes
    feedback = record(state.feedback, found, state.lengths, is_batched)

    return state.replace(feedback=feedback)


def _read_chunk(side: _DraftSide, pairs: Pairs, state: DecodeState) -> DecodeState:
    """Runs the draft over a chunk; whoever is judged starts from where it ends."""
    drafter, draft, shared = side
    draft_cache, context = drafter.extend(draft, shared, state.draft_cache, pairs)
    state = _extended(drafter, state, draft_cache, context)
    if state.unjudged is None:
        return state

    unjudged = state.unjudged.replace(context=state.draft_context)
    return state.replace(unjudged=unjudged)


def _first_token(config, logits, state, positions):
    if config.kind == "greedy":
        return argmax(logits)

    # The position of the last prompt token: steps fold in the number of committed
    # tokens, which is at least one more, so no number is used twice.
    keys = jax.vmap(jax.random.fold_in)(state.request_keys, positions)
    if config.is_full:
        counts = state.extras.counts[:, None]
        probs = _target_probs(config, logits[:, None], state, counts)[:, 0]
        return sample(keys, probs)

    probs = processed_probs(logits, state.sampling, config.numerics.is_row_invariant)
    return sample(keys, probs)


def empty_state(
    config: StepConfig,
    drafter: Drafter | None,
    batch_size: int,
    capacity: int,
    recording: Recording = "nothing",
    has_prediction: bool = False,
) -> DecodeState:
    """A state whose rows are all finished, with caches of `capacity` slots."""
    b = batch_size
    draft_cache = None
    draft_context = None
    if drafter is not None:
        draft_cache = drafter.init_cache(b, capacity)
        draft_context = drafter.init_context(b)

    feedback = _empty_feedback(config, b, capacity, recording, draft_context)
    ints = lambda: jnp.zeros((b,), jnp.int32)
    prediction = lambda: init_prediction(b, capacity) if has_prediction else None
    unjudged = None
    if config.num_unjudged:
        assert drafter is not None, "somebody is judged"
        unjudged = Unjudged(
            **_empty_pairs(config, b, config.num_unjudged),
            hidden=jnp.zeros((b, config.num_unjudged, config.model.hidden_size)),
            is_judged=jnp.ones((b,), bool),
            context=drafter.init_context(b),
            prediction=prediction(),
        )

    backlog = None
    if config.num_behind:
        backlog = Backlog(**_empty_pairs(config, b, config.num_behind))

    deltas = _empty_deltas(config, b, draft_context)

    prompt_states = None
    if config.reads_prompts:
        prompt_states = jnp.zeros((b, config.model.hidden_size))

    return DecodeState(
        cache=llama.init_cache(config.model, config.numerics, b, capacity),
        draft_cache=draft_cache,
        draft_context=draft_context,
        lengths=ints(),
        last_token=ints(),
        # Placeholders: a row's key is set when its request is admitted.
        request_keys=jax.random.split(jax.random.key(0), b),
        sampling=SamplingParams(
            temperature=jnp.zeros((b,)), top_k=ints(), top_p=jnp.ones((b,))
        ),
        num_remaining=ints(),
        # Free rows count as finished, so a batch that is not full emits nothing for
        # them.
        is_finished=jnp.ones((b,), bool),
        feedback=feedback,
        prediction=prediction(),
        unjudged=unjudged,
        backlog=backlog,
        deltas=deltas,
        prompt_states=prompt_states,
    )


def _empty_feedback(
    config: StepConfig, batch_size: int, capacity: int, recording: Recording, context
) -> Feedback | None:
    """Slots for what a learner reads.

    Nothing is allocated for what none does: features are several hidden states a slot.

    Args:
      context: The draft's, whose states may be recorded; None where nobody drafts.
    """
    width = config.model.hidden_size

    def zeros(*shape: int, dtype: Any = jnp.float16) -> jax.Array:
        return jnp.zeros((batch_size, capacity, *shape), dtype)

    if recording == "features":
        return Feedback(
            tokens=zeros(dtype=jnp.int32),
            taps=zeros(len(config.taps) * width),
            hidden=zeros(width),
            logsumexp=zeros(dtype=jnp.float32),
        )

    if recording in RECORDS_STATES and context is not None:
        return Feedback(
            tokens=zeros(dtype=jnp.int32),
            states=zeros(context.hidden.shape[-1]),
            has_state=zeros(dtype=bool),
            choices=zeros(dtype=jnp.int32) if recording == "choices" else None,
        )

    return None


def _empty_pairs(config: StepConfig, batch_size: int, count: int) -> dict[str, Any]:
    """Room for so many waiting pairs of each row."""
    width = len(config.taps) * config.model.hidden_size
    return {
        "inputs": jnp.zeros((batch_size, count), jnp.int32),
        "tokens": jnp.zeros((batch_size, count), jnp.int32),
        "taps": jnp.zeros((batch_size, count, width)),
        "count": jnp.zeros((batch_size,), jnp.int32),
    }


def _empty_deltas(config: StepConfig, batch_size: int, context) -> Any:
    """No differences by row, of the rank of the draft's; None where it has none."""
    if not config.delta_rank:
        return None

    assert context is not None, "somebody drafts"
    width = context.hidden.shape[-1]
    num_tokens = context.logits.shape[-1]
    return no_rows(batch_size, config.delta_rank, width, num_tokens)
