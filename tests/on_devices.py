# SPDX-License-Identifier: Apache-2.0
"""What is true on a mesh of eight devices; `test_sharding.py` runs it on virtual ones.

The sizes are odd, so that no activation has the shape of a weight.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import (
    gguf_tensors,
    hf_tensors,
    model_config,
    write_folder,
    write_gguf,
)
from reference import random_params

from ospec_jax import sharding
from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.decoding.engine import Engine
from ospec_jax.decoding.request import Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.ngram import init_memory
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.learners.config import LearnerConfig
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.models import hub
from ospec_jax.models.hub import load_target, scan_target, split_target
from ospec_jax.parallel.pearl import Parallel
from ospec_jax.parallel.places import find_places
from ospec_jax.session import Session
from ospec_jax.session.arguments import as_prompts
from ospec_jax.session.build import grouped
from ospec_jax.session.live import Live
from ospec_jax.storage import checkpoint
from ospec_jax.storage.checkpoint import Meta
from ospec_jax.testing import tiny_draft, tiny_draft_config, tiny_target
from ospec_jax.types import Draft

VOCAB = 24
SIZES = dict(hidden_size=40, num_layers=2, num_heads=8, num_kv_heads=4)
PROMPTS = [(1, 2, 3), tuple(np.arange(70) % VOCAB), (5, 4), (9, 9, 9, 1, 0, 2)]
ODD = dict(has_qk_norm=True, has_qkv_bias=True, tie_embeddings=True)
TREES = {
    "plain": TreeConfig(num_steps=0),
    "chain": TreeConfig(num_steps=2),
    "dynamic": TreeConfig("dynamic", 2, topk=4, num_draft_tokens=8),
}


def draft_config(target):
    config = tiny_draft_config(target.config, draft_vocab_size=20)
    return dataclasses.replace(config, num_kv_heads=4, taps=(0, 1))


def engine_for(target, tree):
    config, mesh = draft_config(target), target.mesh
    step = StepConfig(target.config, target.numerics, tree, config.taps, mesh=mesh)
    if not tree.num_steps:
        return Engine(step, target.params), None
    drafter = build_drafter("eagle3", config, tree, target.numerics, has_ngrams=True)
    draft = tiny_draft(drafter, config).replace(memory=init_memory(64))
    params = sharding.regroup(draft.params, config, sharding.num_groups(mesh))
    engine = Engine(step, target.params, drafter, recording="features")
    return engine, sharding.put_params(draft.replace(params=params), mesh)


def answers(engine, draft, batch_size, kinds=(SamplingConfig(),)):
    requests = [
        Request(str(i), tuple(map(int, PROMPTS[i % 4])), 10 + i, kinds[i % len(kinds)])
        for i in range(9)
    ]
    done = list(engine.serve(requests, lambda: draft, batch_size))
    done.sort(key=lambda completion: completion.request.id)
    return [completion.token_ids for completion in done], done


@functools.cache
def expected(precision, **changes):
    target = tiny_target(VOCAB, precision, **SIZES | changes)
    return target, answers(*engine_for(target, TREES["plain"]), 1)[0]


@pytest.mark.parametrize(
    ("mesh", "tree", "batch_size", "precision", "changes", "is_scanned"),
    [
        pytest.param(
            *("data=8", "plain", 8, "float32", {}, False), marks=pytest.mark.thorough
        ),
        # Over both axes the next test has a tree, and those of learning a chain.
        pytest.param(
            *("data=2,model=4", "chain", 4, "int8", {}, False),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            *("data=4,model=2", "dynamic", 4, "float32", {}, True),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            *("model=2", "dynamic", 1, "float32", {}, False),
            marks=pytest.mark.thorough,
        ),
        ("model=2", "plain", 1, "int8", ODD, True),
    ],
)
def test_tokens_are_those_of_one_device(
    mesh, tree, batch_size, precision, changes, is_scanned
):
    target, tokens = expected(precision, **changes)
    target = scan_target(target) if is_scanned else target
    target = split_target(target, sharding.make_mesh(mesh))
    engine, draft = engine_for(target, TREES[tree])
    found, done = answers(engine, draft, batch_size)
    assert found == tokens
    assert tree == "plain" or sum(c.stats.num_accepted_tokens for c in done) > 10


@pytest.mark.parametrize(
    ("meshes", "kind"),
    [
        (("model=2", ""), SamplingConfig()),
        pytest.param(("", ""), SamplingConfig(), marks=pytest.mark.thorough),
        pytest.param(
            ("model=4", "model=2"),
            SamplingConfig(temperature=1.0, seed=2),
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_parts_of_all_devices_draft_and_verify_side_by_side(meshes, kind):
    whole, _ = expected("float32")
    places = find_places(*meshes)
    assert not {*places.target.devices} & {*places.draft.devices}
    # As good a draft as there is, on the devices of the draft.
    on = lambda place: split_target(whole, place.mesh) if place.mesh else whole
    model = on(places.draft)
    loaded = LoadedDraft(Draft(model.params), Meta.create(whole, None, "model"), model)
    pair = Parallel(on(places.target), loaded, places, 2)
    ends = dict(stop_ids=whole.stop_ids)
    config = StepConfig(whole.config, whole.numerics, TREES["plain"], **ends)
    plain = Engine(config, whole.params)
    for number, ids in enumerate(PROMPTS[:2]):
        request = Request("0", tuple(map(int, ids)), 14, kind)
        answer = pair.answer(request, number)
        (alone,) = plain.serve([request], ordinals=iter([number]))
        assert list(answer.token_ids) == alone.token_ids
        assert kind.temperature or not answer.rounds or answer.acceptance_rate == 1
    cache = jax.tree.leaves(pair.drafting._cache)[0]
    assert cache.devices() == {*places.draft.devices}
    scored = jax.tree.leaves(pair.target.scored)[0]
    assert scored.devices() == {*places.target.devices}


def test_adjusted_tokens_are_those_of_one_device():
    kinds = (
        SamplingConfig(),
        SamplingConfig(frequency_penalty=0.7, logit_bias=((3, 1.5), (0, -100.0))),
    )
    target, usual = expected("float32")
    tokens, _ = answers(*engine_for(target, TREES["plain"]), 1, kinds)
    assert tokens[0] == usual[0]
    assert tokens[1] != usual[1]
    target = split_target(target, sharding.make_mesh("data=2,model=4"))
    engine, draft = engine_for(target, TREES["dynamic"])
    found, done = answers(engine, draft, 4, kinds)
    assert found == tokens
    assert sum(c.stats.num_accepted_tokens for c in done) > 10
    row, _ = engine.prefill(draft, Request("0", (1, 2, 3), 9, kinds[1]), 256)
    extras = engine.place(None, row, 0, 4, 256).extras
    assert extras.counts.sharding.shard_shape(extras.counts.shape) == (2, VOCAB)


def collectives(compiled):
    """Kind and shape of whatever a program sends between devices."""
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    for line in compiled.as_text().splitlines():
        if found := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            for shape in re.findall(r"\w+\[([\d,]*)\]", found[1]):
                yield found[2], tuple(int(n) for n in shape.split(",") if n)


def shapes_of_weights(params):
    """Sizes above one, in any order, of whole matrices and of their shards."""
    shapes = set()
    for leaf in jax.tree.leaves(params):
        if leaf.ndim > 1:
            whole, shard = leaf.shape, leaf.sharding.shard_shape(leaf.shape)
            shapes |= {whole, shard, whole[-2:], shard[-2:]}
    return {tuple(sorted(n for n in shape if n > 1)) for shape in shapes}


@pytest.mark.parametrize(
    ("precision", "is_scanned"),
    [
        pytest.param("float32", False, marks=pytest.mark.thorough),
        pytest.param("int8", False, marks=pytest.mark.thorough),
        ("int8", True),
    ],
)
def test_no_weight_moves(precision, is_scanned):
    target = tiny_target(VOCAB, precision, **SIZES)
    target = scan_target(target) if is_scanned else target
    target = split_target(target, sharding.make_mesh("data=2,model=4"))
    engine, draft = engine_for(target, TREES["chain"])
    row, _ = engine.prefill(draft, Request("0", (1, 2, 3)), 256)
    state = engine.place(None, row, 0, 4, 256)
    step = (
        engine.compiled(engine.action, "greedy")
        .lower(target.params, draft, state)
        .compile()
    )
    weights = shapes_of_weights((target.params, draft.params))
    assert len(weights) > 8
    found = list(collectives(step))
    moved = [shape for _, shape in found if tuple(sorted(shape)) in weights]
    assert not moved
    # Two all-reduces of a layer's rows, in target and draft; one for the embedding.
    whole = 2, 1 + TREES["chain"].num_steps, 40
    rows = [s for kind, s in found if kind == "all-reduce" and s == whole]
    num_layers = 1 if is_scanned else target.config.num_layers
    assert len(rows) == 2 * num_layers + 1 + 4


def test_state_is_split_by_rows_and_heads():
    target = tiny_target(VOCAB, "float32", **SIZES)
    target = split_target(target, sharding.make_mesh("data=2,model=4"))
    engine, draft = engine_for(target, TREES["dynamic"])
    row, _ = engine.prefill(draft, Request("0", (1, 2, 3)), 256)
    state = engine.place(None, row, 0, 4, 256)
    state, output = engine.compiled(engine.action, "greedy")(
        target.params, draft, state
    )
    shard = lambda x: x.sharding.shard_shape(x.shape)
    assert shard(state.cache.keys[0]) == (2, 1, 8, 256)
    assert shard(state.draft_cache["drafter"].values[0]) == (2, 1, 256, 8)
    assert shard(state.feedback.taps) == (2, 256, 80)
    assert shard(state.lengths) == (2,)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(output))
    attention = target.params["layers_0"]["self_attn"]
    assert shard(attention["qkv_proj"]["kernel"]) == (32, 40)
    assert shard(attention["o_proj"]["kernel"]) == (40, 16)
    assert shard(target.params["embed_tokens_kernel"]) == (6, 40)


LEARNER = LearnerConfig(
    "momentum", optimizer="sgd", learning_rate=0.3, update_interval=20,
    memory_slots=64, ring_capacity=8, num_candidates=8,
)  # fmt: skip

# Half of the devices: each of them is sent parts of every array that is saved.
LEARNING = "data=2,model=2"


@pytest.fixture(scope="module")
def session_target():
    return tiny_target(**SIZES)


@pytest.fixture(scope="module")
def loaded(session_target):
    config = draft_config(session_target)
    drafter = build_drafter("eagle3", config, TreeConfig(num_steps=1))
    meta = Meta.create(session_target, config)
    return LoadedDraft(tiny_draft(drafter, config), meta)


def open_session(target, loaded, **kwargs):
    """Without the longer step that predictions have: it is one of the same kind."""
    how = dict(
        learner=LEARNER, tree=TREES["chain"], batch_size=4, num_predicted_tokens=0
    )
    return Session(target, loaded, **how | kwargs)


def learned(target, loaded, prompts=("abc", "a longer one", "xyz", "abc"), **kwargs):
    session = open_session(target, loaded, **kwargs)
    results = list(session.generate(prompts, 14))
    results.sort(key=lambda result: result.prompt.id)
    return session, [result.token_ids for result in results]


def same(left, right, **tolerance):
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(close, left, right)


def num_shares(tree):
    """In how many pieces matrices lie on different devices."""
    return {
        x.size // np.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
        if x.ndim > 1
    }


def test_learning_goes_on_elsewhere_as_where_it_began(session_target, loaded, tmp_path):
    """From one device to a mesh and back; both learn the same on the way."""
    alone, _ = learned(session_target, loaded)
    before = alone.version
    alone.save(tmp_path / "one")
    split = split_target(session_target, sharding.make_mesh(LEARNING))
    session = open_session(split, loaded)
    assert session.resume(tmp_path / "one") == alone.answered

    more = ["more", "of", "the", "same"]
    answers = [
        {r.prompt.id: r.token_ids for r in one.generate(more, 20)}
        for one in (alone, session)
    ]
    assert answers[0] == answers[1]
    assert session.version == alone.version > before > 0
    learner = session.state.trainer.learner
    assert num_shares(learner.params) == {2}
    assert num_shares(learner.opt_state) == {4}

    session.save(tmp_path / "mesh")
    restored = load_draft(tmp_path / "mesh", session_target)
    kernel = lambda draft: draft.params["qkv_proj"]["kernel"]
    assert len(kernel(restored.draft).sharding.device_set) == 1
    same(restored.draft.params, alone.draft.params, atol=1e-5)
    change = jnp.abs(kernel(restored.draft) - kernel(loaded.draft)).max()
    assert change > 1e-3, "nothing was learned"

    # What the optimizer remembers comes back whole, to share it among other devices.
    wider = sharding.make_mesh("data=4,model=2")
    shapes = jax.eval_shape(lambda: session.state.trainer)
    found = checkpoint.load(
        tmp_path / "mesh", session_target, learner_like=lambda *_: shapes, mesh=wider
    )
    assert num_shares(found.learner.learner.opt_state) == {8}
    in_order = grouped(
        session.state.trainer, loaded.meta.draft, split.mesh, is_inverse=True
    )
    same(jax.device_get(found.learner), jax.device_get(in_order), rtol=0)


# With what `test_sharding.py` holds of two processes, the test above says as much.
@pytest.mark.thorough
def test_learning_and_its_checkpoints(session_target, loaded, tmp_path):
    alone, tokens = learned(session_target, loaded)
    mesh = sharding.make_mesh(LEARNING)
    split = split_target(session_target, mesh)
    session, found = learned(split, loaded)
    assert found == tokens
    assert session.version == alone.version > 0
    assert num_shares(session.state.trainer.learner.opt_state) == {4}

    # Written under a mesh, read without one.
    session.save(tmp_path / "mesh")
    restored = load_draft(tmp_path / "mesh", session_target)
    kernel = lambda draft: draft.params["qkv_proj"]["kernel"]
    assert len(kernel(restored.draft).sharding.device_set) == 1
    same(restored.draft.params, alone.draft.params, atol=1e-5)
    change = jnp.abs(kernel(restored.draft) - kernel(loaded.draft)).max()
    assert change > 1e-3, "nothing was learned"
    resumed = open_session(session_target, loaded)
    assert resumed.resume(tmp_path / "mesh") == alone.answered
    same(resumed.state.trainer, alone.state.trainer, atol=1e-5)
    same(resumed.state.traffic, alone.state.traffic, atol=1e-2)

    # And the reverse, to go on from.
    alone.save(tmp_path / "one")
    back = open_session(split, loaded)
    back.resume(tmp_path / "one")
    same(back.draft.params, session.draft.params, atol=1e-5)
    same(back.state.trainer, session.state.trainer, atol=1e-5)
    assert kernel(back.draft).sharding == kernel(session.draft).sharding
    list(back.generate(["more", "of", "the", "same"], 20))
    assert back.version > session.version


@pytest.mark.thorough
def test_whoever_comes_when_is_answered_as_alone(session_target, loaded):
    """As a server has them; see `session/test_live.py`."""
    prompts = ["abc", "xyz", "one, two, " * 20, "one, two, " * 21, "again", "abc d"]
    plain = [r.token_ids for r in Session(session_target).generate(prompts, 20)]
    split = split_target(session_target, sharding.make_mesh(LEARNING))
    session = open_session(split, loaded)
    live = Live(session, (256, 512), kept_bytes=1 << 24)
    pairs = list(session.requests(as_prompts(prompts), 20, SamplingConfig()))
    prompt_of = {id(request): prompt for prompt, request in pairs}
    arriving = iter(pairs)
    answers = {}
    while len(answers) < len(pairs):
        if live.num_free and (pair := next(arriving, None)):
            live.join(pair[1])
        for done in live.turn():
            prompt = prompt_of[id(done.request)]
            session.take_in(prompt, done, session.text_of(done))
            answers[prompt.id] = done.token_ids
    assert [answers[prompt.id] for prompt, _ in pairs] == plain
    assert session.version > 0


def test_an_update_sends_each_weight_once(session_target, loaded):
    """To those who share its moments; besides, gradients alone are summed."""
    split = split_target(session_target, sharding.make_mesh(LEARNING))
    session, _ = learned(split, loaded)
    windows, now = session.trainer.update.__self__, session.state
    batch = windows._batching.make_batch(
        now.traffic.ring, *np.int32([4, 0, 0]), np.bool_(True)
    )
    assert batch.start.sharding.shard_shape(batch.start.shape) == (2,)
    state = now.trainer.learner
    args = batch, windows.shared, session.draft.token_ids
    compiled = windows._learning.update.lower(
        state.opt_state, state.params, state.num_updates, *args
    ).compile()
    weights = shapes_of_weights((split.params, session.draft.params))
    held = [
        x.sharding.shard_shape(x.shape)
        for x in jax.tree.leaves(state.params)
        if x.ndim > 1
    ]
    for kind, shape in collectives(compiled):
        if tuple(sorted(shape)) in weights and kind != "all-reduce":
            assert kind == "all-gather"
            held.remove(shape)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("auto", dict(head_candidates=8)),
        pytest.param(
            "auto", dict(head_candidates=8, pace="pays"), marks=pytest.mark.thorough
        ),
        pytest.param("preference", {}, marks=pytest.mark.thorough),
    ],
)
def test_the_last_layer_is_learned_where_its_rows_lie(
    session_target, loaded, tmp_path, name, settings
):
    """As on one device, where the run can go on; its rows move to no other device."""
    how = dict(learner=LearnerConfig(name, **settings))
    alone, tokens = learned(session_target, loaded, **how)
    split = split_target(session_target, sharding.make_mesh(LEARNING))
    session = open_session(split, loaded, **how)
    assert session.learner.name == {"auto": "head"}.get(name, name)
    layer = session.trainer.update.__self__
    attribute = "_prefer" if name == "preference" else "_learn"
    learn = getattr(layer, attribute)
    programs = []

    def watched(*args):
        if not programs:
            programs.append(learn.lower(*args).compile())
        return programs[0](*args)

    setattr(layer, attribute, watched)
    results = list(session.generate(("abc", "a longer one", "xyz", "abc"), 14))
    results.sort(key=lambda result: result.prompt.id)
    assert [result.token_ids for result in results] == tokens
    assert session.version == alone.version > 1

    head = session.draft.params["lm_head"]
    state = session.state.trainer.learner
    served = session.served_draft.params["lm_head"]
    assert num_shares((head, state.kernel, state.reference, served)) == {2}
    moved = {
        tuple(sorted(shape))
        for kind, shape in collectives(programs[0])
        if kind != "all-reduce"
    }
    assert not moved & shapes_of_weights(head)

    change = jnp.abs(head["kernel"] - loaded.draft.params["lm_head"]["kernel"]).max()
    assert change > 1e-3, "nothing was learned"
    session.save(tmp_path)
    resumed = open_session(session_target, loaded, **how)
    resumed.resume(tmp_path)
    same(
        resumed.state.trainer.learner, alone.state.trainer.learner, rtol=0.01, atol=1e-3
    )
    same(resumed.draft.params, alone.draft.params, atol=1e-5)


def test_what_a_mesh_does_not_divide_is_refused(session_target, loaded):
    mesh = sharding.make_mesh("data=2,model=4")
    with pytest.raises(ConfigError, match="2 key-value heads.*model=4"):
        split_target(tiny_target(), mesh)
    split = split_target(session_target, mesh)
    with pytest.raises(ConfigError, match="batch_size is 3.*data=2"):
        Session(split, loaded, batch_size=3)
    config = dataclasses.replace(loaded.meta.draft, num_kv_heads=2)
    meta = dataclasses.replace(loaded.meta, draft=config)
    with pytest.raises(ConfigError, match="the draft has 2 key-value heads"):
        Session(split, dataclasses.replace(loaded, meta=meta), batch_size=2)


def test_files_hold_no_groups(session_target, loaded, tmp_path):
    """A draft that was only served comes back bit for bit."""
    split = split_target(session_target, sharding.make_mesh("model=4"))
    Session(split, loaded).save(tmp_path)
    restored = checkpoint.load(tmp_path, session_target)
    jax.tree.map(
        np.testing.assert_array_equal, restored.draft.params, loaded.draft.params
    )


@pytest.mark.parametrize(
    ("kind", "precision"), [("folder", "int8"), ("gguf", "bfloat16")]
)
def test_layers_go_to_their_devices_one_by_one(tmp_path, monkeypatch, kind, precision):
    """A target that is loaded onto a mesh is what is split after it was loaded."""
    config = model_config(num_heads=8, num_kv_heads=4, num_layers=3)
    params = random_params(config)
    if kind == "folder":
        path = write_folder(tmp_path / "model", config, hf_tensors(config, params))
    else:
        path = str(tmp_path / "model.gguf")
        write_gguf(path, config, gguf_tensors(config, params))

    whole = load_target(path, precision, is_scanned=False)
    expected = split_target(whole, sharding.make_mesh("data=2,model=4"))
    parts = []
    split = hub._split

    def watched(params, *args, **kwargs):
        parts.append(set(params))
        return split(params, *args, **kwargs)

    monkeypatch.setattr(hub, "_split", watched)
    found = load_target(path, precision, "data=2,model=4")
    layers = [{f"layers_{i}"} for i in range(3)]
    assert [part for part in parts if part in layers] == layers
    assert len(parts) == 5
    assert found.numerics == expected.numerics
    assert found.mesh == expected.mesh
    same(found.params, expected.params, rtol=0)
    places = lambda target: jax.tree.map(lambda x: x.sharding, target.params)
    assert places(found) == places(expected)
