# SPDX-License-Identifier: Apache-2.0
"""Every optimizer by name decreases a loss, and what cannot be built is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ospec_jax.config import ConfigError
from ospec_jax.learners.base import stepped
from ospec_jax.learners.optimizers import (
    PARAMETER_FREE,
    is_parameter_free,
    make_optimizer,
)

CENTRE = jnp.asarray([0.5, -0.3, 0.2])


def descend(optimizer, num_steps):
    """Losses of a quadratic, and of its parameters' first step."""
    loss = lambda params: jnp.sum((params["w"] - CENTRE) ** 2)

    def step(state, _):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params)
        return stepped(optimizer, grads, opt_state, params, value), value

    params = {"w": jnp.zeros(3)}
    state, values = jax.jit(
        lambda state: jax.lax.scan(step, state, None, num_steps)
    )((params, optimizer.init(params)))  # fmt: skip
    return np.asarray(values), float(loss(state[0]))


@pytest.mark.parametrize("name", [*PARAMETER_FREE, "mechanize:sgd"])
def test_optimizers_without_a_learning_rate_decrease_a_loss(name):
    values, last = descend(make_optimizer(name, 1e9), 400)
    assert last < 0.25 * values[0]
    assert is_parameter_free(name)


@pytest.mark.parametrize(
    "name", ["adam", "sgd", "lion", "adamw", "schedule_free_adamw"]
)
def test_optimizers_with_a_learning_rate_decrease_a_loss(name):
    values, last = descend(make_optimizer(name, 0.01), 100)
    assert last < 0.5 * values[0]
    assert not is_parameter_free(name)


def test_options_reach_the_optimizer_behind_the_clip():
    made = make_optimizer("sgd", 0.1, momentum=0.9)
    grads, params = {"w": jnp.asarray([30.0, 40.0, 0.0])}, {"w": jnp.zeros(3)}
    opt_state = made.init(params)
    for expected in (0.1, 0.19):  # a gradient of norm 50 is clipped to 1
        updates, opt_state = made.update(grads, opt_state, params)
        assert float(optax.global_norm(updates)) == pytest.approx(expected, rel=1e-5)


# The last one is a type, which has no signature to look at.
@pytest.mark.parametrize(
    "name", ["adamm", "global_norm", "clip", "adam:sgd", "Schedule"]
)
def test_what_is_no_such_optimizer_is_refused(name):
    with pytest.raises(ConfigError, match=f"no optimizer '{name}'.*adam, sgd"):
        make_optimizer(name, 0.1)
