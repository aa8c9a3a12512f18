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
# # Selection: which draft should draft?
#
# Several drafts are at hand, each good at something else. Bandits learn how good a
# draft is by letting it draft. HedgeSpec ("Not-a-Bandit", arXiv 2510.20064) does not
# need that: the target has said what comes at every emitted token, and what each
# draft would have drafted there costs no pass of the target. Here both follow the
# same stream. Nothing is downloaded, and it takes about a minute on two cores.

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
import warnings

import matplotlib.pyplot as plt
import numpy as np

from ospec_jax import LoadedDraft, Session, TreeConfig, load_draft
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.loading import pool_draft
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.selection import compare
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

DEPTH, LENGTH = 3, 96  # tokens of a draft, tokens of an answer

# %% [markdown]
# ## A stream, and experts of its domains
#
# `ospec record --draft pool:A+B+...` writes down what every draft would have had
# accepted at every token, and `ospec replay --select` compares selections on that.
# Such a recording can be made up, too: each draft here is right with a chance that
# depends on the domain, and a token that is hard for one is hard for the others.

# %%
DOMAINS = ("mathematics", "code", "chat", "translation")


def make_stream(num_drafts, answers_each=15, seed=0):
    """Answers of four domains, one domain after the other.

    Draft i is at home in domain i; those beyond the fourth are at home in none.
    """
    rng = np.random.default_rng(seed)
    answers = []
    for number, domain in enumerate(DOMAINS):
        skill = rng.uniform(0.30, 0.45, num_drafts)
        skill[number : number + 1] = 0.72
        for i in range(answers_each):
            hardness = rng.normal(size=(LENGTH - 1, 1))
            own = rng.normal(size=(LENGTH - 1, num_drafts))
            # Half of what makes a token hard is common to all drafts.
            score = np.sqrt(0.5) * (hardness + own)
            hits = score < np.quantile(score, skill, axis=0).diagonal()
            accepted = np.zeros(hits.shape, int)
            for place in range(len(hits)):
                following = hits[place : place + DEPTH]
                accepted[place] = np.cumprod(following, axis=0).sum(axis=0)
            name = f"{domain}{i}"
            answers.append(PoolAnswer(name, domain, name, hits, accepted))

    names = tuple(f"draft {i}" for i in range(num_drafts))
    meta = PoolMeta("none", "none", "float32", names, DEPTH, LENGTH)
    return meta, answers


meta, answers = make_stream(4)
SELECTIONS = ("normalhedge", "share", "leader", "ucb", "exp3", "epsilon")
results = {one.name: one for one in compare(meta, answers, SELECTIONS)}
for name, one in results.items():
    print(f"{name:40s} {one.mean_acceptance_length:.3f} tokens a pass")

# %% [markdown]
# ## Weights follow the stream
#
# `normalhedge` keeps what it has learned, so it does not follow where another draft was
# best for long. `share` gives old weights back: it knows of changes.

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharey=True, layout="constrained")
for axis, name in zip(axes, ("normalhedge", "share", "ucb"), strict=True):
    one = results[name]
    weights = one.shares if one.weights is None else one.weights
    for number, domain in enumerate(DOMAINS):
        axis.plot(weights[:, number], label=f"draft of {domain}")
        axis.axvline(15 * number - 0.5, color="gray", lw=0.5)
    axis.set(title=name, xlabel="answer")
axes[0].set_ylabel("weight (of ucb: share of steps)")
axes[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Regret
#
# In passes of the target beyond those of the best draft *of each answer*, which nobody
# knows beforehand. A line that is flat has found it.

# %%
best = next(one for name, one in results.items() if "each answer" in name)
fig, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for name in SELECTIONS:
    axis.plot(np.cumsum(results[name].steps - best.steps), label=name)
for number in range(1, len(DOMAINS)):
    axis.axvline(15 * number - 0.5, color="gray", lw=0.5)
axis.set(xlabel="answer", ylabel="regret, passes of the target")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## More drafts
#
# Who tries each draft pays for each; who judges all of them by every token hardly
# notices how many there are.

# %%
COUNTS = (4, 8, 16, 32)
regrets = {name: [] for name in ("share", "ucb", "exp3")}
for count in COUNTS:
    found = {one.name: one for one in compare(*make_stream(count), tuple(regrets))}
    ideal = next(one for name, one in found.items() if "each answer" in name)
    for name, curve in regrets.items():
        curve.append(int(found[name].steps.sum() - ideal.steps.sum()))
fig, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, curve in regrets.items():
    axis.plot(COUNTS, curve, "o-", label=name)
axis.set(xlabel="drafts", ylabel="regret, passes", xscale="log", xticks=COUNTS)
axis.set_xticklabels(COUNTS)
axis.legend(frameon=False)
plt.show()
print(regrets)

# %% [markdown]
# ## In a session
#
# The same rules choose while a model decodes: `Session(controller="share")`, on the
# command line `--draft pool:A+B --select share`. Every eight steps (`judge_every`) all
# drafts run over what was emitted, and are judged; in between only the one that drafts
# runs. Whoever drafts, the answers are those of plain decoding.

# %%
warnings.filterwarnings("ignore")
target = tiny_target()
config = tiny_draft_config(target.config, draft_vocab_size=0)
drafter = eagle3(config, TreeConfig(num_steps=1))
untrained = LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config))
pool = pool_draft([untrained, load_draft("ngram", target)], target)
session = Session(target, pool, controller="share", ngrams=False)
prompts = [f"Count: {'one two three ' * i}" for i in range(1, 7)]
answers = [result.token_ids for result in session.generate(prompts, 48)]
plain = Session(target, None)
assert answers == [result.token_ids for result in plain.generate(prompts, 48)]
print(session.chooser.report())
print(f"{session.stats.mean_acceptance_length:.2f} tokens a pass")

# %% [markdown]
# An untrained draft and n-grams: the weights are on those that were right. How much a
# selection brings depends on how far the drafts differ by domain. Measure that first,
# with `ospec record` and `ospec replay`: where the best draft of each answer is hardly
# better than one draft for all, there is nothing to select.
