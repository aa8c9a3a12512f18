# SPDX-License-Identifier: Apache-2.0
"""Programs for TPUs that are not there: what is said of them, and who compiles them."""

import dataclasses
import importlib.util
import math

import jax
import pytest

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.decoding import compiling
from ospec_jax.decoding.compiling import CHIPS, Program, compile_programs
from ospec_jax.decoding.lowering import LoweringConfig
from ospec_jax.drafters.registry import build_drafter, public_draft_config
from ospec_jax.models.architectures import ARCHITECTURES
from ospec_jax.reports.compiled import table_of
from ospec_jax.testing import tiny_draft_config, tiny_model_config

V5E = CHIPS["TPU v5 lite"]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU's compiler: pip install 'ospec-jax[tpu-compile]'",
)


def program(**values) -> Program:
    fields = dict.fromkeys((field.name for field in dataclasses.fields(Program)), 0.0)
    return Program(
        **fields | {"collectives": {}, "needed": 1.0, "arguments": 1.0} | values
    )


def test_time_is_bounded_by_bandwidth_or_arithmetic():
    assert program(moved=819e9, flops=1.0).seconds(V5E) == (1.0, "bandwidth")
    many = program(moved=819e6, flops=394e12)
    assert many.seconds(V5E) == (2.0, "arithmetic")
    assert many.seconds(V5E, is_int8=True) == (1.0, "arithmetic")


def test_memory_is_what_is_held_at_once():
    found = program(arguments=8.0, outputs=5.0, aliased=4.0, temporaries=2.0, code=1.0)
    assert found.memory == 12.0
    assert found.as_data(V5E)["fits"]
    assert not program(arguments=V5E.memory, code=1.0).as_data(V5E)["fits"]


def test_speed_ups_are_of_lengths_that_a_depth_can_reach():
    programs = {
        "plain_step": program(moved=100.0),
        "speculative_step 1": program(moved=125.0),
        "speculative_step 3": program(moved=200.0),
    }
    found = compiling.predict_speed_ups(programs, V5E, (2, 4))
    assert found == {
        "speculative_step 1": {"2": pytest.approx(1.6)},
        "speculative_step 3": {"2": pytest.approx(1.0), "4": pytest.approx(2.0)},
    }


def test_figures_grow_by_the_layer():
    few = program(moved=10.0, collectives={"all-reduce": (4, 40.0)})
    more = program(moved=16.0, collectives={"all-reduce": (8, 80.0), "x": (2, 2.0)})
    found = compiling.extrapolate(few, more, (2, 4, 32))
    assert found.moved == 100.0
    assert found.collectives == {"all-reduce": (64.0, 640.0), "x": (30.0, 30.0)}


def test_known_architectures_have_the_sizes_that_their_names_say():
    count = {}
    for name, model in ARCHITECTURES.items():
        heads = (model.num_heads * 2 + model.num_kv_heads * 2) * model.head_dim
        layer = model.hidden_size * (heads + 3 * model.intermediate_size)
        tables = model.vocab_size * model.hidden_size * (2 - model.tie_embeddings)
        count[name] = round((layer * model.num_layers + tables) / 1e6)
    assert count == {
        "smollm2-135m": 134,
        "qwen2.5-0.5b": 494,
        "llama-3.1-8b": 8030,
        "qwen3-8b": 8190,
    }


def test_public_drafts_have_the_sizes_that_are_published():
    model = ARCHITECTURES["llama-3.1-8b"]
    count = {}
    for name in ("eagle3", "dflash"):
        head = public_draft_config(model, name, 15)
        drafter = build_drafter(name, head, TreeConfig(num_steps=15))
        params = jax.eval_shape(drafter.init_params, jax.random.key(0))
        count[name] = sum(math.prod(x.shape) for x in jax.tree.leaves(params)) // 10**6
    # A layer that reads two states, a head of 32,000, and three states joined; five
    # layers, and five states joined.
    assert count == {"eagle3": 424, "dflash": 1174}
    # As `target_layer_ids` of the published code, counted by input: 1, 8, 15, 22, 29.
    dflash = public_draft_config(model, "dflash", 15)
    assert dflash.taps == (2, 9, 16, 23, 30)


def test_without_the_compiler_its_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ospec-jax\[tpu-compile\]'"):
        compiling.described_mesh("v5e:2x2")


@needs_compiler
def test_topologies_that_are_none_or_too_small_are_refused():
    with pytest.raises(ConfigError, match="cannot compile for the topology 'v5e:9x9x"):
        compiling.described_mesh("v5e:9x9x9")
    with pytest.raises(ConfigError, match="takes 8 devices.*has 4"):
        compiling.described_mesh("v5e:2x2", "model=8")


@needs_compiler
def test_steps_are_compiled_for_devices_that_are_not_there():
    mesh, chip = compiling.described_mesh("v5e:2x2", "model=2")
    assert chip.name == "v5e"
    model = tiny_model_config(64, num_layers=2)
    config = LoweringConfig(
        TreeConfig(num_steps=2), batch_size=4, capacity=128, is_scanned=False, mesh=mesh
    )
    programs = compile_programs(model, tiny_draft_config(model), config, (2, 3))
    assert set(programs) == {
        "plain_step",
        "prefill",
        "speculative_step 2",
        "speculative_step 3",
    }
    plain = programs["plain_step"]
    # The donated state is written in place; what is new is a few tokens.
    assert 0 < plain.outputs - plain.aliased < 8192
    assert 0 < plain.needed <= plain.arguments
    assert plain.moved >= plain.needed
    # Cache entries of four rows are written without a loop over them.
    assert plain.loops == 0
    # Two a layer, and those of the vocabulary, which is split, too.
    assert plain.collectives["all-reduce"][0] >= 4
    assert "all-gather" not in plain.collectives
    # Drafting on is a loop of which it is known how often it turns.
    deep = programs["speculative_step 3"]
    assert deep.unknown_loops == 0
    assert deep.moved > programs["speculative_step 2"].moved
    facts = {
        "target": "tiny", "topology": "v5e:2x2", "mesh": "model=2", "capacity": 128,
        "batch_size": 4, "precision": "bfloat16", "versions": compiling.versions(),
        "chip": dataclasses.asdict(chip),
        "programs": {name: each.as_data(chip) for name, each in programs.items()},
        "speed_ups": compiling.predict_speed_ups(programs, chip, (2, 3)),
    }  # fmt: skip
    assert len(table_of(facts).renderables) >= 1


@needs_compiler
def test_a_compiler_that_does_not_know_an_option_compiles_all_the_same(monkeypatch):
    monkeypatch.setattr(compiling, "OPTIONS", {"xla_msa_no_such_option": "0"})
    mesh, _ = compiling.described_mesh("v5e:2x2")
    config = LoweringConfig(batch_size=2, capacity=128, is_scanned=False, mesh=mesh)
    programs = compile_programs(tiny_model_config(64, num_layers=1), None, config)
    assert set(programs) == {"plain_step", "prefill"}
