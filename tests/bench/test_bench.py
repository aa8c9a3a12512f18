# SPDX-License-Identifier: Apache-2.0
"""The harness beside other decoders, and what passes cost, on a tiny target."""

import builtins
import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from ospec_jax import Session, load_draft
from ospec_jax.bench import passes
from ospec_jax.bench.harness import (
    LEARNED_LONGER,
    LONGER,
    UNPADDED,
    BenchConfig,
    run_bench,
)
from ospec_jax.bench.passes import Machine, measure_machine, roofline
from ospec_jax.bench.peers import Peer, open_peer
from ospec_jax.bench.report import (
    _shade_domains,
    markdown_table,
    plot_modes,
    roofline_table,
    terminal_table,
    with_ratios,
)
from ospec_jax.bench.rows import count_mismatches, to_rows
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.stats import repeated_share
from ospec_jax.models.llama import stack_layers
from ospec_jax.testing import tiny_target

PROMPTS = [parse_prompt({"prompt": f"What is {i}?"}, f"q{i}") for i in range(3)]
PLAIN = BenchConfig(modes=("autoregressive",), max_new_tokens=6)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def test_peers_take_turns_on_the_same_token_ids(target, tmp_path):
    asked = []

    def generate(prompt_ids, max_new_tokens, stop_ids):
        asked.append((prompt_ids, max_new_tokens, stop_ids))
        return 4

    run = run_bench(target, None, PROMPTS, PLAIN, peers=[Peer("other", generate)])
    session = run.modes["autoregressive"].session
    requests = session.requests(PROMPTS, 6, SamplingConfig())
    ids = [request.prompt_ids for _, request in requests]
    assert [call[0] for call in asked] == [ids[0], *ids]  # the first one warms up
    assert {call[1:] for call in asked} == {(6, session.engine.config.stop_ids)}
    plain, other = to_rows(run)
    assert other["mode"] == "other"
    assert other["num_tokens"] == 12
    assert "num_mismatched_outputs" not in other
    low, middle, high = other["paired_speedup_quartiles"]
    assert 0 < low <= middle <= high
    assert plain["paired_speedup_quartiles"] == [1.0, 1.0, 1.0]
    assert markdown_table([plain, other]).count("\n") == 3
    assert plot_modes([plain, other], tmp_path / "speed.png").stat().st_size > 1000
    # What only our own modes know is a dash for others.
    of = lambda row: markdown_table([plain | row, other]).splitlines()
    names, _, mine, theirs = (
        [cell.strip() for cell in line.split("|")]
        for line in of(
            {
                "repeated_token_share": 0.25,
                "learner": "osd",
                "optimizer": "adam",
                "learning_rate": 1e-4,
            }
        )
    )
    columns = "repeated tokens", "learner", "optimizer", "rate"
    shown = lambda cells: [cells[names.index(name)] for name in columns]
    assert shown(mine) == ["25%", "osd", "adam", "0.0001"]
    assert shown(theirs) == ["-"] * 4
    console = Console(width=80)
    with console.capture() as capture:
        console.print(terminal_table([plain, other], "", width=80))
    printed = capture.get()
    assert "repeated tokens" in printed
    # Neither of the two learns: a line that is empty in all modes is left out.
    assert "optimizer" not in printed


def test_repeated_tokens_are_those_of_runs_seen_before():
    loop, fresh = [*range(16)] * 2, [*range(100, 116)]
    assert repeated_share([loop, fresh]) == pytest.approx(16 / 48)
    assert repeated_share([]) == 0


@pytest.mark.parametrize(
    "config",
    [
        BenchConfig(modes=("autoregressive",), batch_size=2),
        BenchConfig(modes=("autoregressive",), sampling=SamplingConfig(1.0)),
    ],
)
def test_peers_are_compared_greedily_and_one_by_one(target, config):
    peer = Peer("other", lambda *_: 0)
    with pytest.raises(ConfigError, match="batch size of 1"):
        run_bench(target, None, PROMPTS, config, peers=[peer])


def test_unknown_peers_are_refused():
    with pytest.raises(ConfigError, match="unknown peer 'vllm'"):
        open_peer("vllm", "smollm2-135m")


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch, tmp_path):
    find = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "xllamacpp":
            raise ImportError("no xllamacpp", name=name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install 'ospec-jax\[peers\]'"):
        open_peer("llama-cpp", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "-ngram-simple", "-ngram-mod"])
def test_llama_cpp_answers_with_as_many_tokens_as_are_asked_for(kind, capsys):
    pytest.importorskip("xllamacpp", reason="needs the extra 'peers'")
    peer = open_peer(f"llama-cpp{kind}", "smollm2-135m")
    # "The" and so on, of which no end comes.
    assert peer.generate((504, 3575, 282, 4649, 314), 12, (2,)) == 12
    assert "AVX" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="refuses a prompt of 5000 tokens"):
        peer.generate((504,) * 5000, 12, (2,))


