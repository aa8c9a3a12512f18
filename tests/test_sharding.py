# SPDX-License-Identifier: Apache-2.0
"""Rules of meshes, and all of `on_devices.py` on eight virtual devices."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_devices import SIZES, draft_config, learned, open_session, same

from ospec_jax import sharding
from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.optimizers import make_optimizer
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.models.layers import split_groups
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_model_config, tiny_target

CONFIG = tiny_model_config(num_heads=8, num_kv_heads=4)


def test_on_eight_virtual_devices(request):
    flags = "--xla_force_host_platform_device_count=8"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    file = Path(__file__).with_name("on_devices.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    if "thorough" in request.config.option.markexpr:  # left out here, so there, too
        command += ["-m", "not thorough"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_two_processes_decode_learn_and_save_together(tmp_path):
    """A mesh over both; the checkpoint they write restores on one process."""
    target = tiny_target(**SIZES)
    config = draft_config(target)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    meta = Meta.create(target, config)
    loaded = LoadedDraft(tiny_draft(drafter, config), meta)
    checkpoint.save(tmp_path / "initial", 0, meta, loaded.draft)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    program = Path(__file__).with_name("one_of_two.py")
    rest = [port, "model=2", str(tmp_path)]
    command = lambda i: [sys.executable, str(program), str(i), *rest]
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    with contextlib.ExitStack() as stack:
        processes = []
        for i, log in enumerate(logs):
            out = stack.enter_context(log.open("w"))
            processes.append(
                subprocess.Popen(command(i), env=environment, stdout=out, stderr=out)
            )
            stack.callback(processes[-1].kill)
        codes = [process.wait(timeout=600) for process in processes]
    assert codes == [0, 0], [log.read_text()[-4000:] for log in logs]
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    session, tokens = learned(target, loaded)
    expected = {"tokens": tokens, "version": session.version, "interval": 7}
    assert found == [expected, expected]
    restored = load_draft(tmp_path / "learned", target)
    same(restored.draft.params, session.draft.params, atol=1e-5)
    resumed = open_session(target, loaded)
    resumed.resume(tmp_path / "learned")
    same(resumed.state.trainer, session.state.trainer, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_each_group_holds_its_heads_of_every_part(groups):
    counts = {"q": 8, "k": 4, "v": 4}
    names = [(part, head) for part, n in counts.items() for head in range(n)]
    rows = jnp.arange(len(names) * CONFIG.head_dim)
    params = {"qkv_proj": {"bias": rows}, "norm": {"scale": rows}}
    grouped = sharding.regroup(params, CONFIG, groups)
    np.testing.assert_array_equal(grouped["norm"]["scale"], rows)
    moved = grouped["qkv_proj"]["bias"]
    for i, share in enumerate(jnp.split(moved, groups)):
        heads = [names[j] for j in share[:: CONFIG.head_dim] // CONFIG.head_dim]
        mine = {part: np.split(np.arange(n), groups)[i] for part, n in counts.items()}
        assert heads == [(part, head) for part, own in mine.items() for head in own]
    back = sharding.regroup(grouped, CONFIG, groups, is_inverse=True)
    np.testing.assert_array_equal(back["qkv_proj"]["bias"], rows)
    # Layers take apart what was grouped.
    sizes = [n * CONFIG.head_dim for n in (8, 4, 4)]
    found = split_groups(moved[None], tuple(sizes), groups, axis=-1)
    for x, y in zip(found, jnp.split(rows, np.cumsum(sizes)[:-1]), strict=True):
        np.testing.assert_array_equal(x[0], y)


@pytest.mark.parametrize("text", ["rows=2", "data", "data=0", "data=two", ""])
def test_meshes_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="cannot read"):
        sharding.make_mesh(text)


def test_meshes_that_are_too_large():
    with pytest.raises(ConfigError, match="takes 4096 devices, but there"):
        sharding.make_mesh("data=64,model=64")


def test_summaries_of_fused_rows_are_refused():
    params = {"layer": {"qkv_proj": {"kernel": jnp.ones((256, 128))}}}
    mesh = lambda *sizes: jax.sharding.AbstractMesh(sizes, sharding.AXES)
    state = lambda name: jax.eval_shape(make_optimizer(name, 0.1).init, params)
    experts = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.stack([x] * 3), params))
    for fitting in (state("adam"), state("muon"), {"experts": experts}):
        sharding.check_state(mesh(1, 2), fitting, params, "it")

    sharding.check_state(mesh(2, 1), state("adafactor"), params, "it")
    with pytest.raises(ConfigError, match="it keeps layer/qkv_proj.*model=2.*adam"):
        sharding.check_state(mesh(1, 2), state("adafactor"), params, "it")


def test_the_remedy_names_what_fits():
    mesh = jax.sharding.AbstractMesh((1, 4), sharding.AXES)
    config = tiny_model_config(num_heads=9, num_kv_heads=3, intermediate_size=48)
    with pytest.raises(ConfigError, match="3 key-value heads.*model=4.*of 1 or 3 and"):
        sharding.check_model(mesh, config, "it")
