# SPDX-License-Identifier: Apache-2.0
"""Which tokens a draft can propose: chosen by what its target was recorded to write."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.drafters.base import dequantized
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.models.llama import head_table
from ospec_jax.replay.store import FeedbackStore
from ospec_jax.types import Draft

_RIDGE = 1e-3
"""Share of the mean square of the target's rows that is added to the diagonal."""


def frequent_tokens(
    store: FeedbackStore, vocab_size: int, count: int, kept: np.ndarray | None = None
) -> np.ndarray:
    """The tokens that answers hold most often, `[count]` ids, ascending.

    Among tokens that are as frequent, such as those of no answer, the ones that are
    more frequent in prompts come first, then lower ids, which byte-pair vocabularies
    give to the more frequent merges.

    Args:
      kept: Ids that are chosen in any case.
    """
    answers = np.zeros(vocab_size, np.int64)
    prompts = np.zeros(vocab_size, np.int64)

    for i in range(len(store.entries)):
        np.add.at(answers, store.answer(i), 1)
        np.add.at(prompts, store.prompt(i), 1)

    is_kept = np.zeros(vocab_size, bool)
    if kept is not None:
        is_kept[kept] = True

    # The last key is the first to sort by.
    order = np.lexsort((-prompts, -answers, ~is_kept))
    return np.sort(order[:count]).astype(np.int32)


def coverage_by_domain(store: FeedbackStore, token_ids: np.ndarray) -> dict[str, float]:
    """Share of answer tokens that can be drafted, by domain."""
    seen: dict[str, list[int]] = {}
    for i, entry in enumerate(store.entries):
        answer = store.answer(i)
        total = seen.setdefault(entry.domain, [0, 0])
        total[0] += int(np.isin(answer, token_ids).sum())
        total[1] += len(answer)

    return {domain: inside / total for domain, (inside, total) in seen.items()}


def check_wider(draft: LoadedDraft, size: int) -> None:
    """Finds out whether a draft can be widened to a vocabulary of this size.

    Raises:
      ConfigError: It has no vocabulary of its own, or already a larger one.
    """
    config = draft.meta.draft
    if config is None or not config.has_own_head:
        raise ConfigError(
            "this draft can propose all tokens of its target already: it has no "
            "vocabulary of its own to widen"
        )
    if not config.draft_vocab_size <= size <= config.vocab_size:
        raise ConfigError(
            f"a draft vocabulary of {size} tokens is asked for; this draft has "
            f"{config.draft_vocab_size} and its target {config.vocab_size}: use a "
            f"number from the one to the other"
        )


def widen(
    draft: LoadedDraft, target: Target, store: FeedbackStore, size: int
) -> LoadedDraft:
    """The draft with more tokens that it can propose; the old ones keep their logits.

    A new token's row of the draft's head begins as the target's row, mapped by the
    linear map that comes closest to making the draft's old rows of the target's.

    Args:
      store: Answers that tell which tokens are wanted.
      size: Tokens afterwards.

    Raises:
      ConfigError: The draft has no vocabulary of its own, or already a larger one.
    """
    check_wider(draft, size)
    config = draft.meta.draft
    assert config is not None, "it was checked"
    if size == config.draft_vocab_size:
        return draft

    old_ids = np.asarray(draft.draft.token_ids)
    token_ids = frequent_tokens(store, config.vocab_size, size, kept=old_ids)
    old_rows = np.asarray(draft.draft.params["lm_head"]["kernel"], np.float32)
    table = np.asarray(dequantized(head_table(target.params)), np.float32)
    rows = table[token_ids] @ _map_between(table[old_ids], old_rows)
    places = np.searchsorted(token_ids, old_ids)
    rows[places] = old_rows

    params = draft.draft.params | {"lm_head": {"kernel": jnp.asarray(rows)}}
    if "bigram_out" in params:
        # Nothing is known yet of what a new token follows.
        known = np.asarray(params["bigram_out"]["kernel"], np.float32)
        bias = np.zeros((size, known.shape[1]), np.float32)
        bias[places] = known
        params["bigram_out"] = {"kernel": jnp.asarray(bias)}

    config = dataclasses.replace(config, draft_vocab_size=size)
    return dataclasses.replace(
        draft,
        draft=Draft(params, jnp.asarray(token_ids), draft.draft.memory),
        meta=dataclasses.replace(draft.meta, draft=config),
    )


def _map_between(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The matrix `[d, e]` that takes rows `[n, d]` closest to rows `[n, e]`."""
    gram = inputs.T @ inputs
    # Some directions may hardly occur: without a ridge they would be made up.
    ridge = _RIDGE * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), inputs.T @ outputs)
