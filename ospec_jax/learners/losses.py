# SPDX-License-Identifier: Apache-2.0
"""What a draft is trained to do, from verification's own numbers.

Verification recorded the target's final hidden state and the logsumexp of its logits at
every position. The frozen head's rows of the draft vocabulary times that hidden state,
less that logsumexp, are the target's exact log-probabilities there: they need not sum
to one, what is missing belongs to tokens that cannot be drafted.

All of it is of raw logits, of the target's and the draft's alike, however the tokens
were sampled: a draft that matches them matches at any temperature, and after top-k and
top-p. But losses that are chances of acceptance, total variation and what is made of
it, are those at temperature 1 with nothing cut off. At others they are proxies, as
agreement is of anything but greedy decoding.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ospec_jax.config import ConfigError
from ospec_jax.learners.base import LearnerInfo
from ospec_jax.typing import typed

Positions = Literal["all", "rejected"]
_TINY = 1e-12


class Loss(NamedTuple):
    """A loss on the draft's distributions.

    Attributes:
      at_position: `(probs [b, t, q], logits [b, t, q]) -> [b, t]`.
      is_compound: `at_position` is a chance of rejection, and a depth's loss is the
        chance that a token was rejected there or at any depth before it.
    """

    at_position: Callable
    is_compound: bool = False


@typed
def target_probs(
    head: Float[Array, "q d"],
    hidden: Float[Array, "b t d"],
    logsumexp: Float[Array, "b t"],
) -> Float[Array, "b t q"]:
    """The target's probabilities of the draft vocabulary."""
    # Rounding of the recorded float16 states may push a log-probability above 0.
    logits = jnp.einsum("btd,qd->btq", hidden, head)
    return jnp.exp(jnp.minimum(logits - logsumexp[..., None], 0.0))


