# SPDX-License-Identifier: Apache-2.0
"""The decoding functions lower for accelerators, with their weights as inputs."""

import jax
import numpy as np
import pytest
from jax import export

from ospec_jax.config import ConfigError, ModelConfig, TreeConfig
from ospec_jax.decoding.step import StepConfig, build_step, empty_state
from ospec_jax.distill.families import default_draft_config
from ospec_jax.lowering import LoweringConfig, as_data, lower, write
from ospec_jax.models.layers import Numerics
from ospec_jax.models.quantization import cast_params
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


@pytest.mark.parametrize("family", ["eagle1", "hydra"])
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
        weights = sum(a.size for a in exported.in_avals if a.ndim == 2)
        assert weights > 134e6
        # 135 million parameters as constants would take a hundred megabytes.
        assert len(exported.mlir_module_serialized) < 4e6


def test_an_artefact_computes_what_the_step_does():
    model = tiny_model_config(64)
    config = LoweringConfig(precision="float32", batch_size=1, capacity=64)
    exported = lower(model, None, config, ("cpu",))["plain_step"]
    numerics = Numerics("float32", is_row_invariant=False)
    step = StepConfig(model, numerics, TreeConfig(num_steps=0))
    params = cast_params(random_model_params(model), "float32")
    state = empty_state(step, None, 1, 64, False)
    state = state.replace(
        last_token=state.last_token + 5, num_remaining=state.num_remaining + 9,
        is_finished=state.is_finished & False,
    )  # fmt: skip
    expected = as_data(jax.jit(build_step(step, None))(params, None, state))
    found = exported.call(*as_data((params, None, state)))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_unknown_platforms_are_refused():
    with pytest.raises(ConfigError, match="unknown platforms"):
        lower(tiny_model_config(64), None, LoweringConfig(), ("vulkan",))
