# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Drafters: who guesses best, where, and at what price?
#
# A trained head on the target's states, n-grams of what was said before, the target
# itself in four bits: whoever proposes tokens, verification keeps those that the target
# would have chosen anyway. So drafters differ in two numbers alone: how many of their
# tokens are accepted, which the traffic decides, and what a step costs, which the
# machine decides. This notebook measures both, for six drafters on four domains. It
# fetches SmolLM2-135M (98 MB, once) and takes about two minutes on two cores.

# %%
# Which device is here? In Colab this installs the package that fits it.
import glob
import importlib.util
import subprocess
import sys

PLACES = {"tpu": "/dev/accel* /dev/vfio/[0-9]*", "cuda": "/dev/nvidia[0-9]*"}
found = [name for name, places in PLACES.items() if any(map(glob.glob, places.split()))]
package = f"ospec-jax[{found[0]}]" if found else "ospec-jax"
if importlib.util.find_spec("ospec_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

import jax

print(f"{package} is for this machine; jax runs on {jax.devices()}")

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from ospec_jax import TreeConfig, load_draft, load_target
from ospec_jax.bench.drafts import domain_rows
from ospec_jax.bench.harness import run_bench
from ospec_jax.bench.runs import BenchConfig, Contender
from ospec_jax.cli.notation import parse_tree
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts, parse_prompt
from ospec_jax.decoding.step import shared_tables
from ospec_jax.types import Roots

BLUE, GREY = "#1f6feb", "#8a8f98"
CHAIN, TREE = TreeConfig(num_steps=3), parse_tree("dynamic:4,8", 3)
NUM_PROMPTS, NEW_TOKENS = 3, 40  # of each domain, of each answer
CHAT = (
    "What should I see in Lisbon in two days?",
    "Why do cats purr?",
    "Give me three arguments for learning a musical instrument as an adult.",
)
target = load_target("smollm2-135m")
trees = {
    "shipped": CHAIN,
    "shipped, as a tree": TREE,
    "shipped:hydra": CHAIN,
    "ngram": CHAIN,
    "fallback:ngram,shipped": CHAIN,
    "self:int4": CHAIN,
}
drafts = {
    name: Contender(load_draft(name.split(", ")[0], target), tree)
    for name, tree in trees.items()
}
prompts = [p for domain in DEMO_DOMAINS for p in demo_prompts(domain)[:NUM_PROMPTS]]
prompts += [
    parse_prompt({"prompt": text, "domain": "chat"}, text)
    for text in CHAT[:NUM_PROMPTS]
]

# %% [markdown]
# Everybody answers every prompt in turn, in rotating order, and the target alone does
# too: drifts of the machine hit all alike. What comes out is the same from all of them.

# %%
config = BenchConfig(modes=("autoregressive",), max_new_tokens=NEW_TOKENS)
run = run_bench(target, None, prompts, config, contenders=drafts)
found = {(row["mode"], row["domain"]): row for row in domain_rows(run)}
domains = [*DEMO_DOMAINS, "chat"]
assert all(row["num_mismatched_outputs"] == 0 for row in found.values())


def grid(key):
    """One number for each drafter and domain."""
    return np.array([[found[name, d][key] for d in domains] for name in drafts])


def show_grid(values, title):
    """Draws them, the best of each domain in bold."""
    _, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.imshow(values, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(drafts)), list(drafts))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    dark = (values.min() + values.max()) / 2
    for (i, j), value in np.ndenumerate(values):
        weight = "bold" if value == values[:, j].max() else "normal"
        color = "white" if value > dark else "black"
        axes.text(
            j, i, f"{value:.2f}", ha="center", va="center", weight=weight, color=color
        )
    axes.set_title(title)
    plt.show()


# %% [markdown]
# ## Who is right how often?
#
# The shipped heads were trained on mathematics, code and SQL, hence know neither HTML
# nor YAML nor chat well. N-grams need no training, but an answer that repeats itself
# or its prompt. The target in four bits nearly always agrees with itself.

# %%
lengths = grid("mean_acceptance_length")
show_grid(lengths, "Acceptance length: tokens per target pass")

# %%
length = {name: found[name, "all"]["mean_acceptance_length"] for name in drafts}
{name: round(length[name], 2) for name in sorted(length, key=length.get, reverse=True)}

