# SPDX-License-Identifier: Apache-2.0
"""The nouns that flow between the parts: data only, no algorithms.

Letters are explained in `ospec_jax.typing`.
"""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from ospec_jax.config import ChildrenKind
from ospec_jax.models.cache import KVCache
from ospec_jax.typing import Params, struct


@struct
class Owner:
    """Whose an answer is, and how much may be kept of it; see `online.scopes`.

    Attributes:
      scope: Its number; 0 for nobody in particular.
      is_kin: `[c]` which scopes' text counts together with it, by their numbers.
      share: Of all room, what its own text may take; 1 takes what there is.
      kin_share: Likewise, that of all its kin.
    """

    scope: Int[Array, ""]
    is_kin: Bool[Array, " c"]
    share: Float[Array, ""]
    kin_share: Float[Array, ""]


@struct
class NgramMemory:
    """What followed which tokens in earlier requests; see `drafters.ngram`.

    Attributes:
      fingerprints: `[o, m]` hashes of the n-grams of each order.
      tokens: `[o, m]` what mostly followed them.
      counts: `[o, m]` majority of that token over all others, 0 for an empty slot.
      owners: `[o, m]` scopes whose text they are from; see `Owner`.
      hits: `[l]` suggestions of each kind that were right.
      trials: `[l]` suggestions of each kind.
      orders: Tokens that the keys of each table are made of.
    """

    fingerprints: UInt32[Array, "o m"]
    tokens: Int[Array, "o m"]
    counts: Int[Array, "o m"]
    owners: Int[Array, "o m"]
    hits: Float[Array, " l"]
    trials: Float[Array, " l"]
    orders: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(2, 3))

    @property
    def max_match(self) -> int:
        """Longest suffix of a request that is told apart from longer ones."""
        return max(4, *self.orders)

    @property
    def num_slots(self) -> int:
        """n-grams of each order that it can hold."""
        return self.tokens.shape[1]


@struct
class Deltas:
    """What was learned of single scopes, of low rank; see `learners.deltas`.

    Each of `n` places is one scope's. Its draft has the logits `x W^T + (x B^T) D`, of
    the inputs `x` of its output projection `W` (`head_inputs` of a drafter), with the
    scope's own directions `B` and its difference `D` along them.

    Attributes:
      owners: `[n]` scopes by their numbers; 0 for a place that is free.
      ages: `[n]` updates of others since the scope's own last one.
      directions: `[n, r, e]`; 0 until enough of the scope's inputs were seen.
      shifts: `[n, r, q]`.
      energy: `[n, q]` sum of each token's squared errors, fading.
      leads: `[n]` how many more tokens of late were right with the difference.
      seen: `[n, m, e]` the scope's first inputs, of which its directions are made.
      num_seen: `[n]` how many of them there are.
    """

    owners: Int[Array, " n"]
    ages: Int[Array, " n"]
    directions: Float[Array, "n r e"]
    shifts: Float[Array, "n r q"]
    energy: Float[Array, "n q"]
    leads: Float[Array, " n"]
    seen: Float[Array, "n m e"]
    num_seen: Int[Array, " n"]


@struct
class RowDeltas:
    """Of each row of a batch, the difference that its scope's draft has.

    Attributes:
      directions: `[b, r, e]`; see `Deltas`.
      shifts: `[b, r, q]`; 0 where there is none, or it does not help.
    """

    directions: Float[Array, "b r e"]
    shifts: Float[Array, "b r q"]


@struct
class Draft:
    """What a drafter needs to draft for one target.

    Attributes:
      params: Trained floating-point parameters.
      token_ids: `[q]` target ids of the draft vocabulary, ascending (EAGLE-3's `d2t`,
        as ids instead of offsets); None when the draft predicts all target tokens.
      memory: n-grams of earlier traffic, for drafters that use them.
      deltas: What was learned of single scopes, for drafters that add it; within a
        step that of its rows.
    """

    params: Params
    token_ids: Int[Array, " q"] | None = None
    memory: NgramMemory | None = None
    deltas: Deltas | RowDeltas | None = None


