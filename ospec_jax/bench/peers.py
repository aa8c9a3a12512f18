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

_LOOKUP_TOKENS = 3
_CONTEXT = 2048


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another decoder.

    Attributes:
      generate: Maps prompt ids, the number of new tokens and stop ids to the answer's
        ids, greedily.
    """

    name: str
    generate: Callable[[tuple[int, ...], int, tuple[int, ...]], list[int]]


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
        if name.startswith("llama-cpp"):
            return Peer(name, _llama_cpp(path, has_lookup=name.endswith("lookup")))
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
    "llama-cpp": "llama.cpp, on the GGUF file as it is",
    "llama-cpp-lookup": "with prompt lookup",
}


def _transformers_model(path: Path, dtype: str = "float32"):
    import torch  # pyright: ignore[reportMissingImports]
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
    import torch  # pyright: ignore[reportMissingImports]

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

        return out[0, len(prompt_ids) :].tolist()

    return generate


def _llama_cpp(path: Path, has_lookup: bool):
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # pyright: ignore[reportMissingImports]

    if path.is_dir():
        raise ConfigError(f"llama.cpp reads GGUF files; {path} is a folder")

    lookup = LlamaPromptLookupDecoding(num_pred_tokens=_LOOKUP_TOKENS)
    model = Llama(
        str(path),
        n_ctx=_CONTEXT,
        verbose=False,
        logits_all=has_lookup,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        draft_model=lookup if has_lookup else None,
    )

    def generate(prompt_ids, max_new_tokens, stop_ids):
        answer: list[int] = []
        for token in model.generate(list(prompt_ids), temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if token in stop_ids or len(answer) == max_new_tokens:
                break

        return answer

    return generate
