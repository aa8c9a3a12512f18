# SPDX-License-Identifier: Apache-2.0
"""What users hand to a session: names where there are names, else what they mean.

Whatever has no meaning is refused before anything is loaded, compiled or decoded.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from ospec_jax.config import ConfigError, SamplingConfig, TreeConfig, whole_number
from ospec_jax.data.prompts import Prompt, add_predictions
from ospec_jax.drafters.base import Family
from ospec_jax.learners.config import LearnerConfig, as_learner_config
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.models.hub import Target, load_target
from ospec_jax.session.practice import PracticeConfig
from ospec_jax.session.requests import as_prompt


def as_target(target: Any) -> Target:
    """A loaded target, or the one of a name, which is loaded.

    Raises:
      ConfigError: It is something else.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, str | Path):
        return load_target(target)

    raise ConfigError(
        f"target is {target!r:.60}; use load_target(...), or the name or path of a "
        f"model"
    )


def as_draft(draft: Any, target: Target) -> LoadedDraft | None:
    """A loaded draft, or the one of a name, which is loaded; None for `none`.

    Raises:
      ConfigError: It is something else.
      CheckpointError: It does not fit the target.
    """
    if draft is None or draft == "none":
        return None
    if isinstance(draft, LoadedDraft):
        draft.meta.check(target, warns=False)
        return draft
    if isinstance(draft, str | Path | Family):
        return load_draft(draft, target)

    raise ConfigError(
        f"draft is {draft!r:.60}; use load_draft(...), or what it takes: a name or a "
        f"folder, like 'shipped' or 'ngram'"
    )


def as_learner(learner: Any, draft: LoadedDraft | None) -> LearnerConfig | None:
    """How to learn.

    Raises:
      ConfigError: There is no such learner, or no draft that could learn.
    """
    config = as_learner_config(learner)
    if config is not None and draft is None:
        raise ConfigError(
            f"the learner {config.name!r} has no draft to learn with; give one, "
            f"Session(target, 'shipped', learner=...), if only 'ngram'"
        )

    return config


def is_promoted_by_hand(promote: Any, learner: LearnerConfig | None) -> bool:
    """Whether somebody has to say that what was learned is served.

    Raises:
      ConfigError: It is neither `automatic` nor `manual`, or nothing would ever wait.
    """
    if promote not in ("automatic", "manual"):
        raise ConfigError(f"promote is {promote!r:.60}; use 'automatic' or 'manual'")
    if promote == "automatic":
        return False
    if learner is None:
        raise ConfigError(
            "promote is 'manual', and nothing learns; give a learner, like 'head', or "
            "leave it out"
        )
    if learner.recording == "nothing":
        raise ConfigError(
            f"promote is 'manual', and the learner {learner.name!r} changes no draft: "
            f"n-grams are served at once; use another learner, like 'head', or leave "
            f"it out"
        )

    return True


def as_tree(
    tree: Any, num_speculative_tokens: int | Literal["auto"] | None
) -> TreeConfig | None:
    """How much to draft.

    Raises:
      ConfigError: It is no tree, or two of them.
    """
    if tree is not None and not isinstance(tree, TreeConfig):
        raise ConfigError(
            f"tree is {tree!r:.60}; use a TreeConfig(...), or leave it out and say how "
            f"deep with num_speculative_tokens"
        )
    if num_speculative_tokens is None:
        return tree
    if tree is not None:
        raise ConfigError(
            f"both tree and num_speculative_tokens={num_speculative_tokens!r:.20} are "
            f"set; leave one out: num_steps of a TreeConfig is its depth"
        )
    if num_speculative_tokens == "auto":
        return TreeConfig.auto()

    depth = whole_number("num_speculative_tokens", num_speculative_tokens, least=0)

    return TreeConfig(num_steps=depth)


def as_stop(stop: Any) -> tuple[str, ...]:
    """Strings that end an answer; a string alone is one of them.

    Raises:
      ConfigError: One is empty, or no string.
    """
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, list | tuple | set | frozenset):
        raise ConfigError(f"stop is {stop!r:.60}; use a string, or several in a tuple")

    for text in stop:
        if not isinstance(text, str) or not text:
            raise ConfigError(
                f"stop holds {text!r:.60}; each must be a string that is not empty"
            )

    return tuple(stop)