@struct
class Prediction:
    """What each request's user expects the answer to be; see `drafters.prediction`.

    Attributes:
      tokens: `[b, s]` the expected answer.
      num_tokens: `[b]` how many of them are real; 0 for no prediction.
      confidence: `[b]` chance given to the first token, and to one after a mismatch.
      place: `[b]` the token behind the last stretch that came true.
      num_skipped: `[b]` answer tokens since then.
      run: `[b]` tokens before the next one that came true in a row.
      recent: `[b, r]` the answer's last tokens, -1 before the first.
    """

    tokens: Int[Array, "b s"]
    num_tokens: Int[Array, " b"]
    confidence: Float[Array, " b"]
    place: Int[Array, " b"]
    num_skipped: Int[Array, " b"]
    run: Int[Array, " b"]
    recent: Int[Array, "b r"]


@struct
class SharedTables:
    """The frozen parts of the target that a draft reads.

    Attributes:
      embedding: `{kernel: [v, d], [scale: [v]]}`.
      head: Likewise, the output projection.
      params: All of the target's, for drafters that read them (`reads_target`).
      cache: Likewise; entries of verified tokens.
    """

    embedding: dict
    head: dict
    params: Params | None = None
    cache: KVCache | None = None


@struct
class DraftTree:
    """Proposed tokens. Node 0 is the root: the last committed token, already emitted.

    Parents stand before their children. Nodes stand in depth order, or where their
    number is chosen (`TreeConfig.sizes`) in the order in which they would be kept: the
    first ones are a smaller tree.

    Attributes:
      tokens: `[b, n]` target ids.
      parents: `[b, n]` node numbers; -1 for the root.
      depths: `[b, n]`; 0 for the root.
      is_valid: `[b, n]` whether the node was drafted at all.
      log_probs: `[b, n]` the draft's log-probability of each token given its parent.
      ancestor_mask: `[b, n, n]` whether node j is node i or one of its ancestors.
      draft_probs: `[b, n, q]` what node i's children were drawn from; None for `topk`.
      token_ids: `[q]` target ids of the draft vocabulary, None for the full one.
      states: `[b, n, d]` the draft's state at nodes that it ran over, from which it
        chose their children; None for drafts without any.
      has_state: `[b, n]` which nodes these are.
      choices: `[b, n]` the token that the draft took for most probable from each such
        state, whatever was suggested to it; -1 elsewhere. None unless asked for
        (`Roots.has_choices`).
      sources: `[b, n]` who proposed each node, by number; see `drafters.sources`. None
        where nothing was suggested: all nodes are the draft's own.
      seen_scores: `[b, p]` log-probabilities of the paths to all nodes that were seen
        while it grew, at their places in `growth.Pool`; None where nobody chooses how
        many to verify, and of drafters that do not tell.
      seen_tokens: `[b, p]` theirs; None likewise.
      seen_parents: `[b, p]` places of their parents, -1 for the root; None likewise.
      drafted_depth: To which it was grown; None likewise.
      children: How children were drawn; the exact acceptance rule depends on it.
      max_depth: Static depth, the root's being 0.
      max_children: Static bound of a node's children.
      is_chain: Whether node i + 1 is node i's only child.
      is_reranked: Whether nodes were dropped after their values were looked at.
    """

    tokens: Int[Array, "b n"]
    parents: Int[Array, "b n"]
    depths: Int[Array, "b n"]
    is_valid: Bool[Array, "b n"]
    log_probs: Float[Array, "b n"]
    ancestor_mask: Bool[Array, "b n n"]
    draft_probs: Float[Array, "b n q"] | None = None
    token_ids: Int[Array, " q"] | None = None
    states: Float[Array, "b n d"] | None = None
    has_state: Bool[Array, "b n"] | None = None
    choices: Int[Array, "b n"] | None = None
    sources: Int[Array, "b n"] | None = None
    seen_scores: Float[Array, "b p"] | None = None
    seen_tokens: Int[Array, "b p"] | None = None
    seen_parents: Int[Array, "b p"] | None = None
    drafted_depth: Int[Array, ""] | None = None
    children: ChildrenKind = flax.struct.field(pytree_node=False, default="topk")
    max_depth: int = flax.struct.field(pytree_node=False, default=0)
    max_children: int = flax.struct.field(pytree_node=False, default=1)
    is_chain: bool = flax.struct.field(pytree_node=False, default=False)
    is_reranked: bool = flax.struct.field(pytree_node=False, default=False)


