# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct: real weights, the shipped draft, real prompts."""

import os
from pathlib import Path

import pytest

from ospec_jax import Session, TreeConfig, load_draft, load_target
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts, read_prompts

pytestmark = pytest.mark.slow

SETS = (
    "gsm8k_train4000", "spider_train", "codesearchnet_py_docs", "mbpp",
    "math_test2000", "alpaca_eval",
)  # fmt: skip
TREES = {
    "chain": TreeConfig(num_steps=3),
    "dynamic": TreeConfig("dynamic", num_steps=4, topk=4, num_draft_tokens=10),
}
NUM_PROMPTS = {"int8": 50, "float32": 6}
NEW_TOKENS = 24


def open_target(precision):
    try:
        return load_target("smollm2-135m", precision)
    except FileNotFoundError as error:
        pytest.skip(f"SmolLM2 is neither here nor to be downloaded: {error}")


@pytest.fixture(scope="module", params=["int8", "float32"])
def target(request):
    return open_target(request.param)


@pytest.fixture(scope="module")
def prompts():
    """Prompts of six public sets by turns; of the demo where these are absent."""
    folder = Path(os.environ.get("OSPEC_PROMPTS_DIR", "nowhere"))
    if not folder.is_dir():
        return [p for domain in DEMO_DOMAINS for p in demo_prompts(domain)][:50]
    sets = [read_prompts(folder / f"{name}.jsonl") for name in SETS]
    mixed = [p for row in zip(*(s[9:400:10] for s in sets), strict=False) for p in row]
    return [p for p in mixed if len(p.text) < 400][:50]


@pytest.fixture(scope="module")
def plain(target, prompts):
    count = NUM_PROMPTS[target.numerics.precision]
    return list(Session(target).generate(prompts[:count], NEW_TOKENS))


@pytest.mark.parametrize(("tree", "batch_size", "num_prompts"), [
    ("chain", 1, 50), ("chain", 4, 12), ("dynamic", 1, 12), ("dynamic", 4, 50),
])  # fmt: skip
def test_greedy_equals_plain_decoding(
    target, prompts, plain, tree, batch_size, num_prompts
):
    draft = load_draft("shipped", target)
    session = Session(target, draft, tree=TREES[tree], batch_size=batch_size)
    results = list(session.generate(prompts[: len(plain)][:num_prompts], NEW_TOKENS))
    answers = {r.prompt.id: r.token_ids for r in results}
    assert answers == {r.prompt.id: r.token_ids for r in plain[:num_prompts]}
    accepted = sum(r.stats.num_accepted_tokens for r in results)
    assert accepted > 0.2 * sum(r.stats.num_drafts for r in results)
