# SPDX-License-Identifier: Apache-2.0
"""Damaged files are refused in words, or read as if nothing were wrong with them.

Each reader is given hundreds of files that were right but for one place, drawn from a
seed. It may raise what a user is told (`InputError`, a missing file), nothing else.
What only the last resort of a reader catches (`UnforeseenError`) names the file, but is
a check that is missing: at most 2% of each kind may be. What is accepted must mean what
it meant before, but for what the damaged place says.

OSPEC_FUZZ_FACTOR=20 tries twenty times as many.
"""

import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import mutations
import numpy as np
import public_heads as heads
import pytest
from model_files import (
    gguf_tensors,
    hf_tensors,
    model_config,
    write_folder,
    write_gguf,
)
from reference import random_params
from safetensors.numpy import load_file

from ospec_jax import LearnerConfig, Session
from ospec_jax.cli import arguments
from ospec_jax.config import InputError, ModelConfig, TreeConfig, UnforeseenError
from ospec_jax.config.fields import read_json
from ospec_jax.data.prompts import read_prompts
from ospec_jax.drafters.eagle import eagle3 as build_eagle3
from ospec_jax.formats import eagle3
from ospec_jax.models.hub import fingerprint, load_target
from ospec_jax.models.tokenizer import tokenizer_hash
from ospec_jax.replay.record import read_meta
from ospec_jax.replay.store import FeedbackStore, Recording, write_shard
from ospec_jax.reports.answers import read_answers
from ospec_jax.reports.telemetry import Telemetry, read_rows
from ospec_jax.session.resume import saved_config
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

FACTOR = int(os.environ.get("OSPEC_FUZZ_FACTOR", "1"))
SECONDS = 20
"""After which a reader hangs; each takes milliseconds."""
MEBIBYTES = 400
"""Which reading all files may need in all, beside what reading them whole needs."""
CONFIG = model_config(num_layers=1, rope_theta=5e5, rms_norm_eps=1e-4)
TEXT = "<|im_start|>What is 2 + 3?<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Case:
    """A file that is read, and what is done to it.

    Attributes:
      damage: From its content and random numbers to another content.
      read: Reads the file, or the folder that it is in, and gives what it means.
      explains: What of that the file alone decides, so that damage may change it.
    """

    file: Path
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[], dict[str, Any]]
    explains: tuple[str, ...] = ()


def meaning_of(target) -> dict[str, Any]:
    """All that answers follow from, and nothing else."""
    leaves = jax.tree.leaves(jax.device_get(target.params))
    tokenizer = target.tokenizer
    return {
        "config": target.config,
        "params": [leaf.tobytes() for leaf in leaves],
        "tokenizer": (
            tokenizer_hash(tokenizer),
            tokenizer.encode(TEXT),
            tokenizer.decode(tokenizer.encode(TEXT)),
            tokenizer.chat_template,
        ),
        "ends": target.stop_ids,
    }


def read_model(path: Path) -> dict[str, Any]:
    fingerprint.cache_clear()
    return meaning_of(load_target(str(path), "float32", keeps_programs=False))


def read_store(folder: Path) -> dict[str, Any]:
    store = FeedbackStore(folder)
    rows = [store.recording(i) for i in range(len(store.entries))]
    return {"record": read_meta(folder), "rows": [str(row) for row in rows]}