@struct
class Verdict:
    """The result of verification.

    Attributes:
      path: `[b, m]` accepted nodes from the root on; entries beyond `num_accepted`
        repeat the last one.
      num_accepted: `[b]` accepted draft tokens, the root not counted.
      next_token: `[b]` the target's own token after the path: recovered after a
        rejection, a bonus otherwise.
    """

    path: Int[Array, "b m"]
    num_accepted: Int[Array, " b"]
    next_token: Int[Array, " b"]


@struct
class DraftContext:
    """Where the next proposal begins: the draft after the last emitted token.

    Attributes:
      hidden: `[b, d]` the draft's own state.
      logits: `[b, q]` its prediction of the token after the root.
    """

    hidden: Float[Array, "b d"]
    logits: Float[Array, "b q"]


@struct
class SamplingParams:
    """Per-row sampling; temperature 0 is greedy, top_k 0 and top_p 1 keep all.

    `min_p` is None where no row drops tokens by it: then nothing is computed for it.
    """

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    min_p: Float[Array, " b"] | None = None


@struct
class Extras:
    """What `full` passes alone read of each row; see `decoding.adjusting`.

    Attributes:
      min_p: `[b]`; 0 keeps all.
      presence_penalty: `[b]`; 0 for none.
      frequency_penalty: `[b]`; 0 for none.
      repetition_penalty: `[b]`; 1 for none.
      bias: `[b, v]` added to the logits.
      is_in_prompt: `[b, v]` tokens that the prompt has.
      counts: `[b, v]` how often the answer has each token, the newest one included.
      can_speculate: `[b]` whether anything is drafted for the row.
    """

    min_p: Float[Array, " b"]
    presence_penalty: Float[Array, " b"]
    frequency_penalty: Float[Array, " b"]
    repetition_penalty: Float[Array, " b"]
    bias: Float[Array, "b v"]
    is_in_prompt: Bool[Array, "b v"]
    counts: Int[Array, "b v"]
    can_speculate: Bool[Array, " b"]


@struct
class Roots:
    """Where a draft begins: the last committed token of each row.

    Attributes:
      token: `[b]` already emitted, not yet cached.
      position: `[b]` of that token.
      keys: `[b]` what drawn children are drawn with.
      context: The draft after that token.
      sampling: How each row's tokens are chosen.
      is_active: `[b]` rows whose answer goes on; None for all.
      steering: What a rule of `drafters.stopping` is told from outside, or None.
      has_choices: The tree is to say what the draft took for most probable.
    """

    token: Int[Array, " b"]
    position: Int[Array, " b"]
    keys: Key[Array, " b"]
    context: DraftContext
    sampling: SamplingParams
    is_active: Bool[Array, " b"] | None = None
    steering: Any = None
    has_choices: bool = flax.struct.field(pytree_node=False, default=False)


