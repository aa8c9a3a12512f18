# SPDX-License-Identifier: Apache-2.0
"""A drafting model that learns which steps the target prefers: Online-LR.

Each drafted step that the verifier told from the target's own makes a pair: behind the
same tokens the target's step was chosen, the draft's rejected. Direct preference
optimisation (Rafailov et al., arXiv 2305.18290, equation 7) makes the chosen one
likelier, in comparison with a reference, which for OnlineSPEC (arXiv 2603.12617,
section on Online-LR) is the draft as it was when the chunk of problems began:

    loss = -log sigmoid(beta * ((log p(c) - log p(r)) - (log ref(c) - log ref(r))))

Log-probabilities are sums over a step's tokens. Differences from the released code:
both steps stand behind all that was accepted before them; steps keep their ends; pairs
of equal steps, and those that no verifier judged, are left out.

What is learned are low-rank differences to the last layers' matrices. The model decodes
with them added, in its own precision; the layers below run as they decode.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ospec_jax.config import ConfigError, ModelConfig, whole_number
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.hub import Target
from ospec_jax.models.layers import Numerics, linear
from ospec_jax.models.quantization import cast_leaf
from ospec_jax.reasoning.lookahead import LossyAnswer
from ospec_jax.reasoning.writing import Step
from ospec_jax.typing import Params, struct

_CHUNK = 64
"""Sequences and steps are padded to multiples of so many tokens."""
_LARGEST_STEP = 10.0
"""Of the gradient's norm: one odd pair must not throw the model off."""


class PreferencePair(NamedTuple):
    """Two steps behind the same tokens, the first of which the target prefers."""

    prefix: Step
    chosen: Step
    rejected: Step


