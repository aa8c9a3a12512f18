# SPDX-License-Identifier: Apache-2.0
"""Every acceptance rule is exact, by enumeration: no samples, no tolerance for chance.

For a toy target and draft all trees that can be drawn are listed with their
probabilities. For each of them the rule itself is asked, by bisection, below which
uniform number it accepts each node; so come all its outcomes with their probabilities,
and the law of what is emitted, which must be the target's own up to rounding. Where the
target draws after every node itself (`chosen`), all that it can draw is listed.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ospec_jax.config import SamplingConfig, TreeConfig
from ospec_jax.control.policy import Policies, PolicyShape
from ospec_jax.decoding.adjusting import adjust, as_extras, count_on_paths
from ospec_jax.decoding.rules.hub import hub
from ospec_jax.decoding.rules.recursive import recursive
from ospec_jax.decoding.rules.traversal import traversal
from ospec_jax.decoding.verify import verify_chosen
from ospec_jax.drafters import stopping, topology
from ospec_jax.drafters.base import Hints
from ospec_jax.drafters.combine import longer, mixed_tree
from ospec_jax.drafters.hints import hinted_chain
from ospec_jax.drafters.ngram import init_memory, remember, with_ngrams
from ospec_jax.drafters.sources import DRAFT
from ospec_jax.drafters.topology import best_parents
from ospec_jax.sampling import processed_probs
from ospec_jax.types import Draft, DraftTree, Roots, SamplingParams

ROOT, BITS = 0, 24  # a uniform float32 is a multiple of 2 ** -24
CHAIN = TreeConfig("chain", 3)
PAIRS = TreeConfig("static", 2, branching=(2, 2))
FLAT = TreeConfig("static", 1, branching=(3,))
UNEVEN = TreeConfig("static", 2, parents=best_parents((0.5, 0.2, 0.1), 5, 2))
RULES = {"recursive": recursive, "traversal": traversal, "hub": hub}


def tables(kind, vocab_size):
    """`p[last, next]` and `q[last, next]`, the latter bad on purpose."""
    rng = np.random.default_rng(vocab_size)
    target = rng.dirichlet(np.full(vocab_size, 0.7), size=vocab_size)
    target[1, 2] = 0.0
    target /= target.sum(axis=1, keepdims=True)
    draft = 1 / np.maximum(target, 1e-2) ** 2  # sure of what the target finds unlikely
    if kind == "narrow":  # never drafts the last token
        draft = rng.dirichlet(np.ones(vocab_size), size=vocab_size)
        draft[:, -1] = 0.0
    return target, draft / draft.sum(axis=1, keepdims=True)


def chance_of(children, q, drawn):
    """Probability of drawing `drawn`, in this order, as one node's children."""
    if children == "sampled":
        return np.prod(q[list(drawn)])
    if len(set(drawn)) < len(drawn):
        return 0.0
    best = list(np.argsort(-q, kind="stable"))
    if children == "topk":
        return float(list(drawn) == best[: len(drawn)])
    if children == "topk_sampled":  # one draw from what the others leave
        likely = best[: len(drawn) - 1]
        rest = 1 - q[likely].sum()
        return q[drawn[0]] / rest * (list(drawn[1:]) == likely and rest > 0)
    if children == "hub" and len(drawn) == 2 and drawn[0] != best[0]:
        return q[drawn[0]] * (drawn[1] == best[0])
    chance, left = 1.0, 1.0
    for token in drawn:
        chance, left = chance * q[token] / left, left - q[token]
    return chance


def all_trees(parents, children, q):
    """Tokens `[trees, n]` of every tree that can be drawn, and their chances."""
    family = [[i for i, p in enumerate(parents) if p == n] for n in range(len(parents))]
    found = [((ROOT, *[-1] * (len(parents) - 1)), 1.0)]
    for node, own in enumerate(family):
        grown = []
        for tokens, chance in found:
            for drawn in itertools.product(range(len(q)), repeat=len(own)):
                factor = chance_of(children, q[tokens[node]], drawn) if own else 1.0
                if chance * factor > 0:
                    new = list(tokens)
                    for i, token in zip(own, drawn, strict=True):
                        new[i] = token
                    grown.append((tuple(new), chance * factor))
        found = grown
    tokens, chances = zip(*found, strict=True)
    return np.asarray(tokens, np.int32), np.asarray(chances)