# %% [markdown]
# ## What does a step cost?
#
# Verification reads the target's weights once, for four rows (a chain of three and its
# root) or nine (a tree of eight). Drafting comes on top: nothing
# for n-grams, little for a head of one layer, and three passes of the target itself
# for `self:int4`, whose four bits no product of a CPU makes faster.

# %%
names = list(drafts)[::-1]
draft_cost = np.array([found[name, "all"]["draft_cost"] for name in names])
step_cost = np.array([found[name, "all"]["step_cost"] for name in names])
draft_cost = np.maximum(draft_cost, 0)  # noise of the clock may say less
_, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
axes.barh(names, step_cost - draft_cost, color=GREY, label="verifying")
axes.barh(names, draft_cost, left=step_cost - draft_cost, color=BLUE, label="drafting")
axes.axvline(1, color="black", lw=0.8, ls=":")
axes.set(xlabel="plain steps", title="Cost of a step")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## So who is fastest?
#
# The speed-up is about the acceptance length divided by the step's cost. On a CPU the
# drafter that is right most often is the slowest of all, and a tree, which is right
# more often than the same head's chain, pays only where the processor has arithmetic
# to spare. N-grams beat the head where answers repeat themselves, as YAML does, and
# the head beats them where it is at home. One that lets n-grams go first, where these
# are likely to be right, mostly has the better of both. With three prompts a domain a
# tenth more or less means little, and on a busy machine nothing.

# %%
show_grid(grid("speedup"), "Tokens/s, relative to plain decoding")

# %%
winners = [list(drafts)[i] for i in grid("speedup").argmax(axis=0)]
dict(zip(domains, winners, strict=True))

# %% [markdown]
# On an accelerator the second figure is another one: more rows cost hardly more there,
# so trees gain, and so they do for large targets, beside which a head is small.
#
# ## What a tree looks like
#
# The tree after the second prompt: the area of a node is the probability that the
# draft gives to the path to it; the filled ones are what the target then said itself.

# %%
mode = run.modes["shipped, as a tree"]
session, result = mode.session, mode.results[1]
(_, request), *_ = session.requests([result.prompt], 40, config.sampling)
drafter, draft = session.engine.drafter, session.served_draft
state, _ = session.engine.prefill(draft, request, 512)
shared, context = shared_tables(target.params), state.draft_context
context = context.replace(logits=drafter.predict(draft, shared, context.hidden))
keys = jax.random.split(jax.random.key(0), 1)
roots = Roots(state.last_token, state.lengths, keys, context, state.sampling)
tree, _ = drafter.propose(draft, shared, state.draft_cache, roots)
tokens, parents, depths = (
    np.asarray(x[0]) for x in (tree.tokens, tree.parents, tree.depths)
)
on_path = np.asarray(tree.ancestor_mask[0])  # whether node j is node i or above it
path_probs = np.exp(on_path @ np.asarray(tree.log_probs[0]))
is_right = tokens == np.array(result.token_ids)[depths]
is_accepted = np.array([is_right[above].all() for above in on_path])

height = np.zeros(len(tokens))
for depth in range(1, depths.max() + 1):
    level = np.flatnonzero(depths == depth)
    height[level] = np.linspace(1, -1, len(level) + 2)[1:-1]
_, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for i, parent in enumerate(parents):
    if parent >= 0:
        ends = [parent, i]
        axes.plot(depths[ends], height[ends], color=GREY, lw=1, zorder=1)
    color = BLUE if is_accepted[i] else "white"
    axes.scatter(
        depths[i], height[i], 30 + 500 * path_probs[i], color, edgecolors=BLUE, zorder=2
    )
    text = repr(target.tokenizer.decode([int(tokens[i])]))
    axes.annotate(text, (depths[i], height[i]), (10, 8), textcoords="offset points")
axes.set(xlabel="depth", title="A drafted tree", yticks=[], ylim=(-1, 1.1))
axes.set_xticks(range(depths.max() + 1))
axes.margins(x=0.15)
axes.spines[["top", "right", "left"]].set_visible(False)
plt.show()

# %%
assert tree.tokens.shape[1] == 9
assert is_accepted[0], "the root was said already"
f"accepted nodes below the root: {is_accepted.sum() - 1}"
