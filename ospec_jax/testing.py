# SPDX-License-Identifier: Apache-2.0
"""Tiny models for tests, notebooks and examples: random weights, no downloads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from ospec_jax.config import DraftConfig, ModelConfig, Precision
from ospec_jax.drafters.base import Family
from ospec_jax.drafters.registry import default_draft_config, find_family
from ospec_jax.models.hub import Target, cache_folder
from ospec_jax.models.llama import init_params
from ospec_jax.models.quantization import calibrated_numerics, cast_params
from ospec_jax.models.tokenizer import quiet_import
from ospec_jax.types import Draft

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_DRAWING: dict = {}


def tiny_model_config(vocab_size: int = 16, **changes) -> ModelConfig:
    """A two-layer model with grouped-query attention."""
    values: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
        # A tied head would mostly repeat the last token.
        tie_embeddings=False,
    )
    return ModelConfig(**(values | changes))


def byte_tokenizer():
    """A transformers tokenizer of one token a byte, with a chat template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    with quiet_import():
        from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHAT_TEMPLATE

    return fast


def random_model_params(config: ModelConfig, seed: int = 0):
    """Float32 parameters whose logits are peaked enough to be interesting."""
    params = _drawn(init_params, jax.random.key(seed), config)
    name = "embed_tokens_kernel" if config.tie_embeddings else "lm_head_kernel"
    return params | {name: params[name] * 3.0}


def tiny_target(
    vocab_size: int = 259, precision: Precision = "float32", seed: int = 0, **changes
) -> Target:
    """A random target with a byte tokenizer (259 tokens) of its own."""
    config = tiny_model_config(vocab_size, **changes)
    return Target(
        name=f"tiny-{vocab_size}-{seed}",
        config=config,
        numerics=calibrated_numerics(cache_folder(), precision),
        params=cast_params(random_model_params(config, seed), precision),
        tokenizer=byte_tokenizer(),
        fingerprint=f"tiny-{seed}",
    )


def tiny_draft_config(
    model: ModelConfig,
    draft_vocab_size: int = 12,
    family: str | Family = "eagle3",
    **changes: Any,
) -> DraftConfig:
    """A trainable draft's architecture for a tiny target.

    Args:
      changes: Fields of the architecture that shall have other values.
    """
    defaults: dict[str, Any] = {}
    family = find_family(family)
    layer = model.num_layers // 2 if family.has_layer else 0
    config = default_draft_config(model, draft_vocab_size, family, 5, layer)
    if not family.has_layer:  # else its block has the target's shape
        defaults["intermediate_size"] = 40
    if family.reads_taps and len(config.taps) > 1:
        # The first layer's input has seen nothing but a token.
        defaults["taps"] = tuple(range(1, max(model.num_layers, 3)))

    return dataclasses.replace(config, **(defaults | changes))


def _drawn(init: Callable, key, *static):
    """`init(*static, key)`, one operation after the other.

    It runs once, and takes a second to compile. Most of its single operations have been
    compiled for another model of the same widths.
    """
    trace = jax.make_jaxpr(
        init, static_argnums=tuple(range(len(static))), return_shape=True
    )
    closed, shapes = trace(*static, key)

    # Flax runs the whole model to know its shapes. Nothing of that is asked for.
    is_used = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, is_used, instantiate=True)
    values = jax.core.eval_jaxpr(jaxpr, closed.consts, key)

    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def _first_of_equals(init: Callable) -> Callable:
    """`init` of the first drafter of equal settings, which has been traced."""
    cells = tuple(cell.cell_contents for cell in init.__closure__ or ())
    key = init.__code__, cells
    try:
        hash(key)
    except TypeError:
        return init

    return _DRAWING.setdefault(key, init)


def tiny_draft(drafter, config: DraftConfig, seed: int = 0) -> Draft:
    """A random draft; its vocabulary leaves out some of the target's first tokens."""
    params = _drawn(_first_of_equals(drafter.init_params), jax.random.key(seed))
    if "bigram_out" in params:
        # It is zero before training, and would bias nothing.
        shape = params["bigram_out"]["kernel"].shape
        rows = jax.random.normal(jax.random.key(seed), shape)
        params = params | {"bigram_out": {"kernel": rows}}

    if not config.has_own_head:
        return Draft(params)

    rng = np.random.default_rng(seed)
    ids = rng.choice(config.vocab_size, config.draft_vocab_size, replace=False)
    return Draft(params, jnp.asarray(np.sort(ids), jnp.int32))
