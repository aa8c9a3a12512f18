# SPDX-License-Identifier: Apache-2.0
"""The drafter that the documentation shows works as it stands, and is exact."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ospec_jax import SamplingConfig, Session, TreeConfig, load_draft
from ospec_jax.testing import tiny_target
from ospec_jax.types import Pairs, Roots, SamplingParams

FOLDER = Path(__file__).parents[2] / "docs" / "skeletons"
PROMPTS = ["What is 1 plus 2?", "aaaaaaaa", "Why is the sea blue, and the sky?"]

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")


@pytest.fixture(scope="module")
def family():
    return runpy.run_path(str(FOLDER / "drafter.py"))["REPEAT"]


@pytest.fixture(scope="module")
def follower():
    return runpy.run_path(str(FOLDER / "remembering.py"))["FOLLOWER"]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def answers(session):
    found = session.generate(PROMPTS, 24, SamplingConfig(), is_raw=True)
    return [r.token_ids for r in sorted(found, key=lambda r: r.prompt.id)]


@pytest.mark.crossed
@pytest.mark.parametrize("ngrams", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_family_of_ones_own_drafts_exactly(target, family, batch_size, ngrams):
    session = Session(
        target,
        load_draft(family, target),
        tree=TreeConfig(num_steps=3),
        batch_size=batch_size,
        ngrams=ngrams,
    )
    assert answers(session) == answers(Session(target))
    assert session.stats.num_draft_tokens > 0


@pytest.mark.parametrize("batch_size", [1, 2])
def test_one_that_remembers_is_right_where_text_repeats(target, follower, batch_size):
    session = Session(
        target,
        load_draft(follower, target),
        tree=TreeConfig(num_steps=3),
        batch_size=batch_size,
        ngrams=False,
    )
    assert answers(session) == answers(Session(target))
    assert session.stats.num_accepted_tokens > 0


def test_it_remembers_the_last_token_that_followed(target, follower):
    """Junk is not remembered, nor what another row was told."""
    drafter = follower.build(None, TreeConfig(num_steps=3), target.numerics)
    pairs = Pairs(
        inputs=jnp.array([[5, 6, 7, 5], [5, 5, 5, 5]]),
        tokens=jnp.array([[6, 7, 5, 9], [8, 8, 8, 8]]),
        taps=jnp.zeros((2, 4, 1)),
        starts=jnp.zeros(2, jnp.int32),
        num_valid=jnp.array([3, 0]),
    )
    cache, context = drafter.extend(None, None, drafter.init_cache(2, 64), pairs)
    roots = Roots(
        token=jnp.array([6, 5]),
        position=jnp.array([3, 0]),
        keys=jax.random.split(jax.random.key(0), 2),
        context=context,
        sampling=SamplingParams(*jnp.zeros((3, 2))),
    )
    tree, _ = drafter.propose(None, None, cache, roots)
    assert tree.tokens[0].tolist() == [6, 7, 5, 6]
    assert tree.is_valid.tolist() == [[True] * 4, [True, False, False, False]]


def test_it_is_mixed_by_its_name(target, family):
    draft = load_draft("fallback:ngram,repeat", target, family=family)
    assert (draft.family, draft.mix, draft.suggestions) == (family, "fallback", "ngram")
    session = Session(target, draft, tree=TreeConfig(num_steps=3))
    assert answers(session) == answers(Session(target))
    pooled = load_draft("pool:ngram+repeat", target, family=family)
    assert [member.family.name for member in pooled.members] == ["ngram", "repeat"]
    assert answers(Session(target, pooled)) == answers(Session(target))


def test_its_refusal_reaches_the_user(target, family):
    tree = TreeConfig("dynamic", 2, 2, 4)
    with pytest.raises(ValueError, match="makes chains, not a dynamic tree"):
        Session(target, load_draft(family, target), tree=tree)
