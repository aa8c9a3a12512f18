# SPDX-License-Identifier: Apache-2.0
"""The decoding functions lower for accelerators, with their weights as inputs."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from ospec_jax.config import ConfigError, ModelConfig, TreeConfig
from ospec_jax.decoding.lowering import LoweringConfig, as_data, lower, write
from ospec_jax.decoding.step import StepConfig, build_step, empty_state
from ospec_jax.drafters.registry import default_draft_config
from ospec_jax.models.layers import Numerics
from ospec_jax.models.llama import stack_layers
from ospec_jax.models.quantization import cast_params
from ospec_jax.sharding import abstract_mesh
from ospec_jax.testing import (
    random_model_params,
    tiny_draft_config,
    tiny_model_config,
)

SMOLLM2 = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
    num_heads=9, num_kv_heads=3, head_dim=64, rope_theta=1e5, max_position=8192,
)  # fmt: skip
TREES = {
    "chain": TreeConfig(num_steps=3),
    "dynamic": TreeConfig("dynamic", 3, topk=4, num_draft_tokens=12),
}


def largest_constant(exported) -> int:
    """Entries of the largest array that a program holds, splats not counted."""
    text = exported.mlir_module()
    found = re.findall(r'constant dense<["\[].*?> : tensor<([\dx]+)x\w+>', text)
    return max(math.prod(map(int, shape.split("x"))) for shape in found)


@pytest.mark.crossed
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("tree", list(TREES))
def test_all_functions_lower_for_tpu_and_cuda(tmp_path, tree, precision):
    model = tiny_model_config(64)
    config = LoweringConfig(TREES[tree], precision, batch_size=2, capacity=128)
    lowered = lower(model, tiny_draft_config(model), config, ("tpu", "cuda"))
    assert set(lowered) == {"prefill", "plain_step", "speculative_step"}
    for path in write(lowered, tmp_path):
        exported = export.deserialize(path.read_bytes())
        assert exported.platforms == ("tpu", "cuda")
        assert "callback" not in exported.mlir_module()
        assert 0 < largest_constant(exported) < 1000


@pytest.mark.parametrize("family", ["eagle1", "hydra", "exit", "dflash", "peagle"])
def test_other_families_lower_too(family):
    model = tiny_model_config(64)
    draft = tiny_draft_config(model, family=family)
    config = LoweringConfig(TREES["dynamic"], batch_size=2, capacity=128)
    assert len(lower(model, draft, config, ("tpu", "cuda"), family)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_smollm2_lowers_with_its_weights_as_inputs(precision):
    draft = default_draft_config(SMOLLM2, 8192)
    config = LoweringConfig(precision=precision)
    lowered = lower(SMOLLM2, draft, config, ("tpu", "cuda"))
    for exported in lowered.values():
        weights = sum(a.size for a in exported.in_avals if a.ndim in (2, 3))
        assert weights > 134e6
        # 135 million parameters as constants would take a hundred megabytes.
        assert len(exported.mlir_module_serialized) < 2e5
        assert largest_constant(exported) < 1e4
        assert largest_constant(exported) > 0


@pytest.mark.parametrize("is_scanned", [True, False])
def test_an_artefact_computes_what_the_step_does(is_scanned):
    model = tiny_model_config(64)
    config = LoweringConfig(precision="float32", capacity=64, is_scanned=is_scanned)
    exported = lower(model, None, config, ("cpu",))["plain_step"]
    numerics = Numerics("float32", is_row_invariant=False, is_scanned=is_scanned)
    step = StepConfig(model, numerics, TreeConfig(num_steps=0))
    params = cast_params(random_model_params(model), "float32")
    params = stack_layers(params) if is_scanned else params
    state = empty_state(step, None, 1, 64, False)
    state = state.replace(
        last_token=state.last_token + 5, num_remaining=state.num_remaining + 9,
        is_finished=state.is_finished & False,
    )  # fmt: skip
    expected = as_data(jax.jit(build_step(step, None))(params, None, state))
    found = exported.call(*as_data((params, None, state)))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_scanned_artefacts_do_not_grow_with_layers():
    sizes = []
    for num_layers in (4, 12):
        model = tiny_model_config(64, num_layers=num_layers)
        config = LoweringConfig(capacity=128)
        exported = lower(model, None, config, ("tpu", "cuda"))["plain_step"]
        sizes.append(len(exported.mlir_module_serialized))
    assert sizes[1] < 1.01 * sizes[0]


def test_artefacts_of_a_mesh_say_where_their_inputs_lie(tmp_path):
    """Of four devices, of which none is here."""
    model, mesh = tiny_model_config(64), abstract_mesh("data=2,model=2")
    config = LoweringConfig(TREES["chain"], batch_size=2, capacity=128, mesh=mesh)
    lowered = lower(model, tiny_draft_config(model), config, ("tpu", "cuda"))
    for path in write(lowered, tmp_path):
        exported = export.deserialize(path.read_bytes())
        assert exported.nr_devices == 4
        shards = {
            aval.shape: where.shard_shape(aval.shape)
            for aval, where in zip(
                exported.in_avals, exported.in_shardings_jax(mesh), strict=True
            )
            if where is not None
        }
        # [layers, q + k + v, d] by rows; caches of a batch by rows and heads.
        assert shards[2, 64, 32] == (2, 32, 32)
        if path.stem != "prefill":
            assert shards[2, 2, 2, 128, 8] == (2, 1, 1, 128, 8)
    config = dataclasses.replace(config, mesh=abstract_mesh("model=4"))
    with pytest.raises(ConfigError, match="2 key-value heads.*model=4"):
        lower(model, None, config, ("tpu",))


def test_cudnn_attention_lowers_for_cuda(monkeypatch):
    # Its version is asked for while tracing; no library is needed to lower.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    model = tiny_model_config(64)
    config = LoweringConfig(TREES["dynamic"], capacity=128, attention="cudnn")
    lowered = lower(model, tiny_draft_config(model), config, ("cuda",))
    for exported in lowered.values():
        assert "__cudnn$fmhaScaleBiasSoftmax" in exported.mlir_module()
    plain = LoweringConfig(TREES["dynamic"], capacity=128)
    exported = lower(model, None, plain, ("cuda",))["plain_step"]
    assert "__cudnn" not in exported.mlir_module()


def test_cudnn_attention_is_refused_where_it_cannot_work():
    model = tiny_model_config(64)
    config = LoweringConfig(attention="cudnn", capacity=128)
    with pytest.raises(ConfigError, match="cuda alone"):
        lower(model, None, config, ("tpu", "cuda"))
    with pytest.raises(ConfigError, match="precision is int8"):
        Numerics("int8", attention="cudnn")
    if cudnn.cuda_versions is None:
        with pytest.raises(ConfigError, match="cuDNN is not on this machine"):
            lower(model, None, config, ("cuda",))


def test_the_kernel_lowers_for_tpus_and_their_meshes():
    """Also prompts, which are a row alone and so not split over `data`."""
    model = tiny_model_config(64)
    mesh = abstract_mesh("data=2,model=2")
    config = LoweringConfig(
        batch_size=2,
        capacity=128,
        is_scanned=False,
        attention="pallas",
        mesh=mesh,
    )
    for exported in lower(model, None, config, ("tpu",)).values():
        assert "tpu_custom_call" in exported.mlir_module()
    with pytest.raises(ConfigError, match="tpu alone"):
        lower(model, None, config, ("tpu", "cuda"))
    config = dataclasses.replace(config, is_scanned=True)
    with pytest.raises(ConfigError, match="layers one by one"):
        lower(model, None, config, ("tpu",))


def test_unknown_platforms_are_refused():
    with pytest.raises(ConfigError, match="unknown platforms"):
        lower(tiny_model_config(64), None, LoweringConfig(), ("vulkan",))
