# SPDX-License-Identifier: Apache-2.0
"""An offline router: a classifier of prompts says which drafter answers.

The other way to select, which HedgeSpec (arXiv 2510.20064) compares with: a classifier
is trained on prompts of known domains, and each domain has the drafter that did best on
its recorded answers. It costs nothing while decoding, and knows nothing of how drafts
fare there. The paper's is a BERT; this is a logistic regression on the prompts' words,
weighed by TF-IDF.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.data.known import content_hash
from ospec_jax.data.prompts import Prompt
from ospec_jax.replay.pool_record import PoolAnswer, PoolMeta
from ospec_jax.replay.selection import Selected, picked, replay

ROUTER = "router"


def fit_router(texts: Sequence[str], labels: Sequence[str]) -> Any:
    """Trains a classifier, a pipeline of scikit-learn's: the same texts give the same.

    Raises:
      ConfigError: There are fewer than two classes, or scikit-learn is not installed.
    """
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ConfigError(
            f"a router tells domains apart, and its prompts have "
            f"{', '.join(map(repr, classes)) or 'none'}; give prompts of two or more, "
            f"with a `domain` each"
        )

    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise ConfigError(
            "the router is a classifier of scikit-learn's, which is not installed; "
            "install it with pip install 'ospec-jax[router]'"
        ) from error

    # Marks are words, too: code and questions differ by them.
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]")
    return make_pipeline(words, LogisticRegression(max_iter=1000)).fit(texts, labels)


def route(router: Any, texts: Sequence[str]) -> list[str]:
    """The class of each text."""
    return router.predict(texts).tolist()


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
    domains = router.classes_.tolist()
    best = {}
    for domain in domains:
        own = [one for one in trained_on if one.domain == domain]
        tried = [replay(meta, own, f"fixed:{i}", costs).seconds.sum() for i in numbers]
        best[domain] = int(np.argmin(tried))

    taken_for = route(router, [prompt.text for prompt in prompts])
    pairs = list(zip(prompts, taken_for, strict=True))
    hits = [p.domain == domain for p, domain in pairs if p.domain in domains]

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
