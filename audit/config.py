"""The configuration of every command: one tree of dataclasses whose fields carry their help text and limits.

It comes from a TOML or YAML file, the environment (``LORA_AUDIT_RUN__LIMIT=5``, ``LORA_AUDIT_SETTINGS__STEPS=20``) and
the command line, the later the stronger, all through ``load_config``. The options of the commands are made from the
fields (``audit.cli.options``): a new setting is a new field here.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from audit.choices import BaseCaption as BaseCaption
from audit.choices import CaptionChoice as CaptionChoice
from audit.choices import Clustering as Clustering
from audit.choices import Compile as Compile
from audit.choices import EngineName as EngineName
from audit.choices import Evidence as Evidence
from audit.choices import Expert as Expert
from audit.choices import Latents as Latents
from audit.choices import Method as Method
from audit.choices import Precision as Precision
from audit.choices import Priority as Priority
from audit.choices import Prompts as Prompts
from audit.choices import Recovery as Recovery
from audit.choices import Rule as Rule
from audit.choices import Solver as Solver
from audit.choices import StoredImages as StoredImages
from audit.errors import ConfigError


def _setting(default: Any, text: str, **more: Any) -> Any:
    """A field: its help, and perhaps ``min`` and ``max``, ``metavar``, ``option`` and ``variable`` if not its own.

    ``word`` is what None is called where text is given.
    """
    if "default_factory" in more:
        return field(default_factory=more.pop("default_factory"), metadata={"help": text, **more})
    return field(default=default, metadata={"help": text, **more})


class _Checked:
    """A dataclass whose numbers keep within the limits of their fields. Raises ConfigError."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            value, least, most = getattr(self, one.name), one.metadata.get("min"), one.metadata.get("max")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
                raise ConfigError(f"{one.name} = {value!r}: it is a number {_range(least, most)}")


