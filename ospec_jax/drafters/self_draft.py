# SPDX-License-Identifier: Apache-2.0
"""The target drafts for itself: its first layers, or its weights in four bits.

Both read the keys and values that the target has cached for verified tokens, so they
have no state of their own and nothing to do after a verification. For the first layers
these entries are exactly their own; for coarser weights (ML-SpecQD, arXiv 2503.13565)
they are better than their own would be.
"""

import jax
import jax.numpy as jnp

from ospec_jax.config import ModelConfig, TreeConfig
from ospec_jax.drafters.base import Drafter, Family, Hints, stateless
from ospec_jax.drafters.growth import Nodes, Step, grow, num_scratch
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.layers import Numerics
from ospec_jax.types import Draft, DraftContext, DraftTree, Roots, SharedTables

GROUP = 32
"""Weights that share a scale in four bits."""


def self_draft(
    config: ModelConfig,
    tree: TreeConfig,
    numerics: Numerics,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafter; a `Draft` without parameters uses the target's.

    Args:
      config: The target's, with as many layers as shall draft. The final norm and the
        head follow the last of them.
      stop_fn: When a row grows no deeper; see `drafters.stopping`.
    """
    model = llama.build(config, numerics)

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: tuple,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, tuple]:
        params = first_layers(draft.params or shared.params, shared, config, numerics)

        def step(entries, nodes: Nodes):
            out, _, entries = model(
                params, nodes.tokens, nodes.positions, nodes.bias, entries, nodes.starts
            )
            # Nothing is learned from states here, so there are none: the placeholder of
            # width one is passed on.
            return nodes.hidden, llama.target_logits(params, out, numerics), entries

        proposed = propose_from_root(
            step,
            tree,
            first_entries(shared, config.num_layers),
            roots,
            None,
            hints,
            stop_fn,
            numerics=numerics,
        )
        return proposed, cache

    # The root has a slot, too.
    return stateless(propose, num_scratch(tree) + 1, reads_target=True)


def first_layers(params, shared: SharedTables, config: ModelConfig, numerics: Numerics):
    """The parameters of a target's first layers; others may be among them.

    Args:
      config: Of these layers alone.
    """
    assert shared.cache is not None, "the drafter reads the target"
    keys = shared.cache.keys
    # A native call runs the first of more layers where they lie.
    if not numerics.is_scanned or llama.is_one_call(
        config, numerics, keys, params["layers"]
    ):
        return params

    first = jax.tree.map(lambda stacked: stacked[: config.num_layers], params["layers"])
    return {**params, "layers": first}


def first_entries(shared: SharedTables, num_layers: int) -> kv.KVCache:
    """What a target's first layers have cached of verified tokens."""
    assert shared.cache is not None, "the drafter reads the target"
    # A tuple of layers or one stacked array: the slice is right for both.
    keys = shared.cache.keys
    values = shared.cache.values
    return kv.KVCache(keys=keys[:num_layers], values=values[:num_layers])


def propose_from_root(
    step: Step,
    tree: TreeConfig,
    entries: kv.KVCache,
    roots: Roots,
    *args,
    numerics: Numerics,
) -> DraftTree:
    """Drafts behind what the target has cached of verified tokens.

    The root is not among these: it is the first token that `step` runs over.

    Args:
      entries: The target's, of the layers that draft; a copy is written to.
      args: Further ones of `grow`.
    """
    # The root's own pass makes what verification leaves in the context of other
    # drafters: its state, and the logits of its children.
    starts = roots.position
    root = Nodes(
        tokens=roots.token[:, None],
        hidden=jnp.zeros((roots.token.shape[0], 1, 1)),
        positions=starts[:, None],
        bias=kv.causal_bias(starts, 1, entries.capacity),
        starts=starts,
        depth=0,
    )
    hidden, logits, entries = step(entries, root)
    context = DraftContext(hidden=hidden[:, 0], logits=logits[:, 0])
    roots = roots.replace(context=context)
    # The written copy is dropped: verification runs the target's own layers over the
    # tree and makes the entries that stay.
    drafted, _ = grow(step, tree, entries, roots, *args, numerics=numerics, offset=1)

    return drafted


def in_four_bits(params):
    """Rounds all kernels of the layers to four bits, in groups of `GROUP` inputs.

    The values keep the storage and the products of the target's precision: XLA:CPU has
    no faster product for four bits, so there this measures acceptance, not speed. The
    embedding and the head stay as they are.
    """
    rounded = dict(params)
    for name, value in params.items():
        if isinstance(value, dict):
            rounded[name] = in_four_bits(value)
        elif name == "kernel":
            rounded |= _rounded(params)

    return rounded


@jax.jit
def _rounded(linear: dict) -> dict:
    kernel = linear["kernel"]
    num_out, num_in = kernel.shape
    # Rows that do not divide share one scale.
    size = GROUP if num_in % GROUP == 0 else num_in
    groups = kernel.astype(jnp.float32).reshape(num_out, num_in // size, size)
    # Symmetric: 15 levels from -7 to 7.
    step = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / 7.0
    values = jnp.round(groups / jnp.maximum(step, 1e-12)) * step
    values = values.reshape(num_out, num_in)
    if kernel.dtype == jnp.int8:  # in units of the row's scale, at most 127
        values = jnp.round(values)

    return {"kernel": values.astype(kernel.dtype)}


SELF = Family(
    name="self",
    description="the target itself: int4 (its weights in four bits), exit-N (N layers)",
    build=self_draft,
    config=ModelConfig,
)
