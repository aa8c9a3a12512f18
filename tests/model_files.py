# SPDX-License-Identifier: Apache-2.0
"""Tiny models as Hugging Face folders and as GGUF files."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file
from tokenizers import pre_tokenizers

from ospec_jax.models.hub import cache_folder
from ospec_jax.testing import CHAT_TEMPLATE, byte_tokenizer, tiny_model_config

VOCAB = 261
HF_NAMES = {
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    # OLMo-2's, which stand behind blocks.
    "attention_out_norm": "post_attention_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o_proj": "self_attn.o_proj.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}

GGUF_NAMES = {
    "input_layernorm": "attn_norm.weight",
    "post_attention_layernorm": "ffn_norm.weight",
    "q_proj": "attn_q.weight",
    "k_proj": "attn_k.weight",
    "v_proj": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o_proj": "attn_output.weight",
    "gate_proj": "ffn_gate.weight",
    "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight",
}


def model_config(**changes):
    """Widths that Q8_0's blocks of 32 divide."""
    sizes = dict(intermediate_size=64, num_layers=2, head_dim=16)
    return tiny_model_config(VOCAB, **sizes | changes)


def layer_tensors(config, layer):
    """One layer's separate tensors, by short name."""
    c = config
    heads = np.cumsum([c.num_heads, c.num_kv_heads]) * c.head_dim
    qkv = np.asarray(layer["self_attn"]["qkv_proj"]["kernel"])
    q, k, v = np.split(qkv, heads)
    gate, up = np.split(np.asarray(layer["mlp"]["gate_up_proj"]["kernel"]), 2)
    extra = {}
    if c.has_qkv_bias:
        biases = np.split(np.asarray(layer["self_attn"]["qkv_proj"]["bias"]), heads)
        extra = dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True))
    if c.has_qk_norm or c.has_wide_qk_norm:
        norms = ("q_norm", "k_norm")
        extra = {n: np.asarray(layer["self_attn"][n]["scale"]) for n in norms}
    norms = [name for name, value in layer.items() if "scale" in value]
    return extra | {name: np.asarray(layer[name]["scale"]) for name in norms} | {
        "q_proj": q, "k_proj": k, "v_proj": v,
        "o_proj": np.asarray(layer["self_attn"]["o_proj"]["kernel"]),
        "gate_proj": gate, "up_proj": up,
        "down_proj": np.asarray(layer["mlp"]["down_proj"]["kernel"]),
    }  # fmt: skip


def hf_tensors(config, params):
    tensors = {
        "model.embed_tokens.weight": params["embed_tokens_kernel"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = params["lm_head_kernel"]
    for i in range(config.num_layers):
        for name, value in layer_tensors(config, params[f"layers_{i}"]).items():
            tensors[f"model.layers.{i}.{HF_NAMES[name]}"] = jnp.asarray(value)
    return tensors


def family_of(config):
    """The name of a configuration's family in both file formats."""
    if config.has_qkv_bias:
        return "qwen2"
    if config.has_wide_qk_norm:
        return "olmo2"
    return "qwen3" if config.has_qk_norm else "llama"


def hf_config(config):
    c = config
    values = {
        "model_type": family_of(config),
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_position,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if c.rope_scaling is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_max_position,
        }
    return values


def write_folder(folder, config, tensors, dtype=jnp.float32, **changes):
    """A Hugging Face folder in two shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config) | changes))
    cast = {name: value.astype(dtype) for name, value in tensors.items()}
    first = {name: cast.pop(name) for name in list(cast)[: len(cast) // 2]}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(cast, folder / "model-00002-of-00002.safetensors")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def permute_rotary(kernel, num_heads):
    """llama.cpp's order of q and k rows, as its converter writes it."""
    out, fan_in = kernel.shape
    halves = kernel.reshape(num_heads, 2, out // num_heads // 2, fan_in)
    return halves.swapaxes(1, 2).reshape(out, fan_in)


def gguf_tensors(config, params):
    tensors = {
        "token_embd.weight": params["embed_tokens_kernel"],
        "output_norm.weight": params["norm"]["scale"],
    }
    if not config.tie_embeddings:
        tensors["output.weight"] = params["lm_head_kernel"]
    for i in range(config.num_layers):
        layer = layer_tensors(config, params[f"layers_{i}"])
        if family_of(config) == "llama":
            layer["q_proj"] = permute_rotary(layer["q_proj"], config.num_heads)
            layer["k_proj"] = permute_rotary(layer["k_proj"], config.num_kv_heads)
        for name, value in layer.items():
            tensors[f"blk.{i}.{GGUF_NAMES[name]}"] = value
    return {name: np.asarray(value) for name, value in tensors.items()}


def write_gguf(
    file,
    config,
    tensors,
    is_quantized=False,
    architecture=None,
    pre="smollm",
    extra_tokens=(),
    add=lambda writer: None,
    leave_out=(),
):
    """A GGUF file.

    Args:
      extra_tokens: Tokens and their types, in place of bytes that no test writes.
      add: Is given the writer, to add metadata.
      leave_out: Keys that the file shall lack.
    """
    c = config
    writer = gguf.GGUFWriter(file, architecture or family_of(config))
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "the"]
    types = [3] * len(special) + [1] * (len(tokens) - len(special))
    for i, (token, kind) in enumerate(extra_tokens, 3):
        tokens[-i] = token
        types[-i] = kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    add(writer)
    for key in leave_out:
        del writer.kv_data[0][key]
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, value in tensors.items():
        if is_quantized and value.ndim == 2:
            quantized = gguf.quants.quantize(value, kind)
            writer.add_tensor(name, quantized, raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def with_native_code(cache):
    """Lends a cache folder the functions that were compiled for another one."""
    native = cache_folder() / "native"
    if native.is_dir():
        cache.mkdir(exist_ok=True)
        (cache / "native").symlink_to(native)