def collect_pairs(answer: LossyAnswer) -> list[PreferencePair]:
    """What an answer tells of the target's preferences, in order."""
    pairs = []
    for cycle in answer.cycles:
        number = cycle.num_accepted
        # All were kept, or the newest was told apart by no judgement of it.
        if number == len(cycle.judgements) or not cycle.judgements[number].is_judged:
            continue
        accepted = (token for step in cycle.drafted[:number] for token in step)
        pair = PreferencePair(
            (*cycle.prefix, *accepted), cycle.written[number], cycle.drafted[number]
        )
        if pair.chosen != pair.rejected:
            pairs.append(pair)

    return pairs


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How a drafting model learns from pairs.

    Attributes:
      loss: `dpo`, or `sft`: the baseline OSD-LR, which makes the target's steps
        likelier and knows of no rejected ones.
      reference: What DPO compares with: the model at the start of the `chunk`, as in
        the released code, or the `original`.
      beta: Of DPO.
      learning_rate: Of Adam (0.9, 0.95), on the low-rank differences; the released
        code's 5e-7 is for all parameters.
      rank: Of the differences.
      num_layers: Last layers that learn, at most all but the first.
      num_epochs: Times that a chunk's pairs are gone through: 3 for DPO, 1 for SFT.
      batch_size: Pairs of one step.
      max_pairs: Of one chunk; others are left out, by chance.
      max_tokens: Of a prefix and a step together; longer prefixes lose their
        beginning.
      seed: Of the differences' first values, and of the pairs' order.
    """

    loss: Literal["dpo", "sft"] = "dpo"
    reference: Literal["chunk", "original"] = "chunk"
    beta: float = 0.1
    learning_rate: float = 1e-4
    rank: int = 8
    num_layers: int = 4
    num_epochs: int = 3
    batch_size: int = 12
    max_pairs: int = 40
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self):
        if self.loss not in ("dpo", "sft"):
            raise ConfigError(f"loss is {self.loss!r}; use dpo or sft")
        if self.reference not in ("chunk", "original"):
            raise ConfigError(f"reference is {self.reference!r}; use chunk or original")
        for name in ("beta", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is above 0")
        for name in ("rank", "num_layers", "num_epochs", "batch_size", "max_pairs"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("max_tokens", self.max_tokens, least=2 * _CHUNK)


@struct
class PreferenceState:
    """What learning has come to.

    Attributes:
      deltas: By layer and matrix, `left` `[out, r]` and `right` `[r, in]`, whose
        product is added to it.
      opt_state: Of optax.
      num_updates: Steps so far.
    """

    deltas: Params
    opt_state: Any
    num_updates: Int[Array, ""]


class PreferenceInfo(NamedTuple):
    """What a chunk came to; for looking at.

    Attributes:
      num_pairs: That were learned from.
      first_loss: Mean over the first epoch, each before it was learned from.
      last_loss: Likewise over the last epoch.
      margin: Mean of `log p(c) - log p(r)` less the reference's, over the last epoch,
        in nats; 0 where only the loss `sft` is asked for.
      is_finite: Whether the new state is; if not, the old one stays.
    """

    num_pairs: int
    first_loss: float
    last_loss: float
    margin: float
    is_finite: bool


class PreferenceLearner(NamedTuple):
    """Learns from pairs.

    Attributes:
      init: `() -> PreferenceState`, of the model as it is.
      update: `(state, pairs) -> (state, PreferenceInfo)`, one chunk's. Without pairs
        the state stays as it is.
      serve: `state -> params`, the model with what was learned, in its precision.
      settings: What it was built with, as JSON has it.
    """

    init: Callable[[], PreferenceState]
    update: Callable[
        [PreferenceState, Sequence[PreferencePair]],
        tuple[PreferenceState, PreferenceInfo],
    ]
    serve: Callable[[PreferenceState], Params]
    settings: dict[str, Any]


class _Batch(NamedTuple):
    """Pairs as arrays: rows `2 i` are chosen, rows `2 i + 1` rejected.

    Attributes:
      tokens: `[2 p, t]` prefixes with a step behind each.
      starts: `[2 p]` where the step begins.
      sizes: `[2 p]` tokens of the step; 0 is no pair at all.
    """

    tokens: Int[Array, "b t"]
    starts: Int[Array, " b"]
    sizes: Int[Array, " b"]


def preference_loss(
    log_probs: Float[Array, " b"],
    references: Float[Array, " b"],
    is_real: Float[Array, " p"],
    beta: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """DPO's loss and the margin, means over the pairs.

    Args:
      log_probs: Of the steps under the model, chosen and rejected in turns.
      references: Likewise under the reference.
      is_real: 1 for a pair, 0 for padding.
    """
    gains = log_probs - references
    margins = gains[::2] - gains[1::2]
    mean = lambda x: jnp.sum(x * is_real) / jnp.maximum(jnp.sum(is_real), 1)
    return mean(-jax.nn.log_sigmoid(beta * margins)), mean(margins)


def preference_learner(
    target: Target, config: PreferenceConfig = PreferenceConfig()
) -> PreferenceLearner:
    """Builds the learner of a drafting model.

    Args:
      target: The model that drafts steps, as it was loaded.

    Raises:
      ConfigError: It is split over devices, or its layers are stacked.
    """
    if target.mesh is not None or target.numerics.is_scanned:
        raise ConfigError(
            f"{target.name} is split over devices or has stacked layers, and then does "
            f"not learn steps; load it without a mesh and with is_scanned=False"
        )

    # The layers below are run as they decode; there is one at least.
    first = max(1, target.config.num_layers - config.num_layers)
    names = [f"layers_{i}" for i in range(first, target.config.num_layers)]
    log_probs = _build_log_probs(target.config, target.numerics, first)
    optimizer = optax.chain(
        optax.clip_by_global_norm(_LARGEST_STEP),
        optax.adam(config.learning_rate, b1=0.9, b2=0.95),
    )

    def init() -> PreferenceState:
        key = jax.random.key(config.seed)
        deltas = {
            name: _empty(target.params[name], config.rank, jax.random.fold_in(key, i))
            for i, name in enumerate(names)
        }
        return PreferenceState(deltas, optimizer.init(deltas), jnp.int32(0))

    def loss_of(deltas, params, batch: _Batch, references):
        found = log_probs(params, deltas, batch)
        return _loss_of(config, batch, found, references)

    @jax.jit
    def reference_of(params, deltas, batch: _Batch):
        return log_probs(params, deltas, batch)

    @jax.jit
    def step(state: PreferenceState, params, batch: _Batch, references):
        (loss, margin), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.deltas, params, batch, references
        )
        moves, opt_state = optimizer.update(grads, state.opt_state, state.deltas)
        deltas = optax.apply_updates(state.deltas, moves)
        return PreferenceState(deltas, opt_state, state.num_updates + 1), loss, margin

    def update(
        state: PreferenceState, pairs: Sequence[PreferencePair]
    ) -> tuple[PreferenceState, PreferenceInfo]:
        if not pairs:
            return state, PreferenceInfo(0, 0.0, 0.0, 0.0, True)

        # By the state's own count, so that a run that is resumed goes on as it would.
        rng = random.Random(f"{config.seed} {int(state.num_updates)}")
        num_pairs = min(len(pairs), config.max_pairs)
        batches = _batches_of(config, rng.sample(list(pairs), num_pairs))
        origin = init() if config.reference == "original" else state
        references = [np.zeros(2 * config.batch_size, np.float32)] * len(batches)
        if config.loss == "dpo":
            references = [
                reference_of(target.params, origin.deltas, batch) for batch in batches
            ]

        new = state
        course = []
        order = list(range(len(batches)))
        for _ in range(config.num_epochs):
            rng.shuffle(order)
            found = []
            for i in order:
                new, loss, margin = step(new, target.params, batches[i], references[i])
                found.append((float(loss), float(margin)))
            course.append(np.mean(found, axis=0))

        info = _info_of(num_pairs, course, new)
        return (new if info.is_finite else state), info

    def serve(state: PreferenceState) -> Params:
        return _served(target, names, state)

    return PreferenceLearner(init, update, serve, dataclasses.asdict(config))


def _loss_of(config: PreferenceConfig, batch: _Batch, log_probs, references):
    """A batch's loss and margin; see `preference_loss`."""
    is_real = (batch.sizes[::2] > 0).astype(jnp.float32)
    if config.loss == "sft":
        # Nats by token, as language models are trained.
        chosen = log_probs[::2] / jnp.maximum(batch.sizes[::2], 1)
        count = jnp.maximum(jnp.sum(is_real), 1)
        return -jnp.sum(chosen * is_real) / count, jnp.float32(0)

    return preference_loss(log_probs, references, is_real, config.beta)


