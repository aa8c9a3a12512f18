# SPDX-License-Identifier: Apache-2.0
"""`ospec parallel`: a draft and its target at work side by side (PEARL)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Group

from ospec_jax.cli.arguments import PrecisionName, as_precision, write_json
from ospec_jax.cli.outputs import check_outputs
from ospec_jax.config import ConfigError, SamplingConfig, whole_number
from ospec_jax.data.prompts import read_prompts
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.models.hub import Target
from ospec_jax.parallel.costs import (
    SideTimes,
    balanced_length,
    best_length,
    pearl_cost,
    plain_cost,
    serial_cost,
)
from ospec_jax.reports.progress import Interrupt, progress_bar, say
from ospec_jax.reports.tables import print_table, records_table
from ospec_jax.session.requests import tokenized

if TYPE_CHECKING:
    from ospec_jax.loading import LoadedDraft
    from ospec_jax.parallel.pearl import Parallel, ParallelAnswer
    from ospec_jax.parallel.places import Places

Row = dict[str, Any]
_NUM_FIRST = 4
"""Tokens of the chunks that sides are timed with, before their number is known."""


def parallel(
    prompts: Path,
    draft_model: str,
    target: str = "smollm2-135m",
    precision: PrecisionName = "auto",
    mesh: str = "",
    draft_mesh: str = "",
    draft_device: int | None = None,
    num_speculative_tokens: int | Literal["auto"] = "auto",
    draft_sample_method: Literal["topk", "sampled"] = "topk",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    num_prompts: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Drafts and verifies at the same time, on devices of their own (PEARL); exact.

    Beside it the target answers alone, prompt by prompt in turns. At the end stand what
    each side takes by itself, and what a token would cost in turns: drafting in
    parallel takes two devices, so compare it with the target on both.

    Args:
      prompts: A JSONL file.
      draft_model: Drafts: a GGUF file, a folder or a hub id, of the target's tokenizer.
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id.
      precision: Of weights and products; auto measures which is fastest on this device.
      mesh: Devices to split the target over, the first ones, like model=4; empty for a
        single one.
      draft_mesh: Devices to split the draft over, the last ones; empty for a single
        one.
      draft_device: Number of the draft's device, by default the last one.
      num_speculative_tokens: Of a chunk, the paper's gamma; auto takes as many as the
        draft writes while the target passes over one, as measured at the start.
      draft_sample_method: How the draft's tokens are chosen when sampling: topk, its
        most probable ones, or sampled.
      max_new_tokens: Longest answer, in tokens.
      temperature: 0 takes the most probable token (greedy); above 0 tokens are sampled.
      top_p: Sample from the most probable tokens of so much probability; 1 takes all.
      top_k: Sample from so many of the most probable tokens; 0 takes all.
      seed: Of the random numbers of sampling; each answer draws its own.
      num_prompts: Taken from the file's beginning; by default all.
      json_file: Write a row for each prompt.
    """
    from ospec_jax.parallel.places import find_places, load_pair

    check_outputs([json_file], inputs=[prompts])
    whole_number("--max-new-tokens", max_new_tokens, least=1)
    if num_speculative_tokens != "auto":
        whole_number("--num-speculative-tokens", num_speculative_tokens, least=1)
    if num_prompts is not None:
        whole_number("--num-prompts", num_prompts, least=1)
    sampling = SamplingConfig(temperature, top_k, top_p, seed)
    rows = read_prompts(prompts)[:num_prompts]
    if not rows:
        raise ConfigError(f"{prompts} holds no prompts")
    places = find_places(mesh, draft_mesh, draft_device)

    large, small = load_pair(target, draft_model, places, as_precision(precision))
    say(f"target on {places.target}, draft on {places.draft}; compiling")
    requests = [
        request
        for _, request in tokenized(rows, large.tokenizer, max_new_tokens, sampling)
    ]
    pair, times = _fitted(
        large, small, places, num_speculative_tokens, draft_sample_method, requests[0]
    )

    found: list[Row] = []
    answers: list[ParallelAnswer] = []
    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("parallel", total=len(requests))
        # So that neither side's first answer is the one that compiles.
        pair.answer(requests[0])
        _answer_alone(pair, requests[0], 0)
        for number, request in enumerate(requests):
            if interrupt:
                break
            answers.append(pair.answer(request, number))
            plain = _answer_alone(pair, request, number)
            row = _row_of(request, answers[-1], plain, large.tokenizer)
            # Drawn drafts keep the law of sampled answers, not each draw.
            if draft_sample_method == "sampled" and temperature > 0:
                row["is_same"] = None
            found.append(row)
            bar.update(task, advance=1)

    write_json(json_file, found, is_list=True)
    if found:
        _report(pair, answers, found, times)
    if len(found) < len(requests):
        interrupt.raise_if_set()


