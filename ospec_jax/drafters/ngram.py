# SPDX-License-Identifier: Apache-2.0
"""n-grams: tokens that followed the same few tokens before.

Two sources suggest the next token of a path. The *context* is the request's own prompt
and answer: what followed the latest occurrence of the longest suffix (prompt lookup).
The *memory* is a table of bounded size over earlier requests: what mostly followed the
last two or three tokens. Each kind of match has a *rate*, how often it was right so
far, which is learned from every verified token, drafted or not (full information).

Each n-gram of the memory has an owner, the scope of the request that it is from, and is
suggested to rows of that scope alone. The rates are everybody's.

The family `suffix` keeps tables of longer n-grams, too, the longest match winning, and
drafts deeper from matches that are nearly always right: what suffix decoding does with
a tree of past answers (arXiv 2411.04975), in arrays of fixed shape that `jit` can read
and a checkpoint can hold. Matches are told apart up to eight tokens, no further.

`with_ngrams` lends the suggestions to a neural drafter: a suggestion takes the place of
its least probable child wherever its rate exceeds the draft's own probability. Lent to
`hints.hinted_chain` they are all there is: a drafter for any target, nothing to train.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters.base import Drafter, Family, Hints
from ospec_jax.drafters.hints import either, likelier, suggested_chain
from ospec_jax.drafters.sources import MEMORY
from ospec_jax.models import cache as kv
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    NgramMemory,
    Owner,
    Pairs,
    Retraced,
    Roots,
    SharedTables,
    Suggested,
)
from ospec_jax.typing import typed

ORDERS = (2, 3)
"""Tokens that the memory's keys are made of."""
SUFFIX_ORDERS = (2, 3, 5, 8)
"""Likewise, for the family `suffix`."""
_MAX_COUNT = 8
_NUM_SCORED = 256
"""Newest tokens of a request that its rates are learned from."""
_MAX_TRIALS = 1000.0
"""Older trials fade, so that rates follow the traffic."""
_PRIOR_TRIALS = 32.0
# Measured with SmolLM2-135M on chat, markup and mathematics: by length of the match in
# the context, and by count for each of the memory's orders, where the context says
# something else than the memory or nothing.
_CONTEXT_RATES = {
    4: (0.20, 0.50, 0.62, 0.83),
    8: (0.20, 0.50, 0.62, 0.67, 0.73, 0.76, 0.80, 0.92),
}
_MEMORY_RATES = {
    2: (0.13, 0.22, 0.30, 0.40, 0.40, 0.42, 0.45, 0.62),
    3: (0.26, 0.42, 0.56, 0.60, 0.72, 0.70, 0.70, 0.86),
    5: (0.32, 0.58, 0.70, 0.79, 0.82, 0.81, 0.84, 0.87),
    8: (0.46, 0.70, 0.80, 0.84, 0.89, 0.92, 0.92, 0.94),
}
_SURE_MATCH = 8
_SURE_RATE = 0.9
"""Rate and length of matches that a longer chain is drafted from.

Measured on recorded answers, with chains of 12 instead of 3: the acceptance length
grows by 1.7 to 2.3%, at a cost of 0.5 to 0.9%; shorter matches have no such rates.
"""
_NO_TOKEN = -1
# Equal to no token, and not to `_NO_TOKEN` either.
_NOWHERE = -2


def init_memory(num_slots: int, orders: tuple[int, ...] = ORDERS) -> NgramMemory:
    """A memory that has seen nothing.

    Args:
      num_slots: n-grams of each order that it can hold.
      orders: `ORDERS` or `SUFFIX_ORDERS`.
    """
    # One rate a kind of match, in one array: first the context's by length, then each
    # order's by count. Rates begin at measured ones that weigh as much as 32 trials.
    kinds = [_CONTEXT_RATES[max(4, *orders)], *(_MEMORY_RATES[n] for n in orders)]
    shape = (len(orders), num_slots)
    rates = jnp.asarray(np.concatenate(kinds))
    return NgramMemory(
        fingerprints=jnp.zeros(shape, jnp.uint32),
        tokens=jnp.zeros(shape, jnp.int32),
        counts=jnp.zeros(shape, jnp.int32),
        owners=jnp.zeros(shape, jnp.int32),
        hits=rates * _PRIOR_TRIALS,
        trials=jnp.full_like(rates, _PRIOR_TRIALS),
        orders=orders,
    )