def _batches_of(config: PreferenceConfig, pairs: list[PreferencePair]) -> list[_Batch]:
    """Pairs in batches of one size, the last one filled up."""
    size = config.batch_size
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [_as_batch(group, size, config.max_tokens) for group in groups]


def _info_of(
    num_pairs: int, course: list[np.ndarray], state: PreferenceState
) -> PreferenceInfo:
    """What a chunk came to.

    Args:
      course: Mean loss and margin of each epoch.
      state: Behind the last one.
    """
    leaves = jax.tree.leaves(state.deltas)
    return PreferenceInfo(
        num_pairs=num_pairs,
        first_loss=float(course[0][0]),
        last_loss=float(course[-1][0]),
        margin=float(course[-1][1]),
        is_finite=all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves),
    )


def _served(target: Target, names: list[str], state: PreferenceState) -> Params:
    """The model with its differences added to the layers of these names."""
    # Casting to int8 once more would change scales by a last bit.
    if not int(state.num_updates):
        return target.params

    precision = target.numerics.precision
    changed = {}
    for name in names:
        whole = _added(_as_floats(target.params[name]), state.deltas[name])
        changed[name] = _cast_like(whole, target.params[name], precision)

    return {**target.params, **changed}


def _build_log_probs(config: ModelConfig, numerics: Numerics, first: int) -> Callable:
    """`(params, deltas, batch) -> [b]`, log-probabilities of each row's step."""
    below = dataclasses.replace(config, num_layers=first)
    run_below = llama.build(below, numerics, is_truncated=True)
    trained = Numerics(is_row_invariant=False)
    run_last = llama.build_last_layers(config, trained, first)

    def log_probs(params: Params, deltas: Params, batch: _Batch):
        b, t = batch.tokens.shape
        starts = jnp.zeros((b,), jnp.int32)
        cache = llama.init_cache(below, numerics, b, t)
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        bias = kv.causal_bias(starts, t, t)
        x, _, _ = run_below(params, batch.tokens, positions, bias, cache, starts)
        last = {
            name: _added(_as_floats(params[name]), delta)
            for name, delta in deltas.items()
        }
        hidden = run_last({**last, "norm": params["norm"]}, jax.lax.stop_gradient(x))

        # Logits of the steps alone: the vocabulary is large, and prefixes are long.
        length = _longest_step(t)
        places = batch.starts[:, None] + jnp.arange(length)
        before = jnp.take_along_axis(hidden, (places - 1)[..., None], axis=1)
        tokens = jnp.take_along_axis(batch.tokens, jnp.minimum(places, t - 1), axis=1)
        head = _as_floats(llama.head_table(params))
        logits = linear(before, head, trained)[..., : config.vocab_size]
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        found = chosen - jax.nn.logsumexp(logits, axis=-1)
        is_real = jnp.arange(length) < batch.sizes[:, None]
        return jnp.sum(jnp.where(is_real, found, 0.0), axis=1)

    return log_probs