def without_best(draft, count):
    """Each row without its largest entries, normalised."""
    is_best = np.argsort(np.argsort(-draft, axis=1, kind="stable")) < count
    rest = np.where(is_best, 0.0, draft)
    return rest / rest.sum(axis=1, keepdims=True)


def order_of_questions(parents, rule):
    """The order in which nodes are asked, whatever the answers."""
    if rule != "traversal":
        return range(1, len(parents))
    visited = []

    def visit(node):
        for child in [i for i, p in enumerate(parents) if p == node]:
            visit(child)
        visited.append(node)

    visit(0)
    return visited[:-1]


def outcomes(ask, trees, chances, order, ancestors):
    """All ways that a rule can end: index of the tree, uniforms, and probability."""
    index = np.arange(len(trees))
    uniforms = np.full(trees.shape, 1 - 2.0**-BITS, np.float32)
    for node in order:
        # The number of multiples of 2 ** -24 at which the node is accepted.
        low, high = np.zeros(len(index), int), np.full(len(index), 2**BITS)
        while np.any(low < high):
            middle = (low + high) // 2
            uniforms[:, node] = middle / 2**BITS
            last, _ = ask(index, uniforms)
            is_accepted = ancestors[last, node] & (low < high)
            low = np.where(is_accepted, middle + 1, low)
            high = np.where(is_accepted | (low >= high), high, middle)
        rate = low / 2**BITS
        uniforms[:, node] = 1 - 2.0**-BITS
        accepted = uniforms.copy()
        accepted[:, node] = 0.0
        index = np.concatenate([index, index])
        uniforms = np.concatenate([uniforms, accepted])
        chances = np.concatenate([chances * (1 - rate), chances * rate])
        is_left = chances > 0
        index, uniforms, chances = index[is_left], uniforms[is_left], chances[is_left]
    return index, uniforms, chances


def all_choices(probs, is_valid):
    """What the target can draw after each node, `[choices, n]`, and its chances."""
    found = np.zeros((1, 0), np.int32)
    chances = np.ones(1)
    for law, is_there in zip(np.asarray(probs, float), is_valid, strict=True):
        tokens = np.flatnonzero(law) if is_there else np.zeros(1, int)
        own = law[tokens] / law[tokens].sum() if is_there else np.ones(1)
        found = np.concatenate(
            [
                np.repeat(found, len(tokens), axis=0),
                np.tile(tokens, len(found))[:, None],
            ],
            axis=1,
        )
        chances = np.outer(chances, own).reshape(-1)
    return found.astype(np.int32), chances


def chosen_outcomes(tree, probs, num_tokens):
    """All ways that `verify_chosen` can end: paths of nodes, weights, probabilities."""
    choices, chances = all_choices(probs, np.asarray(tree.is_valid))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(choices), *x.shape)), tree)
    verdict = jax.tree.map(np.asarray, verify_chosen(rows, jnp.asarray(choices)))
    total = {}
    for path, count, token, chance in zip(
        verdict.path, verdict.num_accepted, verdict.next_token, chances, strict=True
    ):
        key = tuple(path[1 : count + 1].tolist()), int(token)
        total[key] = total.get(key, 0.0) + chance
    return [
        (nodes, np.eye(num_tokens)[token], chance)
        for (nodes, token), chance in total.items()
    ]


