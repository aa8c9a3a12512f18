# SPDX-License-Identifier: Apache-2.0
"""Whether a drafted step says what the target's own step says.

Only `exact` keeps the target's text. With every other verifier an answer is made of
steps that the target did not write: how good it is must be measured, see `grading`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.data.templates import encode
from ospec_jax.decoding.request import Request
from ospec_jax.models import cache as kv
from ospec_jax.models import llama
from ospec_jax.models.hub import Target
from ospec_jax.session.session import Session

LOSSY = ("text", "states", "judge")
VERIFIERS = ("exact", *LOSSY)
"""By name: see `build_verifier`."""
THRESHOLD = 0.9
"""Least cosine of `states`."""
_CHUNK = 32
"""Steps are padded to multiples of so many tokens, each compiled once."""
_TOPICS = (
    "The sum of both numbers is 42.",
    "def add(a, b):\n    return a + b",
    "First, we need to find out how many apples are left.",
    "Therefore, the answer is 7.",
    "Next, we multiply the price by the number of days.",
    "Let x be the unknown length of the side.",
    "The train leaves at noon and arrives two hours later.",
    "We check whether the list is empty before we go on.",
)
"""What all steps have in common is the mean of these."""
_QUESTION = (
    "Two people solve the same problem, and each wrote the next step.\n\n"
    "Step A:\n{drafted}\n\nStep B:\n{written}\n\n"
    "Do both steps mean the same, with the same calculations and the same results? "
    "Say no when in doubt. Answer with one word, yes or no."
)


class Pair(NamedTuple):
    """Two steps behind the same tokens.

    Attributes:
      drafted: The draft's, `written` the target's own, as token ids.
    """

    drafted: tuple[int, ...]
    written: tuple[int, ...]


class Judgement(NamedTuple):
    """What a verifier says of a pair.

    Attributes:
      is_same: The drafted step may stand in the place of the target's.
      is_judged: It was compared by what it means, not just equal or unlike by form:
        only such pairs tell what the target prefers.
      score: What it was judged by, if that is a number.
    """

    is_same: bool
    is_judged: bool = True
    score: float | None = None


class Verifier(NamedTuple):
    """Compares steps.

    Attributes:
      is_lossless: Whether answers are the target's own, token for token.
      compare: Pairs to a `Judgement` of each.
    """

    name: str
    is_lossless: bool
    compare: Callable[[Sequence[Pair]], list[Judgement]]


def exact() -> Verifier:
    """Only the same tokens are the same step: an answer is then plain decoding's."""
    compare = lambda pairs: [Judgement(one.drafted == one.written) for one in pairs]
    return Verifier("exact", True, compare)


def same_text(decode: Callable[[list[int]], str]) -> Verifier:
    """The same text but for white space and case is the same step; lossy."""

    def compare(pairs: Sequence[Pair]) -> list[Judgement]:
        return [Judgement(_is_same_text(decode, pair)) for pair in pairs]

    return Verifier("text", False, compare)


