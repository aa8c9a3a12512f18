# SPDX-License-Identifier: Apache-2.0
"""Other decoders of the same weights, measured beside ours in one run.

They are optional packages (`pip install ospec-jax[peers]`). Each reads the target's own
file and gets the same token ids; its outputs may differ from ours, as it rounds
differently, so only its speed is compared.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from ospec_jax.config import ConfigError
from ospec_jax.models.hub import resolve
from ospec_jax.reports.progress import say

_LOOKUP_TOKENS = 3
_CONTEXT = 4096
_LLAMA_CPP = "llama-cpp"


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another decoder.

    Attributes:
      generate: Maps prompt ids, the number of new tokens and stop ids to the number of
        tokens of the answer, which is greedy.
    """

    name: str
    generate: Callable[[tuple[int, ...], int, tuple[int, ...]], int]


def open_peer(name: str, target: str, assistant: str | None = None) -> Peer:
    """Loads a peer.

    Args:
      name: One of `PEERS`.
      target: As `load_target` takes it.
      assistant: A smaller model, for `transformers-assisted`.

    Raises:
      ConfigError: It is unknown, or its package is not installed.
    """
    if name not in PEERS:
        raise ConfigError(f"unknown peer {name!r}; use some of {', '.join(PEERS)}")

    path = resolve(target)
    try:
        if name.startswith(_LLAMA_CPP):
            speculation = name.removeprefix(_LLAMA_CPP).removeprefix("-")
            return Peer(name, _llama_cpp(path, speculation))
        options = {}
        if name == "transformers-lookup":
            options["prompt_lookup_num_tokens"] = _LOOKUP_TOKENS
        if name == "transformers-assisted":
            if assistant is None:
                raise ConfigError(
                    "transformers-assisted needs a smaller model: --draft model:NAME"
                )
            options["assistant_model"] = _transformers_model(resolve(assistant))
        dtype = "bfloat16" if name == "transformers-bfloat16" else "float32"
        return Peer(name, _transformers(_transformers_model(path, dtype), options))
    except ImportError as error:
        raise ConfigError(
            f"the peer {name} needs {error.name}; pip install 'ospec-jax[peers]'"
        ) from error


PEERS = {
    "transformers": "Hugging Face transformers, float32",
    "transformers-bfloat16": "the same in bfloat16",
    "transformers-lookup": "with prompt lookup",
    "transformers-assisted": "with a smaller model",
    _LLAMA_CPP: "llama.cpp, on the GGUF file as it is",
    f"{_LLAMA_CPP}-ngram-simple": "with what followed the same tokens before",
    f"{_LLAMA_CPP}-ngram-map-k": "with a map from n-grams to where they stood",
    f"{_LLAMA_CPP}-ngram-map-k4v": "the same, with up to four continuations of each",
    f"{_LLAMA_CPP}-ngram-mod": "with hashed n-grams",
    f"{_LLAMA_CPP}-ngram-cache": "with n-grams counted by what followed them",
}


def _transformers_model(path: Path, dtype: str = "float32"):
    import torch
    from transformers import AutoModelForCausalLM

    folder, options = (path, {}) if path.is_dir() else (path.parent, {})
    if not path.is_dir():
        options["gguf_file"] = path.name

    kind = getattr(torch, dtype)

    # Else code of the folder's own would run if its user said yes.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=kind, trust_remote_code=False, **options
    )
    return model.eval()


def _transformers(model, options: dict):
    import torch

    def generate(prompt_ids, max_new_tokens, stop_ids):
        ids = torch.tensor([prompt_ids])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stop_ids),
                pad_token_id=stop_ids[0],
                **options,
            )

        return out.shape[1] - len(prompt_ids)

    return generate


def _llama_cpp(path: Path, speculation: str):
    """llama.cpp's own server, within this process.

    Args:
      speculation: One of its kinds of n-grams, with its settings; empty for none.
    """
    import xllamacpp

    if path.is_dir():
        raise ConfigError(f"llama.cpp reads GGUF files; {path} is a folder")

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = _CONTEXT
    params.n_parallel = 1
    params.verbosity = 0
    params.cpuparams.n_threads = os.cpu_count()
    params.cpuparams_batch.n_threads = os.cpu_count()
    # Prompts of earlier requests help nobody else, either.
    params.cache_prompt = False
    params.cache_ram_mib = 0
    if speculation:
        kind = speculation.upper().replace("-", "_")
        known = xllamacpp.common_speculative_type
        params.speculative.types = [getattr(known, f"COMMON_SPECULATIVE_TYPE_{kind}")]

    # What it was compiled for decides how fast it is.
    say(f"llama.cpp: {xllamacpp.get_system_info().strip(' |')}")
    server = xllamacpp.Server(params)

    def generate(prompt_ids, max_new_tokens, stop_ids):
        # It ends where the file's own end tokens come, which are ours.
        reply = server.handle_completions(
            {
                "prompt": list(prompt_ids),
                "n_predict": max_new_tokens,
                "temperature": 0.0,
                "cache_prompt": False,
            }
        )
        if "usage" not in reply:
            raise ConfigError(
                f"llama.cpp refuses a prompt of {len(prompt_ids)} tokens: {reply}"
            )

        return reply["usage"]["completion_tokens"]

    return generate
