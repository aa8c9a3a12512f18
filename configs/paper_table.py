# SPDX-License-Identifier: Apache-2.0
r"""OnlineSPEC's main table, by the models and sets that are at hand.

    ospec table configs/paper_table.py --prompts DIR --out OUT

The paper has three foundation models and seven benchmarks: GSM8K, Spider,
CodeSearchNet-Python, Finance-Alpaca, MBPP, MATH and mathematics of MMLU. DIR holds
JSONL files of these, by the names below. Each tenth row is taken, of AlpacaEval's
instructions each fifth. The newest round of the shipped drafts' training left each
tenth row out; earlier rounds may have seen some.

Methods that learn have the paper's settings, but Opt-Hydra learns from chunks of 40
prompts instead of 80: 160 prompts of a set are four of these. There are trained drafts
for SmolLM2-135M alone. The Qwen models draft by n-grams, and the larger one by the
smaller.
"""

import dataclasses
import runpy
from pathlib import Path

from ospec_jax import LearnerConfig
from ospec_jax.bench.table import Method, PromptSet, TableConfig, TargetPart


def _learner(name: str) -> LearnerConfig:
    file = Path(__file__).with_name(f"{name}.py")
    return runpy.run_path(str(file))["get_config"]()


def get_config() -> TableConfig:
    opt_hydra = dataclasses.replace(_learner("opt_hydra"), update_every_prompts=40)
    sets = {
        "GSM8K": PromptSet("gsm8k_train4000.jsonl", every=10),
        "Spider": PromptSet("spider_train.jsonl", every=10),
        "CodeSearchNet": PromptSet("codesearchnet_py_docs.jsonl", every=10),
        "MBPP": PromptSet("mbpp.jsonl", every=10),
        "MATH": PromptSet("math_test2000.jsonl", every=10),
        "instructions": PromptSet("alpaca_eval.jsonl", every=5),
    }
    return TableConfig(
        methods={
            "n-grams": Method("ngram", ngrams=True),
            "smaller model": Method("model:qwen2.5-coder-0.5b"),
            "EAGLE-3": Method("shipped"),
            "EAGLE-3, OSD": Method("shipped", _learner("osd_eagle3")),
            "Online-EAGLE-3": Method("shipped", _learner("online_eagle3")),
            "Ens-EAGLE-3": Method("shipped", _learner("ens_eagle3")),
            "Hydra": Method("shipped:hydra"),
            "Opt-Hydra": Method("shipped:hydra", opt_hydra),
            "ours, without learning": Method("shipped", ngrams=True),
            "ours": Method("shipped", LearnerConfig("auto"), ngrams=True),
        },
        sets=sets,
        parts=(
            TargetPart(
                "smollm2-135m",
                (
                    "n-grams",
                    "EAGLE-3",
                    "EAGLE-3, OSD",
                    "Online-EAGLE-3",
                    "Ens-EAGLE-3",
                    "Hydra",
                    "Opt-Hydra",
                    "ours, without learning",
                    "ours",
                ),
                tuple(sets),
                num_prompts=160,
            ),
            TargetPart(
                "qwen2.5-coder-0.5b",
                ("n-grams",),
                ("GSM8K", "Spider", "MBPP"),
                num_prompts=40,
            ),
            TargetPart(
                "qwen2.5-coder-1.5b",
                ("n-grams", "smaller model"),
                ("GSM8K", "Spider", "MBPP"),
                num_prompts=10,
            ),
        ),
        left_out={
            "Finance-Alpaca": "no file of it could be had; AlpacaEval's instructions "
            "stand for it",
            "MMLU mathematics": "no file of it could be had",
        },
    )