def _fingerprint(context, scope):
    """A 32-bit hash of the last axis, and of whose it is.

    Args:
      scope: Of the shape of the other axes, or one that fits it.
    """
    # FNV's offset, multiplied by a golden-ratio constant and mixed downwards, since the
    # slot is taken from the low bits. Scopes begin apart, so that the same n-gram of
    # two of them does not contend for one slot.
    start = jnp.asarray(scope).astype(jnp.uint32) * np.uint32(0x85EBCA6B)
    start = start ^ np.uint32(0x811C9DC5)
    code = jnp.broadcast_to(start, context.shape[:-1])
    for i in range(context.shape[-1]):
        code = (code ^ context[..., i].astype(jnp.uint32)) * np.uint32(0x9E3779B1)
        code = code ^ (code >> 15)

    return code


@typed
def match_context(
    history: Int[Array, "b s"],
    num_known: Int[Array, "b w"],
    recent: Int[Array, "b w m"],
) -> tuple[Int[Array, "b w"], Int[Array, "b w"]]:
    """What followed the latest occurrence of the longest suffix.

    Args:
      history: Tokens of each row, in order.
      num_known: How many of them come before the token that is looked for.
      recent: The last tokens before it; they need not be part of `history`.

    Returns:
      The token, and the number of its rate: one less than the length of the match,
      -1 when there is none.
    """
    num_slots = history.shape[1]
    num_recent = recent.shape[-1]
    index = jnp.arange(num_slots)
    # `[b, w, s]`: how many of the tokens right before each slot equal the last of the
    # path. A mismatch ends the count for good.
    is_same = jnp.broadcast_to(
        index < num_known[..., None], (*num_known.shape, num_slots)
    )
    length = jnp.zeros(is_same.shape, jnp.int32)

    # The first slots have no tokens so far back: no token equals what stands there.
    padded = jax.lax.pad(history, jnp.int32(_NOWHERE), [(0, 0, 0), (num_recent, 0, 0)])
    for back in range(num_recent):
        start = num_recent - 1 - back
        before = jax.lax.slice_in_dim(padded, start, start + num_slots, axis=1)
        wanted = jax.lax.slice_in_dim(recent, start, start + 1, axis=2)
        is_same = is_same & (before[:, None] == wanted)
        length = length + is_same

    # One maximum for two wishes: the longest match, and of these the latest.
    score = jnp.max(length * num_slots + jnp.where(length > 0, index, 0), axis=-1)
    # Scores are not negative, so that XLA's plain division does.
    slots = jnp.full_like(score, num_slots)
    found = jnp.take_along_axis(history, jax.lax.rem(score, slots), axis=1)

    return found, (jax.lax.div(score, slots) - 1).astype(jnp.int32)


@typed
def match_memory(
    memory: NgramMemory,
    recent: Int[Array, "b w m"],
    scopes: Int[Array, " b"] | None = None,
) -> tuple[Int[Array, "b w"], Int[Array, "b w"]]:
    """What mostly followed the last tokens, those of the highest order first.

    Args:
      scopes: Whose the rows are: nothing else is found. None is nobody in particular.

    Returns:
      The token and the number of its rate, -1 when nothing is remembered.
    """
    asker = jnp.int32(0) if scopes is None else scopes[:, None]
    codes = jnp.stack(
        [_fingerprint(recent[..., -order:], asker) for order in memory.orders]
    )
    # `[orders, b, w]`, which every table is read at, at once.
    rows = np.arange(len(memory.orders), dtype=np.int32)[:, None, None]
    slots = (codes % memory.num_slots).astype(jnp.int32)
    at = lambda table: table.at[rows, slots].get(mode="promise_in_bounds")
    counts = at(memory.counts)
    # Slots are shared: the fingerprint tells n-grams of one slot apart. Hashes of two
    # scopes may be equal by chance, so their numbers are compared as well.
    is_found = (at(memory.fingerprints) == codes) & (counts > 0)
    is_found &= at(memory.owners) == asker

    # Orders ascend, and so do the numbers of their rates: the largest one is that of
    # the longest match.
    first = memory.max_match + rows * _MAX_COUNT
    levels = jnp.where(is_found, first + counts - 1, -1)
    level = jnp.max(levels, axis=0)
    is_chosen = is_found & (levels == level)
    token = jnp.max(jnp.where(is_chosen, at(memory.tokens), _NO_TOKEN), axis=0)

    return token.astype(jnp.int32), level.astype(jnp.int32)