def emitted_law(
    config, children, rule, kind, vocab_size, validity=None, how=None, only=None
):
    """Law of `depth + 1` tokens after the root: emitted, then the target's own.

    Args:
      only: Tokens `[n]` of a tree that is certain, in place of all that can be drawn.
      validity: `(tokens [trees, n], q) -> is_valid [trees, n]`: nodes that are there,
        by what was drawn; by default all.
      how: Adjusts and cuts the target's law along every path.
    """
    target, draft = tables(kind, vocab_size)
    parents = topology.static_parents(config).tolist()
    if only is None:
        tokens, chances = all_trees(parents, children, draft)
    else:
        tokens, chances = np.asarray(only, np.int32)[None], np.ones(1)
    np.testing.assert_allclose(chances.sum(), 1)
    ancestors = topology.static_ancestor_mask(parents)
    depths = topology.static_depths(parents)
    rank = jnp.asarray([parents[:i].count(p) for i, p in enumerate(parents)])
    counts = [parents.count(i) for i in range(len(parents))]
    is_drawn = children != "topk"
    if children == "topk_sampled":  # the rule is told what was drawn from
        draft = without_best(draft, max(counts) - 1)
    p, q = (jnp.asarray(x, jnp.float32) for x in (target, draft))
    is_there = np.ones(tokens.shape, bool)
    if validity is not None:
        is_there = np.asarray(validity(tokens, draft))

    def tree_of(tokens, is_valid):
        return DraftTree(
            tokens=tokens, parents=jnp.asarray(parents), depths=jnp.asarray(depths),
            ancestor_mask=jnp.asarray(ancestors),
            is_valid=is_valid, log_probs=jnp.zeros(len(parents)),
            draft_probs=q[tokens] if is_drawn else None, children=children,
            max_depth=int(depths.max()), max_children=max(counts),
        )  # fmt: skip

    def probs_of(tree):
        # Of nodes that are not there the target need not be asked.
        own = p[tree.tokens]
        probs = own if how is None else as_asked(how, own, tree)
        return jnp.where(tree.is_valid[:, None], probs, 0.0)

    @jax.jit
    @jax.vmap
    def ask(tokens, is_valid, uniforms):
        tree = tree_of(tokens, is_valid)
        return RULES[rule](uniforms, tree, rank, probs_of(tree))

    if rule == "chosen":
        assert len(tokens) == 1, "children that are no draws make one tree"
        tree = tree_of(jnp.asarray(tokens[0]), jnp.asarray(is_there[0]))
        ends = [(0, *end) for end in chosen_outcomes(tree, probs_of(tree), vocab_size)]
    else:
        answers = lambda index, uniforms: jax.tree.map(
            np.asarray, ask(tokens[index], is_there[index], uniforms)
        )
        index, uniforms, chances = outcomes(
            answers, tokens, chances, order_of_questions(parents, rule), ancestors
        )
        last, rest = answers(index, uniforms)
        on_path = [np.flatnonzero(ancestors[node])[1:] for node in last]
        ends = zip(index, on_path, rest, chances, strict=True)

    length = int(depths.max()) + 1
    law = np.zeros((vocab_size,) * length)
    continued = continuations(target, length)
    accepted = 0.0
    for i, nodes, weights, chance in ends:
        path = [tokens[i, j] for j in nodes]
        accepted += chance * len(path)
        weights = np.asarray(weights, float) / np.sum(weights, dtype=float)
        tail = continued[length - len(path) - 1]
        if how is not None:
            left = length - len(path) - 1
            after = lambda token, path=tuple(path), left=left: asked_law(
                how, target, (ROOT, *path, token), left
            )
            tail = np.stack([after(token) for token in range(vocab_size)])
        law[tuple(path)] += chance * weights.reshape(-1, *[1] * (tail.ndim - 1)) * tail
    expected = continued[length][ROOT]
    if how is not None:
        expected = asked_law(how, target, (ROOT,), length)
    return law, expected, accepted


IN_PROMPT = (2, 1)


