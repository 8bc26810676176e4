"""The configuration: one tree of dataclasses whose fields carry their help text.

It comes from a TOML or YAML file, the environment (``LORA_AUDIT_RUN__LIMIT=5``, ``LORA_AUDIT_SETTINGS__STEPS=20``) and
the command line, the later the stronger, all through ``load_config``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from audit.errors import ConfigError


class Method(StrEnum):
    """How sampling is steered."""

    direct = "direct"
    cfg = "cfg"
    model_guidance = "model-guidance"


class BaseCaption(StrEnum):
    """What the base's prediction is conditioned on in model guidance."""

    empty = "empty"
    same = "same"


class Solver(StrEnum):
    """Which of diffusers' schedulers integrates the sampling ODE."""

    ddim = "ddim"
    dpmpp = "dpm++"


class Clustering(StrEnum):
    """How generations become extractions."""

    peaks = "peaks"
    cliques = "cliques"


class StoredImages(StrEnum):
    """Which images a workspace keeps."""

    extractions = "extractions"
    all = "all"
    hashes_only = "hashes-only"


class Precision(StrEnum):
    """What the networks compute in."""

    auto = "auto"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Compile(StrEnum):
    """What torch.compile is used for."""

    off = "off"
    blocks = "blocks"
    graphs = "graphs"


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Every setting that changes the result of an audit; all of them go into its id."""

    method: Method = _setting(Method.model_guidance, "How sampling is steered: direct, cfg or model-guidance.")
    w: float | None = _setting(
        None,
        "Guidance weight: a number, or auto: by how far fine-tuning has moved the predictions (3 for cfg). The paper: "
        "5 for LoRA, 3 for DreamBooth on Stable Diffusion.",
    )
    k: float = _setting(0.0, "Correction term of model guidance (the paper: -0.02 for DreamBooth, 0 for LoRA).")
    base_caption: BaseCaption = _setting(
        BaseCaption.empty, "What the base's prediction is conditioned on: the empty caption, or the same one."
    )
    solver: Solver = _setting(Solver.dpmpp, "ODE solver: dpm++, or ddim as in the paper (which wants 50 steps).")
    steps: int = _setting(15, "Solver steps an image.")
    seed: int = _setting(0, "Seed of all starting noise.")
    images_per_training_image: int = _setting(50, "Images sampled = this times N0.")
    lora_scale: float = _setting(1.0, "Strength at which a LoRA is applied.")
    clustering: Clustering = _setting(
        Clustering.peaks, "peaks (default, never times out) or cliques (the paper's, up to 30 s a threshold)."
    )
    stored_images: StoredImages = _setting(
        StoredImages.extractions,
        "Images kept: extractions, all, or hashes-only (no pixels leave memory: only descriptors and hashes are kept).",
    )
    adapter: str | None = _setting(None, "Which adapter of a file that holds several by name.")
    resolution: int | None = _setting(None, "Side of the sampled images in pixels; by default the base model's own.")
    embedded_guidance: float = _setting(
        3.5, "Guidance weight that guidance-distilled models (FLUX.1 dev) take as an input; others have none."
    )
    precision: Precision = _setting(
        Precision.auto,
        "What the networks compute in: fp16, bf16 or fp32. auto: fp32 on a CPU; on a GPU fp16 (bf16 for Stable "
        "Diffusion 3, Flux and Chroma), and again in a wider one where numbers overflow.",
    )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for hashing and storing; ``precision`` where it was asked for.

        By default it follows from the device, which is no part of an audit's id.
        """
        found = asdict(self)
        if self.precision is Precision.auto:
            del found["precision"]
        return found


class EngineName(StrEnum):
    """What runs the stages."""

    local = "local"
    ray = "ray"


class Priority(StrEnum):
    """Which checkpoints come first."""

    uploads = "uploads"
    none = "none"