def suggest(
    memory: NgramMemory, history, num_known, recent, scopes=None
) -> tuple[Int[Array, "b w"], Float[Array, "b w"], Int[Array, "b w"]]:
    """The likelier of both sources' tokens with its log-rate, -inf for none.

    Args:
      history: `[b, s]`, with `num_known` `[b, w]` and `recent` `[b, w, m]`; see
        `match_context`.
      scopes: `[b]`; see `match_memory`.

    Returns:
      The token, its log-rate, and which of the two it is from (`drafters.sources`).
    """
    rates = memory.hits / memory.trials
    rate_of = lambda level: jnp.where(
        level >= 0, rates.at[jnp.maximum(level, 0)].get(mode="promise_in_bounds"), 0.0
    )
    near, near_level = match_context(history, num_known, recent)
    far, far_level = match_memory(memory, recent, scopes)
    near_rate = rate_of(near_level)
    far_rate = rate_of(far_level)
    is_near = near_rate >= far_rate
    best = jnp.maximum(near_rate, far_rate)

    # Without any suggestion the rate is 0, and its logarithm -inf.
    token = jnp.where(is_near, near, far)
    # `NGRAMS` or `MEMORY`, which is the next number: to take one off is half of the
    # operations of choosing between the two.
    return token, jnp.log(best), MEMORY - is_near


def remember(
    memory: NgramMemory,
    tokens: Int[Array, " s"],
    num_prompt,
    num_tokens,
    owner: Owner | None = None,
) -> NgramMemory:
    """Learns from one answered request.

    The rates are scored on the answer with the memory as it was; then every n-gram of
    prompt and answer is entered. A slot keeps the token that mostly followed: other
    followers, and other n-grams of the same slot, count it down until one takes over.

    Args:
      tokens: Of prompt and answer, junk beyond `num_tokens`.
      num_prompt: How many belong to the prompt.
      owner: None is nobody in particular, who may take all the room.
    """
    scope = jnp.int32(0) if owner is None else owner.scope
    scored = _score(memory, tokens, num_prompt, num_tokens, scope)
    return _enter(scored, tokens, num_tokens, scope, owner)


def forget(memory: NgramMemory, is_gone: Bool[Array, " c"]) -> NgramMemory:
    """Empties the slots of some scopes; the rates stay.

    Args:
      is_gone: Which, by their numbers.
    """
    is_dropped = is_gone[memory.owners]
    cleared = lambda table: jnp.where(is_dropped, jnp.zeros_like(table), table)
    return memory.replace(
        fingerprints=cleared(memory.fingerprints),
        tokens=cleared(memory.tokens),
        counts=cleared(memory.counts),
        owners=cleared(memory.owners),
    )


def _recent_at(tokens, positions, count):
    """The `count` tokens before each position, -1 where there are none."""
    index = positions[:, None] + jnp.arange(-count, 0)
    return jnp.where(index >= 0, tokens[jnp.maximum(index, 0)], _NO_TOKEN)


def _score(memory: NgramMemory, tokens, num_prompt, num_tokens, scope) -> NgramMemory:
    """Books what each source would have said about the newest tokens."""
    count = min(_NUM_SCORED, tokens.shape[0])
    positions = num_tokens - 1 - jnp.arange(count)
    # The answer's first token comes from prefill: it is never drafted.
    is_scored = positions > num_prompt
    recent = _recent_at(tokens, positions, memory.max_match)[None]
    # With the memory as it was before this request, as while it was decoded.
    near = match_context(tokens[None], positions[None], recent)
    far = match_memory(memory, recent, scope[None])
    actual = tokens[jnp.maximum(positions, 0)]
    hits = memory.hits
    trials = memory.trials

    # Both sources are judged whether their tokens were drafted or not; the memory where
    # it is needed: what it has in common with the context is mostly right, and would
    # have it thought too well of. Level -1 adds nothing, although it indexes the last
    # rate.
    is_alone = (near[1][0] < 0) | (near[0][0] != far[0][0])
    for (token, level), is_asked in ((near, is_scored), (far, is_scored & is_alone)):
        weight = (is_asked & (level[0] >= 0)).astype(hits.dtype)
        trials = trials.at[level[0]].add(weight)
        hits = hits.at[level[0]].add(weight * (token[0] == actual))

    # Hits and trials shrink alike: the rate stays, its weight is bounded.
    keep = jnp.minimum(1.0, _MAX_TRIALS / trials)

    return memory.replace(hits=hits * keep, trials=trials * keep)