def _fitted(
    large: Target,
    small: "LoadedDraft",
    places: "Places",
    num_tokens: int | Literal["auto"],
    children: Literal["topk", "sampled"],
    request: Request,
) -> tuple["Parallel", SideTimes]:
    """The pair with chunks of the length that is wanted, or that fits; its times."""
    from ospec_jax.parallel.measuring import measure_sides
    from ospec_jax.parallel.pearl import Parallel

    first = _NUM_FIRST if num_tokens == "auto" else num_tokens
    pair = Parallel(large, small, places, first, children)
    times = measure_sides(pair, request)
    if num_tokens != "auto" or (fitting := balanced_length(times)) == first:
        return pair, times

    pair = Parallel(large, small, places, fitting, children)
    return pair, measure_sides(pair, request)


def _answer_alone(pair: "Parallel", request: Request, ordinal: int) -> Completion:
    """Plain decoding of the same target, with the same random numbers."""
    with pair.places.target.chosen():
        (plain,) = pair.target.engine.serve([request], ordinals=iter([ordinal]))

    return plain


def _row_of(
    request: Request, answer: "ParallelAnswer", plain: Completion, tokenizer
) -> Row:
    """What is known of a prompt's two answers."""
    ids = list(answer.token_ids)
    return {
        "id": request.id,
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "finish_reason": answer.finish_reason,
        "num_tokens": len(ids),
        "seconds": answer.seconds,
        "prompt_seconds": answer.prompt_seconds,
        "num_rounds": len(answer.rounds),
        "tokens_per_round": answer.tokens_per_round,
        "acceptance_rate": answer.acceptance_rate,
        "share_pre_verify": answer.share_pre_verify,
        "target_num_tokens": len(plain.token_ids),
        "target_seconds": plain.seconds,
        "is_same": ids == list(plain.token_ids),
    }


def _report(
    pair: "Parallel",
    answers: "list[ParallelAnswer]",
    rows: list[Row],
    times: SideTimes,
) -> None:
    from ospec_jax.parallel.pearl import summed

    whole = summed(answers)
    print_table(_table(rows, whole))
    length = pair.num_speculative_tokens
    rate = whole.acceptance_rate
    print_table(_cost_table(times, length, rate))
    say(
        f"a pass over one row {_ms(times.verify(1))}, over {length} "
        f"{_ms(times.verify(length))}, a drafted token {_ms(times.drafting)}, handing "
        f"over {_ms(times.hand_over)}"
    )


def _table(rows: list[Row], whole: "ParallelAnswer") -> Group:
    """The two ways, a row each."""
    compared = [row["is_same"] for row in rows if row["is_same"] is not None]
    same = f"{sum(compared)} of {len(compared)}" if compared else "-"
    heads = ("", "tokens/s", "a round", "accepted", "pre-verify", "same answers")
    alone = _speed(rows, "target_")
    return records_table(
        heads,
        [
            ("target alone", alone, "1.00", "-", "-", "-"),
            (
                "in parallel",
                _speed(rows, ""),
                f"{whole.tokens_per_round:.2f}",
                f"{whole.acceptance_rate:.0%}",
                f"{whole.share_pre_verify:.0%}",
                same,
            ),
        ],
    )


def _cost_table(times: SideTimes, length: int, rate: float) -> Group:
    """What a token costs by the model, at the acceptance rate that was found."""
    lines = [
        ("plainly", 0, plain_cost(times)),
        ("in parallel", length, pearl_cost(times, length, rate)),
    ]
    # With chunks of one token no pass over several rows was timed.
    if len(times.rows) > 1:
        best = best_length(pearl_cost, times, rate)
        in_turns = best_length(serial_cost, times, rate)
        lines.append(("in parallel, at its best length", *best))
        lines.append(("in turns, on the target's devices", *in_turns))

    heads = ("a token by the cost model", "K", "time")
    return records_table(heads, [(name, str(k), _ms(cost)) for name, k, cost in lines])


def _speed(rows: list[Row], prefix: str) -> str:
    tokens = sum(row[f"{prefix}num_tokens"] for row in rows)
    seconds = sum(row[f"{prefix}seconds"] for row in rows)
    return f"{tokens / max(seconds, 1e-9):.1f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
