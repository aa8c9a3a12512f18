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
# # Regret: does less of it mean faster decoding?
#
# Online learning is judged by *dynamic regret*: the draft's summed loss beyond that of
# the best draft for every round. Theory (arXiv 2603.12617, reconstructed in
# `ospec_jax.learners.bounds`) turns it into a floor under the acceleration of decoding.
# Here both are measured, first where all assumptions hold, then on a stream of a tiny
# model. Nothing is downloaded, and it takes about a minute on two cores.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from ospec_jax import LearnerConfig, LoadedDraft, TreeConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.streams import build_stream
from ospec_jax.drafters.base import dequantized
from ospec_jax.drafters.eagle import eagle3
from ospec_jax.learners import bounds as theory
from ospec_jax.learners.objective import build_objective
from ospec_jax.replay.hindsight import best_per_chunk_in_hindsight, dynamic_regret_proxy
from ospec_jax.replay.record import record
from ospec_jax.replay.replayer import Replayer
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

STEPS, COST = 4, 0.1  # tokens drafted a pass, cost of a draft step in target passes

# %% [markdown]
# ## A convex toy
#
# Draft and target are softmax regressions of eight tokens on six features; the target's
# weights wander. A round is one batch of contexts, its loss KL(target || draft): convex
# in the draft's weights, and zero at the target's, so that regret is the summed loss.

# %%
ROUNDS, RADIUS = 1000, 8.0
key_walk, key_contexts = jax.random.split(jax.random.key(0))
contexts = jax.random.normal(key_contexts, (ROUNDS, 16, 6)) / jnp.sqrt(6)


def wander(drift):
    """The target's weights in each round: a rotation of slowly growing angle."""
    first, second = jax.random.normal(key_walk, (2, 8, 6)) * 1.5
    angle = drift * jnp.arange(ROUNDS)[:, None, None]
    return jnp.cos(angle) * first + jnp.sin(angle) * second


def loss(w, target, x):
    p, log_q = jax.nn.softmax(x @ target.T), jax.nn.log_softmax(x @ w.T)
    kl = jnp.sum(p * (jnp.log(p) - log_q), axis=-1)
    acceptance = jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1)
    return jnp.mean(kl), acceptance


def project(w):
    return optax.projections.projection_l2_ball(w, RADIUS)


# %% [markdown]
# Three learners: online gradient descent, optimistic descent, which foresees that the
# next gradient will be like the last one, and an ensemble of step sizes, averaged with
# Hedge's weights. The static draft, the ensemble's expert of step size 0, is where all
# begin.

# %%
GRID = jnp.asarray([0.0, 0.1, 0.4, 1.6, 6.4])


def play(optimizer, targets):
    """Losses and acceptance by round, of one optimizer."""

    def a_round(carry, inputs):
        w, state = carry
        (kl, acceptance), g = jax.value_and_grad(loss, has_aux=True)(w, *inputs)
        updates, state = optimizer.update(g, state, w)
        return (project(optax.apply_updates(w, updates)), state), (kl, acceptance)

    start = jnp.zeros((8, 6))
    carry = start, optimizer.init(start)
    return jax.jit(lambda c: jax.lax.scan(a_round, c, (targets, contexts))[1])(carry)


def play_ensemble(targets, rate=2.0):
    def a_round(carry, inputs):
        experts, losses = carry
        weights = jax.nn.softmax(-rate * losses)
        own = jax.vmap(lambda w: loss(w, *inputs)[0])(experts)
        grads = jax.vmap(jax.grad(lambda w: loss(w, *inputs)[0]))(experts)
        moved = jax.vmap(project)(experts - GRID[:, None, None] * grads)
        served = jnp.einsum("m,mvd->vd", weights, experts)
        return (moved, losses + own), loss(served, *inputs)

    carry = jnp.zeros((len(GRID), 8, 6)), jnp.zeros(len(GRID))
    return jax.jit(lambda c: jax.lax.scan(a_round, c, (targets, contexts))[1])(carry)


targets = wander(0.004)
runs = {
    "static": play(optax.sgd(0.0), targets),
    "gradient": play(optax.sgd(1.6), targets),
    "optimistic": play(optax.optimistic_gradient_descent(1.6), targets),
    "ensemble": play_ensemble(targets),
}

# %% [markdown]
# ## Measured acceleration, and the floor that regret puts under it
#
# Solid: what sampled verification yields with these drafts, so far. Dashed: the bound,
# from regret alone.

# %%
rounds = np.arange(1, ROUNDS + 1)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
table = {}
for color, (name, (kl, acceptance)) in enumerate(runs.items()):
    tokens = theory.expected_tokens(acceptance, STEPS).mean(axis=1)
    measured = theory.acceleration_rate(np.cumsum(tokens) / rounds, STEPS, COST)
    total = np.cumsum(np.asarray(kl, float))
    bound = theory.acceleration_lower_bound(total, rounds, STEPS, COST)
    assert np.all(bound <= measured + 1e-6), name
    axes[0].plot(rounds, total, color=f"C{color}", label=name)
    axes[1].plot(rounds, measured, color=f"C{color}")
    axes[1].plot(rounds, bound, color=f"C{color}", ls="--")
    table[name] = (float(total[-1]), float(measured[-1]), float(bound[-1]))
axes[0].set(xlabel="round", ylabel="dynamic regret, nats", yscale="log")
axes[0].legend(frameon=False)
axes[1].set(xlabel="round", ylabel="acceleration; dashed: bound")
plt.show()
{name: "regret {:.0f}, acceleration {:.2f}, bound {:.2f}".format(*row)
 for name, row in table.items()}  # fmt: skip

