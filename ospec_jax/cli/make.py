# SPDX-License-Identifier: Apache-2.0
"""`ospec write-prompts`, `distill`, `import`, `export`, `lower`: what is made."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ospec_jax import atomic, sharding
from ospec_jax.cli.arguments import PrecisionName, as_precision
from ospec_jax.cli.notation import parse_tree
from ospec_jax.cli.outputs import check_outputs, hold
from ospec_jax.config import (
    AttentionKind,
    ConfigError,
    DraftConfig,
    ModelConfig,
    Precision,
    SamplingConfig,
    whole_number,
)
from ospec_jax.data.prompts import Prompt, read_prompts
from ospec_jax.drafters.eagle import eagle3_taps
from ospec_jax.drafters.registry import (
    TRAINED,
    default_draft_config,
    find_family,
    public_draft_config,
)
from ospec_jax.loading import (
    LoadedDraft,
    draft_folder,
    load_draft,
    restore,
    with_sliding_window,
)
from ospec_jax.models.architectures import ARCHITECTURES
from ospec_jax.models.hub import Target, load_config, load_target
from ospec_jax.reports.progress import Interrupt, busy, console, say
from ospec_jax.reports.tables import print_table
from ospec_jax.storage import checkpoint, low_rank
from ospec_jax.types import Draft

_DRAFT_VOCAB_SIZE = 8192

if TYPE_CHECKING:
    from ospec_jax.decoding import lowering
    from ospec_jax.distill.train import DistillConfig

    TrainedFamily = str
else:
    TrainedFamily = tyro.extras.literal_type_from_choices(TRAINED)


def write_prompts(
    out: Path,
    num: int,
    target: str = "smollm2-135m",
    precision: PrecisionName = "auto",
    kinds: str = "",
    max_document_tokens: int = 1500,
    script: str = "LATIN",
    batch_size: int = 32,
    seed: int = 0,
) -> None:
    """Has a target write prompts itself: its users' turns, documents with tasks.

    It continues its own chat template where a user's turn begins (Magpie). Turns that
    it does not end, that repeat themselves or are like earlier ones are dropped. Ctrl-C
    keeps what is written; the same command goes on, also with a larger number.

    Args:
      out: A JSONL file, for --prompts of the other commands; what it was written by
        stands beside it, in `FILE.config.json`, and what waits for earlier prompts in
        `FILE.ahead.jsonl`.
      num: Prompts that the file shall hold.
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id; it must have
        a chat template.
      precision: Of weights and products; auto measures which is fastest on this device.
      kinds: NAME=WEIGHT, comma-separated, of self-chat, self-turns, self-summary,
        self-translation, self-extraction, self-question, self-rewrite,
        self-continuation, self-system, self-shots; these are the prompts' domains. By
        default all, chat most often.
      max_document_tokens: Longest text that a task is set on, in tokens.
      script: Of the prompts' letters: LATIN, CYRILLIC, CJK, or another first word of
        their Unicode names; empty for any.
      batch_size: Rows decoded together; of long ones fewer.
      seed: Of all that is chosen: another one gives other prompts.
    """
    from ospec_jax.data.filters import FilterConfig
    from ospec_jax.distill.self_config import DEFAULT_KINDS, SelfPromptConfig

    check_outputs(files=[out])
    config = SelfPromptConfig(
        seed=seed,
        kinds=_parse_kinds(kinds) if kinds else DEFAULT_KINDS,
        max_document_tokens=max_document_tokens,
        min_document_tokens=min(200, max_document_tokens),
        filters=FilterConfig(script=script),
    )
    whole_number("--num", num, least=1)
    whole_number("--batch-size", batch_size, least=1)
    hold(files=[out])
    loaded = load_target(target, as_precision(precision))
    _write_self_prompts(loaded, out, num, config, batch_size)


def _parse_kinds(text: str) -> tuple[tuple[str, float], ...]:
    """Reads `NAME=WEIGHT,NAME=WEIGHT`."""
    pairs = {}

    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            pairs[name] = float(weight)
        except ValueError as error:
            raise ConfigError(
                f"cannot read the kinds {text!r}: use NAME=WEIGHT,NAME=WEIGHT, as "
                f"self-chat=3,self-summary=1"
            ) from error

    return tuple(pairs.items())


def _write_self_prompts(
    target: Target, file: Path, num: int, config, batch_size: int
) -> list[Prompt]:
    """Writes prompts, and tells what was kept and dropped; gives so many of them."""
    from ospec_jax.distill.self_prompts import describe_report, write_self_prompts

    report = write_self_prompts(target, file, num, config, batch_size)
    say(f"{file} holds {len(report.prompts)} prompts")
    if report.num_tokens:
        console.print(describe_report(report))

    return report.prompts[:num]


def distill(
    out: Path,
    prompts: Path | None = None,
    self_prompts: int = 0,
    target: str = "smollm2-135m",
    precision: PrecisionName = "auto",
    start: Annotated[str, tyro.conf.arg(name="from")] = "none",
    family: TrainedFamily = "eagle3",
    exit_layer: int = 0,
    data: Path | None = None,
    domain: str = "",
    draft_vocab_size: int | None = None,
    sliding_window: int | None = None,
    num_steps: int = 3,
    num_updates: int = 1200,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    loss: str = "forward_kl",
    feature_weight: float | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    capacity: int = 0,
    collect_batch_size: int = 32,
    collect_only: bool = False,
    ship: Path | None = None,
    delta: int = 0,
    seed: int = 0,
    recipe: Path | None = None,
) -> None:
    """Trains a draft on the target's own outputs; both stages resume.

    Args:
      out: Folder of the recorded answers and of the draft's checkpoints.
      prompts: A JSONL file.
      self_prompts: So many prompts the target writes itself first, as by `ospec
        write-prompts`, into `OUT/self_prompts.jsonl`; beside those of --prompts, or
        alone.
      target: smollm2-135m, a GGUF file, a Hugging Face folder or a hub id.
      precision: Of weights and products; auto measures which is fastest on this device.
      start: A trained draft to start from: none, shipped, shipped:NAME, or a folder;
        it brings its own family, but an EAGLE-3 draft is also a start for one of
        --family peagle.
      family: What to train; one recording serves all of them but exit, which reads the
        states of another layer.
      exit_layer: Layers before an early exit; by default a few.
      data: Where outputs and features are recorded; by default `OUT/data`.
      domain: Comma-separated: learn from rows of these domains alone.
      draft_vocab_size: Tokens that can be drafted, the most frequent ones; 0 for all,
        with the target's frozen head. By default 8192, or those of the draft it starts
        from; that one gets more of them with a larger number.
      sliding_window: Tokens that the draft's own attention sees, when it serves as in
        training; 0 for all. By default that of the draft it starts from, else 0.
      num_steps: Drafted tokens that training looks ahead; Hydra gets as many heads,
        and dflash and peagle draft so many in one pass, at most.
      num_updates: Updates in all, those of an earlier run that it goes on with counted.
      batch_size: Windows of one update.
      learning_rate: Of Adam, at its highest.
      loss: On tokens: forward_kl, reverse_kl, jsd, total_variation or
        acceptance_length.
      feature_weight: Of the loss on predicted states (eagle1); by default the
        published one.
      max_new_tokens: Longest recorded answer, in tokens.
      temperature: Of the recorded outputs.
      capacity: Tokens of a prompt and its output; longer prompts are left out. 0 takes
        all.
      collect_batch_size: Requests decoded together while recording, at most: of long
        ones fewer.
      collect_only: Stop after recording.
      ship: Also save the draft alone, in int8, into this folder.
      delta: Of the shipped draft, keep only its difference to the one that it started
        from, of this rank; 0 keeps all. Loading it takes that one.
      seed: Of the draft's first parameters, of the order of training, of sampling, and
        of the prompts that the target writes.
      recipe: A Python file with `get_config() -> dict` of other defaults for these
        flags; those that are given win.
    """
    from ospec_jax.distill.train import DistillConfig
    from ospec_jax.distill.vocabulary import widen
    from ospec_jax.replay.record import record
    from ospec_jax.replay.store import FeedbackStore

    # Its defaults are in place before arguments are read: see `recipes`.
    _ = recipe
    _check_places(out, data, ship, num_updates)
    _check_asked(prompts, self_prompts)
    whole_number("--collect-batch-size", collect_batch_size, least=1)
    _check_delta(delta, start, draft_vocab_size, ship)
    rows = read_prompts(prompts) if prompts is not None else []
    domains = tuple(d for d in domain.split(",") if d)
    if not self_prompts:
        rows = _of_domains(rows, domains)

    loaded = load_target(target, as_precision(precision))
    draft_config = default_draft_config(
        loaded.config,
        _DRAFT_VOCAB_SIZE if draft_vocab_size is None else draft_vocab_size,
        family,
        num_steps,
        exit_layer,
    )
    initial = _starting(start, loaded, family, num_steps, draft_vocab_size, delta)
    if sliding_window is not None:
        draft_config = dataclasses.replace(draft_config, sliding_window=sliding_window)
        initial = initial and with_sliding_window(initial, sliding_window)

    kind = find_family(family) if initial is None else initial.family
    if initial is not None and initial.meta.draft is not None:
        draft_config = initial.meta.draft

    taps = draft_config.taps if kind.reads_taps else eagle3_taps(loaded.config)
    folder = data or out / "data"
    with Interrupt() as interrupt:
        if self_prompts:
            rows += _self_written(loaded, out, self_prompts, collect_batch_size, seed)
            rows = _of_domains(rows, domains)
            interrupt.raise_if_set()

        count = record(
            loaded,
            rows,
            folder,
            taps,
            max_new_tokens=max_new_tokens,
            sampling=SamplingConfig(temperature=temperature, seed=seed),
            batch_size=collect_batch_size,
            capacity=capacity,
            shard_size=100,
        )
        say(f"recorded {count} answers in {folder}")
        if collect_only:
            return

        # A signal behind the last answer, too, is not for training to go on.
        interrupt.raise_if_set()
        if initial is not None and draft_vocab_size is not None:
            store = FeedbackStore(folder)
            initial = widen(initial, loaded, store, draft_vocab_size)

        config = DistillConfig(
            num_updates=num_updates,
            batch_size=batch_size,
            learning_rate=learning_rate,
            num_steps=num_steps,
            loss=loss,
            feature_weight=feature_weight,
            seed=seed,
            domains=domains,
        )
        newest = _train(loaded, folder, out, config, draft_config, initial, family)
        interrupt.raise_if_set()
        if ship is not None:
            base = initial.draft if delta and initial is not None else None
            _ship(ship, checkpoint.load(newest, loaded), base, start, delta)
            _say_score(loaded, folder, ship, config)


def _check_places(
    out: Path, data: Path | None, ship: Path | None, num_updates: int
) -> None:
    """Takes the folders for this run; a longer trained draft is not written over."""
    check_outputs(folders=[out, data, ship])
    hold(out, data or out / "data", ship)
    if ship is not None and max(checkpoint.steps(ship), default=0) > num_updates:
        raise ConfigError(f"{ship} holds a longer trained draft; choose another folder")


def _check_asked(prompts: Path | None, self_prompts: int) -> None:
    """Refuses to train on nothing."""
    if prompts is None and not self_prompts:
        raise ConfigError(
            "there is nothing to answer: give --prompts FILE.jsonl, or --self-prompts "
            "NUMBER for the target to write prompts itself"
        )

    whole_number("--self-prompts", self_prompts, least=0)


def _self_written(
    loaded: Target, out: Path, num: int, batch_size: int, seed: int
) -> list[Prompt]:
    """So many prompts that the target writes itself, kept in a file of the run's."""
    from ospec_jax.distill.self_config import SelfPromptConfig

    config = SelfPromptConfig(seed=seed)
    file = out / "self_prompts.jsonl"
    return _write_self_prompts(loaded, file, num, config, batch_size)