@typed
def forward_kl(
    probs: Float[Array, "b t q"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t"]:
    """Cross-entropy to the target's distribution: KL(p || q) up to p's entropy."""
    # The target's probabilities need not sum to one, so neither does their weight on
    # the normaliser: -sum p log q = (sum p) logsumexp(z) - sum p z.
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(probs, axis=-1) * total - jnp.sum(probs * logits, axis=-1)


@typed
def reverse_kl(
    probs: Float[Array, "b t q"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t"]:
    """KL(q || p): a draft that seeks one of the target's modes; p at least 1e-12."""
    log_draft = jax.nn.log_softmax(logits, axis=-1)
    log_ratio = log_draft - jnp.log(jnp.maximum(probs, _TINY))
    return jnp.sum(jnp.exp(log_draft) * log_ratio, axis=-1)


@typed
def jsd(
    probs: Float[Array, "b t q"],
    logits: Float[Array, "b t q"],
    forward_share: float = 0.9,
) -> Float[Array, "b t"]:
    """What the released code of OSD calls JSD: a mean of both directions of KL.

    Forward KL counts for 0.9 and reverse KL for 0.1 there (arXiv 2310.07177).
    """
    forward = forward_kl(probs, logits)
    reverse = reverse_kl(probs, logits)
    return forward_share * forward + (1.0 - forward_share) * reverse


@typed
def total_variation(
    probs: Float[Array, "b t q"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t"]:
    """1 - sum(min(p, q)): the probability that a sampled draft token is rejected.

    At temperature 1, with nothing cut off.
    """
    return 1.0 - jnp.sum(jnp.minimum(probs, jax.nn.softmax(logits, axis=-1)), axis=-1)


FORWARD_KL = Loss(forward_kl)
LOSSES = {
    "forward_kl": FORWARD_KL,
    "reverse_kl": Loss(reverse_kl),
    "jsd": Loss(jsd),
    "total_variation": Loss(total_variation),
    # With a_i = sum(min(p, q)) at depth i, the mean over depths of 1 - a_0 ... a_j: the
    # lower, the more tokens are accepted, sum over j of a_0 ... a_j are expected.
    "acceptance_length": Loss(total_variation, is_compound=True),
}
"""Losses by the name that configurations use."""


def named_loss(name: str, forward_share: float = 0.9) -> Loss:
    """The loss of that name.

    Args:
      forward_share: Of forward KL in `jsd`.

    Raises:
      ConfigError: There is none.
    """
    if name not in LOSSES:
        raise ConfigError(
            f"unknown loss {name!r}; one of {', '.join(LOSSES)} is needed"
        )
    if name == "jsd":
        return Loss(functools.partial(jsd, forward_share=forward_share))

    return LOSSES[name]


class LossSums(NamedTuple):
    """What a loss is made of, `[d]` each, by depth; those of a batch's parts add up.

    Attributes:
      lost: The loss at every counted row, times its weight.
      counted: The rows' weight in the loss.
      fresh_lost: As `lost`, of the windows that no update has trained on.
      fresh_counted: Likewise `counted`.
      agreed: Weight of the rows where the draft's best token was the target's.
      missed: The chance of rejection at temperature 1, times the rows' weight.
      seen: The rows' weight in what is reported.
    """

    lost: Float[Array, " d"]
    counted: Float[Array, " d"]
    fresh_lost: Float[Array, " d"]
    fresh_counted: Float[Array, " d"]
    agreed: Float[Array, " d"]
    missed: Float[Array, " d"]
    seen: Float[Array, " d"]


def unrolled_loss(
    logits: list[Float[Array, "b l q"]],
    probs: Float[Array, "b t q"],
    weight: Float[Array, "b t"],
    loss: Loss = FORWARD_KL,
    decay: float = 0.8,
    positions: Positions = "all",
    counted: Float[Array, "b t"] | None = None,
    is_fresh: Bool[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], LearnerInfo]:
    """Mean over depths, weighted by `decay**depth`, of the mean loss (EAGLE-3).

    Args:
      logits: By depth; row i predicts the token after target row i + depth.
      probs: The target's, for rows 0 to l + depths - 1.
      weight: Of the same rows; of what is reported, and of the loss unless `counted`.
      positions: `rejected` takes every row as the root of a chain and counts the depth
        at which the draft's best token first is not the target's: there a greedy
        verification of that chain, drafted by these very parameters, would reject.
        Which chains serving drafted is not recorded.
      counted: The rows' weight in the loss, if another one.
      is_fresh: Windows of which `fresh_loss` tells; None for all.
    """
    sums = loss_sums(logits, probs, weight, loss, positions, counted, is_fresh)
    total = loss_of(sums, decay)
    return total, jax.lax.stop_gradient(info_of(sums, decay))


def loss_sums(
    logits: list[Float[Array, "b l q"]],
    probs: Float[Array, "b t q"],
    weight: Float[Array, "b t"],
    loss: Loss = FORWARD_KL,
    positions: Positions = "all",
    counted: Float[Array, "b t"] | None = None,
    is_fresh: Bool[Array, " b"] | None = None,
) -> LossSums:
    """What `unrolled_loss` is made of; arguments are the same."""
    length = logits[0].shape[1]
    counted = weight if counted is None else counted

    # By row: the chance that a path has survived so far, whether it ran over verified
    # rows alone, and whether the draft's best tokens were right so far.
    survival = on_path = agreed_so_far = jnp.ones_like(weight[:, :length])
    by_depth = []

    # A draft of depth d at row i predicts the token after target row i + d, so every
    # depth is a shifted slice of the same recorded rows.
    for depth, depth_logits in enumerate(logits):
        rows = slice(depth, depth + length)
        p = probs[:, rows]
        w = weight[:, rows]
        used = counted[:, rows]
        is_same = is_agreed(p, depth_logits)
        rejection = loss.at_position(p, depth_logits)
        if loss.is_compound:
            # A path through a row that was not verified is none.
            on_path = on_path * (w > 0)
            survival = survival * jnp.where(w > 0, 1.0 - rejection, 1.0)
            rejection = 1.0 - survival
            used = used * on_path
        # The first disagreement of a chain counts; behind it, verification would have
        # stopped and begun anew.
        if positions == "rejected":
            used = used * agreed_so_far * (1.0 - is_same)
            agreed_so_far = agreed_so_far * is_same

        # The same sums over the windows that no update has trained on: an honest loss.
        fresh = used if is_fresh is None else used * is_fresh[:, None]
        # What is reported counts every verified row, whatever the loss emphasises.
        found = LossSums(
            lost=jnp.sum(rejection * used),
            counted=jnp.sum(used),
            fresh_lost=jnp.sum(rejection * fresh),
            fresh_counted=jnp.sum(fresh),
            agreed=jnp.sum(is_same * w),
            missed=jnp.sum(total_variation(p, depth_logits) * w),
            seen=jnp.sum(w),
        )
        by_depth.append(found)

    return jax.tree.map(lambda *sums: jnp.stack(sums), *by_depth)


def loss_of(
    sums: LossSums, decay: float, counted: Float[Array, " d"] | None = None
) -> Float[Array, ""]:
    """The loss of a batch, or what a part adds to that of all.

    Args:
      counted: Of the whole batch, where the sums are those of a part.
    """
    counted = sums.counted if counted is None else counted
    return _over_depths(_ratio(sums.lost, counted), decay)


def info_of(sums: LossSums, decay: float) -> LearnerInfo:
    """What is reported of a batch, but for the norm of the gradient."""
    emphasis = _emphasis(decay, len(sums.lost))
    return LearnerInfo(
        loss=loss_of(sums, decay),
        agreement=_ratio(sums.agreed, sums.seen),
        acceptance=1.0 - _ratio(sums.missed, sums.seen),
        grad_norm=jnp.float32(0.0),
        weight=jnp.sum(emphasis * sums.counted),
        fresh_loss=_over_depths(_ratio(sums.fresh_lost, sums.fresh_counted), decay),
        fresh_weight=jnp.sum(emphasis * sums.fresh_counted),
    )


def _over_depths(values: Float[Array, " d"], decay: float) -> Float[Array, ""]:
    emphasis = _emphasis(decay, len(values))
    return jnp.sum(emphasis * values) / np.sum(emphasis)


def _emphasis(decay: float, num_depths: int) -> np.ndarray:
    return (decay ** np.arange(num_depths)).astype(np.float32)


def _ratio(total: Float[Array, " d"], weight: Float[Array, " d"]) -> Float[Array, " d"]:
    # A depth without any counted row gives 0, not 0 / 0.
    return total / jnp.maximum(weight, 1e-6)


@typed
def feature_loss(
    features: list[Float[Array, "b l d"]],
    hidden: Float[Array, "b t d"],
    weight: Float[Array, "b t"],
    decay: float = 0.8,
) -> Float[Array, ""]:
    """Smooth L1 between predicted and true final states (EAGLE-1, section 4.2).

    Args:
      features: By depth; row i predicts the target's state at row i + depth.
    """
    length = features[0].shape[1]
    total = jnp.float32(0.0)
    scale = 0.0

    for depth, predicted in enumerate(features):
        rows = slice(depth, depth + length)
        gap = jnp.abs(predicted - hidden[:, rows])
        by_row = jnp.mean(jnp.where(gap < 1, 0.5 * gap**2, gap - 0.5), axis=-1)
        w = weight[:, rows]
        total += decay**depth * jnp.sum(by_row * w) / jnp.maximum(jnp.sum(w), 1e-6)
        scale += decay**depth

    return total / scale


@typed
def is_agreed(
    probs: Float[Array, "b t q"], logits: Float[Array, "b t q"]
) -> Float[Array, "b t"]:
    """1 where the draft's best token is the target's, else 0.

    The target's best token may lie outside the draft vocabulary: surely it does not
    when no single outside token could hold more mass than the best inside one.
    """
    best = jnp.max(probs, axis=-1)
    is_inside = best >= 1.0 - jnp.sum(probs, axis=-1)
    is_same = jnp.argmax(logits, axis=-1) == jnp.argmax(probs, axis=-1)
    return (is_same & is_inside).astype(jnp.float32)


def accepted_lengths(
    logits: list[Float[Array, "b l q"]],
    probs: Float[Array, "b t q"],
    weight: Float[Array, "b t"],
) -> Float[Array, " b"]:
    """Draft tokens that greedy verification would accept, by window; teacher-forced."""
    length = logits[0].shape[1]
    survival = 1.0
    total = 0.0

    for depth, depth_logits in enumerate(logits):
        rows = slice(depth, depth + length)
        # An unverified row ends the path.
        survival = survival * is_agreed(probs[:, rows], depth_logits) * weight[:, rows]
        total = total + survival

    first = weight[:, :length]

    return jnp.sum(total, axis=-1) / jnp.maximum(jnp.sum(first, axis=-1), 1e-6)
