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
# # How much to draft: by domain, against who knows the answer
#
# A deeper draft may have more accepted, and takes longer. What would have paid is known
# afterwards: here a draft grows its widest tree at every token of recorded answers, and
# every smaller tree is a part of it. The marginal rule chooses depth and size by what
# the draft says of its own tokens; the oracle knows what the target will say. It
# fetches SmolLM2-135M (98 MB, once), and takes a few minutes on two cores.

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
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ospec_jax import load_draft, load_target
from ospec_jax.control.clock import Clock, flat_clock
from ospec_jax.data.prompts import demo_prompts
from ospec_jax.replay import rules
from ospec_jax.replay.cycles import build_cycles
from ospec_jax.replay.record import record
from ospec_jax.replay.trees import TraceShape, grow_trees, open_trace, trace_folder

NUM_PROMPTS, NEW_TOKENS = 5, 48  # of each domain
DOMAINS = ("math", "html", "yaml")
SHAPE = TraceShape(topk=1, depth=5, num_nodes=5)
target = load_target("smollm2-135m")
draft = load_draft("shipped", target)

# %% [markdown]
# ## Recorded chains
#
# The draft was trained on mathematics, and on neither of the others.

# %%
folder = Path(tempfile.mkdtemp())
prompts = [prompt for name in DOMAINS for prompt in demo_prompts(name)[:NUM_PROMPTS]]
record(target, prompts, folder, draft.taps, max_new_tokens=NEW_TOKENS)
grow_trees(target, draft, folder, SHAPE)
trace = open_trace(trace_folder(folder, SHAPE))
print(len(trace.ids), "answers of", sum(trace.lengths), "tokens")

# %% [markdown]
# ## Two clocks
#
# One was measured on two cores (`ospec rules --clock again` measures yours): a depth
# takes about as long as four rows more. On the other, made up, a row costs nothing, as
# it roughly does on a TPU.

# %%
CLOCKS = {
    "two cores": Clock(
        topk=1,
        drafting=(0.0, 2.1e-3, 2.6e-3, 3.0e-3, 3.2e-3, 3.8e-3),
        rows=(1, 2, 3, 4, 5, 6),
        verifying=(10.6e-3, 10.6e-3, 10.7e-3, 10.8e-3, 10.9e-3, 11.0e-3),
    ),
    "flat": flat_clock(1, 5),
}
ANSWERS = {
    name: [i for i, domain in enumerate(trace.domains) if domain == name]
    for name in dict.fromkeys(trace.domains)
}


def scores_of(clock, answers):
    """What the marginal rule and the oracle do, and the best fixed choice."""
    cycles = build_cycles(trace.select(answers), clock)
    grid = rules.score_grid(cycles)
    return {
        "marginal": rules.run_rule(cycles, rules.marginal_rule(SHAPE.depth)),
        "oracle": rules.run_oracle(cycles),
        "best fixed, known afterwards": grid.max(),
    }


found = {
    (clock, name): scores_of(CLOCKS[clock], answers)
    for clock in CLOCKS
    for name, answers in ANSWERS.items()
}

# %% [markdown]
# ## Chosen depths
#
# The oracle drafts nothing, or one token, where the draft is about to fail, and deep
# where it is right all along. The rule knows neither; it leans to what has paid.

# %%
depths = np.arange(SHAPE.depth + 1)
figure, axes = plt.subplots(
    len(CLOCKS), len(ANSWERS), figsize=(9, 5), sharex=True, sharey=True, squeeze=False
)
for row, clock in zip(axes, CLOCKS, strict=True):
    for axis, name in zip(row, ANSWERS, strict=True):
        for shift, who in ((-0.2, "marginal"), (0.2, "oracle")):
            score = found[clock, name][who]
            axis.bar(depths + shift, score.depths, 0.4, label=who)
        axis.set_title(f"{name}, {clock}", fontsize=10)
    row[0].set_ylabel("share of steps")
axes[0, 0].legend()
for axis in axes[-1]:
    axis.set_xlabel("depth")
figure.tight_layout()

# %% [markdown]
# ## Verified nodes
#
# Of a chain the rule mostly verifies all that it drafted: what would not pay to verify
# did not pay to draft either. The oracle leaves out what it knows to be wrong.

# %%
figure, axes = plt.subplots(1, len(ANSWERS), figsize=(9, 3), sharey=True, squeeze=False)
for axis, name in zip(axes[0], ANSWERS, strict=True):
    for shift, who in ((-0.2, "marginal"), (0.2, "oracle")):
        axis.bar(depths + shift, found["two cores", name][who].sizes, 0.4, label=who)
    axis.set_title(f"{name}, two cores", fontsize=10)
    axis.set_xlabel("nodes")
axes[0, 0].set_ylabel("share of steps")
axes[0, 0].legend()
figure.tight_layout()

# %% [markdown]
# ## What it comes to
#
# Tokens a second by the clock, as a ratio to the best fixed depth and size, which is
# chosen here on the very answers that are reported.

# %%
for (clock, name), scores in found.items():
    best = scores["best fixed, known afterwards"]
    ratios = {
        who: scores[who].tokens_per_second / best for who in ("marginal", "oracle")
    }
    print(f"{clock:10} {name:6}", *(f"{k} {v:.2f}" for k, v in ratios.items()))
    assert ratios["oracle"] >= max(1.0, ratios["marginal"]) - 1e-6
    # Never told which depth is best, it is not far behind it.
    assert ratios["marginal"] > 0.85
