"""What a checkpoint is, without sampling it: format, family, rank, what was trained and how far it moved."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from audit.choices import Expert
from audit.errors import AuditError, CheckpointError
from audit.models.base import BaseModel
from audit.models.bases import Wanted, claims_of, wanted
from audit.models.checkpoint import Checkpoint, open_checkpoint
from audit.models.experts import PAIR, assigned
from audit.models.formats.adapter import ModuleChange, check_names, lora_norm
from audit.models.formats.algorithms import low_rank_change
from audit.models.formats.headers import is_gguf
from audit.models.formats.names import Algorithm, Group, rank_of, read_names
from audit.models.formats.scaling import Scaling, read_scaling, scaling_of
from audit.models.formats.tensors import Tensors
from audit.models.formats.weights import weights_of
from audit.models.safetensors_header import Header
from audit.models.tuning import families_of, family_warnings, tune

MOST_ELEMENTS = 1 << 26  # of a product that is made to measure it: 256 MiB
_BLOCK = re.compile(
    r"^(?:transformer_[12][._])?(?P<kind>down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks|double_blocks|single_blocks|"
    r"single_transformer_blocks|transformer_blocks|joint_blocks|(?:text_model[._])?encoder[._](?:layers|block)|"
    r"transformer[._]resblocks|noise_refiner|context_refiner|layers|blocks)(?:[._](?P<number>\d+))?"
)
_KIND = re.compile(
    r"(to_[qkv]|to_out[._]0|to_out|[qkv]_proj|out_proj|proj_in|proj_out|ff[._]net[._]\d(?:[._]proj)?|"
    r"fc\d|conv\d|conv|qkv|linear\d|lin|proj_mlp|add_[qkv]_proj|to_add_out|proj)$"
)
_CLAIMED = (
    "modelspec.title", "modelspec.architecture", "modelspec.trigger_phrase", "ss_base_model_version",
    "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "ss_steps",
    "ss_epoch", "ss_learning_rate", "ss_resolution", "ss_num_train_images", "ss_clip_skip",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One block: modules changed, the norm of the change, and, where a base was given, that of its weights."""

    part: str
    name: str
    modules: int
    norm: float
    base_norm: float | None = None


