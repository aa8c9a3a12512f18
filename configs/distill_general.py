# SPDX-License-Identifier: Apache-2.0
r"""A general draft for any target that was tuned to chat, from no data at all.

    ospec distill --recipe configs/distill_general.py --target TARGET --out DIR

The target writes 10,000 prompts of ten kinds, answers them (a million tokens), and a
draft learns from the answers. Whatever is given beside it wins: `--prompts FILE.jsonl`
adds prompts of your own, `--self-prompts` asks for fewer, `--from DIR/draft` goes on
from a draft, with another `--seed` on other prompts.

It takes time and room. A million answers' tokens are as many steps of plain decoding,
and the prompts about as many again; features of all of it are kept, 4.6 KB a token for
SmolLM2-135M and in proportion to a target's width: some 20 GB here. Try
`--self-prompts 200 --num-updates 50` first.
"""

from typing import Any


def get_config() -> dict[str, Any]:
    return {
        "self_prompts": 10_000,
        "max_new_tokens": 128,
        "capacity": 2048,
        # Of 8,192 tokens, a sixth of general text could not be drafted.
        "draft_vocab_size": 16_384,
        "sliding_window": 192,
        "collect_batch_size": 32,
        "num_updates": 1500,
    }