@struct
class Pairs:
    """Verified tokens that a draft is brought up to date with.

    A pair is a token that the target has run over and the one that follows it.

    Attributes:
      inputs: `[b, t]` tokens that the target has run over.
      tokens: `[b, t]` those that follow them.
      taps: `[b, t, f]` what the target made of the inputs, at the draft's taps.
      starts: `[b]` position of the first input.
      num_valid: `[b]` how many pairs are real; the rest is junk.
      num_ahead: Tokens that are known to follow them before anything is drafted; None
        for none.
      scopes: `[b]` whose the rows are; None where the draft has been told before.
    """

    inputs: Int[Array, "b t"]
    tokens: Int[Array, "b t"]
    taps: Float[Array, "b t f"]
    starts: Int[Array, " b"]
    num_valid: Int[Array, " b"]
    num_ahead: Int[Array, ""] | None = None
    scopes: Int[Array, " b"] | None = None


@struct
class Suggested:
    """What was suggested to a draft in the place of each verified token.

    Attributes:
      tokens: `[b, t]`.
      log_rates: `[b, t]` how likely each is thought to be right, -inf for none.
    """

    tokens: Int[Array, "b t"]
    log_rates: Float[Array, "b t"]


@struct
class Retraced:
    """What a drafter would have drafted in the place of each verified token.

    Attributes:
      suggested: What stands in for its own drafts where it is likelier, or None.
      logits: `[b, t, q]` its own predictions, each from the verified tokens before;
        None for a drafter that has none.
      token_ids: `[q]` target ids that these are of, None for all.
    """

    suggested: Suggested | None
    logits: Float[Array, "b t q"] | None
    token_ids: Int[Array, " q"] | None


@struct
class Judged:
    """How one drafter's tokens would have been accepted; see `control.lengths`.

    Attributes:
      chances: `[b, m, k]` of being accepted in the place of each emitted token, if it
        were at that depth of a draft.
      couplings: `[b, m, k]` likewise, given the emitted token.
    """

    chances: Float[Array, "b m k"]
    couplings: Float[Array, "b m k"]


@struct
class Unjudged:
    """Emitted tokens for which the drafters of a pool have not been judged yet.

    Attributes:
      inputs: `[b, w]`, with `tokens` and `taps` as in `Pairs`; real up to `count`.
      hidden: `[b, w, d]` the target's final normed states of the inputs.
      count: `[b]`; the last one ends where the row does.
      is_judged: `[b]`; of other rows nothing waits.
      context: Of each member, the draft before the first of them.
      prediction: As it was before the first of them, or None.
    """

    inputs: Int[Array, "b w"]
    tokens: Int[Array, "b w"]
    taps: Float[Array, "b w f"]
    hidden: Float[Array, "b w d"]
    count: Int[Array, " b"]
    is_judged: Bool[Array, " b"]
    context: Any
    prediction: Prediction | None = None


@struct
class Backlog:
    """Emitted tokens that the draft has not run over yet.

    Attributes:
      inputs: `[b, w]`, with `tokens` and `taps` as in `Pairs`; real up to `count`.
      count: `[b]`; the last one ends where the row does.
    """

    inputs: Int[Array, "b w"]
    tokens: Int[Array, "b w"]
    taps: Float[Array, "b w f"]
    count: Int[Array, " b"]


@struct
class Feedback:
    """What verification said about consecutive tokens: the training signal.

    Slot i belongs to the token at position i of its row. What is not recorded is None:
    of `features` (taps, hidden, logsumexp) a draft is trained as a whole, of `states`
    (and has_state, choices) its last layer alone. `logsumexp` lets the target's exact
    probability of any token be recovered from `hidden` and the frozen head, without a
    softmax over all of them. It is 0 for prompt tokens but the last, whose
    distributions no draft is trained on.

    Attributes:
      tokens: `[b, s]`.
      taps: `[b, s, f]` tapped hidden states, float16.
      hidden: `[b, s, d]` final normed hidden states, float16.
      logsumexp: `[b, s]` of the target's raw logits.
      states: `[b, s, e]` the draft's own states while it drafted, float16.
      has_state: `[b, s]` whether the draft had one there: it has none at the last token
        of a draft that was accepted as a whole.
      choices: `[b, s]` the token that it took for most probable from that state, before
        anything was suggested to it; -1 where that is not known.
    """

    tokens: Int[Array, "b s"]
    taps: Float[Array, "b s f"] | None = None
    hidden: Float[Array, "b s d"] | None = None
    logsumexp: Float[Array, "b s"] | None = None
    states: Float[Array, "b s e"] | None = None
    has_state: Bool[Array, "b s"] | None = None
    choices: Int[Array, "b s"] | None = None


