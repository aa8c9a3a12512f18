# SPDX-License-Identifier: Apache-2.0
"""GGUF files: what they say is heeded or refused, and no count is believed."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import gguf_tensors, model_config, write_gguf
from reference import random_params

from ospec_jax.config import (
    ConfigError,
    FactorScaling,
    InputError,
    LinearScaling,
    YarnScaling,
)
from ospec_jax.models.gguf import read_config
from ospec_jax.models.gguf_file import GGUFFile
from ospec_jax.models.hub import load_target
from ospec_jax.models.tokenizer import tokenizer_from_gguf
from ospec_jax.models.weights import WeightsError

CONFIG = model_config()
PARAMS = random_params(CONFIG)


def write(tmp_path, **options):
    tensors = gguf_tensors(CONFIG, PARAMS)
    return write_gguf(tmp_path / "tiny.gguf", CONFIG, tensors, **options)


def test_the_layout_is_that_of_the_package_that_writes_it(tmp_path):
    own = GGUFFile(write(tmp_path, is_quantized=True))
    theirs = gguf.GGUFReader(str(own.path))
    fields = {k: f.contents() for k, f in theirs.fields.items()}
    assert own.fields.values == {k: x for k, x in fields.items() if k[:5] != "GGUF."}
    assert own.tensor_names == tuple(tensor.name for tensor in theirs.tensors)
    for tensor in theirs.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(
            own.tensor(tensor.name), values.reshape(tensor.shape[::-1])
        )


def test_tokens_that_users_defined_stay_whole(tmp_path):
    tokens = (("<think>", 4), ("<tool_call>", 4), ("[PAD7]", 5))
    tokenizer = tokenizer_from_gguf(GGUFFile(write(tmp_path, extra_tokens=tokens)))
    vocab = tokenizer.get_vocab()
    text = "the<think>a</think> <tool_call>"
    ids = tokenizer.encode(text)
    assert ids[:2] == [vocab["the"], vocab["<think>"]]
    assert ids[-1] == vocab["<tool_call>"]
    # They are text: what hides special tokens shows them.
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # What the file calls unused is split as any text is.
    assert vocab["[PAD7]"] not in tokenizer.encode("[PAD7]")


@pytest.mark.parametrize(
    ("pre", "add", "has_bos"),
    [
        ("smollm", lambda writer: None, False),
        ("smollm", lambda writer: writer.add_add_bos_token(True), True),
        ("smollm", lambda writer: writer.add_add_bos_token(False), False),
        # llama.cpp adds it to these unless the file says no.
        ("llama-bpe", lambda writer: None, True),
        ("llama-bpe", lambda writer: writer.add_add_bos_token(False), False),
    ],
)
def test_the_first_token_is_added_where_the_file_says_so(tmp_path, pre, add, has_bos):
    tokenizer = tokenizer_from_gguf(GGUFFile(write(tmp_path, pre=pre, add=add)))
    ids = tokenizer.encode("the")
    bare = tokenizer.encode("the", add_special_tokens=False)
    assert ids == ([1] if has_bos else []) + bare
    assert len(bare) == 1


def test_the_last_token_is_added_where_the_file_says_so(tmp_path):
    file = write(tmp_path, add=lambda writer: writer.add_add_eos_token(True))
    ids = tokenizer_from_gguf(GGUFFile(file)).encode("the")
    assert ids[-1] == 2
    assert len(ids) == 2


def test_all_ends_that_the_file_names_end_an_answer(tmp_path):
    def add(writer):
        writer.add_eot_token_id(30)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 31)

    target = load_target(write(tmp_path, add=add), "float32")
    # Beside <|endoftext|> and <|im_end|>, which the tokenizer knows.
    assert target.stop_ids == (0, 2, 30, 31)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "dynamic"),
        ("rope.scaling.attn_factor", 2.0),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.dimension_count", 8),
        ("attention.value_length", 8),
        ("attention.sliding_window", 64),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path, key, value):
    add = {str: "add_string", float: "add_float32", int: "add_uint32"}[type(value)]
    file = write(tmp_path, add=lambda w: getattr(w, add)(f"llama.{key}", value))
    with pytest.raises(ConfigError, match=f"tiny.gguf has llama.{key} "):
        read_config(GGUFFile(file))


def write_scaled(tmp_path, values, tensors=()):
    """With values of `rope`, and lists of factors."""

    def add(writer):
        for key, value in values.items():
            kind = {str: "string", float: "float32", int: "uint32", bool: "bool"}
            put = getattr(writer, f"add_{kind[type(value)]}")
            put(f"llama.rope.{key}", value)
        for name, factors in dict(tensors).items():
            writer.add_tensor(f"{name}.weight", np.float32(factors))

    return read_config(GGUFFile(write(tmp_path, add=add)))


YARN_FACTOR = 1 + 0.1 * np.log(4.0)
FACTORS = tuple(map(float, range(1, 9)))


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"scaling.type": "none"}, None),
        (
            {"scaling.type": "none", "scaling.factor": 4.0, "scaling.finetuned": True},
            None,
        ),
        ({"scaling.factor": 1.0}, None),
        # llama.cpp's default is linear.
        ({"scaling.factor": 4.0}, LinearScaling(4.0)),
        ({"scale_linear": 2.0}, LinearScaling(2.0)),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, LinearScaling(4.0)),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0},
            YarnScaling(4.0, 512, attention_factor=YARN_FACTOR),
        ),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 128,
                "scaling.attn_factor": 0.5,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.0,
            },
            YarnScaling(4.0, 128, 16.0, 2.0, 0.5 * YARN_FACTOR),
        ),
    ],
)
def test_scalings_are_those_of_llama_cpp(tmp_path, values, scaling):
    config = write_scaled(tmp_path, values)
    assert config.rope_scaling == scaling
    assert config.max_position == 512


def test_factors_are_tensors(tmp_path):
    """Llama-3's, and those of LongRoPE, within what was trained before it."""
    config = write_scaled(tmp_path, {}, {"rope_freqs": FACTORS})
    assert config.rope_scaling == FactorScaling(FACTORS)
    assert config.max_position == 512
    lists = {"rope_factors_short": FACTORS, "rope_factors_long": FACTORS[::-1]}
    values = {"scaling.original_context_length": 64, "scaling.attn_factor": 1.5}
    config = write_scaled(tmp_path, values, lists)
    assert config.rope_scaling == FactorScaling(FACTORS, 1.5)
    assert config.max_position == 64


