# SPDX-License-Identifier: Apache-2.0
"""What the front door takes: names where there are names, else a clear refusal."""

import numpy as np
import optax
import pytest
from model_files import hf_tensors, model_config, write_folder
from reference import random_params

import ospec_jax as ospec
from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig
from ospec_jax.storage.checkpoint import CheckpointError
from ospec_jax.testing import tiny_target


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def session(target):
    return ospec.Session(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = model_config(tie_embeddings=False, num_layers=2)
    folder = tmp_path_factory.mktemp("models")
    return write_folder(
        folder / "own", config, hf_tensors(config, random_params(config))
    )


def test_names_are_loaded(folder):
    session = ospec.Session(str(folder), "ngram", learner="memory")
    assert session.target.name == "own"
    assert session.learner.name == "memory"
    assert ospec.load_draft("ngram", folder).meta.target == "own"
    assert ospec.load_target(folder, "auto").config == session.target.config


def test_the_draft_none_decodes_plainly(target):
    assert not ospec.Session(target, "none").is_drafting


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner": "head"}, "'head' has no draft to learn with; give one"),
        ({"learner": 3, "draft": "ngram"}, "learner is 3; use a LearnerConfig"),
        ({"draft": 3}, "draft is 3; use load_draft"),
        ({"tree": "chain"}, "tree is 'chain'; use a TreeConfig"),
        (
            {"tree": TreeConfig(), "num_speculative_tokens": 2},
            "both tree and num_speculative_tokens=2 are set; leave one out",
        ),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens is -1; use a whole"),
        ({"batch_size": 0}, "batch_size is 0; use a whole number from 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; use a whole number"),
        ({"batch_size": True}, "batch_size is True; use a whole number"),
        ({"stop": ""}, "stop holds ''; each must be a string that is not empty"),
        ({"stop": ("a", 3)}, "stop holds 3"),
        ({"stop": b"a"}, "stop is b'a'; use a string"),
        ({"ngrams": "no"}, "ngrams is 'no'; use True or False"),
        ({"has_log_probs": 1}, "has_log_probs is 1; use True or False"),
        ({"num_predicted_tokens": -1}, "num_predicted_tokens is -1"),
        ({"controller": 3}, "unknown controller 3"),
        ({"controller": ["auto"]}, r"unknown controller \['auto'\]"),
    ],
)
def test_sessions_refuse_what_means_nothing(target, settings, message):
    with pytest.raises(ConfigError, match=message):
        ospec.Session(target, **settings)


@pytest.mark.parametrize("wrong", [None, 3, b"own", ""])
def test_targets_are_named_by_text_or_path(wrong):
    with pytest.raises(ConfigError, match="use a GGUF file, a folder, a hub id"):
        ospec.load_target(wrong)


def test_what_is_no_target_is_refused(target):
    with pytest.raises(ConfigError, match="use load_target"):
        ospec.Session(3)
    with pytest.raises(ConfigError, match="named by text or a path"):
        ospec.load_target(target)
    with pytest.raises(ConfigError, match="use load_target"):
        ospec.load_draft("ngram", None)
    with pytest.raises(ConfigError, match="precision is 'fp16'; use float32"):
        ospec.load_target("smollm2-135m", "fp16")
    with pytest.raises(ConfigError, match="mesh is 3; use sharding.make_mesh"):
        ospec.load_target("smollm2-135m", mesh=3)


@pytest.mark.parametrize("wrong", [3, None, b"x"])
def test_drafts_are_named_by_text_or_path(target, wrong):
    with pytest.raises(ConfigError, match="use a name, a folder or the record"):
        ospec.load_draft(wrong, target)


def test_a_draft_of_another_target_is_refused():
    draft = ospec.load_draft("ngram", tiny_target())
    other = tiny_target()
    other.tokenizer.add_tokens(["more"])
    with pytest.raises(CheckpointError, match="with tokenizer"):
        ospec.Session(other, draft)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (3, {}, "prompts is 3; use text"),
        (b"a", {}, "prompts is b'a'; use text"),
        ([3], {}, "a row needs `prompt`"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0; use a whole number from 1"),
        ("a", {"max_new_tokens": -5}, "max_new_tokens is -5"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ("a", {"sampling": 0.7}, "sampling is 0.7; use a SamplingConfig"),
        ("a", {"temperature": float("nan")}, "temperature is nan; use 0 or more"),
        ("a", {"temperature": 1e-40}, "temperature is 1e-40; use 0 for"),
        ("a", {"temperature": "hot"}, "temperature is 'hot'; use a number"),
        ("a", {"top_k": 1.5}, "top_k is 1.5; use a whole number"),
        ("a", {"seed": -1}, "seed is -1"),
        ("a", {"is_raw": "yes"}, "is_raw is 'yes'; use True or False"),
        ("a", {"on_text": 3}, "on_text is 3; use a function"),
    ],
)
def test_requests_that_mean_nothing_are_refused_at_once(
    session, prompts, settings, message
):
    with pytest.raises(ConfigError, match=message):
        session.generate(prompts, **settings)