def _enter(
    memory: NgramMemory, tokens, num_tokens, scope, owner: Owner | None
) -> NgramMemory:
    """Enters every n-gram, in order, as far as its owner has room."""
    positions = jnp.arange(tokens.shape[0])
    # All hashes at once: only the tables' updates depend on one another.
    recent = _recent_at(tokens, positions, memory.max_match)
    codes = [_fingerprint(recent[:, -n:], scope) for n in memory.orders]
    codes = jnp.stack(codes, axis=1)
    # The first tokens have fewer predecessors than an n-gram needs.
    has_context = positions[:, None] >= np.asarray(memory.orders)
    rows = np.arange(len(memory.orders))

    is_kin_of = lambda owners: jnp.zeros(owners.shape, bool)
    most = most_of_kin = memory.num_slots
    if owner is not None:
        is_kin_of = lambda owners: owner.is_kin[owners]
        most = (owner.share * memory.num_slots).astype(jnp.int32)
        most_of_kin = (owner.kin_share * memory.num_slots).astype(jnp.int32)

    is_taken = memory.counts > 0
    held = jnp.sum(is_taken & (memory.owners == scope), axis=1)
    held_by_kin = jnp.sum(is_taken & is_kin_of(memory.owners), axis=1)

    def enter(position, tables):
        fingerprints, followers, counts, owners, held, held_by_kin = tables
        code = codes[position]
        token = tokens[position]
        slot = (code % memory.num_slots).astype(jnp.int32)
        # A slot is a majority vote (Boyer and Moore): the token it holds is counted up
        # when it comes again and down by anything else, and replaced once its count is
        # used up.
        count = counts[rows, slot]
        before = owners[rows, slot]
        # Who has taken its share moves within that: it neither takes a slot of others
        # nor counts it down. So a flood of one scope's text leaves theirs in place.
        is_own = (count > 0) & (before == scope)
        is_of_kin = (count > 0) & is_kin_of(before)
        has_room = (held < most) & (is_of_kin | (held_by_kin < most_of_kin))
        is_real = has_context[position] & (is_own | has_room)
        is_known = is_own & (fingerprints[rows, slot] == code)
        is_same = is_known & (followers[rows, slot] == token)
        is_new = is_real & ~is_same & (count <= 1)
        changed = jnp.where(is_same, jnp.minimum(count + 1, _MAX_COUNT), count - 1)
        changed = jnp.where(is_new, 1, changed)
        put = lambda table, value, where: table.at[rows, slot].set(
            jnp.where(where, value, table[rows, slot])
        )

        return (
            put(fingerprints, code, is_new),
            put(followers, token, is_new),
            put(counts, changed, is_real),
            put(owners, scope, is_new),
            held + (is_new & ~is_own),
            held_by_kin + (is_new & ~is_of_kin),
        )

    tables = memory.fingerprints, memory.tokens, memory.counts, memory.owners
    fingerprints, followers, counts, owners, *_ = jax.lax.fori_loop(
        0, num_tokens, enter, (*tables, held, held_by_kin)
    )

    return memory.replace(
        fingerprints=fingerprints, tokens=followers, counts=counts, owners=owners
    )


