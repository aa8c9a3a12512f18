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
# # A race of learners: who follows a drifting stream, and at what cost?
#
# The draft of a tiny model learns from a stream whose domain changes and comes back.
# Answers are recorded once, and all learners are replayed on them: greedy answers do
# not depend on the draft. Scoring is *prequential*: a prompt is answered before
# anything is learned from it. Nothing is downloaded, and it takes about a minute on two
# cores.

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

from ospec_jax import LearnerConfig, LoadedDraft, TreeConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.streams import build_stream
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.replay.record import record
from ospec_jax.replay.replayer import Replayer
from ospec_jax.replay.results import running_length
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

STEPS, BLOCK, ANSWERS = 2, 20, 80  # tokens drafted a pass, prompts of a block, of all

# %% [markdown]
# ## One recording
#
# Two domains take turns in blocks of 20 prompts. The target is random, so its
# "language" of each domain has to be learned from nothing, by an untrained draft.

# %%
target = tiny_target()
config = tiny_draft_config(target.config, draft_vocab_size=target.config.vocab_size)
drafter = eagle3(config, TreeConfig(num_steps=1))
draft = LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config))
rows = {
    name: [parse_prompt({"prompt": f"{text} {i % 6}", "id": f"{name}{i}"}, "")
           for i in range(ANSWERS // 2)]
    for name, text in (("sums", "What is three and"), ("names", "Who comes after"))
}  # fmt: skip
prompts = build_stream(rows, "alternating", num_prompts=ANSWERS, block=BLOCK)
folder = Path(tempfile.mkdtemp())
record(target, prompts, folder, config.taps, max_new_tokens=32, batch_size=4)
replayer = Replayer(target, draft, folder, num_steps=STEPS)

# %% [markdown]
# ## The race
#
# All learners but two update after every 64 answer tokens, from the same windows. OSD,
# the baseline, steps once for four requests. `head` learns the last layer alone, after
# each answer, from the states that drafting would have left behind. `paced` is
# `gradient` that slows down where it does not pay.

# %%
common = LearnerConfig(
    memory_slots=0, update_interval=64, batch_size=4, window=32, num_steps=STEPS,
    num_candidates=0, learning_rate=3e-3,
)  # fmt: skip
sgd = {"optimizer": "sgd", "learning_rate": 0.5}
named = lambda name, **values: common.renamed(name, **values)
learners = {
    "static": None,
    "gradient": common,
    "paced": named("gradient", pace="pays"),
    "momentum": named("momentum", **sgd, momentum=0.5, loss="forward_kl"),
    "optimistic": named("optimistic", **sgd),
    "ensemble": named("ensemble"),
    "shared_ensemble": named("shared_ensemble", meta_rate=3.0, meta_discount=0.8),
    "osd": named("osd", update_every_prompts=1, buffer_requests=4, loss="forward_kl"),
    "head": LearnerConfig(name="head"),
}
runs = {name: replayer.run(learner) for name, learner in learners.items()}
answers = {name: run.answers for name, run in runs.items()}
updates = {name: len(run.reports) for name, run in runs.items()}

# %% [markdown]
# Tokens a target pass, over the last twelve answers. At the dotted lines the domain
# changes.

# %%
lengths, seconds, tables = {}, {}, {}
fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
for number, (name, found) in enumerate(answers.items()):
    counts = {
        key: [getattr(a.stats, key) for a in found]
        for key in ("num_drafts", "num_accepted_tokens")
    }
    ax.plot(running_length(counts, 12), color=f"C{number}", label=name)
    blocks = np.split(np.array(list(counts.values())), ANSWERS // BLOCK, axis=1)
    tables[name] = [1 + b[1].sum() / b[0].sum() for b in blocks]
    drafts, accepted = (sum(values) for values in counts.values())
    lengths[name] = 1 + accepted / drafts
    seconds[name] = sum(a.learning_seconds for a in found)
for change in range(BLOCK, ANSWERS, BLOCK):
    ax.axvline(change - 0.5, color="gray", ls=":")
ax.set(xlabel="answer", ylabel="acceptance length")
ax.legend(frameon=False, ncols=3)
plt.show()

# %% [markdown]
# ## What it costs
#
# Milliseconds of learning for each answer token, and percent more tokens a pass than
# the static draft has, for each second of learning; on the machine that ran this.

# %%
num_tokens = sum(a.num_tokens for a in answers["static"])
print(f"{'':16}{'length':>7}{'by block':>25} {'updates':>8}{'ms/token':>9}{'%/s':>7}")
for name, length in sorted(lengths.items(), key=lambda item: -item[1]):
    gain = 100 * (length / lengths["static"] - 1)
    line = f"{name:16}{length:7.2f} " + "".join(f"{x:6.2f}" for x in tables[name])
    if name != "static":
        line += f" {updates[name]:8}{1e3 * seconds[name] / num_tokens:9.2f}"
        line += f"{gain / seconds[name]:7.0f}"
    print(line)

# %% [markdown]
# ## What it shows, and what not
#
# - Everybody beats the static draft, which knows nothing, and nobody forgets: the
#   second visit to a domain begins above the first.
# - The last layer alone wins, by far, and costs least: its problem is convex, and each
#   step is a whole Newton step. The others need small steps, and this stream is short.
# - The ensemble does as well as or better than gradient descent with the middle of its
#   grid, for a multiple of the time. With one gradient for all experts it costs little
#   more than gradient descent, and is not worse.
# - Expecting the next gradient to be like the last one gains nothing here: each update
#   sees other windows. Momentum, the released code's rule, averages over several.
# - OSD learns from rejected positions only, and steps rarely.
# - `paced` makes the same updates as `gradient` for as long as these pay. A short
#   stream that begins from nothing leaves it little to save.
#
# Rates were not tuned, and this is one seed of one tiny random model: of real drafts it
# says nothing, in particular not of one that is already at home in its traffic.
# `ospec replay` runs the same race on recordings of real models.

# %%
ranked = sorted(lengths, key=lambda name: lengths[name], reverse=True)
{name: f"{lengths[name] / lengths['static']:.2f} times static" for name in ranked}
