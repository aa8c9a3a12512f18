# SPDX-License-Identifier: Apache-2.0
"""An offline router: a classifier of prompts says which drafter answers.

The other way to select, which HedgeSpec (arXiv 2510.20064) compares with: a classifier
is trained on prompts of known domains, and each domain has the drafter that did best on
its recorded answers. It costs nothing while decoding, and knows nothing of how drafts
fare there. The paper's is a BERT; this is a logistic regression on the prompts' words,
weighed by TF-IDF: NumPy is enough for it.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.data.known import content_hash
from ospec_jax.data.prompts import Prompt
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.selection import Selected, picked, replay

ROUTER = "router"
_NUM_STEPS = 500
_RATE = 2.0
"""Of gradient descent. Rows have length 1, so the mean loss curves by less than 1."""
_DECAY = 1e-3


class Router(NamedTuple):
    """A classifier of prompts.

    Attributes:
      words: The column of each known word.
      idf: `[v]` how much each word tells, by how few prompts have it.
      weights: `[v + 1, c]` of the classes, a constant at the end.
      classes: Names of domains.
    """

    words: dict[str, int]
    idf: np.ndarray
    weights: np.ndarray
    classes: tuple[str, ...]


def fit_router(texts: Sequence[str], labels: Sequence[str]) -> Router:
    """Trains a classifier: the same texts give the same one.

    Raises:
      ConfigError: There are fewer than two classes.
    """
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ConfigError(
            f"a router tells domains apart, and its prompts have "
            f"{', '.join(map(repr, classes)) or 'none'}; give prompts of two or more, "
            f"with a `domain` each"
        )

    counted = [Counter(_words_in(text)) for text in texts]
    found = Counter(word for counts in counted for word in counts)
    words = {word: number for number, word in enumerate(sorted(found))}
    shared = np.asarray([found[word] for word in words])
    # Smoothed, as if one more text had every word.
    idf = np.log((1.0 + len(texts)) / (1.0 + shared)) + 1.0
    rows = _rows(counted, words, idf)
    wanted = np.asarray(labels)[:, None] == np.asarray(classes)

    weights = np.zeros((len(words) + 1, len(classes)))
    for _ in range(_NUM_STEPS):
        error = _softmax(rows @ weights) - wanted
        weights -= _RATE * (rows.T @ error / len(texts) + _DECAY * weights)

    return Router(words, idf, weights, classes)


def route(router: Router, texts: Sequence[str]) -> list[str]:
    """The class of each text."""
    counted = [Counter(_words_in(text)) for text in texts]
    scores = _rows(counted, router.words, router.idf) @ router.weights
    return [router.classes[number] for number in scores.argmax(axis=1)]


def _words_in(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _rows(counted, words: dict[str, int], idf: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(counted), len(words) + 1))
    for row, counts in zip(rows, counted, strict=True):
        for word, count in counts.items():
            if word in words:
                row[words[word]] = count * idf[words[word]]

    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.maximum(lengths, 1e-12)
    rows[:, -1] = 1.0
    return rows


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Routes:
    """Which drafter a router has for each of some prompts.

    Attributes:
      numbers: By the prompts' content.
      right: Share of the prompts that were taken for what their domain says; of those
        whose domain was among the trained ones.
      drafters: Name of the drafter that each trained domain has.
    """

    numbers: dict[str, int]
    right: float
    drafters: dict[str, str]

    def select(
        self, fixed: Sequence[Selected], answers: Sequence[PoolAnswer]
    ) -> Selected:
        """What the router comes to, given what each drafter does on these answers."""
        return picked(ROUTER, fixed, [self.numbers[one.content] for one in answers])


def routes_of(
    meta: PoolMeta,
    prompts: Sequence[Prompt],
    trained_on: Sequence[PoolAnswer],
    training: Sequence[Prompt],
    costs: Sequence[float] = (),
) -> Routes:
    """Trains a router on some recorded prompts, and has it choose for others.

    Args:
      trained_on: Recorded answers of the prompts that it is trained on, `training`, in
        their order.
      costs: As for `selection.replay`.

    Raises:
      ConfigError: A prompt is in both, or those that it is trained on are of one
        domain.
    """
    known = {content_hash(prompt) for prompt in training}
    both = [prompt.id for prompt in prompts if content_hash(prompt) in known]
    if both:
        raise ConfigError(
            f"{len(both)} prompts are among those that the router is trained on, the "
            f"first is {both[0]!r}; train it on others"
        )

    router = fit_router([p.text for p in training], [p.domain for p in training])
    numbers = range(len(meta.drafters))
    best = {}
    for domain in router.classes:
        own = [one for one in trained_on if one.domain == domain]
        tried = [replay(meta, own, f"fixed:{i}", costs).seconds.sum() for i in numbers]
        best[domain] = int(np.argmin(tried))

    taken_for = route(router, [prompt.text for prompt in prompts])
    pairs = list(zip(prompts, taken_for, strict=True))
    hits = [p.domain == domain for p, domain in pairs if p.domain in router.classes]

    return Routes(
        {content_hash(prompt): best[domain] for prompt, domain in pairs},
        float(np.mean(hits)) if hits else float("nan"),
        {domain: meta.drafters[number] for domain, number in best.items()},
    )


def reworded(prompts: Sequence[Prompt], others: Sequence[Prompt]) -> list[Prompt]:
    """Prompts that mention a question of another domain before they ask.

    What is asked stays the same, and so does the domain; its words are half another's.
    Answers are asked for anew: they have to be recorded, too.

    Args:
      others: Where these questions are from.

    Raises:
      ConfigError: None of them is of another domain.
    """
    found = []
    for number, prompt in enumerate(prompts):
        strange = [one for one in others if one.domain != prompt.domain]
        if not strange:
            raise ConfigError(
                f"prompt {prompt.id!r} is of the domain {prompt.domain!r}, and so are "
                f"all others; give prompts of another one, too"
            )

        # A step that has no factor in common with most lengths spreads over domains.
        before = strange[number * 7919 % len(strange)].text
        text = (
            f"Somebody else was told: {before}\n\nI have another question. "
            f"{prompt.text}"
        )
        last = {**prompt.messages[-1], "content": text}
        messages = (*prompt.messages[:-1], last)
        found.append(
            dataclasses.replace(
                prompt, id=f"{prompt.id}-reworded", text=text, messages=messages
            )
        )

    return found
