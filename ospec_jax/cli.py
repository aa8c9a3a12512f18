# SPDX-License-Identifier: Apache-2.0
"""The `ospec` command: thin wrappers that read arguments and print results."""

import contextlib
import dataclasses
import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ospec_jax import checkpoint, sharding
from ospec_jax.config import (
    AttentionKind,
    ChildrenKind,
    ConfigError,
    LearnerConfig,
    Precision,
    SamplingConfig,
    TreeConfig,
    Verification,
    parse_tree,
)
from ospec_jax.data.prompts import (
    add_predictions,
    demo_prompts,
    parse_prompt,
    read_prediction,
    read_prompts,
)
from ospec_jax.decoding.engine import PromptTooLongError
from ospec_jax.drafters.mixed import MIXES
from ospec_jax.drafters.registry import FAMILIES
from ospec_jax.models.hub import load_config, load_target
from ospec_jax.models.weights import WeightsError
from ospec_jax.progress import Interrupt, progress_bar
from ospec_jax.session import SHIPPED, LoadedDraft, Session, load_draft

_USER_ERRORS = (
    ConfigError, PromptTooLongError, WeightsError, checkpoint.CheckpointError,
    FileNotFoundError, FloatingPointError,
)  # fmt: skip
console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Arguments that `generate`, `learn` and `bench` share.

    Attributes:
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id.
      draft: none, shipped, ngram, suffix, prediction, model:TARGET (a smaller model),
        self:int4, self:exit-N, a checkpoint folder or that of a public EAGLE-3 head, or
        two drafts: fallback:ngram,DRAFT
        (n-grams where they are likely), mixed:ngram,DRAFT (both in one tree).
      precision: Of weights and products; auto measures what is fastest here.
      batch_size: Requests decoded together.
      num_speculative_tokens: Depth of the draft, K; 0 decodes plainly.
      tree: chain, static:3,2,1 (children by depth), dynamic:TOPK,NUM_TOKENS, or the
        best tree of so many tokens: opt:NUM_TOKENS,MIN_GAIN (grown while it pays),
        sequoia:NUM_TOKENS,P1,P2,... (static, from the chances of first, second, ...
        children).
      min_path_probability: Draft no deeper once the draft gives its best path less.
      draft_sample_method: How children are drawn when sampling.
      verification: token by token, or by whole paths: block (chains), traversal (static
        trees).
      stop: Strings that end an answer.
      raw: Skip the chat template.
      ngrams: Let n-grams of the request, and of learned traffic, suggest tokens.
      mesh: Devices to split over, like data=2,model=4; empty for a single one.
      num_predicted_tokens: Tokens verified at once while a prediction holds.
    """

    target: str = "smollm2-135m"
    draft: str = "shipped"
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    batch_size: int = 1
    num_speculative_tokens: int = 3
    tree: str = "chain"
    min_path_probability: float = 0.0
    draft_sample_method: ChildrenKind = "topk"
    verification: Verification = "token"
    stop: tuple[str, ...] = ()
    raw: bool = False
    ngrams: bool = True
    num_predicted_tokens: int = 12
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    mesh: str = ""

    @property
    def sampling(self) -> SamplingConfig:
        """How the target's tokens are chosen."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def tree_config(self) -> TreeConfig:
        """How much is drafted."""
        if self.draft == "none":
            return TreeConfig(num_steps=0)
        return parse_tree(
            self.tree, self.num_speculative_tokens, self.draft_sample_method,
            self.min_path_probability, self.verification,
        )  # fmt: skip

    def load(self):
        """The target and its draft; bad arguments are refused before the loading."""
        _ = self.tree_config, self.sampling
        mesh = sharding.make_mesh(self.mesh) if self.mesh else None
        sharding.check_batch(mesh, self.batch_size)
        target = load_target(self.target, _precision(self.precision), mesh)
        draft = None if self.draft == "none" else load_draft(self.draft, target)
        return target, draft

    def open(
        self, target, draft: LoadedDraft | None, learner=None, has_log_probs=False
    ) -> Session:
        """A session with these settings."""
        return Session(
            target, draft, learner=learner, tree=self.tree_config,
            batch_size=self.batch_size, stop=self.stop, has_log_probs=has_log_probs,
            ngrams=self.ngrams, num_predicted_tokens=self.num_predicted_tokens,
        )  # fmt: skip