def as_asked(how, probs, tree):
    """`[n, v]` as a `full` step makes them of a target's, at one row's nodes."""
    size = probs.shape[-1]
    extras = jax.tree.map(jnp.asarray, as_extras(how, IN_PROMPT, True, size))
    # The root is the answer's newest token.
    extras = extras.replace(counts=extras.counts.at[0, ROOT].add(1))
    row = jax.tree.map(lambda x: x[None], tree)
    counts = count_on_paths(extras, row)
    logits = adjust(jnp.log(probs)[None], extras, counts)[0]
    each = lambda value, dtype: jnp.full(len(logits), value, dtype)
    sampling = SamplingParams(
        temperature=each(how.temperature, jnp.float32),
        top_k=each(how.top_k, jnp.int32),
        top_p=each(how.top_p, jnp.float32),
        min_p=each(how.min_p, jnp.float32),
    )
    return processed_probs(logits, sampling)


def asked_law(how, target, answer, length):
    """Law of the next tokens after an answer so far, by the formulas, in numpy."""
    if not length:
        return np.ones(())
    with np.errstate(divide="ignore"):
        logits = np.log(target[answer[-1]])
    for token, bias in how.logit_bias:
        logits[token] += bias
    for token in {*IN_PROMPT, *answer}:
        factor = how.repetition_penalty
        logits[token] *= 1 / factor if logits[token] > 0 else factor
    for token in set(answer):
        logits[token] -= how.frequency_penalty * answer.count(token)
        logits[token] -= how.presence_penalty
    weights = np.exp((logits - logits.max()) / how.temperature)
    weights[weights < how.min_p] = 0
    probs = weights / weights.sum()
    return np.stack(
        [
            probs[token] * asked_law(how, target, (*answer, token), length - 1)
            for token in range(len(target))
        ]
    )


def continuations(target, length):
    """`[last, next, ...]`: the target's law of 0 to `length` tokens after `last`."""
    laws = [np.ones(len(target))]
    for _ in range(length):
        laws.append(
            target.reshape(*target.shape, *[1] * (laws[-1].ndim - 1)) * laws[-1]
        )
    return laws


CASES = [
    (CHAIN, "topk", "chosen", 4),
    (CHAIN, "sampled", "recursive", 4),
    (CHAIN, "sampled", "traversal", 4),
    (FLAT, "sampled", "recursive", 4),
    (FLAT, "without_replacement", "recursive", 5),
    (FLAT, "topk_sampled", "recursive", 5),
    (PAIRS, "topk", "chosen", 4),
    (PAIRS, "sampled", "recursive", 3),
    (PAIRS, "without_replacement", "recursive", 4),
    (PAIRS, "topk_sampled", "recursive", 4),
    # As it is asked for by penalties, this one stands below.
    pytest.param(*(PAIRS, "sampled", "traversal", 3), marks=pytest.mark.thorough),
    # The uneven tree has all that this one has.
    pytest.param(
        *(PAIRS, "without_replacement", "traversal", 4), marks=pytest.mark.thorough
    ),
    (PAIRS, "hub", "hub", 4),
    (UNEVEN, "without_replacement", "recursive", 4),
    (UNEVEN, "without_replacement", "traversal", 4),
]
NAMES = {id(CHAIN): "chain", id(FLAT): "flat", id(PAIRS): "pairs", id(UNEVEN): "uneven"}


def name_of(value):
    return NAMES.get(id(value), str(value))


@pytest.mark.crossed
@pytest.mark.parametrize("kind", ["far", "narrow"])
@pytest.mark.parametrize(("config", "children", "rule", "size"), CASES, ids=name_of)
def test_the_emitted_law_is_the_targets(config, children, rule, size, kind):
    law, expected, accepted = emitted_law(config, children, rule, kind, size)
    np.testing.assert_allclose(law, expected, atol=2e-6)
    assert accepted > 0.01


ASKED = {
    "penalties": SamplingConfig(
        temperature=0.8,
        presence_penalty=0.6,
        frequency_penalty=0.9,
        repetition_penalty=1.4,
        logit_bias=((2, 1.5), (0, -0.7)),
    ),
    "rewards": SamplingConfig(
        temperature=1.3, frequency_penalty=-0.8, repetition_penalty=0.6, min_p=0.15
    ),
}