def same_states(target: Target, threshold: float = THRESHOLD) -> Verifier:
    """Steps are the same where the target's own states of them point one way; lossy.

    A step's state is the mean of the final states over its tokens, each step read by
    itself, less what all steps have in common. Embeddings of a model that was made for
    sentences, as in the paper (all-mpnet-base-v2), would tell more.

    Args:
      threshold: Least cosine; the paper has 0.85 and 0.95 for its embeddings.

    Raises:
      ConfigError: The threshold is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise ConfigError(f"the threshold is {threshold}; a cosine lies in [-1, 1]")

    decode = target.tokenizer.decode
    pool = _pooled(target)
    ids = [tuple(target.tokenizer.encode(text)) for text in _TOPICS]
    center = np.mean(pool(ids), axis=0)

    def compare(pairs: Sequence[Pair]) -> list[Judgement]:
        found = [Judgement(_is_same_text(decode, pair)) for pair in pairs]
        asked = [i for i, one in enumerate(found) if not one.is_same]
        if not asked:
            return found

        steps = [step for i in asked for step in pairs[i]]
        states = pool(steps) - center
        states /= np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-9)
        cosines = np.sum(states[::2] * states[1::2], axis=1)
        for i, cosine in zip(asked, cosines, strict=True):
            found[i] = Judgement(bool(cosine >= threshold), True, float(cosine))

        return found

    return Verifier("states", False, compare)


def judged(session: Session) -> Verifier:
    """A model says in one word whether two steps mean the same; lossy.

    Steps are shown to it without what came before, as in the released code. What is no
    clear yes is a no, but it was not judged if it is no clear no either.

    Args:
      session: Of the target, or of any model with a chat template.

    Raises:
      ConfigError: It has none.
    """
    tokenizer = session.target.tokenizer
    decode = session.decode
    # Refused before anything is written, if there is no chat template.
    encode(parse_prompt({"prompt": "Is it?"}, "judge"), tokenizer)

    def compare(pairs: Sequence[Pair]) -> list[Judgement]:
        found = [Judgement(_is_same_text(decode, pair)) for pair in pairs]
        asked = [i for i, one in enumerate(found) if not one.is_same]
        requests = [_question(decode, tokenizer, i, pairs[i]) for i in asked]
        done = session.engine.serve(
            requests, lambda: session.served_draft, session.batch_size
        )
        for completion in done:
            word = decode(completion.token_ids).strip().lower()
            is_clear = word.startswith(("yes", "no"))
            number = int(completion.request.id)
            found[number] = Judgement(word.startswith("yes"), is_clear)

        return found

    return Verifier("judge", False, compare)


def _question(decode, tokenizer: Any, number: int, pair: Pair) -> Request:
    texts = (decode(list(step)).strip() for step in pair)
    text = _QUESTION.format(**dict(zip(Pair._fields, texts, strict=True)))
    ids = encode(parse_prompt({"prompt": text}, "judge"), tokenizer)
    return Request(str(number), ids, max_new_tokens=1, sampling=SamplingConfig())


def _is_same_text(decode, pair: Pair) -> bool:
    drafted, written = ("".join(decode(list(step)).split()) for step in pair)
    return drafted.casefold() == written.casefold()


def _pooled(target: Target) -> Callable[[Sequence[tuple[int, ...]]], np.ndarray]:
    """Maps steps to `[n, d]`, the means of the target's final states."""
    config = target.config
    model = llama.build(config, target.numerics)

    @jax.jit
    def run(params, tokens, lengths):
        b, t = tokens.shape
        starts = jnp.zeros((b,), jnp.int32)
        cache = llama.init_cache(config, target.numerics, b, t)
        positions = jnp.broadcast_to(jnp.arange(t), (b, t))
        bias = kv.causal_bias(starts, t, t)
        hidden, _, _ = model(params, tokens, positions, bias, cache, starts)
        is_real = (positions < lengths[:, None])[..., None]
        return jnp.sum(hidden * is_real, axis=1) / lengths[:, None]

    def pool(steps: Sequence[tuple[int, ...]]) -> np.ndarray:
        states = []
        for step in steps:
            padded = np.zeros((1, -(-len(step) // _CHUNK) * _CHUNK), np.int32)
            padded[0, : len(step)] = step
            states.append(run(target.params, padded, np.full(1, len(step), np.int32)))

        return np.concatenate(jax.device_get(states))

    return pool


def check_verifier(name: str) -> None:
    """Refuses a name that no verifier has; see `build_verifier`.

    Raises:
      ConfigError: There is none of that name.
    """
    kind, _, given = name.partition(":")
    if kind == "states":
        _as_cosine(given)
    elif given or kind not in VERIFIERS:
        raise ConfigError(
            f"unknown verifier {name!r}; use exact, text, states, states:COSINE or "
            f"judge"
        )


def build_verifier(
    name: str, target: Session, judge: Session | None = None
) -> Verifier:
    """A verifier by name: `exact`, `text`, `states`, `states:COSINE` or `judge`.

    Args:
      target: Whose steps are compared to.
      judge: Who is asked, by default the target itself.

    Raises:
      ConfigError: There is none of that name.
    """
    check_verifier(name)
    kind, _, given = name.partition(":")
    if kind == "states":
        return same_states(target.target, _as_cosine(given))
    if kind == "exact":
        return exact()

    return same_text(target.decode) if kind == "text" else judged(judge or target)


def _as_cosine(text: str) -> float:
    if not text:
        return THRESHOLD
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"states:{text} names no cosine; use a number such as states:{THRESHOLD}"
        ) from None
