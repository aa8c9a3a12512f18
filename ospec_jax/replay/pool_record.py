# SPDX-License-Identifier: Apache-2.0
"""Every drafter's acceptance at every position of greedy answers, kept for replays.

Greedy answers do not depend on who drafts. So one plain decoding of a prompt, at each
of whose positions every member of a pool is asked for its chain, tells what a step from
there would have had accepted, whoever drafts. It costs no pass of the target beyond
those of plain decoding. Selectors are then compared without any model.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ospec_jax import atomic
from ospec_jax.config import ConfigError, TreeConfig, from_dict, naming
from ospec_jax.config.fields import parse_json, read_json
from ospec_jax.control.contexts import opening_of
from ospec_jax.control.similar import embedding_of
from ospec_jax.data.known import content_hash
from ospec_jax.data.prompts import Prompt
from ospec_jax.data.templates import encode
from ospec_jax.decoding.batch import fetch
from ospec_jax.decoding.engine import CAPACITIES, Engine
from ospec_jax.decoding.proposing import build_proposals
from ospec_jax.decoding.request import PromptTooLongError, Request
from ospec_jax.decoding.step import StepConfig
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.session.build import serving

_FILE = "pool.json"
_ANSWERS = "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class PoolMeta:
    """What the answers belong to.

    Attributes:
      fingerprint: Of the target's weights.
      drafters: Names of the pool's members.
      num_steps: Tokens of a chain, K.
      ngrams: They were lent n-grams of the request.
    """

    target: str
    fingerprint: str
    precision: str
    drafters: tuple[str, ...]
    num_steps: int
    max_new_tokens: int
    ngrams: bool = True


@dataclasses.dataclass(frozen=True)
class PoolAnswer:
    """One answer, and what every drafter would have had accepted along it.

    Attributes:
      content: Hash of the prompt.
      hits: `[t, n]` whether each drafter, asked before it, had each token as its first
        guess; of the answer's `t + 1` tokens all but the first, which the pass over
        the prompt gives.
      accepted: `[t, n]` tokens of a chain that begins there that are accepted.
      opening: Names how the prompt begins (`control.contexts`); empty in recordings
        from before there were such names.
      embedding: What the target makes of the prompt (`control.similar`); likewise.
    """

    id: str
    domain: str
    content: str
    hits: np.ndarray
    accepted: np.ndarray
    opening: str = ""
    embedding: str = ""

    @property
    def num_tokens(self) -> int:
        """Of the answer, its first one included."""
        return len(self.accepted) + 1

    def to_json(self) -> dict[str, Any]:
        """As a line of the recording."""
        arrays = {"hits": self.hits.tolist(), "accepted": self.accepted.tolist()}
        return vars(self) | arrays


def record_pool(
    target: Target,
    pool: LoadedDraft,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    num_steps: int = 3,
    max_new_tokens: int = 64,
    ngrams: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    on_answer: Callable[[PoolAnswer], None] = lambda answer: None,
) -> int:
    """Records answers to all prompts that are not there; returns how many are new.

    Each answer is on disk before the next begins, so an interrupted recording goes on.

    Args:
      num_steps: Tokens of a chain, K.
      ngrams: Lend n-grams of the request to the drafters, as is the default.

    Raises:
      ConfigError: A draft is no pool, a member cannot be judged, or the folder holds
        answers of other settings.
    """
    if pool.pool is None:
        raise ConfigError("only a pool of drafts is recorded so; use pool:A+B")

    names = tuple(str(pool.meta.card.get("model", "")).split("+"))
    if len(names) != len(pool.members):
        names = tuple(f"draft {i}" for i in range(len(pool.members)))
    meta = PoolMeta(
        target.name,
        target.fingerprint,
        target.numerics.precision,
        names,
        num_steps,
        max_new_tokens,
        ngrams,
    )
    known = set()
    if (folder / _FILE).exists():
        found, answers = read_pool(folder)
        _check_same(folder, found, meta)
        known = {answer.content for answer in answers}
    else:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(meta), indent=1)
        atomic.write_text(folder / _FILE, text)

    recorder = _Recorder(target, pool, num_steps, ngrams)
    count = 0
    num_long = 0
    with (folder / _ANSWERS).open("a", encoding="utf-8") as file:
        for prompt in prompts:
            content = content_hash(prompt)
            if should_stop() or content in known:
                continue
            answer = recorder.answer(prompt, content, max_new_tokens)
            if answer is None:
                num_long += 1
                continue
            known.add(content)
            file.write(json.dumps(answer.to_json()) + "\n")
            file.flush()
            count += 1
            on_answer(answer)

    if num_long:
        warnings.warn(
            f"{num_long} of {len(prompts)} prompts and their answers have too many "
            f"tokens for {target.name} and are left out; lower --max-new-tokens",
            stacklevel=2,
        )

    return count


def is_pool_recording(folder: Path) -> bool:
    """Whether a folder holds a pool's acceptance."""
    return (folder / _FILE).is_file()


def read_pool(folder: Path) -> tuple[PoolMeta, list[PoolAnswer]]:
    """What was recorded, in the order in which it was.

    Raises:
      FileNotFoundError: The folder holds no such recording.
      ConfigError: It is damaged.
    """
    file = folder / _FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no recording of a pool; make one with `ospec record "
            f"--draft pool:A+B --prompts FILE --out {folder}`"
        )

    with naming(file):
        meta = from_dict(PoolMeta, read_json(file))

    return meta, list(_answers(folder / _ANSWERS, len(meta.drafters)))