def test_assisted_generation_needs_a_model(tmp_path):
    with pytest.raises(ConfigError, match="--draft model:NAME"):
        open_peer("transformers-assisted", str(tmp_path))


@pytest.mark.parametrize(("tied", "is_scanned"), [(True, False), (False, True)])
def test_roofline_counts_weights_and_cache_once(tied, is_scanned):
    target = tiny_target(tie_embeddings=tied)
    if is_scanned:
        target = dataclasses.replace(
            target,
            numerics=dataclasses.replace(target.numerics, is_scanned=True),
            params=stack_layers(dict(target.params)),
        )
    machine = Machine(bytes_per_second=1e9, operations_per_second=1e12)
    one, four = roofline(target, machine, rows=(1, 4), capacity=64)
    c = target.config
    layer = c.hidden_size * (
        (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.intermediate_size
    )
    weights = c.num_layers * layer + c.vocab_size * c.hidden_size
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 64
    assert one.num_bytes == four.num_bytes == 4 * (weights + cache)
    assert (one.num_operations, four.num_operations) == (2 * weights, 8 * weights)
    assert one.bound == pytest.approx(one.num_bytes / 1e9)
    assert one.seconds > 0
    assert roofline_table([one, four], machine).count("\n") == 5


def test_machine_is_measured(target, monkeypatch):
    monkeypatch.setattr("ospec_jax.bench.passes._PROBE_BYTES", 1 << 20)
    monkeypatch.setattr("ospec_jax.bench.passes._PROBE_FEATURES", 64)
    machine = measure_machine(target)
    assert np.isfinite([machine.bytes_per_second, machine.operations_per_second]).all()


def test_long_passes_are_timed_in_fewer_rounds(monkeypatch):
    monkeypatch.setattr(passes, "_ENOUGH_SECONDS", 1e9)
    assert list(passes._rounds(16)) == list(range(16))
    monkeypatch.setattr(passes, "_ENOUGH_SECONDS", -1.0)
    assert list(passes._rounds(16)) == list(range(passes._FEWEST_ROUNDS))
    assert list(passes._rounds(2)) == [0, 1]


def test_steps_of_a_pool_are_timed_as_they_run(target):
    """A step is given the member that drafts alone."""
    draft = load_draft("pool:ngram+suffix", target)
    session = Session(target, draft, controller="share")
    found = passes.measure_passes({"it": session}, num_rounds=3)
    assert found["it"].step > 0


def test_ratios_are_also_to_the_faster_plain_decoding(target):
    modes = ("autoregressive", UNPADDED)
    run = run_bench(target, None, PROMPTS, dataclasses.replace(PLAIN, modes=modes))
    plain, unpadded = to_rows(run)
    numerics = run.modes[UNPADDED].session.target.numerics
    assert not numerics.is_row_invariant
    assert run.modes["autoregressive"].session.target.numerics.is_row_invariant

    speeds = {"tokens_per_second": 120.0, "tokens_per_second_with_learning": 120.0}
    slower, faster = with_ratios(
        [plain | {k: 100.0 for k in speeds}, unpadded | speeds]
    )
    assert slower["speedup"] == 1.0
    assert faster["speedup"] == pytest.approx(1.2)
    assert slower["speedup_over_fastest_plain"] == pytest.approx(1 / 1.2)
    assert faster["speedup_over_fastest_plain"] == 1.0
    assert "over the fastest plain" in markdown_table([plain, unpadded])
    assert "over the fastest plain" not in markdown_table([plain])


def test_longer_chains_of_ngrams_are_a_mode(target):
    modes = ("autoregressive", LONGER, LEARNED_LONGER)
    config = dataclasses.replace(PLAIN, modes=modes)
    run = run_bench(target, load_draft("self:exit-1", target), PROMPTS, config)

    for name in modes[1:]:
        mode = run.modes[name]
        tree = mode.session.tree
        assert tree.sizes == (config.tree.num_steps, 2 * config.tree.num_steps + 1)
        assert count_mismatches(run, mode)[0] == 0
    assert run.modes[LONGER].session.learner is None
    assert run.modes[LEARNED_LONGER].session.learner is not None

    with pytest.raises(ConfigError, match=r"lends a draft longer chains.*ngram"):
        run_bench(target, load_draft("ngram", target), PROMPTS, config)


def test_stretches_of_domains_are_named_while_they_can_be_read():
    axes = Figure().subplots()
    _shade_domains(axes, ["a", "a", "b"])
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    axes = Figure().subplots()
    _shade_domains(axes, ["a", "b"] * 20)
    assert not axes.texts
    assert not axes.lines
