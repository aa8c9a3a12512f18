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
# # Quickstart: does a draft that learns from its own verification get better?
#
# A *draft* proposes tokens, the *target* checks them in one pass and keeps those that
# it would have chosen itself. The check says how wrong the draft was: a free training
# signal. Here a tiny random target is served with an untrained draft, which learns
# while it serves. Nothing is downloaded, and it takes about a minute on two cores.
#
# In Colab, first run `!pip install ospec-jax`.

# %%
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from ospec_jax import LearnerConfig, LoadedDraft, Session, TreeConfig, load_draft
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

target = tiny_target()
config = tiny_draft_config(target.config, draft_vocab_size=240)
untrained = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
draft = LoadedDraft(untrained, Meta.create(target, config))

# %% [markdown]
# ## Plain decoding is the reference
#
# With no draft a `Session` decodes token by token.

# %%
prompts = [f"Question {i % 6}: what comes after {i % 6}?" for i in range(36)]
plain = [r.token_ids for r in Session(target).generate(prompts, max_new_tokens=48)]
len(plain), plain[0][:10]

# %% [markdown]
# ## The same prompts, with a draft that learns
#
# Every 96 tokens the learner takes two steps on what verification recorded; the target
# is never run for it.

# %%
learner = LearnerConfig(
    update_interval=96, batch_size=4, window=32, learning_rate=3e-3, num_epochs=2
)
session = Session(target, draft, learner=learner, tree=TreeConfig(num_steps=3))
results = list(session.generate(prompts, max_new_tokens=48))
lengths = np.array([r.stats.mean_acceptance_length for r in results])

fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.plot(np.arange(1, len(lengths) + 1), lengths, marker="o", ms=3)
ax.set(xlabel="prompt", ylabel="tokens per target pass", title="Learning while serving")
ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What was promised
#
# The output is exactly the target's own, whatever the draft does, and the draft has
# become better at predicting this traffic.

# %%
assert [r.token_ids for r in results] == plain
first, last = lengths[:6].mean(), lengths[-6:].mean()
assert last > first + 0.1, (first, last)
f"tokens per target pass: {first:.2f} at first, {last:.2f} at last"

# %% [markdown]
# ## Keep it
#
# A checkpoint holds the draft, the learner and (unless told otherwise) recent traffic.
# `load_draft(folder, target)` reads the draft alone.

# %%
with tempfile.TemporaryDirectory() as folder:
    session.save(folder, with_feedback=False)
    restored = load_draft(folder, target)
again = Session(target, restored, tree=TreeConfig(num_steps=3))
result = next(again.generate(prompts[:1], max_new_tokens=48))
assert result.token_ids == plain[0]
f"restored draft: {result.stats.mean_acceptance_length:.2f} tokens per target pass"
