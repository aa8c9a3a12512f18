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
# # Drafting in parallel: when is a second device worth it?
#
# PEARL lets a draft write on while its target verifies, on a device of its own. Here
# are its rounds, on tiny models, and what they cost, by a model of both sides' times.
# It runs in a minute on two cores.

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

from ospec_jax.decoding.request import Request
from ospec_jax.loading import LoadedDraft
from ospec_jax.parallel.costs import (
    SideTimes,
    best_length,
    pearl_cost,
    plain_cost,
    serial_cost,
)
from ospec_jax.parallel.pearl import Parallel, summed
from ospec_jax.parallel.places import Place, Places
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_target
from ospec_jax.types import Draft

LENGTH, NEW_TOKENS = 4, 64
PROMPTS = [(1, 70 + i, 71, 72) for i in range(6)]
SHARES = (0.0, 0.05, 0.1, 1.0)  # of another model in the draft

# %% [markdown]
# ## Rounds
#
# Both sides share a device here, which changes no token. The draft is the target with
# some of another model in it, from none to all. A tall bar is a round whose pending
# tokens were all accepted; a bar of one is a round that followed a rejection, in which
# the target's pass judged a single token.

# %%
target = tiny_target(64)
other = tiny_target(64, seed=1)
here = Place(jax.devices()[0])
places = Places(target=here, draft=here)
meta = Meta.create(target, None, "model")


def blended(share):
    """The target, with a share of another model."""
    blend = lambda a, b: (1 - share) * a + share * b
    params = jax.tree.map(blend, target.params, other.params)
    model = dataclasses.replace(other, params=params)
    return LoadedDraft(Draft(params), meta, model)


answers = {
    share: [
        Parallel(target, blended(share), places, LENGTH).answer(
            Request(str(i), tuple(t % 64 for t in prompt), NEW_TOKENS)
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    for share in SHARES
}

figure, axes = plt.subplots(len(SHARES), 1, figsize=(9, 6), sharey=True, sharex=True)
for axis, share in zip(axes, SHARES, strict=True):
    whole = summed(answers[share])
    heights = [one.num_emitted for one in whole.rounds[:60]]
    colours = ["C0" if one.num_judged > 1 else "C1" for one in whole.rounds[:60]]
    axis.bar(range(len(heights)), heights, color=colours)
    axis.set_ylabel("tokens")
    axis.set_title(
        f"{share:.0%} of another model: {whole.acceptance_rate:.0%} accepted, "
        f"{whole.tokens_per_round:.2f} tokens a round",
        fontsize=10,
    )
axes[-1].set_xlabel("round (orange: pre-verify)")
figure.tight_layout()

# %% [markdown]
# Whatever the draft was, the answers are the same: those of the target alone.

# %%
tokens = {share: [one.token_ids for one in answers[share]] for share in SHARES}
assert all(found == tokens[0.0] for found in tokens.values())
rates = [summed(answers[share]).acceptance_rate for share in SHARES]
assert rates[0] == 1
assert rates == sorted(rates, reverse=True)

# %% [markdown]
# ## What a token costs
#
# A pass of the target takes 1, whatever its rows; the draft writes a token in a third,
# a fifth, a tenth or a twentieth of that. *In turns* is ordinary speculation on one
# device. *In turns on two* splits both models over both devices, which makes them 1.5
# times as fast; no more than twice is possible. Each is at its best length.

# %%
RATES = np.linspace(0.4, 0.98, 30)
RATIOS = (3, 5, 10, 20)


def sides(ratio):
    """A target whose rows are free, and a draft so many times as fast."""
    return SideTimes((1, 17), (1.0, 1.0), drafting=1 / ratio, hand_over=0.02)


speed_ups = {}
for ratio in RATIOS:
    times = sides(ratio)
    faster = lambda cost, rate, times=times: (
        plain_cost(times) / best_length(cost, times, rate)[1]
    )
    speed_ups[ratio] = {
        "in turns": np.array([faster(serial_cost, rate) for rate in RATES]),
        "in parallel, on two": np.array([faster(pearl_cost, rate) for rate in RATES]),
    }

figure, axes = plt.subplots(1, len(RATIOS), figsize=(11, 3.2), sharey=True)
for axis, ratio in zip(axes, RATIOS, strict=True):
    for name, values in speed_ups[ratio].items():
        axis.plot(RATES, values, label=name)
    in_turns = speed_ups[ratio]["in turns"]
    axis.plot(RATES, 1.5 * in_turns, "C0--", label="in turns, on two")
    axis.set_title(f"draft {ratio} times as fast", fontsize=10)
    axis.set_xlabel("acceptance rate")
    axis.set_ylim(0.8, 6)
axes[0].set_ylabel("plain decoding on one device = 1")
axes[0].legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## When it pays
#
# In parallel wins where a second device would make turns faster by less than this.
# Below 1 turns are faster even on one of both devices.

# %%
gains = np.array(
    [
        speed_ups[ratio]["in parallel, on two"] / speed_ups[ratio]["in turns"]
        for ratio in RATIOS
    ]
)
figure, axis = plt.subplots(figsize=(7, 3.2))
for ratio, gain in zip(RATIOS, gains, strict=True):
    axis.plot(RATES, gain, label=f"draft {ratio} times as fast")
axis.axhline(1, color="grey", linewidth=1)
axis.set_xlabel("acceptance rate")
axis.set_ylabel("in parallel / in turns")
axis.legend(fontsize=8)
figure.tight_layout()

print(f"in parallel, over turns on one of both devices: {gains.max():.2f} at most")
# Half as fast again by splitting is more than drafting in parallel ever gains here ...
assert gains.max() < 1.5
# ... and a fast draft that is often wrong is better used in turns, on one device.
assert gains[-1, RATES < 0.7].max() < 1
