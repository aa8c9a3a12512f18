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
# # Reasoning: steps instead of tokens
#
# Tokens are accepted one by one, so a chain of thought is accepted as slowly as any
# text. Lookahead Reasoning (arXiv 2506.19830) has a small model draft whole steps, and
# a verifier says whether the target's own step means the same. Online-LR (OnlineSPEC,
# arXiv 2603.12617) teaches the small model what was rejected. **With any verifier but
# `exact` the answer is not the target's own**: here both kinds are looked at, with tiny
# models that need no download, in about two minutes on two cores.

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
import dataclasses

import matplotlib.pyplot as plt
import numpy as np

from ospec_jax import Session
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.reasoning.lookahead import Reasoner
from ospec_jax.reasoning.preferences import PreferenceConfig, preference_learner
from ospec_jax.reasoning.steps import StepRule
from ospec_jax.reasoning.stream import OnlineReasoner
from ospec_jax.reasoning.verifiers import exact, same_states
from ospec_jax.reasoning.writing import Writer
from ospec_jax.testing import tiny_target

NUM_PROMPTS, NEW_TOKENS, NUM_CHUNKS = 6, 48, 6
NUM_AHEAD, STEP = 3, 6  # steps drafted in a cycle, tokens of a step

# %% [markdown]
# ## A model, and one that is nearly like it
#
# The target's weights are random. The draft has the same ones, with noise on the last
# layer: so it says what the target says, often enough and not always, as a small model
# of the same family does.

# %%
large = tiny_target()
rng = np.random.default_rng(0)
LAST = f"layers_{large.config.num_layers - 1}"


