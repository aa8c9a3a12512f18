# SPDX-License-Identifier: Apache-2.0
"""Frozen configurations. Builders take plain arguments; these are for borders.

Every `from_dict` refuses keys that it does not know, and names the nearest known one.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, Literal, get_args

Precision = Literal["float32", "bfloat16", "int8"]
AttentionKind = Literal["xla", "cudnn"]
ChildrenKind = Literal["topk", "sampled", "without_replacement", "topk_sampled", "hub"]
Verification = Literal["token", "block", "traversal"]
Recording = Literal["nothing", "features", "states"]


AUTO_DEPTHS = (0, 1, 2, 3, 5)
"""Depths that a tree of depth `auto` chooses from; each is an executable."""


class ConfigError(ValueError):
    """A configuration that cannot work, with the value found and the remedy."""


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Builds the frozen dataclass `cls`, refusing keys that it does not have."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {known}"
            raise ConfigError(f"{cls.__name__} has no key {key!r}{hint}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a target of the Llama, Qwen2 or Qwen3 family.

    Attributes:
      has_qkv_bias: Queries, keys and values have a bias (Qwen2).
      has_qk_norm: Queries and keys are normalised by head (Qwen3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position: int = 2048
    tie_embeddings: bool = True
    has_qkv_bias: bool = False
    has_qk_norm: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Architecture of an EAGLE draft head; `HydraConfig` adds to it.

    Attributes:
      taps: Target layers whose *input* hidden states the draft reads, joined; the
        number of layers itself stands for the input of the target's head, its final
        normed state. EAGLE-3's default is layers 2, n // 2 and n - 3.
      draft_vocab_size: Tokens that can be drafted; 0 stands for the target's full
        vocabulary with its frozen head.
      rope_scaling: Of the draft's own rotary embedding.
      has_norm_before_residual: The residual stream begins at the normed feature, not
        at the feature itself (EAGLE-3 heads of the `speculators` project).
      has_own_embedding: The draft does not share the target's embedding.
      has_fc_bias: The joining projection has a bias (most EAGLE-1 heads).
    """

    vocab_size: int
    target_hidden_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    taps: tuple[int, ...]
    draft_vocab_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None
    has_norm_before_residual: bool = False
    has_own_embedding: bool = False
    has_fc_bias: bool = False

    @property
    def has_own_head(self) -> bool:
        """Whether the draft predicts its own reduced vocabulary with its own head."""
        return self.draft_vocab_size > 0

    @property
    def num_draft_ids(self) -> int:
        """Width of the draft's logits."""
        return self.draft_vocab_size or self.vocab_size


@dataclasses.dataclass(frozen=True)
class HydraConfig(DraftConfig):
    """Architecture of Hydra heads (arXiv 2402.05109).

    Attributes:
      depth: Heads, one for each token of the longest draft.
      num_blocks: Residual blocks of each head; those after the first share weights, as
        in the published heads.
      has_prefix: A decoder layer runs over the target's final states before the heads
        read them (Hydra++).
      has_separate_heads: Each head has an output projection of its own, with a bias, as
        published; else they share one.
    """

    depth: int = 3
    num_blocks: int = 2
    has_prefix: bool = True
    has_separate_heads: bool = False

    def __post_init__(self):
        for name in ("depth", "num_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.has_separate_heads and not self.has_own_head:
            raise ConfigError("separate heads have a draft vocabulary of their own")


def draft_config_from(family: str, values: dict[str, Any]) -> DraftConfig:
    """Rebuilds a draft's architecture from its stored form."""
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict):
        values = values | {"rope_scaling": from_dict(RopeScaling, scaling)}
    return from_dict(HydraConfig if family == "hydra" else DraftConfig, values)


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
        of which every step takes the one that pays; see `decoding.depth`.
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

    @classmethod
    def auto(cls, depths: tuple[int, ...] = AUTO_DEPTHS, **changes) -> "TreeConfig":
        """A chain as deep as pays, at times none at all."""
        return cls(num_steps=max(depths), depths=depths, **changes)

    def __post_init__(self):
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

    def _check_depths(self):
        if self.kind not in ("chain", "parallel"):
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
        """The chain of one of the `depths`."""
        return dataclasses.replace(self, num_steps=num_steps, depths=())

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
    def num_nodes(self) -> int:
        """Nodes verified in one target pass, the root included."""
        if self.kind == "dynamic":
            return 1 + self.num_draft_tokens
        if self.parents:
            return len(self.parents)
        if self.kind == "static":
            widths, width = 1, 1
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

    Attributes:
      top_k: Tokens kept, 0 for all.
      top_p: Probability mass kept, 1.0 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; use 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it lies in (0, 1]")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; use 0 (all) or more")


