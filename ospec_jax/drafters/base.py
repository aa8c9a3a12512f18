# SPDX-License-Identifier: Apache-2.0
"""What a drafter is: a bundle of pure functions over a `Draft`.

Laws, held by the conformance test: cached logits equal uncached ones after partial and
full acceptance; `unroll` reproduces what `propose` computed; rows are independent.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ospec_jax.config import ConfigError, DraftConfig, ModelConfig
from ospec_jax.types import Draft, DraftContext, Pairs, SharedTables


class Hints(NamedTuple):
    """Suggestions that a drafter considers while it grows a tree.

    Attributes:
      recent: `[b, m]` the last tokens up to the root, -1 before the first.
      suggest: `(recent [b, w, m], depth) -> (tokens [b, w], log_probs [b, w], sources
        [b, w])`: a likely next token of each of `w` paths, of which the last `depth`
        tokens were drafted; -inf for none. The sources say who suggests it
        (`drafters.sources`); None where nobody asks.
    """

    recent: jax.Array
    suggest: Callable


class Drafter(NamedTuple):
    """A drafting algorithm for one target and one tree.

    Attributes:
      init_params: `key -> params`, freshly initialised.
      init_cache: `(batch_size, capacity) -> cache`.
      init_context: `batch_size -> context`, of the shapes that `extend` returns.
      extend: `(draft, shared, cache, pairs) -> (cache, context)`: runs over verified
        tokens; see `Pairs`.
      propose: `(draft, shared, cache, roots, hints=None) -> (tree, cache)`: drafts a
        tree under every root; see `Roots`.
      unroll: `(params, token_ids, shared, feedback, start, *, num_context, num_steps,
        candidates=None) -> [logits [b, t, q]]` by depth, the training forward pass; see
        `learners.losses`. `feedback` is of consecutive tokens, `start[b]` the position
        of the first, negative ones being padding. The first `num_context` serve as
        context alone; the `t` that follow predict `num_steps` deep. `candidates[c]` are
        the entries of the draft vocabulary whose logits are wanted, None all.
      num_scratch: Cache slots that `propose` uses beyond the committed ones.
      unroll_outputs: As `unroll`, but returns the logits and, by depth, the states that
        they were made of; None where these are not of one kind.
      has_features: Those states are predictions of the target's final ones.
      is_sure: `(draft, cache, position [b]) -> is_sure [b]`: whether a long chain of
        its suggestions is likely to be right; None for a drafter that never is, or has
        no suggestions. It may return None, too.
      predict: `(draft, shared, hidden) -> logits [b, q]` of a context's state. Where it
        is given, a context's logits are made when something is drafted, not before:
        plain steps keep a draft up to date for less.
      reads_target: `propose` needs the target's parameters and cache in `shared`.
      head_inputs: `(params, states [..., d]) -> [..., e]`: what the draft's own output
        projection `lm_head` reads of its states; None for drafts without one.
      retrace: `(draft, shared, cache, context, pairs, suggested=None) -> (cache,
        context, Retraced)`: as `extend`, and beside it what would have been drafted in
        the place of each of the pairs' `tokens`. `context` is that of the state before
        the first pair. None for a drafter that would have to draft to know.
      adds_deltas: Its logits have the differences of the rows' scopes, where the draft
        that it is given holds them; see `drafters.deltas`.
      takes_chosen: Of a pool it is given the member that proposes alone, in the draft
        and in the state; see `drafters.pool.take_chosen`.
    """

    init_params: Callable
    init_cache: Callable
    init_context: Callable
    extend: Callable
    propose: Callable
    unroll: Callable
    num_scratch: int
    unroll_outputs: Callable | None = None
    has_features: bool = False
    is_sure: Callable | None = None
    predict: Callable | None = None
    reads_target: bool = False
    head_inputs: Callable | None = None
    retrace: Callable | None = None
    adds_deltas: bool = False
    takes_chosen: bool = False


READING = ("init_cache", "init_context", "extend", "is_sure", "predict")
"""Fields of a `Drafter` that running over tokens takes; they know of no tree."""


def as_reader(drafter: Drafter | None) -> Drafter | None:
    """A drafter that runs over tokens and drafts nothing, the same one for all trees.

    For those whose fields `READING` are the same objects, as `build_drafter` gives
    them.
    """
    if drafter is None:
        return None

    return drafter._replace(
        init_params=_drafts_nothing,
        propose=_drafts_nothing,
        unroll=_drafts_nothing,
        unroll_outputs=None,
        head_inputs=None,
        retrace=None,
        num_scratch=0,
    )


def _drafts_nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("it runs over tokens alone")


class Family(NamedTuple):
    """All that sets one family of drafters apart.

    Attributes:
      name: What checkpoints and the command line call it.
      description: One line about what drafts, and from what.
      build: `(config, tree, numerics, stop_fn) -> Drafter`. `config` is of the class
        below; `stop_fn` is a depth policy, or None (`drafters.stopping`).
      config: Of a draft's architecture: a `DraftConfig` for families that are stored
        with their parameters, `ModelConfig` where a language model drafts, what else
        an architecture is made of, None for families without parameters.
      default_config: `(model, draft_vocab_size, num_steps, layer) -> config` of a draft
        for a target of the architecture `model` that shall draft `num_steps` tokens;
        `layer` matters if `has_layer` alone, and 0 leaves the choice of it to the
        family. None for families that are not trained.
      public_config: `(model, num_steps) -> config` of a draft as large as those that
        are published, where these are not of the default's kind; None where they are.
      warm_start: `(params, target) -> params`: of freshly initialised parameters those
        that a target of the draft's own shape gives a better start; None for none.
      max_depth: `config -> int`, the most tokens that it can draft one after the other;
        None for any number.
      reads_taps: Its features are states within the target, at the layers `taps`; else
        they are the target's final states, or none.
      has_layer: A draft belongs to one layer of the target, which a user may choose.
      feature_weight: Of the loss on predicted states, where these are trained.
      ngrams: Whether n-grams suggest tokens to it: where that is `wanted`, or `always`
        or `never`, whatever is wanted.
      memory_orders: Lengths of the n-grams that its memory holds.
      adopts: Family whose trained drafts are a start for one of this; "" for none.
      adopt: `(config, params, embedding [v, d], num_steps) -> (config, params)` of a
        draft for `num_steps` tokens from one of the family that it adopts.
    """

    name: str
    description: str
    build: Callable[..., Drafter]
    config: type | None = None
    default_config: Callable[[ModelConfig, int, int, int], DraftConfig] | None = None
    public_config: Callable[[ModelConfig, int], DraftConfig] | None = None
    warm_start: Callable[[Any, Any], dict] | None = None
    max_depth: Callable[[Any], int] | None = None
    reads_taps: bool = False
    has_layer: bool = False
    feature_weight: float = 0.0
    ngrams: Literal["wanted", "always", "never"] = "wanted"
    memory_orders: tuple[int, ...] = (2, 3)
    adopts: str = ""
    adopt: Callable[[Any, Any, Any, int], tuple[DraftConfig, Any]] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether its drafts have an architecture and parameters that are stored."""
        return self.config is not None and issubclass(self.config, DraftConfig)


