# SPDX-License-Identifier: Apache-2.0
"""A finished benchmark as JSON rows."""

import datetime
import resource
import subprocess
from pathlib import Path

import jax

from ospec_jax._platform import device_name
from ospec_jax.bench.parts import add_parts, add_speedups, paired_quartiles
from ospec_jax.bench.runs import BenchRun, ModeRun, Turns
from ospec_jax.data.templates import encode
from ospec_jax.decoding.engine import PREFILL_CHUNK
from ospec_jax.decoding.reference import is_tie
from ospec_jax.decoding.stats import repeated_share
from ospec_jax.learners.config import optimizer_of


def predicted_seconds(run: BenchRun, name: str) -> float:
    """What a mode's passes should take in all, by their number and single cost."""
    mode = run.modes[name]
    cost = run.pass_seconds[name]
    num_chunks = sum(-(-length // PREFILL_CHUNK) for length in run.prompt_lengths)
    return num_chunks * cost.prefill + mode.stats.num_drafts * cost.step


def to_rows(run: BenchRun) -> list[dict]:
    """The benchmark's JSON: one row a mode, then one a peer; see `parts`, too."""
    rows = [_row(run, name) for name in run.modes]
    rows += [_peer_row(run, name) for name in run.peers]
    return add_parts(run, add_speedups(rows))


def _shared(run: BenchRun, name: str, turns: Turns) -> dict:
    """Of modes and peers alike; ratios are to plain decoding, turn by turn."""
    quartiles = None
    plain = run.modes.get("autoregressive")
    if plain is not None:
        quartiles = paired_quartiles(plain, turns, range(len(turns.turn_seconds)))

    return {
        "mode": name,
        "num_prompts": len(run.prompts),
        "left_out": run.left_out,
        "num_tokens": turns.num_tokens,
        "tokens_per_second_with_learning": turns.tokens_per_second_with_learning,
        "paired_speedup_quartiles": quartiles,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": device_name(),
        "jax_version": jax.__version__,
        "git_commit": _git_commit(),
        "date": datetime.date.today().isoformat(),
    }


def _peer_row(run: BenchRun, name: str) -> dict:
    shared = _shared(run, name, run.peers[name])
    speed = shared["tokens_per_second_with_learning"]
    return shared | {"tokens_per_second": speed}


def _row(run: BenchRun, name: str) -> dict:
    mode = run.modes[name]
    stats = run.modes[name].stats
    session = mode.session
    learner = session.learner
    trained = session.state.trainer
    predicted = None
    # What a step takes is known only where all steps are alike.
    is_known = run.config.batch_size == 1
    is_known &= not session.tree.depths and not session.tree.sizes
    if "autoregressive" in run.modes and is_known:
        plain = predicted_seconds(run, "autoregressive")
        predicted = plain / max(predicted_seconds(run, name), 1e-9)

    mismatched, ties = count_mismatches(run, mode)

    return _shared(run, name, mode) | {
        "tokens_per_second": mode.tokens_per_second,
        "predicted_speedup": predicted,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "mean_draft_length": stats.mean_draft_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "acceptance_per_position": stats.acceptance_per_position,
        "num_mismatched_outputs": mismatched,
        "num_tie_flips": ties,
        "repeated_token_share": repeated_share([r.token_ids for r in mode.results]),
        "learner": learner.name if learner else None,
        **optimizer_of(learner),
        "num_updates": int(trained.num_updates) if trained else 0,
        "num_promotions": session.version,
        "learning_seconds": mode.learning_seconds,
        "num_exercises": mode.num_exercises,
        "idle_seconds": mode.idle_seconds,
        "compile_seconds": mode.compile_seconds,
        "target": session.target.name,
        "precision": session.target.numerics.precision,
        "num_speculative_tokens": session.tree.num_steps,
        "controller": session.chooser.report(),
    }


def count_mismatches(run: BenchRun, mode: ModeRun) -> tuple[int | None, int | None]:
    """Outputs that differ from plain decoding, and how many of them are mere ties.

    Where the draft draws its children sampled outputs follow the same law, but are
    other draws: for them, None. Of draws, and of adjusted logits, nobody has said what
    a tie is.
    """
    session = mode.session
    is_sampled = run.config.sampling.temperature > 0
    if is_sampled and session.engine.is_drawn:
        return None, None

    mismatched = ties = 0
    has_no_ties = is_sampled or run.config.sampling.is_adjusted

    for result, expected in zip(mode.results, run.reference, strict=True):
        if result.token_ids == expected:
            continue
        mismatched += 1
        if has_no_ties:
            continue
        pairs = enumerate(zip(result.token_ids, expected, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is None:
            continue  # one output is longer: no tie
        ids = encode(result.prompt, session.target.tokenizer, run.config.is_raw)
        prefix = [*ids, *expected[:first]]
        ties += is_tie(session.engine.config, session.target.params, prefix)

    return mismatched, None if has_no_ties else ties


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