def test_frequencies_are_scaled_once(tmp_path):
    with pytest.raises(ConfigError, match="twice, by a tensor, rope_freqs"):
        write_scaled(tmp_path, {"scaling.factor": 2.0}, {"rope_freqs": FACTORS})


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "llama.attention.head_count",
        "llama.embedding_length",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type",
    ],
)
def test_a_missing_key_is_named(tmp_path, key):
    file = write(tmp_path, leave_out=[key])
    with pytest.raises(ConfigError, match=f"tiny.gguf lacks '{key}'"):
        load_target(file, "float32")


def test_a_slip_in_a_key_is_no_default(tmp_path):
    add = lambda writer: writer.add_float32("llama.rope.freq_bose", 5e5)
    file = write(tmp_path, add=add, leave_out=["llama.rope.freq_base"])
    with pytest.raises(ConfigError, match=r"did you mean 'llama\.rope\.freq_base'"):
        read_config(GGUFFile(file))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("key", ["rope.freq_base", "attention.layer_norm_rms_epsilon"])
def test_numbers_that_are_none_are_refused(tmp_path, key, value):
    file = write(
        tmp_path,
        # In place of the one that was written before.
        add=lambda writer: writer.add_float32(f"llama.{key}", value),
    )
    with pytest.raises(InputError, match=key):
        read_config(GGUFFile(file))


def header(num_tensors, num_fields, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + rest


def field(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


HUGE = 2**40
LIES = {
    "fields": header(0, HUGE),
    "tensors": header(HUGE, 0),
    "numbers": header(0, 1, field(b"a", 9, struct.pack("<IQ", 0, HUGE))),
    "texts": header(0, 1, field(b"a", 9, struct.pack("<IQ", 8, HUGE))),
    "a text": header(0, 1, field(b"a", 8, struct.pack("<Q", HUGE))),
    "a key": header(0, 1, struct.pack("<Q", HUGE) + b"a" * 20),
    "an array of arrays": header(0, 1, field(b"a", 9, struct.pack("<IQ", 9, 2))),
    "a type": header(0, 1, field(b"a", 77, b"\0" * 8)),
    "a version": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_no_count_is_believed(tmp_path, content):
    file = tmp_path / "lie.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=r"lie\.gguf"):
            GGUFFile(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def patched(file, name, at, value):
    """The file with another number so many bytes behind a tensor's name."""
    content = bytearray(Path(file).read_bytes())
    place = content.index(name) + len(name) + at
    content[place : place + len(value)] = value
    Path(file).write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4 + 16, struct.pack("<I", 99), "type 99"),
        (4, struct.pack("<Q", 2**50), "ends at"),
        (4, struct.pack("<Q", 0), "empty"),
        (4 + 16 + 4, struct.pack("<Q", 0), "overlap"),
        (4 + 16 + 4, struct.pack("<Q", 2**63), "ends at"),
        (4 + 16 + 4, struct.pack("<Q", 33), "alignment"),
        (0, struct.pack("<I", 5), "5 dimensions"),
    ],
)
def test_a_tensor_that_is_not_where_it_says(tmp_path, at, value, message):
    file = write(tmp_path)
    patched(file, b"blk.1.ffn_down.weight", at, value)
    with pytest.raises(WeightsError, match=f"tiny.gguf.*{message}"):
        GGUFFile(file)


def test_more_layers_than_are_read_are_refused(tmp_path):
    file = write(tmp_path, add=lambda writer: None)
    patched(file, b"llama.block_count", 4, struct.pack("<I", 1))
    with pytest.raises(WeightsError, match=r"fewer layers"):
        load_target(file, "float32")


def test_infinities_are_refused(tmp_path):
    tensors = gguf_tensors(CONFIG, PARAMS)
    tensors["blk.1.attn_norm.weight"] = tensors["blk.1.attn_norm.weight"] * np.inf
    file = write_gguf(tmp_path / "tiny.gguf", CONFIG, tensors)
    with pytest.raises(WeightsError, match="input_layernorm of layer 1"):
        load_target(file, "float32")