@pytest.mark.parametrize(
    "prompt",
    ["Hi", {"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}],
)
def test_one_prompt_is_one_answer(session, prompt):
    [result] = session.generate(prompt, 4)
    assert result.prompt.text == "Hi"
    assert len(result.token_ids) == 4


def test_sampling_may_be_given_by_its_parts(session):
    whole = session.target, SamplingConfig(temperature=0.9, top_k=5, top_p=0.9, seed=3)
    [expected] = ospec.Session(whole[0]).generate("Hi", 8, whole[1])
    again = ospec.Session(whole[0])
    [result] = again.generate(
        "Hi", 8, temperature=np.float32(0.9), top_k=np.int64(5), top_p=0.9, seed=3
    )
    assert result.token_ids == expected.token_ids


def test_folders_are_paths(session):
    with pytest.raises(ConfigError, match="the folder is 3; use a path"):
        session.save(3)
    with pytest.raises(ConfigError, match="the folder is None; use a path"):
        session.resume(None)
    with pytest.raises(ConfigError, match="capacities are 'all'; use numbers"):
        session.warm_up("all")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreeConfig("wide"), "kind is 'wide'; use chain, static, dynamic or"),
        (lambda: TreeConfig(num_steps=2.5), "num_steps is 2.5; use a whole number"),
        (lambda: TreeConfig.auto(3), "depths are 3; use several"),
        (lambda: SamplingConfig("1"), "temperature is '1'; use a number"),
        (lambda: SamplingConfig(min_p=1.2), r"min_p is 1.2; it lies in \[0, 1\]"),
        (lambda: SamplingConfig(min_p=float("nan")), "min_p is nan; it lies"),
        (lambda: SamplingConfig(presence_penalty=-2.5), "presence_penalty is -2.5; it"),
        (
            lambda: SamplingConfig(frequency_penalty=3),
            "frequency_penalty is 3; it lies",
        ),
        (
            lambda: SamplingConfig(repetition_penalty=0),
            "repetition_penalty is 0; use 1",
        ),
        (
            lambda: SamplingConfig(logit_bias={5: 1.0}),
            "logit_bias is {5: 1.0}; use pairs",
        ),
        (lambda: SamplingConfig(logit_bias=((5, "a"),)), "use pairs of a token id and"),
        (
            lambda: SamplingConfig(logit_bias=((-5, 1.0),)),
            "has the token id -5; ids are",
        ),
        (
            lambda: SamplingConfig(logit_bias=((5, 101),)),
            "token 5 is 101.0; it lies in",
        ),
        (lambda: SamplingConfig(logit_bias=((5, 1), (5, 2))), "id 5 more than once"),
        (
            lambda: ospec.LearnerConfig(optimizer=optax.adam(1e-3)),
            "name it, as optimizer='adam' with learning_rate=",
        ),
        (lambda: ospec.LearnerConfig(["head"]), r"unknown learner \['head'\]; use one"),
        (lambda: ospec.LearnerConfig(batch_size="4"), "batch_size is '4'; use a whole"),
        (lambda: ospec.LearnerConfig(seed="a"), "seed is 'a'; use a whole number"),
        (lambda: ospec.LearnerConfig(method="head"), "method is 'head'; leave it out"),
    ],
)
def test_configurations_refuse_other_types(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_biases_of_json_are_hashable():
    found = SamplingConfig(logit_bias=[[5, 1], (np.int64(3), np.float32(0.5))])
    assert found == SamplingConfig(logit_bias=((5, 1.0), (3, 0.5)))
    assert hash(found)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({}, "greedy"),
        ({"min_p": 0.5}, "greedy"),  # the most probable token is always kept
        ({"logit_bias": ((3, 0.0),)}, "greedy"),
        ({"temperature": 0.5, "top_p": 0.5}, "sampled"),
        ({"temperature": 0.5, "min_p": 0.1}, "full"),
        ({"presence_penalty": 0.1}, "full"),
        ({"frequency_penalty": -0.1}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
        ({"logit_bias": ((3, 0.1),)}, "full"),
    ],
)
def test_only_who_asks_for_more_needs_more(how, kind):
    assert SamplingConfig(**how).kind == kind


def test_numbers_of_numpy_are_numbers():
    tree = TreeConfig("static", np.int64(2), branching=[2, 1])
    assert tree == TreeConfig("static", 2, branching=(2, 1))
    assert type(tree.num_steps) is int
