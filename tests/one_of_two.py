# SPDX-License-Identifier: Apache-2.0
"""One of two processes that decode and learn together; `test_sharding.py` runs both.

Arguments: the process's number, the coordinator's port, the mesh, a folder for the
checkpoint. Each has a single device: two devices' collectives would wait for each other
in one small pool of threads.
"""

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
number, port, mesh, folder = int(sys.argv[1]), *sys.argv[2:4], Path(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)

import on_devices  # noqa: E402 - a process joins the others before it computes

from ospec_jax import sharding  # noqa: E402
from ospec_jax.loading import load_draft  # noqa: E402
from ospec_jax.models.hub import enable_compilation_cache, split_target  # noqa: E402

enable_compilation_cache()
assert (jax.process_count(), jax.local_device_count()) == (2, 1)
# What a clock decides is process 0's: here it says 7, the other one 8.
interval = int(sharding.agreed(7 + number))
target = split_target(
    on_devices.tiny_target(**on_devices.SIZES), sharding.make_mesh(mesh)
)
draft = load_draft(folder / "initial", target)
session, tokens = on_devices.learned(target, draft)
assert not session.state.trainer.learner.params["fc"]["kernel"].is_fully_addressable
session.save(folder / "learned", with_feedback=False)
session.save(folder / "learned")  # in place of the other
result = {"tokens": tokens, "version": session.version, "interval": interval}
(folder / f"{number}.json").write_text(json.dumps(result))
