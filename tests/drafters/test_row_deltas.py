# SPDX-License-Identifier: Apache-2.0
"""Scopes' own differences in a draft: as if they were in its projection, row by row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafted import random_head

from ospec_jax import TreeConfig
from ospec_jax.config import SamplingConfig
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.deltas import add_rows
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.learners import deltas as rule
from ospec_jax.testing import tiny_target
from ospec_jax.types import Deltas, RowDeltas

VOCAB, RANK = 8, 3
TREES = {
    "chain": TreeConfig(num_steps=3),
    "static": TreeConfig(kind="static", num_steps=2, branching=(2, 2)),
    "drawn": TreeConfig(num_steps=3, children="sampled"),
}
LENGTHS = (5, 9, 70)


@pytest.fixture(scope="module")
def target():
    return tiny_target(VOCAB)


@pytest.fixture(scope="module")
def loaded(target):
    return random_head(target, VOCAB)


def some_deltas(loaded, owners=(1, 2), strength=2.0) -> Deltas:
    """Differences that change most of what is drafted."""
    num_tokens, width = loaded.draft.params["lm_head"]["kernel"].shape
    deltas = rule.init_deltas(RANK, width, num_tokens)
    rng = np.random.default_rng(0)
    for place, owner in enumerate(owners):
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        deltas = deltas.replace(
            owners=deltas.owners.at[place].set(owner),
            directions=deltas.directions.at[place].set(normal(RANK, width)),
            shifts=deltas.shifts.at[place].set(strength * normal(RANK, num_tokens)),
            leads=deltas.leads.at[place].set(1.0),
        )
    return deltas


def merged(draft, deltas: Deltas, place: int):
    """The draft with a place's difference in its projection."""
    head = draft.params["lm_head"]
    kernel = head["kernel"] + deltas.shifts[place].T @ deltas.directions[place]
    return draft.replace(params={**draft.params, "lm_head": {"kernel": kernel}})


def engine_of(target, loaded, tree, kind="greedy", rank=0):
    config = StepConfig(
        target.config, target.numerics, tree, loaded.taps, kind=kind, delta_rank=rank
    )
    drafter = eagle3(loaded.meta.draft, tree, target.numerics)
    return Engine(config, target.params, drafter)


def requests(temperature=0.0, scopes=(1, 2, 0)):
    rng = np.random.default_rng(1)
    return [
        Request(
            str(number),
            tuple(rng.integers(0, VOCAB, length).tolist()),
            48,
            SamplingConfig(temperature, seed=number),
            scope=number,
        )
        for number, length in zip(scopes, LENGTHS, strict=True)
    ]


def answers(engine, draft, asked, batch_size=1):
    found = {}
    for done in engine.serve(asked, lambda: draft, batch_size):
        found[done.request.id] = done.token_ids, done.stats.num_accepted_tokens
    return [found[one.id] for one in asked]


@pytest.mark.parametrize(
    "name",
    # The most probable tokens of a chain are asked for again below, drawn ones here.
    [
        pytest.param("chain", marks=pytest.mark.thorough),
        pytest.param("static", marks=pytest.mark.thorough),
        "drawn",
    ],
)
def test_it_is_as_if_it_were_in_the_projection(target, loaded, name):
    temperature = 1.0 if name == "drawn" else 0.0
    kind = "sampled" if temperature else "greedy"
    deltas = some_deltas(loaded)
    plain = engine_of(target, loaded, TREES[name], kind)
    own = engine_of(target, loaded, TREES[name], kind, RANK)
    asked = requests(temperature)
    expected = [
        answers(plain, draft, [one])[0]
        for draft, one in zip(
            (merged(loaded.draft, deltas, 0), merged(loaded.draft, deltas, 1)),
            asked,
            strict=False,
        )
    ]
    # Nobody in particular has the draft that all share.
    expected.append(answers(plain, loaded.draft, asked[2:])[0])
    draft = loaded.draft.replace(deltas=deltas)
    alone = answers(own, draft, asked)
    # Numbers of requests are folded into draws, so all are asked as they were there.
    if not temperature:
        assert alone == expected
        assert answers(own, draft, asked, batch_size=3) == expected
        shared = [answers(plain, loaded.draft, [one])[0] for one in asked]
        assert [tokens for tokens, _ in shared] == [tokens for tokens, _ in expected]
        assert shared[:2] != expected[:2]
    else:
        singly = [answers(own, draft, [one])[0] for one in asked]
        assert singly == expected


def test_whoever_has_the_row_next_has_nothing_of_it(target, loaded):
    own = engine_of(target, loaded, TREES["chain"], rank=RANK)
    draft = loaded.draft.replace(deltas=some_deltas(loaded))
    first, second, nobody = requests()
    longer = dataclasses.replace(second, max_new_tokens=90)
    expected = answers(own, draft, [nobody])
    # The second row goes on while the first is taken by another.
    found = answers(own, draft, [longer, first, nobody], batch_size=2)
    assert found[2:] == expected


def test_a_token_has_the_same_logits_among_others(loaded):
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    rows = RowDeltas(normal(3, RANK, 32), normal(3, RANK, VOCAB))
    inputs, logits = normal(3, 5, 32), normal(3, 5, VOCAB)
    add = jax.jit(add_rows)
    several = np.asarray(add(rows, inputs, logits))
    for token in range(5):
        one = slice(token, token + 1)
        alone = np.asarray(add(rows, inputs[:, one], logits[:, one]))
        np.testing.assert_array_equal(alone[:, 0], several[:, token])
    for row in range(3):
        take = functools.partial(jnp.take, indices=jnp.asarray([row]), axis=0)
        part = jax.tree.map(take, (rows, inputs, logits))
        np.testing.assert_array_equal(np.asarray(add(*part))[0], several[row])
