# SPDX-License-Identifier: Apache-2.0
"""Times what drafting takes of a step: catching up, the first token, each further one.

    python tools/time_drafts.py --depths 1 2 3

The parts of the draft are compiled alone, as a step runs them, and take turns; the
fastest of all runs counts. Pin it to one core (`taskset -c 0`) beside other work: there
two threads wait for each other.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from time_products import fastest

from ospec_jax.config import TreeConfig
from ospec_jax.decoding.step import shared_tables
from ospec_jax.drafters.base import Drafter
from ospec_jax.drafters.registry import build_drafter
from ospec_jax.loading import LoadedDraft, load_draft
from ospec_jax.models.hub import Target, load_target
from ospec_jax.reports.progress import say
from ospec_jax.session.build import serving
from ospec_jax.types import Draft, DraftContext, Pairs, Roots, SamplingParams


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      target: As for `ospec generate`; it is loaded in int8.
      draft: A trained one, as there.
      depths: Chains of so many tokens.
      pairs: Numbers of verified tokens that the draft catches up with.
      capacity: Slots of the cache, all but the last 16 of them filled.
      num_rounds: Bursts of each part.
      num_runs: Runs in a burst.
    """

    target: str = "smollm2-135m"
    draft: str = "shipped"
    depths: tuple[int, ...] = (1, 2, 3)
    pairs: tuple[int, ...] = (1, 4)
    capacity: int = 512
    num_rounds: int = 150
    num_runs: int = 4


class Parts:
    """The parts of one draft, each as a function without arguments."""

    def __init__(self, target: Target, loaded: LoadedDraft, capacity: int):
        self.target = target
        self.loaded = loaded
        self.capacity = capacity
        served: Draft = serving(target, loaded, loaded.memory_orders)(loaded.draft)
        self.args = served.replace(memory=None), shared_tables(target.params)
        self.start = jnp.full(1, capacity - 16, jnp.int32)
        self.rng = np.random.default_rng(0)

    def _drafter(self, depth: int) -> Drafter:
        tree = TreeConfig(num_steps=depth)
        loaded = self.loaded
        return build_drafter(
            loaded.family, loaded.architecture, tree, self.target.numerics
        )

    def _random(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.normal(size=shape), jnp.float32)

    def catch_up(self, num_pairs: int):
        """Runs over so many verified tokens."""
        drafter = self._drafter(1)
        tokens = jnp.ones((1, num_pairs), jnp.int32)
        width = len(self.loaded.taps) * self.target.config.hidden_size
        taps = self._random(1, num_pairs, width)
        pairs = Pairs(tokens, tokens, taps, self.start, tokens[:, 0] * num_pairs)

        def run(args, cache):
            cache, context = drafter.extend(*args, cache, pairs)
            return cache, context.hidden

        return self._repeated(run, drafter)

    def propose(self, depth: int):
        """Drafts a chain, the first token's logits included."""
        drafter = self._drafter(depth)
        hidden = self._random(*drafter.init_context(1).hidden.shape)
        keys = jax.random.split(jax.random.key(0), 1)
        sampling = SamplingParams(jnp.zeros(1), 0 * self.start, jnp.ones(1))

        def run(args, cache):
            assert drafter.predict is not None, "its contexts' logits are made late"
            logits = drafter.predict(*args, hidden)
            context = DraftContext(hidden, logits)
            roots = Roots(self.start // self.start, self.start, keys, context, sampling)
            tree, cache = drafter.propose(*args, cache, roots)
            return cache, (tree.tokens, tree.log_probs, tree.is_valid)

        return self._repeated(run, drafter)

    def _repeated(self, run, drafter: Drafter):
        """A call that writes into the same cache each time."""
        compiled = jax.jit(run, donate_argnums=1)
        held = [drafter.init_cache(1, self.capacity)]

        def call():
            held[0], out = compiled(self.args, held[0])
            return out

        return call


def main(settings: Settings) -> None:
    """Times and prints."""
    target = load_target(settings.target, "int8")
    parts = Parts(target, load_draft(settings.draft, target), settings.capacity)
    runs = {f"catch up with {n}": parts.catch_up(n) for n in settings.pairs}
    runs |= {f"draft {depth}": parts.propose(depth) for depth in settings.depths}
    times = fastest(runs, settings.num_rounds, settings.num_runs)

    say("| part | microseconds |\n|---|---|")
    for name, seconds in times.items():
        say(f"| {name} | {1e6 * seconds:.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
