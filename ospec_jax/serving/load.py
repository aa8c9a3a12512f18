# SPDX-License-Identifier: Apache-2.0
"""Loads a server with requests, and measures what its users would see.

A closed loop has so many clients, each of which asks again when it is answered. In an
open loop requests come when they come (Poisson), whether earlier ones are answered or
not: only there does a queue grow. Names of figures are those of `vllm bench serve`.
"""

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ospec_jax import atomic
from ospec_jax.config import ConfigError, whole_number
from ospec_jax.data.prompts import Prompt
from ospec_jax.reports.summary import running_length

_TIMEOUT = 600.0
"""Seconds until a request that hears nothing is given up."""
_LONGEST_LINE = 2**20
"""Bytes of a chunk, at most."""
_WINDOW = 20
"""Requests over which acceptance is drawn: a single one says little."""


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """What a server is asked, and how often.

    Attributes:
      clients: Of a closed loop.
      rate: Requests a second of an open loop; None for a closed one.
      seed: Of the arrivals.
    """

    url: str = "http://127.0.0.1:8000"
    clients: int = 1
    rate: float | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    api_key: str | None = None

    def __post_init__(self):
        whole_number("clients", self.clients, least=1)
        whole_number("max_new_tokens", self.max_new_tokens, least=1)
        if self.rate is not None and not 0 < self.rate < 1e4:
            raise ConfigError(f"rate is {self.rate}; use requests a second, above 0")


@dataclasses.dataclass
class Asked:
    """One request, as its user saw it.

    Attributes:
      start: Seconds since the load began; of the request's own arrival, in an open
        loop, whenever it could be sent.
      first: Seconds to the first text.
      seconds: To the end.
      gaps: Between tokens: a chunk of several has its time split over them.
      error: What went wrong, or empty.
    """

    domain: str
    start: float
    first: float = 0.0
    seconds: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_passes: int = 0
    num_accepted: int = 0
    version: str = ""
    text: str = ""
    error: str = ""


def run_load(
    prompts: Sequence[Prompt],
    config: LoadConfig,
    on_answer: Callable[[Asked], None] = lambda asked: None,
) -> tuple[list[Asked], float]:
    """Asks all prompts, in order; returns what came of each, and the seconds it took.

    Raises:
      ConfigError: There is no server, or the library for asking is not installed.
    """
    return asyncio.run(_run(prompts, config, on_answer))


async def _run(prompts, config: LoadConfig, on_answer) -> tuple[list[Asked], float]:
    # What the client takes of the processor is missing to a server on the same machine,
    # and this library takes least.
    try:
        import aiohttp
    except ImportError as error:
        raise ConfigError(
            "loading a server needs aiohttp: pip install 'ospec-jax[serve]'"
        ) from error

    headers = {}
    if config.api_key is not None:
        headers["authorization"] = f"Bearer {config.api_key}"
    url = config.url.rstrip("/")
    async with aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_read=_TIMEOUT),
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=_LONGEST_LINE,
    ) as client:
        try:
            model = await _model_of(client, url)
        except (aiohttp.ClientError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                f"no server answers at {config.url} ({error}); start one with `ospec "
                f"serve`"
            ) from error

        start = time.perf_counter()
        results: list[Asked] = []

        async def ask(prompt: Prompt, arrival: float) -> None:
            asked = Asked(prompt.domain, arrival)
            results.append(asked)
            try:
                await _ask(client, model, prompt, config, asked, start)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                asked.error = f"{type(error).__name__}: {error}"[:200]
            on_answer(asked)

        if config.rate is None:
            await _closed(prompts, config.clients, ask, start)
        else:
            await _open(prompts, config, ask, start)

        return results, time.perf_counter() - start


async def _closed(prompts, clients: int, ask, start: float) -> None:
    source = iter(prompts)

    async def client() -> None:
        for prompt in source:
            await ask(prompt, time.perf_counter() - start)

    await asyncio.gather(*[client() for _ in range(clients)])


async def _open(prompts, config: LoadConfig, ask, start: float) -> None:
    assert config.rate is not None
    chance = random.Random(config.seed)
    arrival = 0.0
    tasks = []
    for prompt in prompts:
        arrival += chance.expovariate(config.rate)
        await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(prompt, arrival)))

    await asyncio.gather(*tasks)


async def _model_of(client, url: str) -> str:
    """The first model that a server names.

    Raises:
      ConfigError: It names none, as where a key is wrong.
    """
    async with client.get(f"{url}/v1/models") as response:
        if response.status != 200:
            text = await response.text(errors="replace")
            raise ConfigError(f"the server answers {response.status}: {text[:200]}")

        return (await response.json())["data"][0]["id"]


