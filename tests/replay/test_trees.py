# SPDX-License-Identifier: Apache-2.0
"""Trees on record hold what the engine does with any smaller tree."""

import dataclasses
import json

import numpy as np
import pytest

from ospec_jax.config import ConfigError, TreeConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.replay.record import record
from ospec_jax.replay.score import whole_answer
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.replay.trees import (
    TraceShape,
    grow_trees,
    open_trace,
    trace_folder,
)
from ospec_jax.session.build import serving
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target

NEW_TOKENS = 20
PROMPTS = [
    parse_prompt({"prompt": f"Why {'so ' * i}{i}?", "id": f"p{i}", "domain": "d"}, "")
    for i in range(5)
]
SHAPE = TraceShape(topk=3, depth=4, num_nodes=12)
CHAIN = TraceShape(topk=1, depth=4, num_nodes=4)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    record(target, PROMPTS[:3], folder, (1, 2, 3), max_new_tokens=NEW_TOKENS)
    return folder


def make_draft(target, name):
    # One that is mostly right, and one that is mostly wrong.
    if name != "eagle3":
        return load_draft(name, target)

    config = tiny_draft_config(target.config, 200)
    drafter = build_drafter(name, config, TreeConfig(num_steps=1))
    return LoadedDraft(tiny_draft(drafter, config), Meta.create(target, config, name))


@pytest.fixture(scope="module", params=["self:exit-1", "eagle3"])
def draft(target, request):
    return make_draft(target, request.param)


@pytest.fixture(scope="module")
def traces(target, folder, draft):
    found = {}
    for shape in (SHAPE, CHAIN):
        grow_trees(target, draft, folder, shape)
        trace = open_trace(trace_folder(folder, shape))
        in_memory = {
            f.name: np.array(value)
            for f in dataclasses.fields(trace)
            if isinstance(value := getattr(trace, f.name), np.ndarray)
        }
        found[shape.topk] = dataclasses.replace(trace, **in_memory)

    yield found
    for shape in (SHAPE, CHAIN):
        for file in sorted(trace_folder(folder, shape).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


def engine_steps(target, draft, tree, prompt, answer):
    """Tokens of each step of the engine, along a recorded answer."""
    numerics = target.numerics
    drafter = build_drafter(draft.family, draft.architecture, tree, numerics)
    config = StepConfig(target.config, numerics, tree, draft.taps)
    served = serving(target, draft, draft.memory_orders)(draft.draft)
    steps = []
    engine = Engine(config, target.params, drafter)
    request = Request("r", tuple(prompt), len(answer))
    (done,) = engine.serve(
        [request],
        lambda: served,
        on_tokens=lambda _, emitted: steps.append(emitted.token_ids),
    )
    assert done.token_ids == answer
    return steps[1:]  # the first token is the prompt's


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("topk", "depth", "size"),
    [
        (3, 4, 12),
        pytest.param(3, 4, 3, marks=pytest.mark.thorough),
        (3, 2, 7),
        pytest.param(3, 1, 2, marks=pytest.mark.thorough),
        pytest.param(3, 1, 3, marks=pytest.mark.thorough),
        (1, 4, 4),
        pytest.param(1, 2, 2, marks=pytest.mark.thorough),
    ],
)
def test_a_replayed_choice_emits_what_the_engine_emits(
    target, folder, draft, traces, topk, depth, size
):
    store = FeedbackStore(folder)
    trace = traces[topk]
    tree = trace.shape.tree(depth, size)
    if topk == 1:  # a chain is a tree of width 1
        tree = TreeConfig(num_steps=depth)

    for number in (0, 2):
        (entry,) = [i for i, e in enumerate(store.entries) if e.id == trace.ids[number]]
        recording = store.recording(entry)
        prompt = recording.arrays["tokens"][: recording.num_prompt].tolist()
        position = int(trace.starts[number])
        end = position + trace.lengths[number]
        replayed = []
        while position < end:
            replayed.append(trace.emitted(position, depth, size))
            position += len(replayed[-1])

        answer = whole_answer(recording)
        assert replayed == engine_steps(target, draft, tree, prompt, answer)