def with_noise(target, size):
    """A draft that differs from the target by so much in its last layer."""

    def disturbed(leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return leaf + size * float(leaf.std()) * noise

    last = jax.tree.map(disturbed, target.params[LAST])
    return dataclasses.replace(
        target,
        name=f"{target.name} with noise {size}",
        params=target.params | {LAST: last},
        fingerprint=f"{target.fingerprint}-{size}",
    )


rule = StepRule(max_tokens=STEP)
alone = Session(large)
beside = Session(large, batch_size=NUM_AHEAD + 1)
prompts = [
    parse_prompt({"prompt": f"problem {i}: "}, f"tiny-{i}") for i in range(NUM_PROMPTS)
]


def reasoner(small, verifier):
    return Reasoner(
        Writer(Session(small), rule), Writer(beside, rule), verifier, NUM_AHEAD
    )


# %% [markdown]
# ## The exact verifier changes nothing
#
# Drafted steps are kept where they are the target's own, token for token. So the answer
# is what the target alone would write, however bad the draft is; what changes is how
# many cycles it takes.

# %%
NOISES = (0.0, 0.1, 0.2, 0.4)
plain = list(alone.generate(prompts, max_new_tokens=NEW_TOKENS))
kept = {}
for noise in NOISES:
    solver = OnlineReasoner(reasoner(with_noise(large, noise), exact()))
    solved = list(solver.answer(prompts, NEW_TOKENS))
    same = [one.text == own.text for one, own in zip(solved, plain, strict=True)]
    drafted = sum(one.answer.num_drafted for one in solved)
    kept[noise] = sum(one.answer.num_accepted for one in solved) / drafted
    cycles = sum(len(one.answer.cycles) for one in solved)
    print(
        f"noise {noise}: {sum(same)} of {len(same)} answers are the target's, "
        f"{kept[noise]:.0%} of steps kept, {cycles} cycles"
    )
    assert all(same)

# %% [markdown]
# ## What a kept step is worth
#
# A cycle drafts g steps and has the target write g + 1 of its own side by side. With a
# chance a that a step is kept it yields (1 - a^(g + 1)) / (1 - a) steps, and takes as
# long as g of the draft and one of the target's, in a batch. `row` is how much longer a
# batch of g + 1 rows takes than a lone one: nothing on an accelerator whose arithmetic
# waits for memory, and a lot on a CPU.


# %%
def speed_up(a, g, draft, row):
    """Steps a second, relative to the target alone; `draft` is the draft's cost."""
    steps = np.where(a < 1, (1 - a ** (g + 1)) / np.maximum(1 - a, 1e-9), g + 1.0)
    return steps / (g * draft + row)


chances = np.linspace(0, 1, 101)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
for axis, title, row in (
    (axes[0], "an accelerator: rows are free", 1.0),
    (axes[1], "a CPU: four rows take 1.6 times one", 1.6),
):
    for draft in (0.05, 0.15, 0.33):
        axis.plot(chances, speed_up(chances, 3, draft, row), label=f"draft: {draft}")
    axis.axhline(1, color="gray", lw=0.8)
    axis.set(title=title, xlabel="chance that a step is kept")
axes[0].set_ylabel("speed-up over the target alone")
axes[0].legend(frameon=False, title="cost, in the target's")
plt.show()

# %% [markdown]
# A draft of a third of the target's cost does not pay on such a CPU below a chance of
# seven tenths. Of the steps that Qwen2.5-Coder's 0.5B drafted for its 1.5B, about such
# a draft, a lossy verifier kept 53% (`docs/reasoning.md`).
#
# ## A lossy verifier keeps more, and the answer is another one
#
# `states` compares the directions of the target's own states over both steps. With a
# lower threshold more steps are kept that the target did not write.

# %%
small = with_noise(large, 0.4)
for threshold in (0.99, 0.9, 0.7):
    solver = OnlineReasoner(reasoner(small, same_states(large, threshold)))
    solved = list(solver.answer(prompts, NEW_TOKENS))
    same = [one.text == own.text for one, own in zip(solved, plain, strict=True)]
    drafted = sum(one.answer.num_drafted for one in solved)
    accepted = sum(one.answer.num_accepted for one in solved)
    print(
        f"states:{threshold}: {accepted / drafted:.0%} of steps kept, "
        f"{sum(same)} of {len(same)} answers are the target's"
    )

# %% [markdown]
# ## The draft learns what the target prefers
#
# Each rejected step and the target's own behind the same tokens are a pair. After every
# chunk of problems the draft makes the target's step likelier than its own (DPO), by
# small differences to its last layer. `sft`, the baseline, knows of no rejected steps.
# Here the same dozen problems come again and again, as requests do that are alike.

# %%
small = with_noise(large, 0.1)
CHUNK = 12
shares = {}
for loss in ("sft", "dpo"):
    config = PreferenceConfig(loss=loss, num_layers=1, learning_rate=3e-4, num_epochs=4)
    learner = preference_learner(small, config)
    solver = OnlineReasoner(reasoner(small, exact()), learner, CHUNK)
    drafted = np.zeros(NUM_CHUNKS)
    accepted = np.zeros(NUM_CHUNKS)
    rows = [{"prompt": f"problem {i % CHUNK}: "} for i in range(NUM_CHUNKS * CHUNK)]
    stream = [parse_prompt(row, f"stream-{i}") for i, row in enumerate(rows)]
    for one in solver.answer(stream, NEW_TOKENS):
        drafted[one.version] += one.answer.num_drafted
        accepted[one.version] += one.answer.num_accepted
    shares[loss] = accepted / drafted
    print(f"{loss}: {', '.join(f'{x:.0%}' for x in shares[loss])} of steps kept")

fig, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for loss, share in shares.items():
    axis.plot(range(NUM_CHUNKS), share, marker="o", label=loss)
axis.axhline(shares["sft"][0], color="gray", lw=0.8, label="without learning")
axis.set(xlabel="chunks learned from", ylabel="share of steps kept", ylim=(0, 1))
axis.set_xticks(range(NUM_CHUNKS))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Every answer of both runs is still the target's own: the verifier was `exact`. With
# real models the command is
#
# ```
# ospec reason --prompts FILE.jsonl --target LARGE --draft-model SMALL \
#   --verifier judge --learner dpo
# ```