@dataclass(frozen=True)
class RunSettings:
    """How a run goes about the catalog. None of this changes a result."""

    engine: EngineName = _setting(EngineName.local, "local (this process, one audit at a time) or ray.")
    address: str | None = _setting(None, "A Ray cluster: auto, or ray://host:10001. Without, one is started here.")
    where: str = _setting("TRUE", "An SQL condition over the checkpoints table: which items are audited.")
    limit: int | None = _setting(None, "Audits at most.")
    shard: str = _setting("0/1", "This run's part of the work, I/N with I from 0: several runs can share it.")
    max_gpu_hours: float | None = _setting(
        None, "Stop taking on audits after this many GPU hours (worker hours on CPUs)."
    )
    priority: Priority = _setting(Priority.uploads, "uploads: a platform's own uploads before the rest; or none.")
    min_workers: int = _setting(1, "Workers kept while there is work.")
    max_workers: int | None = _setting(None, "Workers at most. Default: as many as the cluster has room for.")
    gpus_per_worker: float | None = _setting(None, "GPUs a worker, fractions allowed. Default: 1 where there are any.")
    cpus_per_worker: float = _setting(1.0, "CPUs a worker takes; on machines without GPUs it is what pins it.")
    batch_size: int = _setting(0, "Images a batch; halved when memory runs out. 0: by the device's memory.")
    compile: Compile = _setting(
        Compile.off,
        "torch.compile: off, blocks (the repeated blocks of the denoiser: a minute once a worker and family) or graphs "
        "(the whole denoiser, with CUDA graphs).",
    )
    attempts: int = _setting(3, "Failed attempts after which a checkpoint is quarantined.")
    extract_deadline: float = _setting(4 * 3600.0, "Seconds after which a worker that extracts counts as hung.")
    finish_deadline: float = _setting(1800.0, "Seconds after which clustering and matching count as hung.")
    drain_seconds: float = _setting(60.0, "Seconds that running audits have to finish after SIGTERM; the rest resumes.")
    metrics_port: int | None = _setting(None, "Serve Prometheus metrics on this port.")
    metrics_address: str = _setting(
        "127.0.0.1", "The address they are served on; 0.0.0.0 is every one of this machine."
    )
    compact_every: int = _setting(200, "Finished audits after which small files are merged.")


@dataclass(frozen=True)
class Config:
    """Everything that a run needs."""

    workspace: str = _setting("lora-audit-workspace", "Where all results are: a folder, or s3://bucket/prefix.")
    descriptor: str = _setting("sscd", "sscd, nano, pdq, or the path of a TorchScript or ONNX file.")
    references: tuple[str, ...] = _setting((), "Reference sets of the workspace to match with.")
    bases: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "The base model of each family, or of a base model's claimed name: sd1 = sd15."},
    )
    base_configs: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "For single-file bases: the folder or owner/name@COMMIT of its configuration."},
    )
    settings: Settings = field(default_factory=Settings, metadata={"help": "What changes the result of an audit."})
    run: RunSettings = field(default_factory=RunSettings, metadata={"help": "How a run goes about its work."})


PREFIX = "LORA_AUDIT_"


def load_config(
    file: Path | None = None, environment: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The configuration from ``file`` (.toml, .yaml, .yml), ``environment`` and ``overrides`` ("run.limit": 5).

    Raises ConfigError naming the file, variable or option that is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    tree: dict[str, Any] = _read(file) if file else {}
    _check_names(tree, Config, str(file))
    known = {dotted.upper().replace(".", "__"): dotted for dotted, _ in leaves(Config())}
    for variable, value in (os.environ if environment is None else environment).items():
        name = variable.removeprefix(PREFIX)
        if name != variable and name in known:
            _put(tree, known[name], value)
    for dotted, value in (overrides or {}).items():
        if value is not None:
            if dotted.split(".")[0] not in ("bases", "base_configs") and dotted not in known.values():
                raise ConfigError(f"there is no setting {dotted!r}: see 'lora-audit config show'")
            _put(tree, dotted, value)
    if isinstance(tree.get("references"), str):
        tree["references"] = [name.strip() for name in tree["references"].split(",") if name.strip()]
    settings = tree.get("settings")
    if isinstance(settings, dict) and settings.get("w") == "auto":
        settings["w"] = None
    try:
        return TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where} = {str(first['input'])[:100]!r}: {first['msg']}") from error


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        found = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {file} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration {file} is not valid: {str(error)[:300]}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"the configuration {file} is empty, or not a table of settings")
    return found


def _check_names(tree: Mapping[str, Any], kind: type, where: str) -> None:
    known = {one.name: one for one in fields(kind)}
    for name, value in tree.items():
        if name not in known:
            raise ConfigError(f"{where}: there is no setting {name!r} (there are: {', '.join(known)})")
        default = known[name].default_factory
        if isinstance(default, type) and is_dataclass(default) and isinstance(value, dict):
            _check_names(value, default, f"{where}, {name}")


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str]]]:
    """("run.limit", (value, help)) of every setting of a configuration."""
    for one in fields(node):
        value = getattr(node, one.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", (value, str(one.metadata["help"]))


def help_of(name: str) -> str:
    """The help text of one setting."""
    return str(Settings.__dataclass_fields__[name].metadata["help"])


def default_of(name: str) -> Any:
    """The default of one setting."""
    return Settings.__dataclass_fields__[name].default
