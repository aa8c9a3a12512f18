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
# # Quickstart: a draft that learns from its own verification
#
# A *draft* proposes tokens, the *target* checks them in one pass and keeps those that
# it would have chosen itself. The check says how wrong the draft was: a free training
# signal. Here SmolLM2-135M writes HTML, which the draft that comes with the package
# knows little of. It takes about two minutes on two cores, most of them compilation;
# the model (98 MB) is fetched once.

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

import matplotlib.pyplot as plt
import numpy as np

from ospec_jax import Session, TreeConfig, load_draft, load_target
from ospec_jax.data.prompts import demo_prompts

NUM_PROMPTS, NEW_TOKENS = 20, 64
target = load_target("smollm2-135m")
draft = load_draft("shipped", target)
prompts = demo_prompts("html")[:NUM_PROMPTS]
print(target, draft, sep="\n")

# %% [markdown]
# ## Plain decoding is the reference
#
# With no draft a `Session` decodes token by token.

# %%
plain = list(Session(target).generate(prompts, NEW_TOKENS))
print(prompts[0].text, "\n")
print(plain[0].text)

# %% [markdown]
# ## The same prompts in three more ways
#
# With the draft as it is; with n-grams of the request beside it; and with learning:
# after each answer the draft's last layer is fitted to what the target said, and
# n-grams of the answer are remembered. The target is never run for it.

# %%
sessions = {
    "the draft as it is": Session(target, draft, ngrams=False),
    "and n-grams": Session(target, draft),
    "and learning": Session(target, draft, learner="auto"),
}
answers = {
    name: list(session.generate(prompts, NEW_TOKENS))
    for name, session in sessions.items()
}

# %% [markdown]
# ## Tokens per pass of the target
#
# Each line counts from the first prompt to the one below it. A pass of the target is
# what takes the time; how many tokens it gives does not depend on the machine.

# %%
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for name, results in answers.items():
    passes = np.cumsum([r.stats.num_drafts for r in results])
    accepted = np.cumsum([r.stats.num_accepted_tokens for r in results])
    ax.plot(np.arange(1, len(results) + 1), 1 + accepted / passes, label=name)
ax.set(
    xlabel="prompts answered",
    ylabel="tokens per target pass",
    title="SmolLM2-135M writes HTML",
)
ax.grid(alpha=0.3)
ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()
{name: f"{s.stats.mean_acceptance_length:.2f}" for name, s in sessions.items()}

# %% [markdown]
# ## What was promised
#
# The output is exactly the target's own, whoever drafts, and whatever was learned.

# %%
for results in answers.values():
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
"every token is plain decoding's"

# %% [markdown]
# ## Keep it
#
# A checkpoint holds the draft, the learner and (unless told otherwise) recent traffic.
# `load_draft(folder, target)` reads the draft alone; `session.resume(folder)` goes on
# with everything.

# %%
with tempfile.TemporaryDirectory() as folder:
    sessions["and learning"].save(folder, with_feedback=False)
    restored = load_draft(folder, target)
again = Session(target, restored, tree=TreeConfig(num_steps=5))
result = next(again.generate(prompts[:1], NEW_TOKENS))
assert result.token_ids == plain[0].token_ids
f"the restored draft, five deep: {result.stats.mean_acceptance_length:.2f}"
