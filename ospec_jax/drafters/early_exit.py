# SPDX-License-Identifier: Apache-2.0
"""Early exit with a trained head: the target's first layers, then a block of its own.

The layers are the target's, in its weights, and read the entries that it cached for
verified tokens; only what stands between the exit and a token is trained. So the draft
has no cache and nothing to do after a verification, and its state at a drafted token is
the target's own wherever the token is right: training needs no unrolled steps.

As in Kangaroo (arXiv 2404.18911), but for its adapter's attention, which would need a
cache, and its own rule of when to stop drafting.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ospec_jax.config import ConfigError, ExitConfig, ModelConfig, TreeConfig
from ospec_jax.drafters.base import (
    Drafter,
    Family,
    Hints,
    shape_of,
    stateless,
    training_head,
)
from ospec_jax.drafters.eagle import eagle3_taps
from ospec_jax.drafters.growth import Nodes, num_scratch
from ospec_jax.drafters.self_draft import first_entries, first_layers, propose_from_root
from ospec_jax.drafters.starts import last_layer
from ospec_jax.drafters.stopping import StopFn
from ospec_jax.models import llama
from ospec_jax.models.layers import (
    Linear,
    Numerics,
    RMSNorm,
    SwiGLU,
    at_least_two_rows,
    linear,
)
from ospec_jax.types import (
    Draft,
    DraftContext,
    DraftTree,
    Feedback,
    Pairs,
    Retraced,
    Roots,
    SharedTables,
    Suggested,
)
from ospec_jax.typing import Params


class ExitHead(nn.Module):
    """A feed-forward block and a norm over the exit's states, and a projection."""

    config: ExitConfig
    numerics: Numerics

    def setup(self):
        c = self.config
        n = self.numerics
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps, n)
        self.mlp = SwiGLU(c.intermediate_size, n)
        self.norm = RMSNorm(c.rms_norm_eps, n)
        if c.has_own_head:
            self.lm_head = Linear(c.draft_vocab_size, n)

    def outputs(self, states):
        """States of the exit, further on."""
        return states + self.mlp(self.post_attention_layernorm(states))

    def head_inputs(self, outputs):
        """What the output projection reads."""
        return self.norm(outputs)

    def logits(self, outputs, head):
        """Draft logits over the rows of `head`, or of the draft's own for None."""
        normed = self.head_inputs(outputs)
        if head is None:
            return self.lm_head(normed)

        return linear(normed, head, self.numerics)

    def init_all(self, states, head):
        """Touches every parameter."""
        outputs = self.outputs(states)
        return self.logits(outputs, head), outputs