def _range(least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return "that is finite"
    return f"of at least {least}" if most is None else f"from {least if least is not None else '-infinity'} to {most}"


@dataclass(frozen=True)
class Settings(_Checked):
    """Every setting that changes the result of an audit; all of them go into its id."""

    method: Method = _setting(Method.model_guidance, "How sampling is steered: direct, cfg or model-guidance.")
    w: float | None = _setting(
        None,
        "Guidance weight: a number, or auto: by how far fine-tuning has moved the predictions (3 for cfg). The paper: "
        "5 for LoRA, 3 for DreamBooth on Stable Diffusion.",
        min=0, max=1000, word="auto", metavar="NUMBER|auto",
    )  # fmt: skip
    k: float = _setting(0.0, "Correction term of model guidance (the paper: -0.02 for DreamBooth, 0 for LoRA).")
    base_caption: BaseCaption = _setting(
        BaseCaption.empty, "What the base's prediction is conditioned on: the empty caption, or the same one."
    )
    solver: Solver = _setting(Solver.dpmpp, "ODE solver: dpm++, or ddim as in the paper (which wants 50 steps).")
    steps: int = _setting(15, "Solver steps an image.", min=1, max=1000)
    seed: int = _setting(0, "Seed of all starting noise.", min=0)
    images_per_training_image: int = _setting(50, "Images sampled = this times N0.", min=1)
    lora_scale: float = _setting(1.0, "Strength at which a LoRA is applied.")
    clustering: Clustering = _setting(
        Clustering.peaks, "peaks (default, never times out) or cliques (the paper's, up to 30 s a threshold)."
    )
    stored_images: StoredImages = _setting(
        StoredImages.extractions,
        "Images kept: extractions, all, or hashes-only (no pixels leave memory: only descriptors and hashes are kept).",
    )
    adapter: str | None = _setting(None, "Which adapter of a file that holds several by name.", metavar="NAME")
    expert: Expert | None = _setting(
        None,
        "Of a base with two experts (Wan 2.2 T2V-A14B), which one the file is for: high-noise, low-noise or both; by "
        "default as its name or metadata says.",
    )
    resolution: int | None = _setting(
        None, "Side of the sampled images in pixels; by default the base model's own.", min=16
    )
    frames: int = _setting(
        1,
        "Frames of each sampled video, of which the middle one is looked at: 1, 5, 9, ... Only for bases that draw "
        "videos (Wan).",
        min=1, max=161,
    )  # fmt: skip
    embedded_guidance: float = _setting(
        3.5, "Guidance weight that guidance-distilled models (FLUX.1 dev) take as an input; others have none."
    )
    precision: Precision = _setting(
        Precision.auto,
        "What the networks compute in: fp16, bf16 or fp32. auto: fp32 on a CPU; on a GPU fp16 (bf16 for Stable "
        "Diffusion 3, Flux and Chroma), and again in a wider one where numbers overflow.",
    )

    evidence: Evidence = _setting(
        Evidence.both,
        "extraction (sample, and compare what comes out), membership (how much better than its base the model denoises "
        "each reference; nothing is sampled), or both.",
    )
    membership_evaluations: int = _setting(
        2500, "Evaluations that membership may take (pictures of it: a tenth more); the likeliest get most.", min=6
    )
    control_share: float = _setting(
        0.1,
        "Control generations: pictures of the base alone for the same captions and seeds, beside so many times the "
        "images sampled; what it draws as well is no match. 0: none.",
        min=0, max=1,
    )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for hashing and storing, without those that change nothing as they are.

        By default the precision follows from the device, which is no part of an audit's id, and whether membership is
        measured, or the base sampled, too, changes nothing of what is extracted.
        """
        said = {
            "precision": self.precision is not Precision.auto,
            "expert": self.expert is not None,
            "frames": self.frames != 1,
            "evidence": self.evidence is Evidence.membership,
            "membership_evaluations": self.membership_evaluations != Settings.membership_evaluations,
            "control_share": self.control_share != Settings.control_share,
        }
        return {name: value for name, value in asdict(self).items() if said.get(name, True)}


@dataclass(frozen=True)
class VerdictSettings(_Checked):
    """What counts as a match. It is asked of a finished audit: under another rule or rate nothing is sampled again."""

    rule: Rule = _setting(
        Rule.calibrated,
        "calibrated: a match is what decoys hardly ever reach by both kinds of evidence, at the rate --fdr; without "
        "decoys there is no verdict. either: by one kind of evidence, among decoys that are a random split of one "
        "collection with the references (--drawn). fixed: what reaches the descriptor's threshold, whose error rate is "
        "not known.",
    )
    fdr: float = _setting(0.05, "Of what is called a match, the share that may be wrong on average.", min=1e-6, max=0.5)


@dataclass(frozen=True)
class CaptionSettings(_Checked):
    """Where captions come from that nobody has given. They go into an audit's id themselves."""

    choice: CaptionChoice = _setting(
        CaptionChoice.known,
        "known: the catalog's or the metadata's. auto: where there are none, or where the model does not heed them, "
        "they are recovered from the model.",
        option="captions",
    )  # fmt: skip
    method: Recovery = _setting(
        Recovery.attention,
        "attention (what fine-tuning has changed for each word, then phrases by prediction) or gradient (the paper's).",
        option="caption-method",
    )  # fmt: skip
    evaluations: int = _setting(
        5000, "Network evaluations for ranking words by attention; choosing captions of the first takes 486 more.",
        option="caption-evaluations", min=0, max=10_000_000,
    )  # fmt: skip
    iterations: int = _setting(
        1000, "Iterations of recovery by gradient.", option="caption-iterations", min=1, max=100_000
    )


@dataclass(frozen=True)
class RunSettings(_Checked):
    """How audits are gone about. None of this changes a result."""

    engine: EngineName = _setting(EngineName.local, "local (this process, one audit at a time) or ray.")
    address: str | None = _setting(None, "A Ray cluster: auto, or ray://host:10001. Without, one is started here.")
    device: str | None = _setting(None, "cpu, cuda or cuda:N. Default: cuda where there is one.")
    where: str = _setting("TRUE", "An SQL condition over checkpoints: which items are audited.", metavar="SQL")
    limit: int | None = _setting(None, "Audits at most.", min=1)
    shard: str = _setting("0/1", "This run's part of the work, I/N from 0: several runs can share it.", metavar="I/N")
    max_gpu_hours: float | None = _setting(
        None, "Stop taking on audits after this many GPU hours (worker hours on CPUs).", min=0
    )
    priority: Priority = _setting(Priority.uploads, "uploads: a platform's own uploads before the rest; or none.")
    min_workers: int = _setting(1, "Workers kept while there is work.", min=0)
    max_workers: int | None = _setting(None, "Workers at most. Default: as many as the cluster has room for.", min=1)
    gpus_per_worker: float | None = _setting(
        None, "GPUs a worker, fractions allowed. Default: 1 where there are any.", min=0
    )
    cpus_per_worker: float = _setting(1.0, "CPUs a worker takes; on machines without GPUs it is what pins it.", min=0)
    batch_size: int = _setting(0, "Images a batch; halved when memory runs out. 0: by the device's memory.", min=0)
    compile: Compile = _setting(
        Compile.off,
        "torch.compile: off, blocks (the repeated blocks of the denoiser: a minute once a worker and family) or graphs "
        "(the whole denoiser, with CUDA graphs).",
    )
    latents: Latents = _setting(
        Latents.auto,
        "Latents of a folder's pictures (--references FOLDER), which membership is measured on: auto (kept unless "
        "images are hashes-only), always, never. They show the pictures to whoever has the base model.",
    )
    attempts: int = _setting(3, "Failed attempts after which a checkpoint is quarantined.", min=1)
    sample_deadline: float = _setting(4 * 3600.0, "Seconds after which a worker that samples counts as hung.", min=0)
    finish_deadline: float = _setting(1800.0, "Seconds after which clustering and matching count as hung.", min=0)
    drain_seconds: float = _setting(
        60.0, "Seconds that running audits have to finish after SIGTERM; the rest resumes.", min=0
    )
    metrics_port: int | None = _setting(None, "Serve Prometheus metrics on this port.", min=0, max=65535)
    metrics_address: str = _setting(
        "127.0.0.1", "The address they are served on; 0.0.0.0 is every one of this machine."
    )
    compact_every: int = _setting(200, "Finished audits after which small files are merged.", min=1)


@dataclass(frozen=True)
class CrawlSettings(_Checked):
    """How sources are asked, and what is taken from them."""

    civitai_endpoint: str = _setting("https://civitai.com/api/v1", "Civitai's API, for a mirror.", metavar="URL")
    hub_endpoint: str = _setting(
        "https://huggingface.co", "The Hugging Face Hub, for a mirror.", metavar="URL", variable="HF_ENDPOINT"
    )
    rate: float = _setting(2.0, "Requests a second to a host; 0 for no limit of ours.", min=0)
    retries: int = _setting(6, "Tries after 429, 5xx and lost connections.", min=0, max=20)
    downloads: int = _setting(4, "Files downloaded at once.", min=1, max=32)
    max_file: str = _setting("8G", "Largest file that is downloaded, such as 500M or 8G.", metavar="SIZE")
    prompts: Prompts = _setting(
        Prompts.missing, "Example images' prompts as captions: missing (only without trained words), always, never."
    )
    training_data: bool = _setting(False, "Also take training sets that uploaders have published, to score audits.")
    token_file: Path | None = _setting(None, "A file (mode 0600) with the token, instead of the environment.")
    opt_out: Path | None = _setting(
        None, "A list of models and users to leave alone. Default: the workspace's opt-out.txt.",
        variable="LORA_AUDIT_OPT_OUT",
    )  # fmt: skip
    allow_private: bool = _setting(False, "Talk to hosts with private addresses, too.")
    metrics_port: int | None = _setting(None, "Serve Prometheus metrics on this port.", min=0, max=65535)
    metrics_address: str = _setting(
        "127.0.0.1", "The address they are served on; 0.0.0.0 is every one of this machine."
    )


@dataclass(frozen=True)
class Config:
    """Everything that commands need."""

    workspace: str = _setting("lora-audit-workspace", "Where all results are: a folder, or s3://bucket/prefix.")
    descriptor: str = _setting("sscd", "sscd, nano, pdq, or the path of a TorchScript or ONNX file.")
    references: tuple[str, ...] = _setting((), "A reference set of the workspace to match with. Repeat for several.")
    bases: dict[str, str] = _setting(
        None,
        "The base model of a family, or of a base model's claimed name, key or hash: sd1=sd15, pony-v6=FOLDER, "
        "sd1=owner/name@COMMIT.",
        default_factory=dict, option="base", metavar="FAMILY=SOURCE",
    )  # fmt: skip
    base_configs: dict[str, str] = _setting(
        None,
        "For single-file bases: the folder or owner/name@COMMIT of its configuration, and of its other parts where the "
        "file is the denoiser alone.",
        default_factory=dict, option="base-config", metavar="FAMILY=SOURCE",
    )  # fmt: skip
    operator: str | None = _setting(
        None, "Who makes the report, for its manifest: as you want to be named there, or not at all.", metavar="NAME"
    )
    signing_key: Path | None = _setting(
        None, "A PEM file (mode 0600) with the private key that signs manifests: Ed25519 or ECDSA.", metavar="FILE"
    )
    settings: Settings = _setting(None, "What changes the result of an audit.", default_factory=Settings)
    verdict: VerdictSettings = _setting(None, "What counts as a match.", default_factory=VerdictSettings)
    captions: CaptionSettings = _setting(
        None, "Where captions come from that nobody has given.", default_factory=CaptionSettings
    )
    run: RunSettings = _setting(None, "How audits are gone about.", default_factory=RunSettings)
    crawl: CrawlSettings = _setting(None, "How sources are asked.", default_factory=CrawlSettings)


PREFIX = "LORA_AUDIT_"
FREE = ("bases", "base_configs")  # tables whose names are the user's


def load_config(
    file: Path | None = None, environment: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The configuration from ``file`` (.toml, .yaml, .yml), ``environment`` and ``overrides`` ("run.limit": 5).

    Raises ConfigError naming the file, variable or option that is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    tree: dict[str, Any] = _read(file) if file else {}
    _check_names(tree, Config, str(file))
    for dotted, value in _of_environment(os.environ if environment is None else environment).items():
        _put(tree, dotted, value)
    known = {dotted for dotted, _ in leaves(Config())}
    for dotted, value in (overrides or {}).items():
        if value is not None:
            if dotted.split(".")[0] not in FREE and dotted not in known:
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


def variable_of(dotted: str) -> str:
    """The environment variable of a setting."""
    own = field_of(dotted).metadata.get("variable")
    return str(own) if own else PREFIX + dotted.upper().replace(".", "__")


def field_of(dotted: str) -> Field[Any]:
    """The field of a setting such as "run.limit"."""
    *groups, name = dotted.split(".")
    kind: Any = Config
    for group in groups:
        kind = kind.__dataclass_fields__[group].default_factory
    found: Field[Any] = kind.__dataclass_fields__[name]
    return found


def _of_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings by their dotted names. Raises ConfigError for a variable of a group that has no such setting."""
    by_variable = {variable_of(dotted): dotted for dotted, _ in leaves(Config())}
    groups = tuple(f"{PREFIX}{one.name.upper()}__" for one in fields(Config))
    for variable in environment:
        if variable.startswith(groups) and variable not in by_variable:
            raise ConfigError(f"{variable} names no setting: see 'lora-audit config show'")
    return {by_variable[name]: value for name, value in environment.items() if name in by_variable}


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
