# SPDX-License-Identifier: Apache-2.0
"""`ospec serve` as a process of its own, with a tiny model."""

import contextlib
import subprocess
import sys
import threading

from model_files import hf_tensors, model_config, write_folder
from reference import random_params

OSPEC = [sys.executable, "-m", "ospec_jax"]


def write_model(place):
    """A tiny model with a byte tokenizer; returns its folder."""
    config = model_config()
    write_folder(place, config, hf_tensors(config, random_params(config)))
    return place


@contextlib.contextmanager
def server(folder, *flags, draft="ngram"):
    """A server on a free port; gives the process, its address and its lines."""
    command = [*OSPEC, "serve", "--target", str(folder), "--port", "0"]
    command += ["--max-model-len", "200", "--draft", str(draft)]
    command += ["--num-predicted-tokens", "0", *map(str, flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1)
    said = process.stderr
    assert said is not None
    lines = []
    is_ready = threading.Event()

    def read():
        for line in said:
            lines.append(line)
            if line.startswith("ready: "):
                is_ready.set()
        is_ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert is_ready.wait(240)
        address = next((line for line in lines if line.startswith("ready: ")), None)
        assert address is not None, "".join(lines)
        yield process, address.split()[1], lines
    finally:
        process.kill()
        process.wait()
        reader.join()