def _starting(
    start: str,
    loaded: Target,
    family: str,
    num_steps: int,
    draft_vocab_size: int | None,
    delta: int,
) -> LoadedDraft | None:
    """The draft that training starts from, as one of the family, if any."""
    from ospec_jax.distill.adopting import adopted
    from ospec_jax.distill.vocabulary import check_wider

    given = _trained(start, loaded)
    if given is None:
        return None

    initial = adopted(given, family, loaded, num_steps)
    if delta and initial.family != given.family:
        raise ConfigError(
            f"--delta keeps the difference to a draft of the same family, but "
            f"--family {family} makes another one of {start!r}; leave out --delta"
        )
    if draft_vocab_size is not None:
        check_wider(initial, draft_vocab_size)

    return initial


def _train(
    loaded: Target,
    folder: Path,
    out: Path,
    config: "DistillConfig",
    draft_config: DraftConfig,
    initial: LoadedDraft | None,
    family: str,
) -> Path:
    """Trains on what a folder holds, and tells how it went; returns where it lies."""
    from ospec_jax.distill.evaluate import history_table
    from ospec_jax.distill.train import train

    trained = out / "draft"
    history = train(loaded, folder, trained, config, draft_config, initial, family)
    say(f"saved {trained}, and its course as {trained / 'training.png'}")
    if history:
        console.print(history_table(history[-8:]))

    return trained


