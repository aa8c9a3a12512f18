# SPDX-License-Identifier: Apache-2.0
"""How much is drafted, how it is verified, how tokens are chosen."""

import dataclasses
from typing import Any, Literal

from ospec_jax.config.base import ConfigError, check_types, is_of_type

ChildrenKind = Literal["topk", "sampled", "without_replacement", "topk_sampled", "hub"]
Verification = Literal["token", "block", "traversal"]

StepKind = Literal["greedy", "sampled", "full"]
"""What a compiled pass can do: `greedy` takes the most probable tokens, `sampled` knows
temperature, top-k and top-p, too, and `full` all there is of `SamplingConfig`, reports
log-probabilities with alternatives, and keeps single rows from drafting."""

MAX_ALTERNATIVES = 20
"""Most probable tokens that can be reported with each token, as OpenAI has it."""

AUTO_DEPTHS = (0, 1, 2, 3, 5)
"""Depths that a tree of depth `auto` chooses from; each is an executable."""


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """How much is drafted in one step, and in which shape.

    Attributes:
      kind: `chain` drafts one path; `static` the full tree of `branching`; `dynamic`
        expands the `topk` most probable nodes at each depth and keeps the best
        `num_draft_tokens` of all (EAGLE-2); `parallel` is two chains of two drafters.
      num_steps: Depth of the tree, K for a chain; 0 decodes without drafting.
      topk: Width of the dynamic tree's frontier.
      num_draft_tokens: Nodes of a dynamic tree, without the root.
      branching: Children of every node, by depth, of a static tree.
      parents: Instead of `branching`: the parent of each node, -1 for the root, which
        is node 0, in order of depth.
      children: How children are drawn. `topk`: the most probable ones; `sampled`:
        independent draws; `without_replacement`: distinct draws; `topk_sampled`: one
        draw and the most probable of the others; `hub`: pairs of SpecHub.
      verification: How sampled output is accepted. `token`: one token after the other;
        `block` (chains) and `traversal` (static trees): whole paths of drawn children,
        which accepts more.
      min_gain: A dynamic tree grows no deeper once the best `num_draft_tokens` nodes of
        one more depth promise less than so many accepted tokens more (OPT-Tree).
      min_path_probability: A chain or dynamic tree grows no deeper once the draft gives
        its most probable path less than this.
      depths: Instead of drafting `num_steps` always: depths, `num_steps` the largest,
        of which every step takes the one that pays; see `control.depth`.
      sizes: Instead of verifying all nodes always: numbers of nodes, the root left out,
        the largest all of the tree's, of which every step verifies as many as it is
        told to; see `drafters.sizing`. Never fewer where that would leave out a token
        that was drawn.
    """

    kind: Literal["chain", "static", "dynamic", "parallel"] = "chain"
    num_steps: int = 3
    topk: int = 1
    num_draft_tokens: int = 0
    branching: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    min_gain: float = 0.0
    children: ChildrenKind = "topk"
    min_path_probability: float = 0.0
    verification: Verification = "token"
    depths: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def auto(cls, depths: tuple[int, ...] = AUTO_DEPTHS, **changes) -> "TreeConfig":
        """A chain as deep as pays, at times none at all.

        Raises:
          ConfigError: The depths are no such numbers.
        """
        if not isinstance(depths, list | tuple) or not depths:
            raise ConfigError(
                f"depths are {depths!r}; use several to choose from, like {AUTO_DEPTHS}"
            )

        return cls(num_steps=max(depths), depths=depths, **changes)

    def __post_init__(self):
        check_types(self)
        self._check_children()
        if self.depths:
            self._check_depths()
        if not 0 <= self.min_path_probability < 1:
            raise ConfigError(
                f"min_path_probability is {self.min_path_probability}; use 0 (always "
                f"the full depth) to below 1"
            )
        if self.kind == "static" and self.min_path_probability:
            raise ConfigError(
                "a static tree always has its full depth; min_path_probability is for "
                "chains and dynamic trees"
            )
        if self.num_steps < 0:
            raise ConfigError(f"num_steps is {self.num_steps}; it must be at least 0")
        if self.min_gain and self.kind != "dynamic":
            raise ConfigError(f"min_gain is for dynamic trees, not a {self.kind} one")

        if self.parents:
            self._check_parents()
        elif self.kind == "static" and len(self.branching) != self.num_steps:
            raise ConfigError(
                f"a static tree needs one branching number for each of its "
                f"{self.num_steps} depths, not {self.branching}"
            )

        if self.kind == "dynamic":
            self._check_dynamic()
        if self.sizes:
            self._check_sizes()

    def _check_depths(self):
        # A dynamic tree may be left out as a whole: then it is drafted, or nothing is.
        is_whole = self.kind == "dynamic" and self.depths == (0, self.num_steps)
        if self.kind not in ("chain", "parallel") and not is_whole:
            raise ConfigError(
                f"only chains vary their depth, not a {self.kind} tree; use --tree "
                f"chain or a fixed --num-speculative-tokens"
            )

        ascending = sorted(set(self.depths))
        if list(self.depths) != ascending or (ascending[0], ascending[-1]) < (0, 1):
            raise ConfigError(
                f"depths to choose from ascend from 0 or more to 1 or more, not "
                f"{self.depths}"
            )
        if self.num_steps != ascending[-1]:
            raise ConfigError(
                f"num_steps is {self.num_steps}; it must be the largest of the depths "
                f"{self.depths}"
            )

    def of_depth(self, num_steps: int) -> "TreeConfig":
        """The tree of one of the `depths`."""
        if self.kind == "dynamic" and not num_steps:
            return TreeConfig(num_steps=0)

        # A shorter chain has fewer nodes to verify.
        sizes = self.sizes
        if self.kind != "dynamic":
            sizes = tuple(size for size in sizes if size <= num_steps)

        return dataclasses.replace(self, num_steps=num_steps, depths=(), sizes=sizes)

    def _check_sizes(self):
        if self.kind not in ("chain", "dynamic"):
            raise ConfigError(
                f"only chains and dynamic trees vary how many nodes are verified, not "
                f"a {self.kind} one; use one of these, or leave sizes out"
            )

        ascending = sorted(set(self.sizes))
        whole = self.num_nodes - 1
        if list(self.sizes) != ascending or ascending[0] < 1 or ascending[-1] != whole:
            raise ConfigError(
                f"sizes to choose from ascend from 1 or more to all {whole} nodes of "
                f"the tree, not {self.sizes}"
            )

    def _check_parents(self):
        if self.kind != "static" or self.branching:
            raise ConfigError("parents describe a static tree, in place of branching")
        if self.parents[0] != -1 or len(self.parents) < 2:
            raise ConfigError(
                f"a tree begins with its root, whose parent is -1, and has more nodes "
                f"than that; found {self.parents}"
            )

        depths = [0]

        for node, parent in enumerate(self.parents[1:], 1):
            if not self.parents[node - 1] <= parent < node or parent < 0:
                raise ConfigError(
                    f"node {node} of the tree has parent {parent}; parents come before "
                    f"their children, and siblings stand side by side: {self.parents}"
                )
            depths.append(depths[parent] + 1)

        if max(depths) != self.num_steps:
            raise ConfigError(
                f"the tree of {self.parents} has depth {max(depths)}; num_steps is "
                f"{self.num_steps}"
            )
        if self.children in ("topk_sampled", "hub"):
            raise ConfigError(
                f"children={self.children!r} need one number of children a depth: use "
                f"branching, not parents"
            )

    def _check_children(self):
        if self.verification == "block" and self.kind != "chain":
            raise ConfigError(
                f"block verification is for chains, not a {self.kind} tree; use "
                f"verification='traversal' for static trees"
            )

        is_drawn = self.children in ("sampled", "without_replacement")
        if self.verification != "token" and not is_drawn:
            raise ConfigError(
                f"{self.verification} verification needs children that are drawn "
                f"('sampled' or 'without_replacement'), not {self.children!r}: with "
                f"others it would accept no more"
            )
        if self.children == "topk_sampled" and self.kind != "static":
            raise ConfigError("children='topk_sampled' is for static trees")
        if self.children == "hub" and set(self.branching) != {2}:
            raise ConfigError(
                f"children='hub' are pairs: use a static tree of branching 2, not "
                f"{self.kind} {self.branching or ''}"
            )

    def _check_dynamic(self):
        if self.children != "topk":
            raise ConfigError(
                f"a dynamic tree keeps its most probable nodes, which is exact only "
                f"for children='topk', not {self.children!r}; use a static tree"
            )

        pool = self.topk + (self.num_steps - 1) * self.topk**2
        if not 0 < self.num_draft_tokens <= pool:
            raise ConfigError(
                f"num_draft_tokens is {self.num_draft_tokens}; a dynamic tree of topk "
                f"{self.topk} and depth {self.num_steps} has 1 to {pool}"
            )

    @property
    def is_drawn(self) -> bool:
        """Whether children are drawn: then a seed's tokens depend on the draft."""
        return self.children != "topk" and self.num_steps > 0

    @property
    def num_nodes(self) -> int:
        """Nodes verified in one target pass, the root included."""
        if self.kind == "dynamic":
            return 1 + self.num_draft_tokens
        if self.parents:
            return len(self.parents)

        if self.kind == "static":
            widths = 1
            width = 1
            for branches in self.branching:
                width *= branches
                widths += width
            return widths

        return 1 + self.num_steps * (2 if self.kind == "parallel" else 1)

    @property
    def is_chain(self) -> bool:
        """Whether node i's only child is node i + 1."""
        return self.kind == "chain"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the target's tokens are chosen; temperature 0 is greedy.

    The logits are adjusted in vLLM's order, bias, repetition, frequency, presence; then
    temperature, min-p, top-k and top-p make the law. The adjustments hold for greedy
    answers, too. See `decoding.adjusting`.

    Attributes:
      top_k: Tokens kept, 0 for all.
      top_p: Probability mass kept, 1.0 for all.
      seed: Of the random numbers; each answer draws its own (`decoding.request`).
      min_p: Tokens less probable than this share of the most probable one are dropped.
      presence_penalty: Taken off the logits of tokens that the answer has.
      frequency_penalty: Likewise, once for each time that it has them.
      repetition_penalty: Divides positive logits of tokens that prompt or answer have,
        and multiplies negative ones.
      logit_bias: Pairs of a token id and what is added to its logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "logit_bias", _as_pairs(self.logit_bias))
        check_types(self)
        self._check_temperature()
        self._check_adjustments()
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it lies in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; use 0 (all) or more")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; use 0 to {2**32 - 1}")

    def _check_temperature(self):
        if not 0 <= self.temperature < float("inf"):  # NaN is refused, too
            raise ConfigError(f"temperature is {self.temperature}; use 0 or more")

        # In float32 others are 0, by which logits would be divided, or infinite.
        if self.temperature and not 1e-30 <= self.temperature <= 1e30:
            raise ConfigError(
                f"temperature is {self.temperature}; use 0 for the most probable "
                f"token, or a number from 1e-30 to 1e30"
            )

    def _check_adjustments(self):
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; it lies in [0, 1]")

        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                raise ConfigError(f"{name} is {value}; it lies in [-2, 2]")

        # Far outside its logits would be 0 or infinite in float32.
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}; use 1 for none, or "
                f"a number from 0.001 to 1000"
            )

        seen = set()
        for token, bias in self.logit_bias:
            if token < 0:
                raise ConfigError(
                    f"logit_bias has the token id {token}; ids are 0 or more"
                )
            if token in seen:
                raise ConfigError(
                    f"logit_bias has the token id {token} more than once; give each "
                    f"token one bias"
                )
            if not -100 <= bias <= 100:
                raise ConfigError(
                    f"logit_bias of the token {token} is {bias}; it lies in [-100, 100]"
                )
            seen.add(token)

    @property
    def is_adjusted(self) -> bool:
        """Whether logits are changed by anything else than a temperature."""
        has_penalty = self.presence_penalty or self.frequency_penalty
        has_bias = any(bias for _, bias in self.logit_bias)
        return bool(has_penalty or has_bias or self.repetition_penalty != 1)

    @property
    def kind(self) -> StepKind:
        """The least that a pass must be able to do for it."""
        is_greedy = self.temperature == 0
        # The most probable token is kept by every min-p.
        if self.is_adjusted or (self.min_p and not is_greedy):
            return "full"

        return "greedy" if is_greedy else "sampled"


def _as_pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of an id and a bias: lists, as JSON has them, become hashable.

    Raises:
      ConfigError: They are no such pairs.
    """
    pairs: Any = tuple(bias) if isinstance(bias, list | tuple) else (None,)
    pairs = tuple(tuple(x) if isinstance(x, list) else x for x in pairs)
    if not is_of_type(pairs, tuple[tuple[int, float], ...], needs_finite=False):
        raise ConfigError(
            f"logit_bias is {bias!r:.80}; use pairs of a token id and a number, like "
            f"((5, -100), (7, 2.5))"
        )

    return tuple((int(token), float(value)) for token, value in pairs)
