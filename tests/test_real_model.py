# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct: real weights, the shipped draft, real prompts."""

import functools
import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import forward

from ospec_jax import Session, TreeConfig, load_draft, load_target
from ospec_jax.config import SamplingConfig
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts, read_prompts
from ospec_jax.distill.self_config import SelfPromptConfig
from ospec_jax.distill.self_prompts import write_self_prompts
from ospec_jax.models import cache as kv
from ospec_jax.models import llama

pytestmark = pytest.mark.slow

SETS = (
    "gsm8k_train4000", "spider_train", "codesearchnet_py_docs", "mbpp",
    "math_test2000", "alpaca_eval",
)  # fmt: skip
TREES = {
    "chain": TreeConfig(num_steps=3),
    "dynamic": TreeConfig("dynamic", num_steps=4, topk=4, num_draft_tokens=10),
}
NEW_TOKENS = 24
TEXT_LENGTH = 96


@functools.cache
def open_target(precision):
    """Read once in a worker; nothing changes what is loaded."""
    try:
        return load_target("smollm2-135m", precision)
    except FileNotFoundError as error:
        pytest.skip(f"SmolLM2 is neither here nor to be downloaded: {error}")


# That float32 is the model is held below, and what decodes it in `decoding/`.
@pytest.fixture(
    scope="module",
    params=["int8", pytest.param("float32", marks=pytest.mark.thorough)],
)
def target(request):
    return open_target(request.param)


@pytest.fixture(scope="module")
def prompts():
    """Prompts of six public sets by turns; of the demo where these are absent."""
    folder = Path(os.environ.get("OSPEC_PROMPTS_DIR", "nowhere"))
    if not folder.is_dir():
        return [p for domain in DEMO_DOMAINS for p in demo_prompts(domain)][:12]
    sets = [read_prompts(folder / f"{name}.jsonl") for name in SETS]
    mixed = [p for row in zip(*(s[9:400:10] for s in sets), strict=False) for p in row]
    return [p for p in mixed if len(p.text) < 400][:12]


@pytest.fixture(scope="module")
def plain(target, prompts):
    # float32 takes several times as long, and is the simpler case.
    prompts = prompts[: 6 if target.numerics.precision == "float32" else 12]
    return list(Session(target).generate(prompts, NEW_TOKENS))


@pytest.mark.crossed
@pytest.mark.parametrize(("tree", "batch_size", "num_prompts"), [
    ("dynamic", 4, 12),
    pytest.param("chain", 4, 6, marks=pytest.mark.thorough),
    pytest.param("chain", 1, 12, marks=pytest.mark.thorough),
    pytest.param("dynamic", 1, 6, marks=pytest.mark.thorough),
])  # fmt: skip
def test_greedy_equals_plain_decoding(
    target, prompts, plain, tree, batch_size, num_prompts
):
    draft = load_draft("shipped", target)
    session = Session(target, draft, tree=TREES[tree], batch_size=batch_size)
    expected = {r.prompt.id: r.token_ids for r in plain[:num_prompts]}
    results = list(session.generate(prompts[: len(expected)], NEW_TOKENS))
    assert {r.prompt.id: r.token_ids for r in results} == expected
    accepted = sum(r.stats.num_accepted_tokens for r in results)
    assert accepted > 0.2 * sum(r.stats.num_drafts for r in results)


def test_sampled_answers_are_plain_decodings(prompts):
    """Token by token, drafted in a batch by a draft that learns meanwhile."""
    target = open_target("int8")
    draft = load_draft("shipped", target)
    sampling = SamplingConfig(temperature=0.8, top_p=0.95, seed=3)

    def answers(session):
        results = session.generate(prompts[:8], NEW_TOKENS, sampling)
        return {r.prompt.id: r.token_ids for r in results}

    plain = answers(Session(target))
    learning = Session(target, draft, learner="head", batch_size=3)
    assert answers(learning) == plain
    assert learning.version > 0
    assert learning.stats.num_accepted_tokens > 0.2 * learning.stats.num_drafts
    assert len(set(map(tuple, plain.values()))) == len(plain)


def test_the_last_layer_learns_more_than_ngrams_of_the_request():
    """Away from home, on twenty prompts; counted in passes, which no load changes."""
    target = open_target("int8")
    draft = load_draft("shipped", target)
    passes = {}
    for learner in (None, "head"):
        session = Session(target, draft, learner=learner)
        list(session.generate(demo_prompts("html")[:20], 48))
        passes[learner] = session.stats.num_drafts
    # It was 237 to 253; with a preconditioner that is none, 248.
    assert passes["head"] < 0.96 * passes[None]