def _say_score(
    loaded: Target, folder: Path, ship: Path, config: "DistillConfig"
) -> None:
    """Tells what the draft is worth that was saved alone, as it is stored."""
    from ospec_jax.distill.train import score

    found = score(loaded, folder, load_draft(ship, loaded), config)
    say(f"saved {ship}; as it is stored there: {found}")


def _check_delta(
    delta: int, start: str, draft_vocab_size: int | None, ship: Path | None
) -> None:
    """Refuses a difference to nothing, of other tokens, or one that nobody keeps."""
    if not delta:
        return
    if start == "none":
        raise ConfigError(
            "--delta keeps the difference to a draft: name it with --from"
        )
    if draft_vocab_size is not None:
        raise ConfigError(
            "--delta keeps the difference to a draft of the same tokens; leave out "
            "--draft-vocab-size"
        )
    if ship is None:
        raise ConfigError("--delta is for the draft that --ship saves: name its folder")


def _ship(
    folder: Path,
    newest: checkpoint.Checkpoint,
    base: Draft | None,
    start: str,
    delta: int,
) -> None:
    """Saves a trained draft alone, in int8.

    Args:
      base: What its difference is taken to, by the name `start`; None keeps all.
    """
    draft = newest.draft
    meta = dataclasses.replace(newest.meta, storage="int8")
    if base is not None:
        draft, meta = _difference(draft, meta, base, start, delta)

    checkpoint.save(folder, newest.step, meta, draft)


