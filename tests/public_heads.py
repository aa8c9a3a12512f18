# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 and Hydra heads and DFlash drafts as published, tiny, without the package."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
D, INNER, HEADS, KV_HEADS, HEAD_DIM = 32, 40, 4, 2, 8
NUM_DRAFT, TAPS = 20, (1, 2, 3)


def draft_ids(vocab_size):
    """Target ids of the draft vocabulary, ascending."""
    rng = np.random.default_rng(1)
    return np.sort(rng.choice(vocab_size, NUM_DRAFT, replace=False))


def tensors(vocab_size, dtype="float32", layer="midlayer.", embedding=None):
    """The tensors of the reference code's `Model.state_dict()`."""
    rng, ids = np.random.default_rng(0), draft_ids(vocab_size)
    shapes = {
        "fc": (D, len(TAPS) * D),
        f"{layer}self_attn.q_proj": (HEADS * HEAD_DIM, 2 * D),
        f"{layer}self_attn.k_proj": (KV_HEADS * HEAD_DIM, 2 * D),
        f"{layer}self_attn.v_proj": (KV_HEADS * HEAD_DIM, 2 * D),
        f"{layer}self_attn.o_proj": (D, HEADS * HEAD_DIM),
        f"{layer}mlp.gate_proj": (INNER, D),
        f"{layer}mlp.up_proj": (INNER, D),
        f"{layer}mlp.down_proj": (D, INNER),
        f"{layer}hidden_norm": (D,),
        f"{layer}input_layernorm": (D,),
        f"{layer}post_attention_layernorm": (D,),
        "norm": (D,),
        "lm_head": (NUM_DRAFT, D),
    }
    made = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        values = rng.normal(size=shape) * scale + (1.0 if len(shape) == 1 else 0.0)
        made[f"{name}.weight"] = values.astype(DTYPES[dtype])
    is_drafted = np.zeros(vocab_size, bool)
    is_drafted[ids] = True
    made |= {"d2t": ids - np.arange(NUM_DRAFT), "t2d": is_drafted}
    if embedding is not None:
        made["embed_tokens.weight"] = np.asarray(embedding).astype(DTYPES[dtype])
    return made


def flat_config(vocab_size, **changes):
    """As in yuhuili/EAGLE3-LLaMA3.1-Instruct-8B and SpecForge's configurations."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.1",
        "use_cache": True,
        "vocab_size": vocab_size,
        "draft_vocab_size": NUM_DRAFT,
    } | changes


def speculators_config(vocab_size, layer_changes=None, **changes):
    """As `Eagle3SpeculatorConfig` of the speculators project writes itself."""
    layer = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    return {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": NUM_DRAFT,
        "dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": list(TAPS),
        "embed_requires_grad": False,
        "norm_before_fc": False,
        "norm_before_residual": True,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {
                "architectures": ["LlamaForCausalLM"],
                "name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
            },
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0.dev5",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer | (layer_changes or {}),
    } | changes


def hydra_tensors(target, kind="prefix-mlp", num_heads=3, num_blocks=3, seed=0):
    """`hydra_head.state_dict()` of the reference code for a target's configuration.

    There blocks after the first are `[ResBlock] * n`, one module under many names.
    """
    rng, made = np.random.default_rng(seed), {}
    d, has_prefix = target.hidden_size, kind == "prefix-mlp"

    def draw(name, *shape):
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        offset = 1.0 if "norm" in name else 0.0
        made[name] = (rng.normal(size=shape) * scale + offset).astype(np.float32)

    def dense(name, num_rows, num_columns):
        draw(f"{name}.weight", num_rows, num_columns)
        draw(f"{name}.bias", num_rows)

    for head in range(num_heads):
        numbers = range(1, 2 * num_blocks, 2) if has_prefix else range(num_blocks)
        blocks = [f"hydra_mlp.{head}.{number}.linear" for number in numbers]
        dense(blocks[0], d, (head + 2) * d)
        dense(blocks[0].replace("linear", "res_connection"), d, (head + 2) * d)
        for block in blocks[1:]:
            dense(block, d, d)
            for part in (".weight", ".bias"):
                made[block + part] = made[blocks[1] + part]
        dense(f"hydra_lm_head.{head}" + ".1" * has_prefix, target.vocab_size, d)
    if has_prefix:
        prefix, kv = "prefix_embeding_layer.", target.num_kv_heads * target.head_dim
        layer = f"{prefix}layers.0."
        draw(f"{prefix}embed_tokens.weight", target.vocab_size, d)
        for name, rows in (("q", d), ("k", kv), ("v", kv), ("o", d)):
            draw(f"{layer}self_attn.{name}_proj.weight", rows, d)
        draw(f"{layer}self_attn.rotary_emb.inv_freq", target.head_dim // 2)
        for name in ("gate", "up"):
            draw(f"{layer}mlp.{name}_proj.weight", target.intermediate_size, d)
        draw(f"{layer}mlp.down_proj.weight", d, target.intermediate_size)
        draw(f"{layer}input_layernorm.weight", d)
        draw(f"{layer}post_attention_layernorm.weight", d)
        draw(f"{prefix}norm.weight", d)
    return made


def hydra_config(kind="prefix-mlp", num_heads=3, num_blocks=3, **changes):
    """As in ankner/hydra-vicuna-7b-v1.3, with its `HydraConfig`."""
    return {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "hydra_head_arch": kind,
        "hydra_num_heads": num_heads,
        "hydra_num_layers": num_blocks,
        "transformers_version": "4.34.1",
    } | changes


def dflash_tensors(num_layers=2, seed=0):
    """`DFlashDraftModel.state_dict()` of the reference code."""
    rng = np.random.default_rng(seed)
    shapes = {"fc": (D, len(TAPS) * D), "hidden_norm": (D,), "norm": (D,)}
    for number in range(num_layers):
        layer = f"layers.{number}."
        shapes |= {
            f"{layer}self_attn.q_proj": (HEADS * HEAD_DIM, D),
            f"{layer}self_attn.k_proj": (KV_HEADS * HEAD_DIM, D),
            f"{layer}self_attn.v_proj": (KV_HEADS * HEAD_DIM, D),
            f"{layer}self_attn.o_proj": (D, HEADS * HEAD_DIM),
            f"{layer}self_attn.q_norm": (HEAD_DIM,),
            f"{layer}self_attn.k_norm": (HEAD_DIM,),
            f"{layer}mlp.gate_proj": (INNER, D),
            f"{layer}mlp.up_proj": (INNER, D),
            f"{layer}mlp.down_proj": (D, INNER),
            f"{layer}input_layernorm": (D,),
            f"{layer}post_attention_layernorm": (D,),
        }
    made = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        values = rng.normal(size=shape) * scale + (1.0 if len(shape) == 1 else 0.0)
        made[f"{name}.weight"] = values.astype(np.float32)
    return made


def dflash_config(vocab_size, **changes):
    """As in z-lab/Qwen3-8B-DFlash-b16, with the layers whose *output* is read."""
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "block_size": 4,
        "dflash_config": {
            "mask_token_id": vocab_size - 1,
            "target_layer_ids": [tap - 1 for tap in TAPS],
        },
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": D,
        "intermediate_size": INNER,
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 2048,
        "model_type": "qwen3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "num_key_value_heads": KV_HEADS,
        "num_target_layers": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
    } | changes


def write(folder, config, weights, file="model.safetensors"):
    """Writes the folder as it lies on the hub."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / file)
    return folder