def read_record(file: Path) -> dict[str, Any]:
    meta = checkpoint.read_meta(read_json(file))
    learner = saved_config(meta.learner) if meta.learner else None
    return {"meta": meta, "learner": learner}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Files of all kinds that are read, by the kind."""
    root = tmp_path_factory.mktemp("files")
    params = random_params(CONFIG)
    return {
        **_folder_cases(root, params),
        **_gguf_cases(root, params),
        **_draft_cases(root),
        **_traffic_cases(root),
    }


def _folder_cases(root, params) -> dict[str, Case]:
    folder = root / "model"
    write_folder(folder, CONFIG, hf_tensors(CONFIG, params))
    shards = sorted(folder.glob("*.safetensors"))
    where = {name: file.name for file in shards for name in load_file(file)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    ends = folder / "generation_config.json"
    ends.write_text(json.dumps({"eos_token_id": [2, 7], "bos_token_id": 1}))

    read = lambda: read_model(folder)
    files = {
        "config.json": ("config", "ends"),
        "generation_config.json": ("ends",),
        "tokenizer.json": ("tokenizer", "ends"),
        "tokenizer_config.json": ("tokenizer", "ends"),
        index.name: (),
    }
    found = {
        name: Case(folder / name, mutations.damage_json, read, explains)
        for name, explains in files.items()
    }
    damage = mutations.damage_safetensors
    return found | {"safetensors": Case(shards[0], damage, read, ("params",))}


def _gguf_cases(root, params) -> dict[str, Case]:
    file = root / "tiny.gguf"
    write_gguf(file, CONFIG, gguf_tensors(CONFIG, params), is_quantized=True)
    # Where its tensors begin: all before is the header.
    head = file.read_bytes().index(b"output_norm.weight")
    damage = lambda content, rng: mutations.damage_bytes(content, rng, head)
    explains = ("config", "params", "tokenizer", "ends")
    return {"gguf": Case(file, damage, lambda: read_model(file), explains)}


def _draft_cases(root) -> dict[str, Case]:
    target = tiny_target()
    config = tiny_draft_config(target.config)
    draft = tiny_draft(build_eagle3(config, TreeConfig(num_steps=1)), config)
    learner = LearnerConfig(name="ensemble", budget=0.05).to_json()
    meta = Meta.create(target, config, learner=learner, answered=("a", "b"))
    checkpoint.save(root / "draft", 0, meta, draft)
    record = root / "record.json"
    record.write_text(json.dumps(dataclasses.asdict(meta)))
    stored = root / "draft" / "0" / "meta" / "_strings.json"

    head = heads.write(root / "head", heads.flat_config(259), heads.tensors(259))
    read_head = lambda: {"head": str(eagle3.read(head, 30).config)}
    public = head / "config.json"
    weights = head / "model.safetensors"

    learns = root / "learner.py"
    learns.write_text(
        "from ospec_jax import LearnerConfig\n\n\n"
        "def get_config():\n"
        "    return LearnerConfig(name='optimistic', radius=1.0, budget=0.05)\n"
    )
    json_of = mutations.damage_json
    read_whole = lambda: {"meta": checkpoint.load(root / "draft").meta}
    read_learner = lambda: {"learner": arguments.learner_config(str(learns))}
    own = ("meta", "learner")
    return {
        "record": Case(record, json_of, lambda: read_record(record), own),
        "checkpoint": Case(stored, _damage_strings, read_whole, own),
        "head's config": Case(public, json_of, read_head, ("head",)),
        "head": Case(weights, mutations.damage_safetensors, read_head),
        "learner": Case(learns, mutations.damage_python, read_learner, own),
    }


def _damage_strings(content: bytes, rng: random.Random) -> bytes:
    """A checkpoint's record, which is JSON in a string of a JSON file."""
    if rng.random() < 0.2:
        return mutations.damage_json(content, rng)

    strings = json.loads(content)
    (name,) = (key for key, value in strings.items() if isinstance(value, str))
    inner = mutations.damage_json(strings[name].encode(), rng)

    return json.dumps(strings | {name: inner.decode("utf-8", "replace")}).encode()


def _traffic_cases(root) -> dict[str, Case]:
    folder = root / "recording"
    folder.mkdir()
    arrays = {
        "tokens": np.arange(9, dtype=np.int32),
        "taps": np.ones((9, 4), np.float16),
        "hidden": np.ones((9, 2), np.float16),
        "logsumexp": np.ones(9, np.float32),
    }
    rows = [Recording(id, "math", 3, arrays, 5, taps=(1, 2)) for id in "ab"]
    write_shard(folder, 0, rows)
    meta = folder / "recording.json"
    fields = {"taps": [1, 2], "max_new_tokens": 8, "order": ["a", "b"]}
    names = {"target": "tiny", "fingerprint": "f", "precision": "float32"}
    meta.write_text(json.dumps(names | fields))
    read = lambda: read_store(folder)
    index = folder / "shard_00000" / "index.json"
    array = folder / "shard_00000" / "taps.npy"
    in_head = lambda content, rng: mutations.damage_bytes(content, rng, 128)
    lines = mutations.damage_lines

    told = root / "telemetry.jsonl"
    telemetry = Telemetry(told)
    session = Session(tiny_target())
    for number in range(3):
        telemetry.answer(f"p{number}", "math", 4, session.stats)
    telemetry.close()
    rows_of = lambda: {"rows": read_telemetry(told)}

    prompts = root / "prompts.jsonl"
    turns = {"messages": [{"role": "user", "content": "Hi"}], "seed": 3, "choice": 1}
    asked = [{"id": "a", "prompt": "Hello", "prediction": "Hi"}, turns | {"id": "b"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))

    answers = root / "answers.jsonl"
    answers.write_text('{"id": "a", "text": "Hi"}\n{"id": "b", "text": "Ho"}\n')
    own = ("rows", "record")
    return {
        "recording.json": Case(meta, mutations.damage_json, read, own),
        "index.json": Case(index, mutations.damage_json, read, own),
        "taps.npy": Case(array, in_head, read, own),
        "telemetry": Case(told, lines, rows_of, own),
        "prompts": Case(prompts, lines, lambda: {"rows": read_prompts(prompts)}, own),
        "answers": Case(answers, lines, lambda: {"rows": read_answers(answers)}, own),
    }


