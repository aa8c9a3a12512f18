# SPDX-License-Identifier: Apache-2.0
"""Does a draft predict its target at all? A head read wrongly decodes, at no gain."""

from ospec_jax.config import TreeConfig
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts
from ospec_jax.loading import LoadedDraft
from ospec_jax.models.hub import Target
from ospec_jax.session import Session
from ospec_jax.storage.checkpoint import CheckpointError

_USELESS = 1.01


def self_check(
    target: Target, draft: LoadedDraft, num_prompts: int = 2, max_new_tokens: int = 32
) -> float:
    """Answers a few prompts of each domain; returns the mean acceptance length.

    Raises:
      CheckpointError: (Almost) nothing that was drafted was accepted.
    """
    depth = 3
    max_depth = draft.family.max_depth
    if max_depth is not None:
        depth = min(depth, max_depth(draft.architecture))

    # n-grams would get tokens accepted that the draft had no part in.
    session = Session(target, draft, tree=TreeConfig(num_steps=depth), ngrams=False)
    prompts = [p for domain in DEMO_DOMAINS for p in demo_prompts(domain)[:num_prompts]]
    results = list(session.generate(prompts, max_new_tokens))
    stats = sum((r.stats for r in results[1:]), results[0].stats)
    length = stats.mean_acceptance_length
    if length < _USELESS:
        raise CheckpointError(
            f"this draft decodes {target.name} at a mean acceptance length of "
            f"{length:.2f} over {stats.num_drafts} steps: it is never right. "
            f"Likely causes: it reads the wrong layers (it was read with taps "
            f"{draft.taps}; --taps overrides them), its fc projection was skipped or "
            f"its norms swapped when it was saved, d2t is wrong, or it "
            f"was trained for another model; --no-check takes it as it is"
        )

    return length