async def _ask(
    client, model: str, prompt: Prompt, config: LoadConfig, asked: Asked, start: float
) -> None:
    """Asks one prompt, and times what comes."""
    body = {
        "model": model,
        "messages": list(prompt.messages),
        "max_completion_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    began = start + asked.start
    last = began
    url = f"{config.url.rstrip('/')}/v1/chat/completions"
    async with client.post(url, json=body) as response:
        if response.status != 200:
            text = await response.text(errors="replace")
            asked.error = f"{response.status}: {text[:160]}"
            return

        async for line in response.content:
            found = line.removeprefix(b"data: ").strip()
            if not line.startswith(b"data: ") or found == b"[DONE]":
                continue
            chunk = json.loads(found)
            if "error" in chunk:
                asked.error = str(chunk["error"].get("message"))[:200]
                return
            now = time.perf_counter()
            last = _take(asked, chunk, began, last, now)

    asked.seconds = last - began


def _take(asked: Asked, chunk: dict, began: float, last: float, now: float) -> float:
    """Books a chunk; returns when the newest token came."""
    usage = chunk.get("usage") or {}
    before = asked.num_tokens
    asked.num_tokens = usage.get("completion_tokens", before)
    asked.num_prompt_tokens = usage.get("prompt_tokens", asked.num_prompt_tokens)
    asked.version = chunk.get("system_fingerprint") or asked.version
    stats = (chunk.get("metrics") or {}).get("speculative_decoding")
    if stats:
        asked.num_passes = stats["num_spec_steps"]
        asked.num_accepted = stats["num_accepted_draft_tokens"]

    for choice in chunk["choices"]:
        asked.text += choice.get("delta", {}).get("content") or ""

    count = asked.num_tokens - before
    if count <= 0:
        return last
    if before == 0:
        asked.first = now - began
        asked.gaps += [0.0] * (count - 1)
    else:
        asked.gaps += [(now - last) / count] * count

    return now


def summarize(results: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """Figures of a load, by the names of `vllm bench serve`; times in milliseconds."""
    done = [asked for asked in results if not asked.error]
    tokens = sum(asked.num_tokens for asked in done)
    passes = sum(asked.num_passes for asked in done)
    accepted = sum(asked.num_accepted for asked in done)
    per_token = [
        (asked.seconds - asked.first) / (asked.num_tokens - 1)
        for asked in done
        if asked.num_tokens > 1
    ]
    values = {
        "ttft": [asked.first for asked in done],
        "tpot": per_token,
        "itl": [gap for asked in done for gap in asked.gaps],
        "e2el": [asked.seconds for asked in done],
    }
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(results) - len(done),
        "total_input_tokens": sum(asked.num_prompt_tokens for asked in done),
        "total_output_tokens": tokens,
        "request_throughput": len(done) / seconds,
        "output_throughput": tokens / seconds,
        "spec_decode_acceptance_length": 1 + accepted / passes if passes else 1.0,
    }
    for name, times in values.items():
        found |= _described(name, np.array(times or [0.0]) * 1e3)

    return found


def _described(name: str, times: np.ndarray) -> dict[str, float]:
    return {
        f"mean_{name}_ms": float(times.mean()),
        f"median_{name}_ms": float(np.median(times)),
        f"p99_{name}_ms": float(np.percentile(times, 99)),
    }


def plot_load(results: Sequence[Asked], path: Path) -> Path:
    """Draws acceptance and latency along the stream, in order of arrival."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = sorted((a for a in results if not a.error), key=lambda asked: asked.start)
    at = np.array([asked.start for asked in done])
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, layout="constrained"
    )

    passes = [asked.num_passes for asked in done]
    accepted = [asked.num_accepted for asked in done]
    above.plot(at, running_length(passes, accepted, _WINDOW))
    above.set_ylabel(f"tokens a pass, last {_WINDOW} requests")
    begins = [i for i, a in enumerate(done) if i and a.domain != done[i - 1].domain]
    # Marks say something only where a stream stays with a domain for a while.
    if 0 < len(begins) <= 12:
        for i in begins:
            above.axvline(at[i], color="0.8", zorder=0)
            below.axvline(at[i], color="0.8", zorder=0)

    below.scatter(at, [1e3 * a.first for a in done], s=8, label="first token")
    between = [1e3 * np.mean(a.gaps or [0.0]) for a in done]
    below.scatter(at, between, s=8, label="between tokens")
    below.set_yscale("log")
    below.set_ylabel("ms")
    below.set_xlabel("seconds")
    below.legend()
    return atomic.write_figure(figure, path)
