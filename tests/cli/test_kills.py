# SPDX-License-Identifier: Apache-2.0
"""A server that is killed under load, again and again: what is whole, what is kept."""

import json
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from drafted import random_head
from server_process import server, write_model

from ospec_jax import LearnerConfig, Session, load_target

pytestmark = pytest.mark.thorough

NUM_KILLS = 20
NUM_CLIENTS = 3
NEW_TOKENS = 40
PROMPTS = [f"Tell {i} stories." for i in range(12)]
SAVE_EVERY = 1.0
SLACK = 4.0
"""Seconds that a save may come late, behind steps and on a busy machine."""


def ask(address, text):
    """A streamed answer; whether it was told that it is whole."""
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "max_completion_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    answer = ""
    is_whole = False
    url = f"{address}/v1/chat/completions"
    try:
        with httpx2.stream("POST", url, json=body, timeout=60) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return answer, is_whole
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk
                for choice in chunk["choices"]:
                    answer += choice["delta"].get("content") or ""
                    is_whole |= choice["finish_reason"] is not None
    except httpx2.TransportError:
        pass

    return answer, False


def load_until(is_over, address, seed):
    """What one client is told until the server is gone."""
    chance = random.Random(seed)
    found = []
    while not is_over.is_set():
        text = chance.choice(PROMPTS)
        found.append((text, *ask(address, text)))
    return found


def version_of(address):
    return httpx2.get(f"{address}/status", timeout=60).json()["status"]["draft"][
        "version"
    ]


def test_a_killed_server_loses_an_interval_and_tells_no_half_answer(tmp_path):
    folder = write_model(tmp_path / "m")
    kept = tmp_path / "kept"
    target = load_target(folder, precision="float32")
    draft = random_head(target, taps=(0, 1, 2))
    Session(target, draft).save(tmp_path / "draft")
    results = Session(target).generate(PROMPTS, NEW_TOKENS)
    wanted = {result.prompt.text: result.text for result in results}

    flags = ["--batch-size", 2, "--precision", "float32", "--learner", "head"]
    flags += ["--checkpoint", kept, "--save-every", SAVE_EVERY]
    chance = random.Random(0)
    durable = 0
    num_whole = 0
    num_cut = 0

    for number in range(NUM_KILLS):
        with server(folder, *flags, draft=tmp_path / "draft") as (process, address, _):
            assert version_of(address) >= durable
            is_over = threading.Event()
            with ThreadPoolExecutor(NUM_CLIENTS) as pool:
                seeds = [NUM_CLIENTS * number + i for i in range(NUM_CLIENTS)]
                clients = [pool.submit(load_until, is_over, address, s) for s in seeds]
                time.sleep(chance.uniform(0.5, 1.5))
                durable = version_of(address)
                time.sleep(SAVE_EVERY + SLACK + chance.uniform(0, 1))
                is_over.set()
                process.send_signal(signal.SIGKILL)
                told = [answer for client in clients for answer in client.result()]

        for text, answer, is_whole in told:
            # Whoever was told the end has all of it; the others a beginning.
            assert (
                answer == wanted[text] if is_whole else wanted[text].startswith(answer)
            )
            num_whole += is_whole
            num_cut += not is_whole

    assert num_whole > 10 * NUM_KILLS
    assert num_cut > NUM_KILLS / 2
    assert durable > 0
    session = Session(target, draft, learner=LearnerConfig("head"))
    with pytest.warns(UserWarning, match="holds no feedback"):
        session.resume(kept)
    assert session.version >= durable