def test_the_target_writes_what_reads_as_a_users_turn(tmp_path):
    target = open_target("int8")
    config = SelfPromptConfig(kinds=(("self-chat", 1.0),), max_turn_tokens=72)
    file = tmp_path / "prompts.jsonl"
    report = write_self_prompts(target, file, 6, config, batch_size=6)
    assert len(read_prompts(file)) == 6
    # Most turns end by themselves, and hold words that no English text is without.
    assert report.dropped["self-chat", "goes on"] <= 6
    common = {"a", "the", "to", "of", "in", "is", "and", "for", "how", "can", "you"}
    words = [set(prompt.text.lower().split()) for prompt in report.prompts]
    assert all(common & said for said in words)
    assert not any("<|" in prompt.text for prompt in report.prompts)


def log_probs(target, texts):
    """`[text, position, token]` log-probabilities after every token but the last."""
    c = target.config
    run = llama.build(c, target.numerics)

    @jax.jit
    def score(params, tokens):
        start = jnp.zeros(1, jnp.int32)
        cache = llama.init_cache(c, target.numerics, 1, TEXT_LENGTH)
        bias = kv.causal_bias(start, TEXT_LENGTH, TEXT_LENGTH)
        positions = jnp.arange(TEXT_LENGTH)[None]
        hidden = run(params, tokens, positions, bias, cache, start)[0]
        logits = llama.target_logits(params, hidden, target.numerics)
        return jax.nn.log_softmax(logits[0, :-1])

    return [np.asarray(score(target.params, jnp.asarray(t)[None])) for t in texts]


# Biases and other sizes are compared with numpy on tiny files, too.
@pytest.mark.parametrize(
    "name",
    ["smollm2-135m", pytest.param("qwen2.5-coder-0.5b", marks=pytest.mark.thorough)],
)
def test_forward_equals_an_independent_one(name):
    """Weights, permutations, biases and rotary embedding, against numpy in float64."""
    if name == "smollm2-135m":
        target = open_target("float32")
    else:
        file = Path(os.environ.get("OSPEC_MODELS_DIR", "nowhere")) / f"{name}.gguf"
        if not file.exists():
            pytest.skip(f"OSPEC_MODELS_DIR holds no {file.name}")
        target = load_target(str(file), "float32")
    tokens = target.tokenizer.encode("def area(radius):\n    return 3.14159 * radius")
    padded = (tokens + [0] * TEXT_LENGTH)[:TEXT_LENGTH]
    found = log_probs(target, [padded])[0][: len(tokens)]
    logits, _ = forward(target.params, target.config, tokens)
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert np.array_equal(found.argmax(1), expected.argmax(1))


@pytest.fixture(scope="module")
def texts():
    """Thirty questions with their references, `TEXT_LENGTH` tokens of each."""
    folder = Path(os.environ.get("OSPEC_PROMPTS_DIR", "nowhere"))
    if not folder.is_dir():
        pytest.skip("OSPEC_PROMPTS_DIR names no folder of prompt sets")
    tokenizer, found = open_target("int8").tokenizer, []
    for name in SETS[:5]:
        lines = (folder / f"{name}.jsonl").read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        whole = (f"{row['prompt']}\n{row.get('reference') or ''}" for row in rows)
        long = (t for t in map(tokenizer.encode, whole) if len(t) >= TEXT_LENGTH)
        found += [t[:TEXT_LENGTH] for t in itertools.islice(long, 6)]
    assert len(found) == 30
    return found


def test_int8_is_still_a_good_model(texts):
    """Perplexity within 2% of float32's, and nine of ten of its choices."""
    int8, exact = (log_probs(open_target(p), texts) for p in ("int8", "float32"))
    chosen = lambda rows: np.mean(
        [np.mean(r[np.arange(TEXT_LENGTH - 1), t[1:]])
         for r, t in zip(rows, texts, strict=True)]
    )  # fmt: skip
    ratio = np.exp(chosen(exact) - chosen(int8))
    same = [
        np.mean(a.argmax(-1) == b.argmax(-1)) for a, b in zip(int8, exact, strict=True)
    ]
    assert abs(ratio - 1) < 0.02, ratio
    assert np.mean(same) >= 0.9, np.mean(same)