def early_exit(
    config: ExitConfig,
    tree: TreeConfig,
    numerics: Numerics | None = None,
    stop_fn: StopFn | None = None,
) -> Drafter:
    """Builds the drafter.

    Args:
      config: The target's shape and the head's.
      tree: How much to draft.
      numerics: For drafting; training is in float32.
      stop_fn: When a row grows no deeper; see `drafters.stopping`.
    """
    numerics = numerics or Numerics()
    module = ExitHead(config, numerics)
    trainer = ExitHead(config, numerics.for_training())
    layers = llama.build(config.model, numerics, is_truncated=True)

    def propose(
        draft: Draft,
        shared: SharedTables,
        cache: tuple,
        roots: Roots,
        hints: Hints | None = None,
    ) -> tuple[DraftTree, tuple]:
        params = first_layers(shared.params, shared, config.model, numerics)

        def apply(*args, method) -> Any:
            return module.apply({"params": draft.params}, *args, method=method)

        def step(entries, nodes: Nodes):
            # The entries are all that a token needs of those before it.
            tokens = nodes.tokens
            states, _, entries = layers(
                params, tokens, nodes.positions, nodes.bias, entries, nodes.starts
            )
            if numerics.is_row_invariant:
                (states,) = at_least_two_rows(states)

            outputs = apply(states, method=ExitHead.outputs)
            head = None if config.has_own_head else shared.head
            logits = apply(outputs, head, method=ExitHead.logits)
            num_tokens = tokens.shape[1]

            return outputs[:, :num_tokens], logits[:, :num_tokens], entries

        proposed = propose_from_root(
            step,
            tree,
            first_entries(shared, config.num_layers),
            roots,
            draft.token_ids,
            hints,
            stop_fn,
            numerics=numerics,
        )
        return proposed, cache

    def retrace(
        draft: Draft,
        shared: SharedTables,
        cache: tuple,
        context: DraftContext,
        pairs: Pairs,
        suggested: Suggested | None = None,
    ) -> tuple[tuple, DraftContext, Retraced]:
        # The target itself has run the layers below the exit over the inputs, and what
        # it made of each is what the token behind that is predicted from.
        states = pairs.taps
        num_tokens = states.shape[1]
        if numerics.is_row_invariant:
            (states,) = at_least_two_rows(states)

        params = {"params": draft.params}
        head = None if config.has_own_head else shared.head
        found: Any = module.apply(params, states, head, method=ExitHead.init_all)
        logits = found[0][:, :num_tokens]

        return cache, context, Retraced(suggested, logits, draft.token_ids)

    def unroll_outputs(
        params: Params,
        token_ids: Int[Array, " q"] | None,
        shared: SharedTables,
        feedback: Feedback,
        start: Int[Array, " b"],
        *,
        num_context: int,
        num_steps: int,
        candidates: Int[Array, " c"] | None = None,
    ) -> tuple[list[Float[Array, "b t q"]], list[Float[Array, "b t d"]]]:
        # The token before a drafted one has the target's own state.
        assert feedback.taps is not None, "features are recorded"
        states = feedback.taps[:, num_context + 1 :].astype(jnp.float32)
        head = training_head(config, params, token_ids, shared, candidates)
        found: Any = trainer.apply(
            {"params": params}, states, head, method=ExitHead.init_all
        )
        logits, outputs = found

        # One pass serves all depths: what depth d predicts of pair i it reads off
        # position i + d. Slices of the same array stand for the unrolled steps.
        num_pairs = states.shape[1] + 1 - num_steps
        rows = [slice(depth, depth + num_pairs) for depth in range(num_steps)]

        return [logits[:, r] for r in rows], [outputs[:, r] for r in rows]

    def head_inputs(params, states):
        return module.apply({"params": params}, states, method=ExitHead.head_inputs)

    return stateless(
        propose,
        num_scratch(tree) + 1,  # the root has a slot, too
        reads_target=True,
        init_params=lambda key: _init_params(config, trainer, key),
        unroll=lambda *args, **kwargs: unroll_outputs(*args, **kwargs)[0],
        unroll_outputs=unroll_outputs,
        state_width=config.hidden_size,
        head_inputs=head_inputs if config.has_own_head else None,
        retrace=retrace,
    )


def _init_params(config: ExitConfig, trainer: ExitHead, key) -> Params:
    """Parameters that know nothing."""
    states = jnp.zeros((1, 1, config.hidden_size))
    frozen = {"kernel": jnp.zeros((2, config.hidden_size))}
    head = None if config.has_own_head else frozen
    return trainer.init(key, states, head, method=ExitHead.init_all)["params"]


def _default_config(
    model: ModelConfig, draft_vocab_size: int, num_steps: int, layer: int
) -> ExitConfig:
    """An exit behind `layer` layers, by default where EAGLE-3's first tap is."""
    if layer and not 0 < layer < model.num_layers:
        raise ConfigError(
            f"exit_layer is {layer}; of this target it is one from 1 "
            f"to {model.num_layers - 1}"
        )

    return ExitConfig(
        **shape_of(model),
        taps=(layer or max(eagle3_taps(model)[0], 1),),
        draft_vocab_size=draft_vocab_size,
        has_qkv_bias=model.has_qkv_bias,
        has_qk_norm=model.has_qk_norm,
        has_wide_qk_norm=model.has_wide_qk_norm,
        norms=model.norms,
        attention_window=model.attention_window,
        embedding_multiplier=model.embedding_multiplier,
    )


def _warm_start(params, target) -> dict:
    """The block and the norm are those of the target's last layer."""
    layer = last_layer(target)
    return {name: layer[name] for name in ("post_attention_layernorm", "mlp", "norm")}


EXIT = Family(
    name="exit",
    description="the target's first layers and a trained head behind them (early exit)",
    build=early_exit,
    config=ExitConfig,
    default_config=_default_config,
    warm_start=_warm_start,
    reads_taps=True,
    has_layer=True,
)