@dataclass
class Inspection:
    """Everything that ``lora-audit inspect`` says. ``unmeasured`` modules need a base for the norm of their change."""

    path: str
    format: str | None = None
    bytes: int = 0
    sha256: str | None = None
    tensors_sha256: str | None = None
    identity: str | None = None
    tensors: int = 0
    parameters: int = 0
    precisions: dict[str, int] = field(default_factory=dict)
    algorithms: dict[str, int] = field(default_factory=dict)
    decomposed: bool = False
    family: str | None = None
    claimed_family: str | None = None
    wants: Wanted | None = None
    ranks: dict[int, int] = field(default_factory=dict)
    alphas: dict[float, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    unmeasured: int = 0
    unused: list[str] = field(default_factory=list)
    unused_share: float | None = None
    base: str | None = None
    claims: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problem: str | None = None


def inspect(
    path: Path, base: BaseModel | None = None, adapter: str | None = None, low_noise: Path | None = None,
    expert: Expert | None = None,
) -> Inspection:  # fmt: skip
    """Look at ``path``, and ``low_noise`` beside it; with ``base`` also whether every tensor has a place in it.

    ``expert`` is the one of the base's two that the file is for. What is wrong with a file becomes its ``problem``.
    """
    found = Inspection(str(path))
    try:
        checkpoint = open_checkpoint(path, low_noise)
        _describe(found, checkpoint, adapter)
        found.warnings = family_warnings(checkpoint, base)
        _check(checkpoint, adapter)
        if base is not None:
            found.base = base.name
            expert, said = assigned(checkpoint, base.architecture.boundary(base.pipeline), expert)
            checkpoint = replace(checkpoint, expert=expert)
            found.warnings += said
            _against(found, checkpoint, base, adapter)
    except AuditError as error:
        found.problem = str(error)
    return found


def _check(checkpoint: Checkpoint, adapter: str | None) -> None:
    """Raise CheckpointError for what no base can mend: numbers that are not finite, tensors of no known format.

    The numbers of GGUF files are read with a base only: unpacking them takes minutes.
    """
    try:
        _ = checkpoint.prediction
        for _, some in _apart(checkpoint):
            with Tensors([(path, header) for path, header in some if not is_gguf(path)]) as opened:
                if checkpoint.format.is_adapter:
                    check_names(read_names(opened.info, adapter), _metadata(checkpoint, some), opened.info)
                else:
                    opened.check_quantisation()
                opened.check_finite(None if checkpoint.format.is_adapter else weights_of(opened))
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _apart(checkpoint: Checkpoint) -> list[tuple[str, list[tuple[Path, Header]]]]:
    """The files whose tensors are under one set of names: all, or each of the two for a base's experts, so named."""
    files = checkpoint.files
    if {*PAIR} <= {*files}:
        return [(f"{expert} ", [files[expert]]) for expert in PAIR]
    return [("", list(files.values()))]


def _metadata(checkpoint: Checkpoint, files: list[tuple[Path, Header]]) -> dict[str, str]:
    """What the headers of files that are ``_apart`` from others say: of two for a base's experts each its own."""
    return checkpoint.metadata if len(files) == len(checkpoint.files) else files[0][1].metadata


def _describe(found: Inspection, checkpoint: Checkpoint, adapter: str | None) -> None:
    infos = [info for _, header in checkpoint.files.values() for info in header.tensors.values()]
    found.format, found.bytes = str(checkpoint.format), checkpoint.bytes
    found.sha256, found.tensors_sha256 = checkpoint.sha256, checkpoint.tensors_sha256
    found.identity = checkpoint.identity
    found.tensors = len(infos)
    found.parameters = sum(math.prod(info.shape) for info in infos)
    found.precisions = dict(Counter(info.dtype for info in infos).most_common())
    found.claims = {name: checkpoint.metadata[name][:300] for name in _CLAIMED if name in checkpoint.metadata}
    found.family, found.claimed_family = families_of(checkpoint)
    found.wants = wanted(claims_of(checkpoint.metadata), found.family, found.claimed_family)
    if not checkpoint.format.is_adapter:
        found.parts = {part: len(header.tensors) for part, (_, header) in checkpoint.files.items()}
        return
    groups: list[Group] = []
    for whose, files in _apart(checkpoint):
        tensors = {name: info for _, header in files for name, info in header.tensors.items()}
        names = read_names(tensors, adapter or next(iter(read_names(tensors).adapters), None))
        groups += names.groups
        found.adapters, found.unused = names.adapters, [*found.unused, *names.unknown]
        found.parts |= {f"{whose}{part}": n for part, n in Counter(group.part for group in names.groups).items()}
        with Tensors(files) as opened:
            for one in names.embeddings:
                shape = tensors[one.tensor].shape
                vectors = shape[0] if len(shape) > 1 else 1
                found.tokens.setdefault(one.token or checkpoint.path.stem, {})[one.part] = vectors
            _measure(found, names.groups, opened, read_scaling(_metadata(checkpoint, files)), whose)
    found.algorithms = {str(name): n for name, n in Counter(group.algorithm for group in groups).most_common()}
    found.decomposed = any({"dora_scale", "magnitude"} & set(group.tensors) for group in groups)
    found.targets = dict(Counter(_kind(group) for group in groups).most_common())


def _measure(
    found: Inspection, groups: list[Group], tensors: Tensors, scalings: dict[str, Scaling], whose: str = ""
) -> None:
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    sums: dict[tuple[str, str], list[float]] = {}
    for group in groups:
        scaling = scaling_of(scalings, group.part, group.module)
        try:
            rank = rank_of(group.algorithm, {role: tensors.info[name].shape for role, name in group.tensors.items()})
            alpha = _alpha(group, tensors, scaling)
        except (IndexError, RuntimeError, KeyError, ValueError):
            found.unmeasured += 1
            continue
        if rank is not None:
            ranks[rank] += 1
            if alpha is not None:
                alphas[alpha] += 1
        norm = _norm_alone(group, tensors, scaling)
        if norm is None or not math.isfinite(norm):
            found.unmeasured += 1
        else:
            sums.setdefault((f"{whose}{group.part}", block_of(group.module)), []).append(norm)
    ranks, alphas = ranks + Counter(found.ranks), alphas + Counter(found.alphas)
    found.ranks, found.alphas = dict(ranks.most_common()), dict(alphas.most_common())
    found.blocks += [
        Block(part, name, len(norms), math.sqrt(sum(norm**2 for norm in norms)))
        for (part, name), norms in sorted(sums.items(), key=lambda item: (item[0][0], _order(item[0][1])))
    ]


def _alpha(group: Group, tensors: Tensors, scaling: Scaling) -> float | None:
    if "alpha" in group.tensors:
        return round(float(tensors.get(group.tensors["alpha"]).flatten()[0]), 4)
    return scaling.of(group.module)


def _norm_alone(group: Group, tensors: Tensors, scaling: Scaling) -> float | None:
    """The norm of a change that the file alone determines, None where it takes the base's weights or much memory."""
    roles = group.tensors
    try:
        if scaling.start or ("diff_b" in roles and group.algorithm is not Algorithm.full):
            return None  # of the base's weights, or of the bias beside them
        if group.algorithm is Algorithm.lora and "mid" not in roles and not {"dora_scale", "magnitude"} & set(roles):
            return lora_norm(tensors, group, scaling)
        if group.algorithm in (Algorithm.full, Algorithm.norm):
            changes = [tensors.get(name).double().norm() for role, name in roles.items() if role != "alpha"]
            return float(sum(change**2 for change in changes)) ** 0.5
        if group.algorithm in (Algorithm.loha, Algorithm.lokr) and "dora_scale" not in roles:
            shape = _shape(group, {role: tensors.info[name].shape for role, name in roles.items()})
            if shape is None or math.prod(shape) > MOST_ELEMENTS:
                return None
            values = {role: tensors.get(name) for role, name in roles.items()}
            alpha = _alpha(group, tensors, scaling)
            rank = scaling.rank_of(group.module)
            change = low_rank_change(group.algorithm, values, shape, alpha, scaling.rank_stabilised, rank)
            return float(change.double().norm())
    except (ValueError, RuntimeError, IndexError, KeyError):
        return None
    return None


def _shape(group: Group, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the weight that LoHa or LoKr factors make."""
    if group.algorithm is Algorithm.loha:
        core = shapes.get("hada_t1")
        if core:
            return (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *core[2:])
        return (shapes["hada_w1_a"][0], *shapes["hada_w1_b"][1:])
    first = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], *shapes["lokr_w1_b"][1:])
    second = shapes.get("lokr_w2")
    if second is None:
        core = shapes.get("lokr_t2")
        a, b = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
        second = (a[1], b[1], *core[2:]) if core else (a[0], *b[1:])
    if len(first) != 2 or len(second) < 2:
        return None
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _against(found: Inspection, checkpoint: Checkpoint, base: BaseModel, adapter: str | None) -> None:
    tuned = tune(base, checkpoint, adapter=adapter)
    found.unused, found.unused_share = tuned.unused, tuned.unused_share
    found.warnings += tuned.warnings
    blocks: dict[tuple[str, str], list[ModuleChange]] = {}
    for change in tuned.changes:
        blocks.setdefault((change.part, block_of(change.module)), []).append(change)
    found.unmeasured = 0
    found.blocks = [
        Block(
            part,
            name,
            len({change.module for change in changes}),
            math.sqrt(sum(change.norm**2 for change in changes)),
            math.sqrt(sum(change.base_norm**2 for change in changes)),
        )
        for (part, name), changes in sorted(blocks.items(), key=lambda item: (item[0][0], _order(item[0][1])))
    ]


def block_of(module: str) -> str:
    """The block that a module's name, with dots or underscores, begins with; "other" outside all blocks."""
    match = _BLOCK.match(module)
    if match is None:
        return "other"
    kind = match["kind"].replace("text_model.", "").replace("text_model_", "").replace("encoder_", "encoder.")
    return kind if match["number"] is None else f"{kind}.{match['number']}"


def _order(name: str) -> tuple[int, str, int]:
    kind, _, number = name.rpartition(".")
    first = ("down", "input", "mid", "middle", "up", "output", "double", "transformer", "joint", "single", "encoder")
    place = next((i for i, start in enumerate(first) if name.startswith(start)), len(first))
    return place, kind, int(number) if number.isdigit() else -1


def _kind(group: Group) -> str:
    """What sort of layer it is: the end of its name."""
    found = _KIND.search(group.module)
    if found is None:
        return "other"
    return re.sub(r"^ff_net_(\d)_?", r"ff.net.\1.", found[1]).rstrip(".").replace("to_out_0", "to_out.0")


def as_json(found: Inspection) -> dict[str, Any]:
    """For scripts: plain values, names of numbers as text."""
    from dataclasses import asdict

    return asdict(found)