def _of_domains(rows: list[Prompt], domains: tuple[str, ...]) -> list[Prompt]:
    """The prompts of these domains; of all of them if none is named."""
    found = [row for row in rows if not domains or row.domain in domains]
    if not found:
        raise ConfigError(
            f"no prompt is of the domains {', '.join(map(repr, domains))}; there are "
            f"{', '.join(sorted({repr(row.domain) for row in rows}))}"
        )

    return found


def _trained(name: str, target) -> LoadedDraft | None:
    """The draft that training starts from, if any."""
    if name == "none":
        return None

    found = load_draft(name, target)
    if found.meta.draft is None:
        raise ConfigError(f"the draft {name!r} has no parameters to train")

    return found


def _difference(draft, meta, base, name: str, rank: int):
    """What is stored of a draft that was trained from another one."""
    params = low_rank.subtract(draft.params, base.params, rank)
    known = low_rank.fingerprint(base)
    meta = dataclasses.replace(meta, base=name, base_hash=known, rank=rank)
    return Draft(params), meta


def import_draft(
    src: tyro.conf.Positional[Path],
    out: Path,
    target: str | None = None,
    precision: PrecisionName = "auto",
    taps: tuple[int, ...] = (),
    check: bool = True,
) -> None:
    """Turns a public EAGLE-3 head, Hydra heads or a DFlash draft into a checkpoint.

    Args:
      src: Folder with config.json and *.safetensors; or, where torch is installed,
        *.bin (EAGLE-3) or hydra_lm_head.pt. Or the hub id of one, owner/name or
        owner/name@revision.
      out: Folder of the checkpoint.
      target: What the head was trained for; Hydra heads and DFlash drafts cannot be
        read without it.
        Without it only an EAGLE-3 head's own files are checked.
      precision: Of the target's weights and products while the head is checked.
      taps: Target layers whose input an EAGLE-3 head or a DFlash draft reads, if its
        files say it wrongly.
      check: Decode a few prompts, and refuse a head that is never right.
    """
    from ospec_jax.formats.importing import load_folder
    from ospec_jax.formats.tensors import check_is_free
    from ospec_jax.session.self_check import self_check

    check_outputs(folders=[out])
    check_is_free(out)

    src = draft_folder(src)
    loaded = load_target(target, as_precision(precision)) if target else None
    draft, meta = load_folder(src, loaded, taps or None)
    if loaded is not None and check:
        with busy("decoding a few prompts"):
            length = self_check(loaded, LoadedDraft(draft, meta))
        say(f"self-check: mean acceptance length {length:.2f}")
    else:
        say("not checked against a target")

    say(f"saved {checkpoint.save(out, 0, meta, draft)}")