Shared = Annotated[Decoding, tyro.conf.arg(name="")]


def _precision(name: str) -> Precision | None:
    return None if name == "auto" else name  # type: ignore[return-value]


def generate(
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None,
    prompts: Path | None = None,
    decoding: Shared = Decoding(),
    prediction: Path | None = None,
    stream: bool = False,
    logprobs: bool = False,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Answers a prompt, or every prompt of a file.

    Args:
      prompt: The prompt's text.
      prompts: A JSONL file of prompts instead.
      prediction: A file that the answer to --prompt is expected to resemble, such as
        the one that it edits; rows of --prompts have a key `prediction`.
      stream: Print text as it comes.
      logprobs: Report each token's log-probability.
      json_file: Write one object (a list for several prompts); - for standard output.
    """
    if prompts is not None and prompt is None:
        rows = read_prompts(prompts)
    elif prompt is not None and prompts is None:
        rows = [parse_prompt({"prompt": prompt}, "prompt-0")]
    else:
        raise ConfigError("give either --prompt or --prompts")
    if prediction is not None:
        if prompts is not None:
            raise ConfigError(
                "--prediction goes with --prompt; give the rows of --prompts a key "
                "`prediction`"
            )
        rows = add_predictions(rows, [read_prediction(prediction)])
    if decoding.draft == "none" and any(row.prediction for row in rows):
        decoding = dataclasses.replace(decoding, draft="prediction")
    target, draft = decoding.load()
    session = decoding.open(target, draft, has_log_probs=logprobs)
    write = lambda _, text: print(text, end="", flush=True)
    results = []
    for result in session.generate(
        rows, decoding.max_new_tokens, decoding.sampling, is_raw=decoding.raw,
        on_text=write if stream else None,
    ):  # fmt: skip
        results.append(result)
        if stream:
            print()
        elif json_file is None:
            print(result.text)
        length = result.stats.mean_acceptance_length
        console.print(
            f"[dim]{len(result.token_ids)} tokens, "
            f"{len(result.token_ids) / result.seconds:.1f} tokens/s (compilation "
            f"included), mean acceptance length {length:.2f}[/dim]"
        )
    _write_json(json_file, [r.to_json() for r in results], is_list=prompts is not None)


def learn(
    prompts: Path,
    decoding: Shared = Decoding(),
    learner: str = "gradient",
    learning_rate: float | None = None,
    optimizer: str | None = None,
    learn_budget: float | None = None,
    update_interval: int | None = None,
    promotion: Literal["always", "guarded"] | None = None,
    checkpoint_dir: Annotated[Path | None, tyro.conf.arg(name="checkpoint")] = None,
    resume: bool = False,
    save_every: int = 50,
    save_feedback: bool = True,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Answers a stream of prompts, learns from it, and saves the draft.

    Args:
      prompts: A JSONL file.
      learner: gradient, memory, or a Python file with `get_config() -> LearnerConfig`.
      optimizer: Any optax optimizer.
      learn_budget: Share of wall-clock time for learning.
      update_interval: Tokens between updates; 0 derives it from the budget.
      promotion: Serve every iterate, or only those that proved better.
      checkpoint_dir: Where to save; Ctrl-C saves too.
      resume: Go on exactly where the checkpoint stopped.
      save_every: Prompts between two checkpoints.
      save_feedback: Also save recent traffic, which a bitwise resume needs.
      json_file: Write the answers and metrics.
    """
    rows = read_prompts(prompts)
    if resume and checkpoint_dir is None:
        raise ConfigError("--resume needs --checkpoint")
    if decoding.draft == "none":
        raise ConfigError("learning needs a draft: --draft shipped or a folder")
    config = learner_config(
        learner, optimizer=optimizer, learning_rate=learning_rate,
        budget=learn_budget, update_interval=update_interval, promotion=promotion,
    )  # fmt: skip
    target, draft = decoding.load()
    session = decoding.open(target, draft, config)
    if resume and checkpoint_dir is not None:
        answered = set(session.resume(checkpoint_dir))
        rows = [row for row in rows if row.id not in answered]
        console.print(
            f"{len(answered)} prompts were answered before, {len(rows)} are left; "
            f"draft version {session.version}"
        )
    session.warm_up(sampling=decoding.sampling)
    results = []
    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("learn", total=len(rows))
        answers = session.generate(
            rows, decoding.max_new_tokens, decoding.sampling, is_raw=decoding.raw
        )
        for result in answers:
            results.append(result)
            bar.update(task, advance=1, description=_live(result, results))
            if checkpoint_dir is not None and len(results) % save_every == 0:
                session.save(checkpoint_dir, save_feedback)
            if interrupt:
                break
    if checkpoint_dir is not None:
        path = session.save(checkpoint_dir, save_feedback)
        console.print(f"saved {path}")
    _write_json(json_file, [r.to_json() for r in results], is_list=True)


def learner_config(name_or_file: str, **flags) -> LearnerConfig:
    """A learner by name or from a configuration file; flags that are given win.

    Raises:
      ConfigError: There is no such learner or file, or the file gives something else.
    """
    if name_or_file in ("gradient", "memory"):
        config = LearnerConfig(name=name_or_file)  # type: ignore[arg-type]
    elif not Path(name_or_file).is_file():
        raise ConfigError(
            f"unknown learner {name_or_file!r}: use gradient, memory, or a Python file "
            f"with get_config()"
        )
    else:
        get_config = runpy.run_path(name_or_file).get("get_config")
        config = get_config() if get_config else None
        if not isinstance(config, LearnerConfig):
            raise ConfigError(f"{name_or_file} has no get_config() -> LearnerConfig")
    given = {name: value for name, value in flags.items() if value is not None}
    return dataclasses.replace(config, **given)


def _live(result, results) -> str:
    """Progress of a stream: speed and acceptance over the last ten prompts."""
    recent = results[-10:]
    tokens = sum(len(r.token_ids) for r in recent)
    seconds = sum(r.seconds + r.learning_seconds for r in recent)
    drafts = sum(r.stats.num_drafts for r in recent)
    accepted = sum(r.stats.num_accepted_tokens for r in recent)
    return (
        f"{tokens / max(seconds, 1e-9):.1f} tokens/s, acceptance length "
        f"{1 + accepted / max(drafts, 1):.2f}, draft v{result.version}"
    )


def distill(
    prompts: Path,
    out: Path,
    target: str = "smollm2-135m",
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto",
    draft: str = "none",
    family: Literal["eagle3", "eagle1", "hydra"] = "eagle3",
    data: Path | None = None,
    draft_vocab_size: int = 8192,
    num_steps: int = 3,
    num_updates: int = 1200,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    loss: str = "forward_kl",
    feature_weight: float | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    collect_batch_size: int = 32,
    collect_only: bool = False,
    ship: Path | None = None,
    seed: int = 0,
) -> None:
    """Trains a draft on the target's own outputs; both stages resume.

    Args:
      prompts: A JSONL file.
      out: Folder of the recorded answers and of the draft's checkpoints.
      draft: A trained draft to start from: none, shipped, or a folder; it brings its
        own family.
      family: What to train; one recording serves all of them.
      data: Where outputs and features are recorded; by default `OUT/data`.
      draft_vocab_size: Tokens that can be drafted, the most frequent ones; 0 for all,
        with the target's frozen head.
      num_steps: Drafted tokens that training looks ahead; Hydra gets as many heads.
      loss: On tokens: forward_kl or total_variation.
      feature_weight: Of the loss on predicted states (eagle1); by default the
        published one.
      temperature: Of the recorded outputs.
      collect_only: Stop after recording.
      ship: Also save the draft alone, in int8, into this folder.
    """
    from ospec_jax.distill.collect import collect
    from ospec_jax.distill.families import default_draft_config, eagle3_taps
    from ospec_jax.distill.train import DistillConfig, train

    rows = read_prompts(prompts)
    loaded = load_target(target, _precision(precision))
    draft_config = default_draft_config(
        loaded.config, draft_vocab_size, family, num_steps
    )
    taps, initial = eagle3_taps(loaded.config), None
    if draft != "none":
        start = load_draft(draft, loaded)
        if start.meta.draft is None:
            raise ConfigError(f"the draft {draft!r} has no parameters to train")
        draft_config, initial = start.meta.draft, (start.draft, start.meta)
        if start.meta.family == "eagle3":
            taps = draft_config.taps
    folder = data or out / "data"
    sampling = SamplingConfig(temperature=temperature, seed=seed)
    count = collect(
        loaded, rows, folder, taps, max_new_tokens=max_new_tokens,
        sampling=sampling, batch_size=collect_batch_size,
    )  # fmt: skip
    console.print(f"recorded {count} answers in {folder}")
    if collect_only:
        return
    config = DistillConfig(
        num_updates=num_updates, batch_size=batch_size, learning_rate=learning_rate,
        num_steps=num_steps, loss=loss, feature_weight=feature_weight, seed=seed,
    )  # fmt: skip
    trained = out / "draft"
    history = train(loaded, folder, trained, config, draft_config, initial, family)
    console.print(f"saved {trained}, and its course as {trained / 'training.png'}")
    if history:
        console.print(history[-1])
    if ship is not None:
        newest = checkpoint.load(trained, loaded)
        meta = dataclasses.replace(newest.meta, storage="int8")
        checkpoint.save(ship, newest.step, meta, newest.draft)
        console.print(f"saved {ship}")


def import_draft(
    src: tyro.conf.Positional[Path],
    out: Path,
    target: str | None = None,
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto",
    taps: tuple[int, ...] = (),
    check: bool = True,
) -> None:
    """Turns a public EAGLE-3 head into a checkpoint.

    Args:
      src: Folder with config.json and *.safetensors, or *.bin where torch is installed.
      out: Folder of the checkpoint.
      target: What the head was trained for. Without it only the head's own files are
        checked.
      taps: Target layers whose input the head reads, if its files say it wrongly.
      check: Decode a few prompts, and refuse a head that is never right.
    """
    from ospec_jax.formats.check import self_check
    from ospec_jax.formats.importing import load_folder

    loaded = load_target(target, _precision(precision)) if target else None
    draft, meta = load_folder(src, loaded, taps or None)
    if loaded is not None and check:
        with console.status("decoding a few prompts"):
            length = self_check(loaded, LoadedDraft(draft, meta))
        console.print(f"self-check: mean acceptance length {length:.2f}")
    else:
        console.print("not checked against a target")
    console.print(f"saved {checkpoint.save(out, 0, meta, draft)}")


def export_draft(
    draft: tyro.conf.Positional[str],
    out: Path,
    format: Literal["eagle3", "speculators"] = "eagle3",
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    target: str | None = None,
) -> None:
    """Writes a draft as a public EAGLE-3 head that other servers load.

    Args:
      draft: shipped, or a checkpoint folder.
      out: Folder of config.json and model.safetensors.
      format: eagle3 (SGLang, vLLM, the reference code) or speculators (vLLM).
      dtype: Of the weights; auto is what they were imported in, else float32.
      target: Its name or path for the reader of the head; by default the recorded one.
    """
    from ospec_jax.formats import exporting

    found = checkpoint.load(SHIPPED if draft == "shipped" else draft)
    meta, card = found.meta, found.meta.card
    if meta.family != "eagle3" or meta.draft is None:
        raise ConfigError(
            f"{draft} is a draft of the family {meta.family!r}; only EAGLE-3 heads "
            f"have a public format here"
        )
    chosen = card.get("dtype", "float32") if dtype == "auto" else dtype
    verifier = target or card.get("verifier") or meta.target
    exporting.write(out, found.draft, meta.draft, format, chosen, verifier)
    console.print(f"saved {out} ({chosen})")


def bench(
    prompts: Path | None = None,
    decoding: Shared = Decoding(),
    num_prompts: int = 50,
    modes: str = "autoregressive,static,ngrams,learned",
    learner: str = "gradient",
    learn_budget: float | None = None,
    learning_rate: float | None = None,
    peers: str = "",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    markdown: Path | None = None,
    plot: Path | None = None,
    stream_plot: Path | None = None,
) -> None:
    """Measures decoding modes, interleaved on the same prompts.

    Args:
      prompts: A JSONL file; without one, mathematics that comes with the package.
      num_prompts: Prompts taken from its beginning.
      modes: Comma-separated: autoregressive, static (the draft as it is), ngrams (and
        n-grams of the request), learned (and of earlier ones; the draft is trained).
      learner: gradient, memory, or a Python file with `get_config() -> LearnerConfig`.
      learn_budget: Share of the learned mode's time for learning.
      peers: Comma-separated other decoders of the same weights: transformers,
        transformers-bfloat16, transformers-lookup, transformers-assisted, llama-cpp,
        llama-cpp-lookup.
      json_file: Write one row a mode.
      markdown: Write the table.
      plot: Draw the modes' speed into this PNG.
      stream_plot: Draw acceptance over the stream into this PNG.
    """
    from ospec_jax.bench.harness import BenchConfig
    from ospec_jax.bench.peers import open_peer
    from ospec_jax.bench.report import markdown_table, plot_modes, plot_stream

    rows = read_prompts(prompts) if prompts else demo_prompts("math")
    rows = rows[:num_prompts]
    config = BenchConfig(
        modes=tuple(m for m in modes.split(",") if m), tree=decoding.tree_config,
        max_new_tokens=decoding.max_new_tokens,
        learner=learner_config(
            learner, learning_rate=learning_rate, budget=learn_budget
        ),
        sampling=decoding.sampling, is_raw=decoding.raw, ngrams=decoding.ngrams,
        batch_size=decoding.batch_size,
    )  # fmt: skip
    names = [name for name in peers.split(",") if name]
    assistant = decoding.draft.removeprefix("model:") if ":" in decoding.draft else None
    others = [open_peer(name, decoding.target, assistant) for name in names]
    target, draft = decoding.load()
    run, table = run_with_progress(target, draft, rows, config, others)
    _write_json(json_file, table, is_list=True)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(markdown_table(table) + "\n")
    if plot is not None:
        console.print(f"plot: {plot_modes(table, plot)}")
    if stream_plot is not None:
        console.print(f"plot: {plot_stream(run, stream_plot)}")


def roofline(
    target: str = "smollm2-135m",
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto",
    capacity: int = 256,
) -> None:
    """Times target passes by rows, against this machine's memory and arithmetic.

    Args:
      capacity: Slots of the cache.
    """
    from ospec_jax.bench import passes
    from ospec_jax.bench.report import roofline_table

    loaded = load_target(target, _precision(precision))
    machine = passes.measure_machine(loaded)
    costs = passes.roofline(loaded, machine, capacity=capacity)
    print(roofline_table(costs, machine))


def run_with_progress(target, draft, prompts, config, peers=()):
    """Runs a benchmark behind a live bar and prints its table."""
    from ospec_jax.bench.harness import ModeRun, run_bench
    from ospec_jax.bench.report import markdown_table, terminal_table
    from ospec_jax.bench.rows import to_rows

    with Interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task("compiling", total=len(prompts))

        def show(number, name, turns):
            text = f"{turns.tokens_per_second_with_learning:.1f} tokens/s"
            if isinstance(turns, ModeRun):
                text = _live(turns.results[-1], turns.results)
            bar.update(task, completed=number, description=f"{name}: {text}")

        should_stop = lambda: bool(interrupt)
        run = run_bench(target, draft, prompts, config, show, should_stop, peers)
    table = to_rows(run)
    if console.is_terminal:
        title = f"{target.name}, {target.numerics.precision}"
        console.print(terminal_table(table, title))
    else:
        console.print(markdown_table(table), soft_wrap=True, markup=False)
    return run, table


def lower(
    out: Path,
    target: str = "smollm2-135m",
    draft: str = "shipped",
    platforms: str = "tpu,cuda",
    precision: Precision = "bfloat16",
    num_speculative_tokens: int = 3,
    tree: str = "chain",
    batch_size: int = 1,
    capacity: int = 1024,
    scan: bool = True,
    attention: AttentionKind = "xla",
    mesh: str = "",
) -> None:
    """Lowers the decoding functions for accelerators that need not be here.

    Args:
      out: Folder of the artefacts, which `jax.export.deserialize` reads.
      target: Only its architecture is read.
      draft: none, shipped, or a checkpoint folder; likewise.
      platforms: Comma-separated: cpu, cuda, rocm, tpu.
      capacity: Slots of each row's cache.
      scan: Lower one layer, run over stacked weights, instead of each.
      attention: cudnn for cuda alone, on a machine that has the library.
      mesh: Devices to split over, like data=2,model=4; empty for a single one.
    """
    from ospec_jax import lowering

    config = lowering.LoweringConfig(
        parse_tree(tree, num_speculative_tokens), precision, batch_size, capacity,
        is_scanned=scan, attention=attention,
        mesh=sharding.abstract_mesh(mesh) if mesh else None,
    )  # fmt: skip
    head, family = None, ""
    if draft != "none":
        meta = checkpoint.load(SHIPPED if draft == "shipped" else draft).meta
        head, family = meta.draft, meta.family
    with console.status(f"lowering for {platforms}"):
        lowered = lowering.lower(
            load_config(target), head, config, platforms.split(","), family
        )  # fmt: skip
    for path in lowering.write(lowered, out):
        console.print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def drafters() -> None:
    """Lists the families of drafters."""
    for name, description in (FAMILIES | MIXES).items():
        print(f"{name:10} {description}")


def demo(
    out: Path = Path("demo-output"),
    num_prompts_per_domain: int = 20,
    max_new_tokens: int = 64,
    num_speculative_tokens: int = 3,
    learner: str = "gradient",
    learn_budget: float | None = None,
    learning_rate: float | None = None,
) -> None:
    """The main job: a draft that learns while its stream moves through three domains.

    Args:
      out: Folder of the plot, the table and the learned draft's checkpoint.
      learner: gradient, memory, or a Python file with `get_config() -> LearnerConfig`.
    """
    from ospec_jax.demo import run_demo

    run_demo(
        out, num_prompts_per_domain, max_new_tokens, num_speculative_tokens,
        learner_config(learner, budget=learn_budget, learning_rate=learning_rate),
    )  # fmt: skip


def _write_json(file: Path | None, rows: list, is_list: bool) -> None:
    if file is None:
        return
    text = json.dumps(rows if is_list else rows[0], indent=1, ensure_ascii=False)
    if str(file) == "-":
        print(text)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", "utf-8")


def main() -> None:
    """Entry point of `ospec`."""
    functions = (generate, learn, distill, bench, roofline, lower, drafters, demo)
    commands = {function.__name__: function for function in functions}
    commands |= {"import": import_draft, "export": export_draft}
    warnings.showwarning = lambda message, *_: console.print(f"[yellow]{message}")
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="ospec")
    except _USER_ERRORS as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        with contextlib.suppress(Exception):
            console.print("interrupted")
        sys.exit(130)