def in_order(
    answers: Sequence[PoolAnswer], prompts: Sequence[Prompt], folder: Path
) -> list[PoolAnswer]:
    """The answers to some prompts, in their order, known by content.

    Raises:
      ConfigError: One of the prompts was not recorded.
    """
    by_content = {answer.content: answer for answer in answers}
    missing = [p.id for p in prompts if content_hash(p) not in by_content]
    if missing:
        raise ConfigError(
            f"{len(missing)} prompts of the stream are not in {folder}, the first is "
            f"{missing[0]!r}; record the stream's file into it, too"
        )

    return [
        dataclasses.replace(by_content[content_hash(p)], id=p.id, domain=p.domain)
        for p in prompts
    ]


def _answers(file: Path, num_drafters: int) -> Iterator[PoolAnswer]:
    if not file.is_file():
        return

    lines = file.read_text("utf-8").split("\n")
    # A line without its end was cut short by a kill: its answer is recorded again.
    if lines[-1]:
        atomic.write_text(file, "".join(line + "\n" for line in lines[:-1]))

    for number, line in enumerate(lines[:-1], 1):
        where = f"line {number} of {file}"
        row = parse_json(line, where)
        with naming(where):
            hits = np.asarray(row["hits"], np.int8).reshape(-1, num_drafters)
            accepted = np.asarray(row["accepted"], np.int32).reshape(-1, num_drafters)
            if hits.shape != accepted.shape:
                raise ConfigError(
                    f"{where} has {len(hits)} hits and {len(accepted)} chains; it is "
                    f"damaged: take the line out"
                )
            yield PoolAnswer(
                row["id"],
                row["domain"],
                row["content"],
                hits,
                accepted,
                str(row.get("opening", "")),
                str(row.get("embedding", "")),
            )


def _check_same(folder: Path, found: PoolMeta, wanted: PoolMeta) -> None:
    for field in dataclasses.fields(PoolMeta):
        old = getattr(found, field.name)
        new = getattr(wanted, field.name)
        if old != new:
            raise ConfigError(
                f"{folder} was recorded with {field.name} {old}, not {new}; use what "
                f"it was recorded with, or another folder"
            )


class _Recorder:
    """Compiled functions that answer a prompt plainly and ask everybody on the way."""

    def __init__(self, target: Target, pool: LoadedDraft, num_steps: int, ngrams: bool):
        assert pool.pool is not None
        chain = TreeConfig(num_steps=num_steps)
        drafters = tuple(
            build_drafter(
                pool.family,
                pool.pool.first(number),
                chain,
                numerics=target.numerics,
                has_ngrams=ngrams,
            )
            for number in range(len(pool.members))
        )
        if drafters[0].retrace is None:
            raise ConfigError(
                "a member of the pool cannot be judged without being asked: that is so "
                "for self:... and for drafters of one's own without `retrace`; leave "
                "it out"
            )

        plain = StepConfig(
            model=target.config,
            numerics=target.numerics,
            tree=chain.of_depth(0),
            taps=pool.taps,
            stop_ids=target.stop_ids,
            judged=TreeConfig(num_steps=1),
            reads_prompts=True,
        )
        self.num_steps = num_steps
        self._target = target
        self._engine = Engine(plain, target.params, drafters[0])
        drafting = dataclasses.replace(plain, tree=chain)
        self._propose = build_proposals(drafting, drafters)
        self._served = serving(target, pool, pool.memory_orders)(pool.draft)
        # Chains are written behind a row's tokens as they are when they are verified.
        self._room = num_steps + max(drafter.num_scratch for drafter in drafters) + 2

    def answer(
        self, prompt: Prompt, content: str, max_new_tokens: int
    ) -> PoolAnswer | None:
        """What everybody would have had accepted; None for too long a prompt."""
        ids = encode(prompt, self._target.tokenizer)
        request = Request(prompt.id, ids, max_new_tokens)
        needed = len(ids) + max_new_tokens + self._room
        capacity = next((c for c in CAPACITIES if c >= needed), None)
        if capacity is None:
            return None
        try:
            capacity = self._engine.capacity_for([request], capacity)
        except PromptTooLongError:
            return None

        state, output = self._engine.prefill(self._served, request, capacity)
        action = self._engine.action
        tokens = []
        chains = []
        hits = []
        embedding = ""

        while True:
            read = fetch(output)
            if read.prompt_states is not None:
                embedding = embedding_of(read.prompt_states[0])
            tokens += read.tokens[0, : read.num_emitted[0]].tolist()
            if read.judged is not None:
                hits.append([one.chances[0, 0, 0] for one in read.judged.items])
            if read.is_finished[0]:
                break
            # Asked first: the step uses up the state.
            chains.append(self._propose(self._target.params, self._served, state))
            state, output = self._engine.step(action, "greedy", self._served, state)

        width = len(self._served.params.items)
        return PoolAnswer(
            prompt.id,
            prompt.domain,
            content,
            np.asarray(hits, np.int8).reshape(-1, width),
            _accepted(tokens, [chain[0] for chain in fetch(chains)], width),
            opening_of(ids),
            embedding,
        )


def _accepted(tokens: list[int], chains: list[np.ndarray], width: int) -> np.ndarray:
    """How many tokens of each chain the answer goes on with, `[t, n]`."""
    found = []
    for place, drafted in enumerate(chains):
        rest = np.asarray(tokens[place + 1 : place + 1 + drafted.shape[1]])
        is_same = drafted[:, : len(rest)] == rest
        found.append(np.cumprod(is_same, axis=1).sum(axis=1))

    return np.asarray(found, np.int32).reshape(-1, width)