# %% [markdown]
# Less regret, more speed: the bound is loose, its ranking is right. The ensemble finds
# nearly the best step size without being told. Optimism changes little here: behind a
# target that moves steadily, gradient descent keeps a constant distance, and foreseeing
# the gradient does not shorten it; it would forgive larger steps if gradients were not
# noisy.

# %%
by_regret = sorted(table, key=lambda name: table[name][0])
by_speed = sorted(table, key=lambda name: -table[name][1])
print("least regret first:", ", ".join(by_regret))
print("fastest first:     ", ", ".join(by_speed))
singles = {
    step: float(play(optax.sgd(step), targets)[0].sum()) for step in GRID.tolist()[1:]
}
print(f"the ensemble's regret: {table['ensemble'][0]:.0f}")
{f"step size {step:.1f}": f"regret {total:.0f}" for step, total in singles.items()}

# %% [markdown]
# ## Faster drift, more regret
#
# The regret of gradient descent against its own bound, of the order sqrt(T (1 + P)),
# where the path length P is how far the target's weights move.

# %%
diameter = 2 * RADIUS
steepest = float(np.sqrt(2) * jnp.linalg.norm(contexts, axis=-1).mean(axis=1).max())
paths, measured, bounds = [], [], []
for drift in (0.0, 0.004, 0.02, 0.1):
    moving = wander(drift)
    paths.append(theory.path_length(moving))
    known = ROUNDS, paths[-1], diameter, steepest
    step = theory.best_step_size(*known)
    measured.append(float(play(optax.sgd(step), moving)[0].sum()))
    bounds.append(theory.gradient_descent_bound(*known))
assert np.all(np.asarray(measured) <= bounds)
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(paths, measured, "o-", label="measured")
ax.plot(paths, bounds, "--", label="bound")
ax.set(xlabel="path length of the target", ylabel="regret, nats", yscale="log")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A stream of a tiny model
#
# Nothing is convex here, and the best draft of each round is unknown. A stream of two
# domains is recorded once, and learners are replayed on it, without the target. Their
# losses are held against a *proxy*: drafts trained afterwards on each chunk that they
# are scored on.

# %%
target = tiny_target()
config = tiny_draft_config(target.config, draft_vocab_size=0)
untrained = tiny_draft(eagle3(config, TreeConfig(num_steps=1)), config)
draft = LoadedDraft(untrained, Meta.create(target, config))
rows = {
    name: [parse_prompt({"prompt": f"{text} {i % 5}", "id": f"{name}{i}"}, "")
           for i in range(30)]
    for name, text in (("sums", "What is three and"), ("names", "Who comes after"))
}  # fmt: skip
prompts = build_stream(rows, "shifts", num_prompts=60)
folder = Path(tempfile.mkdtemp())
record(target, prompts, folder, config.taps, max_new_tokens=32, batch_size=4)

replayer = Replayer(target, draft, folder, num_steps=3, has_losses=True, decay=1.0)
learner = LearnerConfig(
    update_interval=96, batch_size=4, window=32, learning_rate=3e-3, num_epochs=3,
    num_candidates=0, decay=1.0, loss="forward_kl",
)  # fmt: skip
served = {}  # answers before an update -> what is served from then on
static = replayer.run(None)
count = []
learned = replayer.run(
    learner, count.append,
    on_update=lambda _, before, after: served.update({len(count) + 1: after.params}),
)  # fmt: skip
hindsight = best_per_chunk_in_hindsight(
    replayer, 10, num_epochs=8, learning_rate=3e-3, window=32
)
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for name, run in (("static", static), ("learned", learned)):
    losses = [answer.loss for answer in run.answers]
    proxy = dynamic_regret_proxy(losses, hindsight)
    ax.plot(proxy, label=name)
    table[name] = proxy
ax.axvline(29.5, color="gray", ls=":")
ax.set(xlabel="answer", ylabel="regret proxy, nats a position")
ax.legend(frameon=False)
plt.show()
print({name: f"{proxy[-1]:.2f} nats in the end" for name, proxy in table.items()})

# %% [markdown]
# And the bound, chunk by chunk: the KL divergence of what was served, and the
# acceleration that sampled verification would have with it. The draft's loss is its
# cross-entropy, so the target's own entropy is taken off. An untrained draft is two
# nats and more away from its target, of which the bound only says that all may be
# rejected: with tiny models it says something late, or never.

# %%
judge = jax.jit(build_objective(replayer.drafter.unroll, 64, 3, decay=1.0).score)
head = dequantized(replayer.shared.head)
divergence, speed = [], []
for first in range(0, 60, 10):
    params = served[max([n for n in served if n <= first])] if first else (
        draft.draft.params
    )  # fmt: skip
    windows = replayer.store.windows(replayer.order[first : first + 10], 32)
    segments = replayer.store.segments(windows, 64, 32, 3)
    info, _ = judge(params, segments, replayer.shared, None)
    hidden = segments.feedback.hidden[:, 65:-2].astype(np.float32)
    log_p = jax.nn.log_softmax(hidden @ head.T)
    weight = segments.weight[:, 65:-2]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    divergence.append(float(info.loss - jnp.sum(entropy * weight) / weight.sum()))
    tokens = 1 + np.cumprod(info.acceptance).sum()
    speed.append(float(theory.acceleration_rate(tokens, 3, COST)))
chunks = 10 * np.arange(1, len(speed) + 1)
bound = theory.acceleration_lower_bound(divergence, 1, 3, COST)
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(chunks, speed, "o-", label="measured")
ax.plot(chunks, bound, "--", label="bound")
ax.set(xlabel="answer", ylabel="acceleration")
ax.legend(frameon=False)
plt.show()
assert np.all(bound <= speed)
[
    f"KL {kl:.2f}: acceleration {s:.2f} >= {b:.2f}"
    for kl, s, b in zip(divergence, speed, bound, strict=True)
]