def test_some_trees_are_right_and_some_are_not(draft, traces):
    """Else the test above would compare nothing."""
    is_right = traces[3].is_right
    assert 0.01 < is_right.any(axis=1).mean() < 1
    # Siblings differ, so at most one node of each depth is right.
    for depth in range(1, SHAPE.depth + 1):
        level = slice(SHAPE.first_place(depth), SHAPE.first_place(depth + 1))
        assert is_right[:, level].sum(axis=1).max() <= 1


def test_scores_fall_along_paths_and_entropies_are_those_of_drafts(draft, traces):
    trace = traces[3]
    above = np.maximum(trace.parents, 0)
    of_parent = np.take_along_axis(trace.scores, above, axis=1)
    of_parent = np.where(trace.parents < 0, 0.0, of_parent)
    assert (trace.scores <= of_parent).all()
    assert trace.contexts[0] < trace.contexts[1]
    if draft.family.name != "eagle3":
        return

    # The root's own distribution: its three most probable tokens bound the entropy.
    probs = np.exp(trace.scores[:, :3])
    rest = 1 - probs.sum(axis=1)
    known = -(probs * np.log(probs)).sum(axis=1)
    assert (trace.entropies[:, 0, 0] >= known - 1e-4).all()
    most = known - rest * np.log(np.maximum(rest, 1e-9) / 197)
    assert (trace.entropies[:, 0, 0] <= most + 1e-4).all()


def test_growing_goes_on_with_new_answers(target, tmp_path):
    draft = make_draft(target, "eagle3")
    record(target, PROMPTS[:2], tmp_path, (1, 2, 3), max_new_tokens=6)
    assert grow_trees(target, draft, tmp_path, SHAPE) == 2
    assert grow_trees(target, draft, tmp_path, SHAPE) == 0
    record(target, PROMPTS, tmp_path, (1, 2, 3), max_new_tokens=6)
    assert grow_trees(target, draft, tmp_path, SHAPE) == 3
    trace = open_trace(trace_folder(tmp_path, SHAPE))
    assert trace.ids == tuple(p.id for p in PROMPTS)
    picked = trace.select([3, 0])
    assert picked.ids == ("p3", "p0")
    begin = int(trace.starts[3])
    end = begin + trace.lengths[3]
    np.testing.assert_array_equal(
        picked.tokens[: trace.lengths[3]], trace.tokens[begin:end]
    )


def test_other_drafts_shapes_and_damage_are_refused(target, tmp_path):
    draft = make_draft(target, "eagle3")
    record(target, PROMPTS[:1], tmp_path, (1, 2, 3), max_new_tokens=6)
    grow_trees(target, draft, tmp_path, SHAPE)
    other = make_draft(target, "eagle3")
    params = {**other.draft.params}
    params["fc"] = {"kernel": params["fc"]["kernel"] * 2}
    other = dataclasses.replace(other, draft=other.draft.replace(params=params))
    with pytest.raises(ConfigError, match="holds trees of"):
        grow_trees(target, other, tmp_path, SHAPE)
    mixed = load_draft("fallback:ngram,self:exit-1", target)
    with pytest.raises(ConfigError, match="one draft alone"):
        grow_trees(target, mixed, tmp_path, SHAPE)

    folder = trace_folder(tmp_path, SHAPE)
    index = folder / "shard_00000" / "index.json"
    kept = json.loads(index.read_text())
    index.write_text(json.dumps(kept | {"lengths": [3]}))
    with pytest.raises(ConfigError, match="3 positions"):
        open_trace(folder)
    with pytest.raises(FileNotFoundError, match="holds no trees"):
        open_trace(tmp_path)


@pytest.mark.parametrize("text", ["4,6", "4,x,6", "0,1,1", "2,1,3"])
def test_shapes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError):
        TraceShape.parse(text)
