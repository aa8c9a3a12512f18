# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of every scaling, by formulas of their papers, and read."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from ospec_jax.config import (
    ConfigError,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    draft_config_from,
)
from ospec_jax.config.fields import Fields
from ospec_jax.formats import speculators
from ospec_jax.models.rope import rotary_angles
from ospec_jax.models.rope_fields import num_positions, read_rope
from ospec_jax.testing import tiny_draft_config, tiny_model_config

SCALINGS = {
    "none": None,
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, 64),
    "linear": LinearScaling(2.5),
    "yarn": YarnScaling(4.0, 64),
    "yarn-exact": YarnScaling(16.0, 256, 20.0, 2.0, 1.3, is_truncated=False),
    "yarn-of-short": YarnScaling(2.0, 8),
    "factors": FactorScaling(tuple(1 + 0.5 * i for i in range(16)), 1.2),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_angles_are_those_of_the_papers(scaling):
    config = tiny_model_config(head_dim=32, rope_theta=1e4, rope_scaling=scaling)
    positions = jnp.asarray([[0, 1, 5, 63, 200]])
    angle = np.outer(
        np.asarray(positions[0]), [reference.frequency(config, i) for i in range(16)]
    )
    expected = reference.magnitude(config) * np.tile(
        np.stack([np.cos(angle), np.sin(angle)]), 2
    )
    for table in ((), (256,), (256, True)):
        found = np.stack(rotary_angles(config, positions, *table))[:, 0, :, 0]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def fields(rope, name="rope_scaling", **values):
    values = {"max_position_embeddings": 64, "rope_theta": 1e4} | values
    return Fields(values | {name: rope}, "config.json")


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1, 1.5], "long_factor": [2, 3]}


@pytest.mark.parametrize(
    ("rope", "scaling", "length"),
    [
        ({"type": "linear", "factor": 2}, LinearScaling(2.0), 64),
        # It is none up to the length that it is defined by, which is the model's own.
        ({"type": "dynamic", "factor": 2.0}, None, 64),
        (
            {"type": "yarn"} | YARN,
            YarnScaling(4.0, 32, attention_factor=1 + 0.1 * math.log(4)),
            128,
        ),
        (
            {"type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 0.5},
            YarnScaling(4.0, 64, 16.0, attention_factor=0.5),
            256,
        ),
        (
            {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}
            | YARN,
            YarnScaling(
                4.0,
                32,
                attention_factor=(1 + 0.07 * math.log(4)) / (1 + 0.03 * math.log(4)),
                is_truncated=False,
            ),
            128,
        ),
        (
            {"type": "yarn", "original_max_position_embeddings": 16},
            YarnScaling(4.0, 16, attention_factor=1 + 0.1 * math.log(4)),
            64,
        ),
        (
            {"type": "longrope", "original_max_position_embeddings": 32} | LONG,
            FactorScaling((1.0, 1.5), math.sqrt(1 + math.log(2) / math.log(32))),
            32,
        ),
        (
            {"type": "su", "attention_factor": 1.1} | LONG,
            FactorScaling((1.0, 1.5), 1.1),
            64,
        ),
    ],
    ids=lambda x: x.get("type") if isinstance(x, dict) else "",
)
def test_both_spellings_are_read(rope, scaling, length):
    old = fields(rope)
    rope = {"rope_type" if n == "type" else n: x for n, x in rope.items()}
    new = fields(rope | {"rope_theta": 1e4}, "rope_parameters")
    del new.values["rope_theta"]
    for found in (old, fields(rope), new):
        assert read_rope(found) == (1e4, scaling)
        assert num_positions(found) == length


def test_the_original_length_may_stand_outside():
    """As Phi-3 has it; there it comes first."""
    rope = {"type": "yarn"} | YARN
    found = fields(rope, original_max_position_embeddings=16)
    assert read_rope(found)[1] == dataclasses.replace(
        YarnScaling(4.0, 16), attention_factor=1 + 0.1 * math.log(4)
    )


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "proportional"}, "rope type 'proportional'; default, linear, dyn"),
        ({"type": "linear"}, "lacks 'factor'"),
        ({"type": "yarn", "factor": "4"}, "factor '4'; use a number"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 32}, "above beta_slow 32"),
        ({"type": "longrope"}, "lacks 'short_factor'"),
        ({"type": "longrope", "short_factor": [1, 0]}, "short_factor .* above 0"),
        ({"type": "longrope", "short_factor": 2.0}, "a list of finite numbers"),
        ({"type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}, "only a part"),
    ],
)
def test_what_cannot_be_read_is_named(rope, message):
    with pytest.raises(ConfigError, match=message):
        read_rope(fields(rope))


@pytest.mark.parametrize(
    ("scaling", "changes", "message"),
    [
        (FactorScaling((1.0, 2.0)), {}, "2 factors, but heads of 8 turn 4 pairs"),
        (YarnScaling(2.0, 8), {"rope_theta": 1.0}, "rope_theta is 1.0; YaRN"),
    ],
)
def test_scalings_that_do_not_fit_are_refused(scaling, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model_config(rope_scaling=scaling, **changes)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_drafts_keep_theirs(scaling):
    """In a checkpoint, and in what others read."""
    model = tiny_model_config(head_dim=32, rope_scaling=scaling)
    config = tiny_draft_config(model)
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert draft_config_from(type(config), stored) == config
    written = json.loads(json.dumps(speculators.layer_config(config, 64)))
    assert read_rope(Fields(written, "config.json"))[1] == scaling