def _longest_step(num_tokens: int) -> int:
    """Tokens of a step that a sequence of this shape may end with."""
    return min(num_tokens // 2, 2 * _CHUNK)


def _as_batch(pairs: Sequence[PreferencePair], size: int, max_tokens: int) -> _Batch:
    """Arrays of so many pairs, of as few shapes as will do.

    A prefix that is too long loses its beginning, a step its end.
    """
    rows = []
    for prefix, *steps in pairs:
        longest_step = _longest_step(max_tokens)
        steps = [step[:longest_step] for step in steps]
        # Both begin in the same place, so that they read the same.
        room = max_tokens - max(map(len, steps))
        prefix = prefix[-room:]
        rows += [(prefix, step) for step in steps]

    longest = max(len(prefix) + len(step) for prefix, step in rows)
    widest = 2 * max(len(step) for _, step in rows)
    num_tokens = -(-max(longest, widest) // _CHUNK) * _CHUNK
    tokens = np.zeros((2 * size, num_tokens), np.int32)
    starts = np.ones(2 * size, np.int32)
    sizes = np.zeros(2 * size, np.int32)
    for i, (prefix, step) in enumerate(rows):
        tokens[i, : len(prefix) + len(step)] = (*prefix, *step)
        starts[i] = len(prefix)
        sizes[i] = len(step)

    return _Batch(*map(jnp.asarray, (tokens, starts, sizes)))


def _empty(params: Params, rank: int, key) -> Params:
    """Differences that add nothing, to every matrix of a tree."""
    found = {}
    for i, (name, value) in enumerate(sorted(params.items())):
        own = jax.random.fold_in(key, i)
        if isinstance(value, dict):
            found |= {name: inner} if (inner := _empty(value, rank, own)) else {}
        elif name == "kernel" and value.ndim == 2:
            rows, columns = value.shape
            right = jax.random.normal(own, (rank, columns)) * columns**-0.5
            found |= {"left": jnp.zeros((rows, rank)), "right": right}

    return found


def _as_floats(params: Params) -> Params:
    """A tree in float32; of int8 matrices what their numbers stand for."""
    found = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found[name] = _as_floats(value)
        elif value.dtype == jnp.int8:
            scale = params[f"{name.removesuffix('kernel')}scale"]
            found[name] = value.astype(jnp.float32) * scale[:, None]
        elif not (name.endswith("scale") and _has_int8(params, name)):
            found[name] = value.astype(jnp.float32)

    return found


def _has_int8(params: Params, scale: str) -> bool:
    """Whether a scale is that of an int8 matrix, not a norm's gain."""
    kernel = params.get(f"{scale.removesuffix('scale')}kernel")
    return kernel is not None and kernel.dtype == jnp.int8


def _added(params: Params, deltas: Params) -> Params:
    """A tree in float32 with its differences."""
    found = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found[name] = _added(value, deltas.get(name, {}))
        elif name == "kernel" and "left" in deltas:
            found[name] = value + deltas["left"] @ deltas["right"]
        else:
            found[name] = value

    return found


def _cast_like(params: Params, like: Params, precision) -> Params:
    """A tree in float32 as another one of its structure is stored."""
    found = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found[name] = _cast_like(value, like[name], precision)
        elif like[name].dtype == jnp.int8:
            found |= cast_leaf(name, value, "int8")
        else:
            found[name] = value.astype(like[name].dtype)

    return found