@pytest.mark.crossed
@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(
    ("config", "children", "rule", "size"),
    [
        (CHAIN, "topk", "chosen", 4),
        (CHAIN, "sampled", "recursive", 3),
        pytest.param(CHAIN, "sampled", "traversal", 3, marks=pytest.mark.thorough),
        (PAIRS, "without_replacement", "recursive", 3),
        pytest.param(PAIRS, "topk_sampled", "recursive", 3, marks=pytest.mark.thorough),
        (PAIRS, "sampled", "traversal", 3),
        pytest.param(
            *(PAIRS, "without_replacement", "traversal", 3), marks=pytest.mark.thorough
        ),
        (PAIRS, "hub", "hub", 3),
    ],
    ids=name_of,
)
def test_the_emitted_law_is_the_targets_as_it_was_asked_for(
    config, children, rule, size, name
):
    how = ASKED[name]
    law, expected, accepted = emitted_law(config, children, rule, "far", size, how=how)
    np.testing.assert_allclose(law, expected, atol=2e-6)
    assert accepted > 0.01
    # What depends on the path is more than a bias would be.
    raw = continuations(tables("far", size)[0], law.ndim)[-1][ROOT]
    assert np.abs(law - raw).sum() > 0.05


def paths(tokens, draft):
    """Log-probabilities of the chains' paths, by depth from 0 on."""
    steps = np.log(np.maximum(draft[tokens[:, :-1], tokens[:, 1:]], 1e-30))
    return np.cumsum(np.pad(steps, ((0, 0), (1, 0))), axis=1)


def stopped_by(stop_fn):
    """What a depth rule leaves of chains: it looks at what was drawn, and stops."""

    @functools.partial(jax.jit, static_argnums=0)
    def stops_at(depth, scores, rows):
        depths = jnp.arange(1, CHAIN.num_steps + 1)
        so_far = jnp.where(depths <= depth, scores[:, 1:], -jnp.inf)
        before = jnp.where(depths < depth, scores[:, 1:], -jnp.inf)
        return stop_fn(
            stopping.Progress(
                depth,
                scores[:, depth, None],
                jnp.log(rows)[:, None],
                so_far,
                before if depth > 1 else None,
                CHAIN.num_steps,
                depths,
                jnp.full(len(scores), 40),
            )
        )

    def validity(tokens, draft):
        scores = np.asarray(paths(tokens, draft), np.float32)
        is_valid = np.ones(tokens.shape, bool)
        for depth in range(1, CHAIN.num_steps):
            rows = np.asarray(draft, np.float32)[tokens[:, depth - 1]]
            stops = np.asarray(stops_at(depth, scores, rows))
            is_valid[:, depth + 1] = is_valid[:, depth] & ~stops
        return is_valid

    return validity


def without_improbable(lowest):
    """Drops drawn tokens that the draft finds improbable, after a look at them."""
    return lambda tokens, draft: paths(tokens, draft) >= np.log(lowest)


def any_policy(seed):
    """A policy for the depth that nobody taught: it says anything."""
    shape = PolicyShape(1, CHAIN.num_steps, (1, 2, 3))
    rng = np.random.default_rng(seed)
    layers = tuple(
        (rng.normal(size=widths).astype(np.float32), np.zeros(widths[1], np.float32))
        for widths in itertools.pairwise((shape.num_seen("depth"), 8, 2))
    )
    return Policies(layers, None, 1, 0, shape)


COSTS = [[1.0] * 3, [1.3] * 3, [1.5] * 3, [2.1] * 3]
DEPTH_RULES = {
    "probability": stopping.below_probability(0.3),
    "mass": stopping.below_mass(0.3),
    "gain": stopping.below_gain(0.3),
    "entropy": stopping.above_entropy(0.8),
    "marginal": stopping.unless_worth_more(
        COSTS, (1, 2, 3), (1.0, 0.8, 0.7), np.linspace(0.1, 0.9, 8)
    ),
    "policy": stopping.taught(any_policy(2)),
}


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("children", "rule"),
    [("topk", "chosen"), ("sampled", "recursive"), ("sampled", "traversal")],
)
@pytest.mark.parametrize("name", DEPTH_RULES)
def test_depth_may_follow_a_look_at_drawn_tokens(name, children, rule):
    validity = stopped_by(DEPTH_RULES[name])
    law, expected, _ = emitted_law(CHAIN, children, rule, "narrow", 4, validity)
    np.testing.assert_allclose(law, expected, atol=2e-6)