def read_telemetry(file: Path) -> list[dict]:
    """Its rows, as a run that goes on behind two of its answers reads them back."""
    copy = file.with_suffix(".copy")
    copy.write_bytes(file.read_bytes())
    Telemetry(copy, num_answered=2).close()

    return read_rows(file)


@contextlib.contextmanager
def limited():
    """Ends what hangs."""

    def stop(*_):
        pytest.fail(f"a reader takes longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def differing(found: dict[str, Any], whole: dict[str, Any]) -> set[str]:
    return {name for name in whole if found[name] != whole[name]}


COUNTS = {
    "config.json": 90,
    "generation_config.json": 30,
    "tokenizer.json": 50,
    "tokenizer_config.json": 50,
    "model.safetensors.index.json": 40,
    "safetensors": 80,
    "gguf": 120,
    "record": 150,
    "checkpoint": 20,
    "head's config": 60,
    "head": 40,
    "learner": 40,
    "recording.json": 50,
    "index.json": 50,
    "taps.npy": 40,
    "telemetry": 60,
    "prompts": 60,
    "answers": 30,
}
"""Damaged files of each kind."""
HF_NAMES = {
    "max_position": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tie_embeddings": "tie_word_embeddings",
}
"""Of the configuration's names, those that `config.json` has others for."""


def assert_explained(found: ModelConfig, whole: ModelConfig, damaged: bytes) -> None:
    """What differs is in the file, or its name is not, so that a default is meant."""
    values = json.loads(damaged)
    for field in dataclasses.fields(ModelConfig):
        value = getattr(found, field.name)
        name = HF_NAMES.get(field.name, field.name)
        if value != getattr(whole, field.name) and name in values:
            assert values[name] == value, (name, values[name], value)


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_refused_in_words_or_mean_the_same(cases, kind):
    case = cases[kind]
    content = case.file.read_bytes()
    rng = random.Random(kind)
    count = FACTOR * COUNTS[kind]
    num_refused = 0
    unforeseen = []
    wrong = []
    with warnings.catch_warnings():
        # What is told of is another test's affair.
        warnings.simplefilter("ignore")
        whole = case.read()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            for number in range(count):
                damaged = case.damage(content, rng)
                case.file.write_bytes(damaged)
                try:
                    with limited():
                        found = case.read()
                except (InputError, FileNotFoundError) as error:
                    num_refused += 1
                    if isinstance(error, UnforeseenError):
                        unforeseen.append(f"{number}: {error}")
                except Exception as error:
                    wrong.append(f"{number}: {type(error).__name__}: {error}")
                else:
                    changed = differing(found, whole) - {*case.explains}
                    if changed:
                        wrong.append(f"{number}: {changed} changed")
                    if kind == "config.json":
                        assert_explained(found["config"], whole["config"], damaged)
        finally:
            case.file.write_bytes(content)

    assert not wrong
    assert len(unforeseen) <= 0.02 * count, unforeseen
    assert num_refused > 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEBIBYTES * 1024


def test_enough_is_tried():
    assert sum(COUNTS.values()) >= 1000


@pytest.mark.parametrize("kind", ["config.json", "gguf", "tokenizer_config.json"])
def test_what_means_the_same_decodes_the_same(cases, kind):
    """Answers follow from what is compared above, and from nothing else."""
    case = cases[kind]
    content = case.file.read_bytes()
    path = case.file if kind == "gguf" else case.file.parent
    load = lambda: load_target(str(path), "float32", keeps_programs=False)
    answer = lambda: next(iter(Session(load()).generate(["2 + 3"], 6))).token_ids
    rng = random.Random(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = case.read()
        expected = answer()
        num_tried = 0
        try:
            while num_tried < 2:
                case.file.write_bytes(case.damage(content, rng))
                with contextlib.suppress(InputError):
                    if not differing(case.read(), whole):
                        assert answer() == expected
                        num_tried += 1
        finally:
            case.file.write_bytes(content)