def as_flag(name: str, value: Any) -> bool:
    """A switch.

    Raises:
      ConfigError: It is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r:.60}; use True or False")

    return value


def as_share(name: str, value: Any) -> float:
    """A share of time, from 0 on and below 1.

    Raises:
      ConfigError: It is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise ConfigError(f"{name} is {value!r:.60}; use a share from 0 on, below 1")

    return float(value)


def as_practice(
    learn_idle: Any, learner: LearnerConfig | None
) -> PracticeConfig | None:
    """How to practise; a number is that of exercises for each answer, 0 for none.

    Raises:
      ConfigError: It is something else, or nothing learns.
    """
    config = learn_idle
    if not isinstance(config, PracticeConfig):
        count = whole_number("learn_idle", learn_idle, least=0)
        if not count:
            return None
        config = PracticeConfig(num_per_answer=count)

    if learner is None:
        raise ConfigError(
            f"learn_idle is {learn_idle!r:.60}, and nothing learns; give a learner, "
            f"Session(target, draft, learner='auto', learn_idle=...)"
        )

    return config


def as_capacities(capacities: Any) -> list[int | None]:
    """Slots of caches to compile for; None is the smallest one.

    Raises:
      ConfigError: One is no such number.
    """
    if capacities is None or isinstance(capacities, int):
        capacities = [capacities]
    if isinstance(capacities, str) or not isinstance(capacities, Iterable):
        raise ConfigError(
            f"capacities are {capacities!r:.60}; use numbers of slots, None for the "
            f"smallest"
        )

    return [c if c is None else whole_number("capacity", c, 1) for c in capacities]


def as_folder(folder: Any) -> Path:
    """A folder of checkpoints.

    Raises:
      ConfigError: It is no path.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ConfigError(f"the folder is {folder!r:.60}; use a path")

    return Path(folder)


def as_sampling(sampling: Any, **given: Any) -> SamplingConfig:
    """How tokens are chosen.

    Args:
      given: Settings that win over those of `sampling`; None for what is not set.

    Raises:
      ConfigError: It is something else, or a setting is out of its range.
    """
    if not isinstance(sampling, SamplingConfig):
        raise ConfigError(
            f"sampling is {sampling!r:.60}; use a SamplingConfig(...), or the keywords "
            f"temperature, top_k, top_p and seed"
        )

    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(sampling, **given)


def as_prompts(
    prompts: Any, predictions: Any = None, first: int = 0
) -> list[Prompt] | Iterator[Prompt]:
    """Prompts of any form: a list where all are there, else one by one as they come.

    Args:
      prompts: A prompt, or some of them; see `Session.generate`.
      predictions: Likewise what answers are expected to be, or None.
      first: Number of the first prompt; one that has no id is named by its number.

    Raises:
      ConfigError: It is something else, or there are more of one than of the other.
    """
    if isinstance(prompts, str | dict | Prompt):
        prompts = [prompts]
        predictions = [predictions] if isinstance(predictions, str) else predictions
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ConfigError(
            f"prompts is {prompts!r:.60}; use text, a row with `prompt` or `messages`, "
            f"or several of these"
        )

    # A generator: prompts of a source are parsed when they are taken.
    parsed = (as_prompt(prompt, i) for i, prompt in enumerate(prompts, first))
    if isinstance(prompts, list | tuple):
        parsed = list(parsed)
        return parsed if predictions is None else add_predictions(parsed, predictions)

    return parsed if predictions is None else _with_predictions(parsed, predictions)


def _with_predictions(prompts: Iterator[Prompt], predictions: Any) -> Iterator[Prompt]:
    """Adds predictions as prompts come."""
    if isinstance(predictions, str | bytes) or not isinstance(predictions, Iterable):
        raise ConfigError(
            f"predictions is {predictions!r:.60}; use as many as there are prompts, "
            f"None where there is none"
        )

    rest = iter(predictions)
    missing = object()

    def pair() -> Iterator[Prompt]:
        for prompt in prompts:
            prediction: Any = next(rest, missing)
            if prediction is missing:
                raise ConfigError(
                    f"there is no prediction for the prompt {prompt.id!r}; give as "
                    f"many as there are prompts, None where there is none"
                )
            yield from add_predictions([prompt], [prediction])

    return pair()