def with_ngrams(
    drafter: Drafter, tree: TreeConfig, has_batched_writes: bool = False
) -> Drafter:
    """Lends n-gram suggestions to a drafter; its `Draft` must carry a memory.

    Args:
      has_batched_writes: As in `Numerics`.

    Raises:
      ConfigError: Children are drawn: a suggestion in place of a draw is not exact.
    """
    if tree.children != "topk":
        raise ConfigError(
            f"n-grams suggest tokens, which is exact only for children='topk', not "
            f"{tree.children!r}; switch them off with ngrams=False"
        )

    def init_cache(batch_size, capacity):
        return {
            "drafter": drafter.init_cache(batch_size, capacity),
            # Slot i holds the token at position i + 1.
            "history": jnp.zeros((batch_size, capacity), jnp.int32),
            "scopes": jnp.zeros((batch_size,), jnp.int32),
        }

    def extend(
        draft: Draft, shared: SharedTables, cache: dict, pairs: Pairs
    ) -> tuple[dict, DraftContext]:
        inner, context = drafter.extend(draft, shared, cache["drafter"], pairs)
        return _moved_on(cache, inner, written(cache, pairs), pairs.scopes), context

    def written(cache: dict, pairs: Pairs) -> Int[Array, "b s"]:
        return kv.write_rows(
            cache["history"][..., None],
            pairs.tokens[..., None],
            pairs.starts,
            is_batched=has_batched_writes,
        )[..., 0]

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: dict,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[dict, DraftContext, Retraced]:
        assert drafter.retrace is not None
        history = written(cache, pairs)
        own = _suggested_at(_memory_of(draft), history, pairs, cache["scopes"])
        inner, context, found = drafter.retrace(
            draft,
            shared,
            cache["drafter"],
            context,
            pairs,
            likelier(own, suggested),
        )

        return _moved_on(cache, inner, history, pairs.scopes), context, found

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: dict,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, dict]:
        hints = either(_hints_of(draft, cache, roots.position), hints)
        proposed, inner = drafter.propose(draft, shared, cache["drafter"], roots, hints)
        return proposed, _moved_on(cache, inner, cache["history"])

    return drafter._replace(
        init_cache=init_cache,
        extend=extend,
        propose=propose,
        is_sure=_is_sure,
        retrace=retrace if drafter.retrace is not None else None,
    )


def _moved_on(cache: dict, inner, history, scopes=None) -> dict:
    """The cache behind newer tokens."""
    # The first pass over a prompt says whose it is; later ones need not.
    return {
        "drafter": inner,
        "history": history,
        "scopes": cache["scopes"] if scopes is None else scopes,
    }


def _memory_of(draft: Draft) -> NgramMemory:
    if draft.memory is None:
        raise ConfigError("drafting with n-grams needs a draft with a memory")

    return draft.memory


def _suggested_at(memory: NgramMemory, history, pairs: Pairs, scopes) -> Suggested:
    """What was suggested in the place of each token of the pairs."""
    # Slot `p - 1` holds the token at position p: before token i of the pairs so many
    # are known, and nothing behind them is looked at.
    num_known = pairs.starts[:, None] + jnp.arange(pairs.tokens.shape[1])
    index = num_known[..., None] + jnp.arange(-memory.max_match, 0)
    recent = jax.vmap(lambda row, at: row[jnp.maximum(at, 0)])(history, index)
    recent = jnp.where(index >= 0, recent, _NO_TOKEN)
    tokens, log_rates, _ = suggest(memory, history, num_known, recent, scopes)

    return Suggested(tokens, log_rates)


def _hints_of(draft: Draft, cache: dict, position: Int[Array, " b"]) -> Hints:
    """What the root's n-grams suggest."""
    memory = _memory_of(draft)
    history = cache["history"]
    # The root is at `position`, which slot `position - 1` holds; it is the last of
    # `recent`.
    index = position[:, None] + jnp.arange(-memory.max_match, 0)
    recent = jnp.take_along_axis(history, jnp.maximum(index, 0), axis=1)
    recent = jnp.where(index >= 0, recent, _NO_TOKEN)

    def suggest_after(recent, depth):
        # Drafted tokens are not in the history: matches end before the root's
        # follower, wherever the path has got to.
        num_known = jnp.broadcast_to(position[:, None], recent.shape[:2])
        return suggest(memory, history, num_known, recent, cache["scopes"])

    return Hints(recent, suggest_after)


def _is_sure(
    draft: Draft, cache: dict, position: Int[Array, " b"]
) -> Bool[Array, " b"] | None:
    """Whether a long n-gram says what follows the root; None where none is kept."""
    memory = draft.memory
    # Shorter matches have no rates that pay for a longer chain.
    if memory is None or memory.max_match < _SURE_MATCH:
        return None

    hints = _hints_of(draft, cache, position)
    _, log_rate, _ = hints.suggest(hints.recent[:, None], 0)
    return log_rate[:, 0] >= np.log(_SURE_RATE)


NGRAM = Family(
    name="ngram",
    description="no parameters: what followed the same tokens before (prompt lookup)",
    build=suggested_chain,
    ngrams="always",
    memory_orders=ORDERS,
)

SUFFIX = Family(
    name="suffix",
    description="likewise, with longer n-grams of past answers and deeper drafts",
    build=suggested_chain,
    ngrams="always",
    memory_orders=SUFFIX_ORDERS,
)
