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
# # Speed: how deep should a draft go on this machine?
#
# A verification of more rows costs more, but less than its rows would one by one:
# memory is read once for all. How much more decides how deep to draft. This notebook
# measures the cost of a pass by rows and the acceptance by depth, and predicts the best
# depth K from the two. It fetches SmolLM2-135M (98 MB, once).

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
import matplotlib.pyplot as plt
import numpy as np

from ospec_jax import Session, TreeConfig, load_draft, load_target
from ospec_jax.bench.passes import measure_machine, measure_passes, roofline
from ospec_jax.data.prompts import demo_prompts

NUM_PROMPTS, NEW_TOKENS = 8, 64
target = load_target("smollm2-135m")
draft = load_draft("shipped", target)
print(target.numerics)

# %% [markdown]
# ## What a pass costs
#
# The bound is what memory, or arithmetic, allows at best.

# %%
machine = measure_machine(target)
costs = roofline(target, machine, rows=(1, 2, 4, 8, 16, 32))
rows = [cost.num_rows for cost in costs]
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot(rows, [1e3 * c.seconds for c in costs], "o-", color="#1f6feb", label="pass")
axes.plot(rows, [1e3 * c.bound for c in costs], "--", color="#8a8f98", label="bound")
axes.set(xlabel="rows", ylabel="ms", ylim=0, title="Cost of a target pass")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## How often each depth is accepted
#
# One long chain tells the acceptance of all shorter ones: whether the third token is
# accepted does not depend on what was drafted behind it.

# %%
DEPTHS = (0, 1, 3, 5, 7)
prompts = demo_prompts("math")[:NUM_PROMPTS]
sessions = {
    k: Session(target, draft if k else None, tree=TreeConfig(num_steps=k), ngrams=False)
    for k in DEPTHS
}
for session in sessions.values():
    session.warm_up()
lengths = {}
for k, session in sessions.items():
    answers = list(session.generate(prompts, max_new_tokens=NEW_TOKENS))
    lengths[k] = session.stats.mean_acceptance_length
by_depth = sessions[7].stats.acceptance_per_position
expected = {k: 1 + sum(by_depth[:k]) for k in DEPTHS}
{k: (round(expected[k], 2), round(lengths[k], 2)) for k in DEPTHS}

# %% [markdown]
# Expected and measured lengths agree, up to where chains happen to begin.

# %%
assert all(abs(expected[k] - lengths[k]) < 0.25 for k in DEPTHS)
assert all(np.diff(by_depth) <= 0), "a deeper token cannot be accepted more often"

# %% [markdown]
# ## The best depth
#
# A step of depth K emits its mean acceptance length and costs what it costs; the ratio
# to a plain step is the speed-up. It rises while another drafted token earns more than
# it costs, and falls behind that.

# %%
passes = measure_passes({str(k): session for k, session in sessions.items()})
step = {k: passes[str(k)].step for k in DEPTHS}
speedup = {k: expected[k] * step[0] / step[k] for k in DEPTHS}
best = max(speedup, key=speedup.__getitem__)
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot(DEPTHS, [speedup[k] for k in DEPTHS], "o-", color="#1f6feb")
axes.axvline(best, color="#8a8f98", ls=":")
axes.set(xlabel="K", ylabel="speed-up", title=f"Predicted: K = {best} is best here")
plt.show()