def shape_of(model: ModelConfig) -> dict[str, Any]:
    """Values of a `DraftConfig`, all but two, for one layer of the target's shape."""
    return dict(
        vocab_size=model.vocab_size,
        target_hidden_size=model.hidden_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.rms_norm_eps,
        rope_scaling=model.rope_scaling,
    )


def stateless(
    propose: Callable, num_scratch: int = 0, state_width: int = 1, **changes
) -> Drafter:
    """A drafter without a cache of its own, by itself without parameters, too.

    Args:
      state_width: Of the states that it reports of the nodes it ran over.
      changes: Further fields of the `Drafter`.
    """

    def init_context(batch_size: int) -> DraftContext:
        return DraftContext(
            hidden=jnp.zeros((batch_size, state_width)),
            logits=jnp.zeros((batch_size, 1)),
        )

    def extend(draft: Draft, shared: SharedTables, cache: Any, pairs: Pairs):
        return cache, init_context(pairs.inputs.shape[0])

    def unroll(*_, **__):
        raise ConfigError("this draft has no parameters to train")

    drafter = Drafter(
        init_params=lambda key: {},
        init_cache=lambda batch_size, capacity: (),
        init_context=init_context,
        extend=extend,
        propose=propose,
        unroll=unroll,
        num_scratch=num_scratch,
    )
    return drafter._replace(**changes)


def frozen_head(shared: SharedTables, token_ids) -> dict:
    """The target's head on the draft vocabulary, in its own precision.

    Args:
      token_ids: `[q]`, or None for the whole one.

    Returns:
      `{kernel: [q, d], [scale: [q]]}`.
    """
    if token_ids is None:
        return shared.head

    # Gathered in the head's own storage: int8 rows keep their scales.
    return {name: rows[token_ids] for name, rows in shared.head.items()}


def embedding_table(config: DraftConfig, params, shared: SharedTables) -> dict:
    """The embedding that a draft reads, its own or the target's."""
    return params["embed_tokens"] if config.has_own_embedding else shared.embedding


def training_head(
    config: DraftConfig,
    params,
    token_ids,
    shared: SharedTables,
    candidates=None,
    name: str = "lm_head",
) -> dict | None:
    """The float32 head rows of `candidates`; None stands for the draft's own, whole.

    Args:
      candidates: `[c]` entries of the draft vocabulary; None for all.
      name: Of the draft's own head among its parameters.
    """
    # None lets the module read its own projection. Candidate rows are taken from
    # `params`, so gradients reach these as well.
    if config.has_own_head and candidates is None:
        return None
    if config.has_own_head:
        return {key: rows[candidates] for key, rows in params[name].items()}

    # The target's head is frozen: it is a constant of the loss, in float32 whatever it
    # is stored in.
    kernel = dequantized(frozen_head(shared, token_ids))
    return {"kernel": kernel if candidates is None else kernel[candidates]}


def dequantized(table: dict) -> Float[Array, "v d"]:
    """A table in float32, for training."""
    kernel = table["kernel"].astype(jnp.float32)
    return kernel * table["scale"][:, None] if "scale" in table else kernel


def take_row(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values[b, index[b]]` for every row."""
    # One index a row, spread over the trailing axes: `[b, 1, 1, ...]`.
    shape = (-1, 1) + (1,) * (values.ndim - 2)
    return jnp.take_along_axis(values, index.reshape(shape), axis=1)[:, 0]


def states_before(
    context: DraftContext, outputs: Float[Array, "b t d"], num_tokens: int
) -> Float[Array, "b n d"]:
    """The state that predicts each of some pairs' tokens.

    A pair predicts the token behind its own, so the first one's token was predicted
    from what was known before them all.

    Args:
      outputs: Of the pairs, and perhaps of copies behind them.
      num_tokens: How many pairs there are.
    """
    before = context.hidden[:, None].astype(outputs.dtype)
    return jnp.concatenate([before, outputs[:, : num_tokens - 1]], axis=1)