def export_draft(
    draft: tyro.conf.Positional[str],
    out: Path,
    format: Literal["eagle3", "speculators"] = "eagle3",
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    target: str | None = None,
    max_position: int = 2048,
) -> None:
    """Writes a draft as a public EAGLE-3 head that other servers load.

    Args:
      draft: shipped, shipped:NAME, or a checkpoint folder.
      out: Folder of config.json and model.safetensors.
      format: eagle3 (SGLang, vLLM, the reference code) or speculators (vLLM).
      dtype: Of the weights; auto is what they were imported in, else float32.
      target: Its name or path for the reader of the head; by default the recorded one.
      max_position: Of the target; servers size their caches by it.
    """
    from ospec_jax.formats import exporting, speculators

    check_outputs(folders=[out])
    found = restore(draft)
    meta = found.meta
    card = found.meta.card
    if meta.family != "eagle3" or meta.draft is None:
        raise ConfigError(
            f"{draft} is a draft of the family {meta.family!r}; only EAGLE-3 heads "
            f"can be exported"
        )

    chosen = card.get("dtype", "float32") if dtype == "auto" else dtype
    verifier = target or card.get("verifier") or meta.target
    if format == "speculators":
        verifier = speculators.loadable_name(verifier)

    exporting.write(
        out, found.draft, meta.draft, format, chosen, verifier, max_position
    )
    say(f"saved {out} ({chosen})")


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
    stop_ids: tuple[int, ...] = (),
    scan: bool = True,
    attention: AttentionKind = "xla",
    mesh: str = "",
    compile: bool = False,
    topology: str = "v5e:2x2",
    depths: tuple[int, ...] = (3, 7),
    layers: tuple[int, ...] = (),
    lengths: tuple[float, ...] = (2, 3, 4),
) -> None:
    """Lowers the decoding functions for accelerators that need not be here.

    Args:
      out: Folder of the artefacts, which `jax.export.deserialize` reads; with --compile
        of `compiled.json`.
      target: Only its architecture is read; smollm2-135m, qwen2.5-0.5b, llama-3.1-8b
        and qwen3-8b are known without any file.
      draft: none, shipped, shipped:NAME, or a checkpoint folder; likewise. With
        --compile a family, too, like eagle3, hydra or dflash: as large as public ones,
        of 32,000 draft tokens where they have a head of their own.
      platforms: Comma-separated: cpu, cuda, rocm, tpu.
      precision: Of weights and products.
      num_speculative_tokens: Depth of the draft, K.
      tree: As for `ospec generate`.
      batch_size: Requests decoded together.
      capacity: Slots of each row's cache.
      stop_ids: Tokens that end an answer.
      scan: Lower one layer, run over stacked weights, instead of each.
      attention: cudnn for cuda alone, on a machine that has the library; pallas for
        tpu alone, with --no-scan or --compile.
      mesh: Devices to split over, like data=2,model=4; empty for a single one.
      compile: Compile with the TPU's own compiler instead, layer by layer, and say what
        the programs take: memory, bytes moved, and bounds of their time.
      topology: With --compile: the TPUs, like v5e:2x2, v6e:2x2 or v5p:2x2x1.
      depths: With --compile: of the drafts, each K.
      layers: With --compile: two numbers of layers, to be compiled in place of all of
        the target's; figures are drawn out from these.
      lengths: With --compile: mean acceptance lengths to predict speed-ups for.
    """
    from ospec_jax.decoding import lowering

    check_outputs(folders=[out])
    if compile:
        _compile(
            out,
            target,
            draft,
            topology,
            mesh,
            lowering.LoweringConfig(
                parse_tree(tree, num_speculative_tokens),
                precision,
                batch_size,
                capacity,
                stop_ids,
                is_scanned=False,
                attention=attention,
            ),
            depths,
            layers,
            lengths,
        )
        return

    config = lowering.LoweringConfig(
        parse_tree(tree, num_speculative_tokens),
        precision,
        batch_size,
        capacity,
        stop_ids,
        is_scanned=scan,
        attention=attention,
        mesh=sharding.abstract_mesh(mesh) if mesh else None,
    )
    head = None
    family = ""
    if draft != "none":
        meta = checkpoint.load(draft_folder(draft)).meta
        head = meta.draft
        family = meta.family

    with busy(f"lowering for {platforms}"):
        lowered = lowering.lower(
            _architecture(target), head, config, platforms.split(","), family
        )

    for path in lowering.write(lowered, out):
        say(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def _architecture(target: str) -> ModelConfig:
    """A target's shape; of known ones no file is read."""
    return ARCHITECTURES.get(target) or load_config(target)


def _compile(
    out: Path,
    target: str,
    draft: str,
    topology: str,
    mesh: str,
    config: "lowering.LoweringConfig",
    depths: tuple[int, ...],
    layers: tuple[int, ...],
    lengths: tuple[float, ...],
) -> None:
    from ospec_jax.decoding import compiling
    from ospec_jax.reports import compiled

    model = _architecture(target)
    if layers and (len(layers) != 2 or not 0 < layers[0] < layers[1]):
        raise ConfigError(
            f"layers are {layers}; use two numbers, like 2 4, the smaller one first"
        )
    if any(depth < 1 for depth in depths):
        raise ConfigError(f"depths are {depths}; each is 1 or more")

    devices, chip = compiling.described_mesh(topology, mesh)
    config = dataclasses.replace(config, mesh=devices)
    family = draft
    head = None
    if draft in TRAINED:
        head = public_draft_config(model, draft, max(depths))
    elif draft != "none":
        meta = checkpoint.load(draft_folder(draft)).meta
        head = meta.draft
        family = meta.family

    with busy(f"compiling {target} for {topology}"):
        if layers:
            pair = (layers[0], layers[1])
            programs = compiling.compile_by_layers(
                model, head, config, pair, depths, family
            )
        else:
            programs = compiling.compile_programs(model, head, config, depths, family)

    is_int8 = config.precision == "int8"
    facts = {
        "target": target,
        "draft": draft,
        "topology": topology,
        "mesh": mesh,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "capacity": config.capacity,
        "layers": list(layers) or [model.num_layers],
        "versions": compiling.versions(),
        "chip": dataclasses.asdict(chip),
        "programs": {
            name: program.as_data(chip, is_int8) for name, program in programs.items()
        },
        "speed_ups": compiling.predict_speed_ups(programs, chip, lengths, is_int8),
    }
    file = out / "compiled.json"
    atomic.write_text(file, json.dumps(facts, indent=1) + "\n")
    print_table(compiled.table_of(facts))
    say(f"saved {file}")