@pytest.mark.parametrize("name", DEPTH_RULES)
def test_the_depth_rules_stop_some_drawn_chains_and_not_others(name):
    """Else the test above would show nothing."""
    _, draft = tables("narrow", 4)
    tokens, chances = all_trees([-1, 0, 1, 2], "sampled", draft)
    kept = stopped_by(DEPTH_RULES[name])(tokens, draft)[:, 1:]
    by_depth = np.bincount(kept.sum(axis=1), weights=chances, minlength=4)
    assert by_depth[0] == 0
    assert np.sum(by_depth > 0.05) > 1


def test_size_may_follow_a_look_at_the_most_probable_tokens():
    for lowest in (0.2, 0.5):
        validity = without_improbable(lowest)
        law, expected, _ = emitted_law(CHAIN, "topk", "chosen", "far", 4, validity)
        np.testing.assert_allclose(law, expected, atol=2e-6)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_size_that_follows_a_look_at_drawn_tokens_is_biased(rule):
    """What is refused: improbable tokens would come more seldom than they should."""
    validity = without_improbable(0.2)
    law, expected, _ = emitted_law(CHAIN, "sampled", rule, "far", 4, validity)
    assert np.abs(law - expected).sum() > 0.05


def longer_chain(history):
    """What `longer` drafts of a memory that was taught all that is unlikely."""
    tree = mixed_tree("longer", TreeConfig(num_steps=2))
    target, draft_probs = tables("far", 4)
    unlikely, drafted = jnp.argmin(target, axis=1), jnp.argmax(draft_probs, axis=1)
    wrong = [ROOT]
    for _ in range(tree.num_steps):
        wrong.append(int(unlikely[wrong[-1]]))
    text = wrong * 8
    memory = remember(init_memory(64), jnp.asarray(text, jnp.int32), 0, len(text))

    inner = hinted_chain(TreeConfig(num_steps=2))
    of_table = lambda recent, depth: (
        drafted[recent[..., -1]].astype(jnp.int32),
        jnp.full(recent.shape[:2], -0.1),
        jnp.full(recent.shape[:2], DRAFT),
    )
    neural = inner._replace(
        propose=lambda draft, shared, cache, roots, hints: inner.propose(
            draft, shared, cache, roots, Hints(hints.recent, of_table)
        )
    )
    drafter = with_ngrams(longer(neural, tree), tree)
    # The first token of a text stands in no slot.
    slots = jnp.asarray([[*text[:history], ROOT]], jnp.int32)
    cache = drafter.init_cache(1, 64) | {"history": jnp.pad(slots, ((0, 0), (0, 16)))}
    at = jnp.full((1,), slots.shape[1], jnp.int32)
    roots = Roots(jnp.full((1,), ROOT, jnp.int32), at, None, None, None)
    propose = jax.jit(lambda draft, *args: drafter.propose(draft, None, *args))
    found, _ = propose(Draft({}, memory=memory), cache, roots)
    return tree, found


@pytest.mark.parametrize(("history", "num_drafted"), [(0, 2), (24, 5)])
def test_a_longer_chain_of_a_spoilt_memory_keeps_the_law(history, num_drafted):
    """Where nothing is likely, and where a long chain of what is wrong is."""
    tree, drafted = longer_chain(history)
    is_valid = np.asarray(drafted.is_valid)
    assert is_valid.sum() == num_drafted + 1
    law, expected, accepted = emitted_law(
        tree, "topk", "chosen", "far", 4, lambda *_: is_valid,
        only=np.asarray(drafted.tokens[0]),
    )  # fmt: skip
    np.testing.assert_allclose(law, expected, atol=2e-6)
    assert accepted < 0.5