@struct
class DecodeState:
    """All that one step hands to the next, one request a row.

    Attributes:
      lengths: `[b]` committed tokens, whose keys and values lie in the cache.
      last_token: `[b]` the newest emitted token, root of the next tree; not yet cached.
      request_keys: `[b]` a row's randomness is its key folded with the position.
      num_remaining: `[b]` tokens that may still be emitted.
      draft_cache: What the drafter keeps of the committed tokens.
      draft_context: The draft after the newest token; of a pool, that of each member.
      feedback: Verified features by position, or None when nothing is recorded.
      prediction: What the answers are expected to be, or None.
      unjudged: What a pool's drafters are still to be judged by, or None where that is
        done at every step, or never.
      backlog: What the draft is behind by, or None where it never is.
      extras: What rows ask that only `full` passes can do; None where none does.
      deltas: What is added to the draft's logits, or None where nothing is.
      prompt_states: `[b, d]` sum of the target's final states over the prompts, as far
        as they were run; None where nobody asks.
    """

    cache: KVCache
    draft_cache: Any
    draft_context: Any
    lengths: Int[Array, " b"]
    last_token: Int[Array, " b"]
    request_keys: Key[Array, " b"]
    sampling: SamplingParams
    num_remaining: Int[Array, " b"]
    is_finished: Bool[Array, " b"]
    feedback: Feedback | None
    prediction: Prediction | None = None
    unjudged: Unjudged | None = None
    backlog: Backlog | None = None
    extras: Extras | None = None
    deltas: RowDeltas | None = None
    prompt_states: Float[Array, "b d"] | None = None


@struct
class StepOutput:
    """The only thing the host reads.

    Attributes:
      tokens: `[b, m]` emitted tokens, valid up to `num_emitted`.
      num_emitted: `[b]`; 0 for rows that had finished before.
      num_accepted: `[b]` accepted draft tokens that were emitted.
      num_drafted: `[b]` valid draft tokens.
      is_finished: `[b]`.
      log_probs: `[b, m]` the target's log-probabilities of the tokens, or None.
      is_sure: `[b]` whether a long chain of suggestions is likely to be right next;
        None when there is nobody to say.
      judged: `Judged` of every member of a pool, for the emitted tokens, in the order
        in which the state has them; None where nobody asks.
      alternatives: Of `full` passes: ids and log-probabilities of the target's most
        probable tokens in the place of each emitted one, each `[b, m, a]`, falling.
      evidence: `[b, e]` on the draft, of steps that are steered, as their controller
        wants it (`control.marginal.Evidence`, `control.lessons.Cycle`); else None.
      sources: `[b, k]` who proposed each accepted token, valid up to `num_accepted`;
        None as in `DraftTree`.
      prompt_states: Of a prompt's pass, as in `DecodeState`; None of steps.
    """

    tokens: Int[Array, "b m"]
    num_emitted: Int[Array, " b"]
    num_accepted: Int[Array, " b"]
    num_drafted: Int[Array, " b"]
    is_finished: Bool[Array, " b"]
    log_probs: Float[Array, "b m"] | None
    is_sure: Bool[Array, " b"] | None = None
    judged: Any = None
    alternatives: tuple[Int[Array, "b m a"], Float[Array, "b m a"]] | None = None
    evidence: Float[Array, "b e"] | None = None
    sources: Int[Array, "b k"] | None = None
    prompt_states: Float[Array, "b d"] | None = None