LearnerName = Literal[
    "gradient",
    "momentum",
    "optimistic",
    "ensemble",
    "shared_ensemble",
    "osd",
    "head",
    "memory",
    "auto",
]
LEARNER_NAMES: tuple[str, ...] = get_args(LearnerName)

_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    # Step sizes of SGD differ from Adam's by orders of magnitude.
    "momentum": {"optimizer": "sgd", "learning_rate": 0.1},
    "optimistic": {"optimizer": "sgd", "learning_rate": 0.1},
    "osd": {"learning_rate": 1e-4, "update_every_prompts": 1},
    # The paper's rule never forgets; this one is for streams that shift.
    "shared_ensemble": {"meta_rate": 3.0, "meta_discount": 0.8},
}

_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("memory_slots update_interval", lambda x: x >= 0, "0 or more"),
    ("radius expert_pull update_every_prompts", lambda x: x >= 0, "0 (off) or more"),
    ("momentum hint_decay replay_share", lambda x: 0 <= x < 1, "0 to below 1"),
    ("budget", lambda x: 0 < x < 1, "above 0 and below 1"),
    ("token_share meta_discount", lambda x: 0 < x <= 1, "above 0, and at most 1"),
    ("forward_share", lambda x: 0 <= x <= 1, "0 to 1"),
    ("num_experts", lambda x: x >= 2, "2 (the static draft and another) or more"),
    ("step_ratio", lambda x: x > 1, "above 1"),
    ("learning_rate meta_rate temperature", lambda x: x > 0, "above 0"),
    ("decay position_decay", lambda x: x > 0, "above 0"),
    ("buffer_requests num_epochs num_scored", lambda x: x >= 1, "1 or more"),
)


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """How a draft learns from the traffic it serves.

    Attributes:
      name: `gradient` steps along gradients; `momentum` is SGD with heavy-ball momentum
        (OnlineSPEC's released code); `optimistic` plays where the next gradient is
        expected to lead (its paper); `ensemble` averages experts of several step sizes,
        each with its own gradient; `shared_ensemble` with one gradient for all; `osd`
        is Online Speculative Decoding, the baseline; `head` trains the draft's output
        projection alone, after every answer, at next to no cost; `memory` only
        remembers n-grams, as all of them do; `auto` is `head` where the draft has an
        output projection of its own, on a single device, else `gradient`.
      memory_slots: n-grams of each order that are remembered; 0 for none.
      optimizer: Any optax optimizer that takes a learning rate, or finds its own step
        size: mechanize, cocob, dog, prodigy, ... By default adam, or what the learner
        was published with.
      learning_rate: By default 3e-4, or what suits the learner's own optimizer. An
        ensemble's is the middle of its grid.
      momentum: Of the momentum learner.
      hint_decay: Optimistic: the hint is the last gradient (0), or an average of past
        ones that keeps this part of its old value at each update.
      radius: Optimistic, shared ensemble: parameters stay in the ball of this radius
        around the first ones; 0 for no bound.
      num_experts: Of an ensemble, the static draft counted.
      step_ratio: Between neighbours in an ensemble's grid of step sizes.
      static_expert: Whether the static draft may get weight.
      reset_experts: Experts begin each round at their average (released code).
      meta: How experts are weighed: `hedge` on their cumulative normalised losses, or
        `last_chunk`, softmax of their mean loss in the last round (released code).
      meta_rate: Of Hedge; see `learners.meta`. By default 1, or 3 where it forgets.
      meta_discount: Of older losses at each update, in Hedge; 1 never forgets, the
        default but of the shared ensemble, 0.8.
      temperature: Of `last_chunk`, in units of the loss.
      expert_pull: Shared ensemble: part of the way that an expert of the middle step is
        drawn to the played parameters at each update.
      num_scored: Shared ensemble: windows of each batch that experts are judged on.
      buffer_requests: OSD: requests between two steps; each update is one request, so
        that a batch should hold the windows of one.
      loss: forward_kl, reverse_kl, jsd, total_variation or acceptance_length.
      forward_share: Of forward KL in jsd, the rest is reverse KL.
      decay: Weight of each depth relative to the one before.
      position_decay: Weight of each position of a window relative to the one before.
      positions: Learn from all positions, or where the draft would be `rejected`.
      token_share: Share of positions that are learned from, drawn at random.
      update_interval: Answer tokens between two updates; 0 derives it from `budget`.
      update_every_prompts: Instead: prompts between two rounds of learning, each of
        `num_epochs` over all their windows, as far as the ring holds them; 0 for off.
      budget: Share of wall-clock time that learning may take, turned into an interval
        by a measurement at the start and then kept.
      batch_size: Windows in one update.
      window: Pairs trained in a window.
      num_context: Pairs before each window that are attended to.
      num_steps: Unrolled draft steps.
      num_candidates: Draft tokens that an update looks at, the likeliest ones; its loss
        knows no others. 0 for all, at twice the cost.
      num_epochs: Updates done at each interval; or see `update_every_prompts`.
      replay_share: Part of each batch drawn from older windows.
      promotion: `always` serves each iterate; `guarded` only proven ones.
      min_windows: Compared windows before a guarded promotion.
      ring_capacity: Windows remembered.
      head_rate: Step size of `head`; 1 is a whole Newton step for a token.
      head_damping: Of its preconditioner; see `learners.head`.
      head_candidates: Draft tokens whose rows of the projection one step may change.
    """

    name: LearnerName = "gradient"
    memory_slots: int = 65536
    optimizer: str = ""
    learning_rate: float = 0.0
    momentum: float = 0.9
    hint_decay: float = 0.0
    radius: float = 0.0
    num_experts: int = 4
    step_ratio: float = 2.0
    static_expert: bool = True
    reset_experts: bool = False
    meta: Literal["hedge", "last_chunk"] = "hedge"
    meta_rate: float = 0.0
    meta_discount: float = 0.0
    temperature: float = 0.2
    expert_pull: float = 0.2
    num_scored: int = 1
    buffer_requests: int = 8
    loss: str = "forward_kl"
    forward_share: float = 0.9
    decay: float = 0.8
    position_decay: float = 1.0
    positions: Literal["all", "rejected"] = "all"
    token_share: float = 1.0
    update_interval: int = 0
    update_every_prompts: int = 0
    budget: float = 0.02
    batch_size: int = 4
    window: int = 64
    num_context: int = 64
    num_steps: int = 3
    num_candidates: int = 1024
    num_epochs: int = 1
    replay_share: float = 0.0
    promotion: Literal["always", "guarded"] = "always"
    min_windows: int = 8
    ring_capacity: int = 64
    head_rate: float = 1.0
    head_damping: float = 0.1
    head_candidates: int = 256
    seed: int = 0

    def __post_init__(self):
        if self.name not in LEARNER_NAMES:
            raise ConfigError(
                f"unknown learner {self.name!r}; use one of {', '.join(LEARNER_NAMES)}"
            )
        defaults: dict[str, Any] = {"optimizer": "adam", "learning_rate": 3e-4}
        defaults |= {"meta_rate": 1.0, "meta_discount": 1.0}
        for key, value in (defaults | _OWN_DEFAULTS.get(self.name, {})).items():
            if not getattr(self, key):
                object.__setattr__(self, key, value)
        self._check_ranges()
        choices = {"meta": ("hedge", "last_chunk"), "positions": ("all", "rejected")}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"{key} is {getattr(self, key)!r}; use {' or '.join(known)}"
                )
        if self.batch_size > self.ring_capacity:
            raise ConfigError(
                f"batch_size {self.batch_size} exceeds ring_capacity "
                f"{self.ring_capacity}"
            )
        if self.num_scored > self.batch_size:
            raise ConfigError(
                f"num_scored {self.num_scored} exceeds batch_size {self.batch_size}"
            )
        if self.num_context < 64:
            raise ConfigError(
                f"num_context is {self.num_context}; at least 64 pairs of context are "
                f"needed for a window's first pairs to see what they saw when serving"
            )

    @property
    def recording(self) -> Recording:
        """What it needs to know of verified tokens."""
        return {"memory": "nothing", "head": "states"}.get(self.name, "features")  # type: ignore[return-value]

    def _check_ranges(self):
        for keys, is_good, wanted in _LIMITS:
            for key in keys.split():
                if not is_good(getattr(self, key)):
                    raise ConfigError(f"{key} is {getattr(self, key)}; use {wanted}")

    @property
    def is_training(self) -> bool:
        """Whether the draft is trained as a whole, along gradients."""
        return self.recording == "features"
