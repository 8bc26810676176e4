"""Put an adapter file's changes into copies of the base's networks, and account for every tensor of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from audit.choices import Expert
from audit.models.base import BaseModel
from audit.models.experts import PAIR, marked
from audit.models.families.keys import Target, flat_targets, module_targets
from audit.models.formats.algorithms import changed
from audit.models.formats.names import (
    ANY_ENCODER,
    MAX_VECTORS,
    AdapterNames,
    Algorithm,
    Embedding,
    Group,
    Naming,
    rank_of,
    read_names,
    shown,
)
from audit.models.formats.parts import gathered, narrow, scatter, sharing_copy
from audit.models.formats.quantised import check_kind
from audit.models.formats.scaling import Scaling, problems, read_scaling, scaling_of
from audit.models.formats.tensors import Tensors
from audit.models.safetensors_header import DTYPE_BITS, TensorInfo


@dataclass(frozen=True)
class ModuleChange:
    """How far one module's weights moved: the norm of the change and that of the base's weights."""

    part: str
    module: str
    norm: float
    base_norm: float


@dataclass
class Tuned:
    """What a checkpoint makes of a base model.

    ``networks``: the parts it changes, by component name. ``embeddings``: token -> component -> vectors [n, width].
    ``unused``: tensors without effect; ``unused_share``: their share of the squared norm of all.
    """

    networks: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    changes: list[ModuleChange] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unused_share: float = 0.0
    warnings: list[str] = field(default_factory=list)


class Places:
    """Where the modules that a file names are in a base model; ``expert`` is the one of two that the file is for."""

    def __init__(self, base: BaseModel, expert: Expert | None = None) -> None:
        self.base = base
        named = zip(PAIR, base.architecture.denoisers, strict=False)
        self.experts = {one: part for one, part in named if base.part(part) is not None}
        if expert is not None and expert not in self.experts:
            raise ValueError(f"the base has no {expert} expert")
        self.expert = expert
        self._targets: dict[str, dict[str, Target]] = {}
        self._flat: dict[str, dict[str, Target]] = {}

    def component(self, part: str) -> str | None:
        """The component that a file's part is ("denoiser", "te1", ...); None where this base has none of it."""
        if part == "denoiser":
            return self.base.architecture.denoiser if self.expert is None else self.experts[self.expert]
        name = self.base.architecture.encoder_names.get(part)
        return name if name and self.base.part(name) is not None else None

    def find(self, group: Group) -> tuple[str, Target] | None:
        """(component, target) of a group; None where the base has no such module."""
        component, module = self.component(group.part), group.module
        if group.part == "denoiser" and len(self.experts) > 1:
            expert, module = marked(module)
            if expert is not None and self.expert is not None:
                raise ValueError(f"{group.module[:120]} names an expert itself")
            component = component if expert is None else self.experts[expert]
        if component is None:
            return None
        if component not in self._targets:
            self._targets[component] = module_targets(self.base.part(component))
            self._flat[component] = flat_targets(self._targets[component])
        target = (self._flat if group.flat else self._targets)[component].get(module)
        return None if target is None else (component, target)


def apply_adapter(
    base: BaseModel,
    tensors: Tensors,
    metadata: dict[str, str],
    lora_scale: float,
    adapter: str | None,
    token: str,
    dtype: torch.dtype | None = None,
    expert: Expert | None = None,
) -> Tuned:
    """The base's networks with the adapter in effect at ``lora_scale``.

    ``adapter`` chooses one of several in the file; ``token`` names an embedding that has no name of its own; ``expert``
    is the denoiser that the file is for, where the base has two. Changes
    are computed in float32 and, once a module is finished, kept in ``dtype``. Raises ValueError where tensors do not
    fit the modules they name.
    """
    names = read_names(tensors.info, adapter)
    check_names(names, metadata, tensors.info)
    _one_adapter(names, adapter)
    tensors.check_finite()
    scalings = read_scaling(metadata)
    places = Places(base, expert)
    found = Tuned(unused=list(names.unknown))
    used, hit = 0.0, set[tuple[str, str]]()
    lost = sum(norm_of(tensors.get(name)) ** 2 for name in names.unknown)
    for group in names.groups:
        place, scaling = places.find(group), scaling_of(scalings, group.part, group.module)
        if place is None:
            found.unused += group.tensors.values()
            lost += _lost_norm(group, tensors, scaling) ** 2
            continue
        named = {(place[0], module) for module in place[1].modules}
        if named & hit:
            raise ValueError(f"{group.module[:120]} is named twice in it, in two spellings: which holds is not known")
        hit |= named
        change = _apply_group(base, found, group, place, tensors, scaling, lora_scale)
        found.changes.append(change)
        used += change.norm**2 / max(lora_scale**2, 1e-12)
        for part, module in named:
            narrow(found.networks[part], module, dtype, base.part(part))
    lost += _embed(base, places, names, tensors, token, found)
    found.unused_share = lost / (lost + used) if lost + used > 0 else 0.0
    if not names.groups and not found.embeddings:
        found.unused_share = 1.0
    if not scalings and any(name.startswith("base_model.model.") for name in tensors):
        found.warnings.append(
            "its alpha is in no tensor and its adapter_config.json is not beside it: alpha is taken to be the rank"
        )
    if any(group.algorithm is Algorithm.tlora for group in names.groups):
        found.warnings.append(
            "T-LoRA leaves out ranks at noisy steps where its trainer samples: here all are in effect"
        )
    return found


def check_names(names: AdapterNames, metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ValueError for tensors that may change what the others do, a configuration that does, and integers."""
    for group in names.groups:
        for role, name in group.tensors.items():
            if role not in _FLAGS and tensors[name].dtype in DTYPE_BITS:  # GGUF's own are unpacked
                check_kind(name, tensors[name], False)
    if names.strange:
        raise ValueError(
            f"{len(names.strange)} of its tensors are of no known format ({shown(names.strange)}): what they do to the "
            "others is not known"
        )
    wrong = problems(metadata)
    if wrong:
        raise ValueError("; ".join(wrong[:3]))


def _embed(base: BaseModel, places: Places, names: AdapterNames, tensors: Tensors, token: str, found: Tuned) -> float:
    """Put the tokens' vectors into ``found``; the squared norm of those for an encoder that the base has not."""
    lost, outputs = 0.0, list(names.lost)
    for one in names.embeddings:
        vectors = tensors.get(one.tensor)
        vectors = vectors[None] if vectors.ndim == 1 else vectors
        component = _encoder(base, places, one, vectors)
        if component is None and one.part == "te3":
            outputs.append(one.tensor)  # a copy for T5 beside those for CLIP
            continue
        if component is None:
            found.unused.append(one.tensor)
            lost += norm_of(vectors) ** 2
            continue
        width = base.part(component).get_input_embeddings().weight.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != width or not 1 <= len(vectors) <= MAX_VECTORS:
            raise ValueError(f"the embedding {one.tensor[:80]!r} of {tuple(vectors.shape)} does not fit width {width}")
        if component in found.embeddings.setdefault(one.token or token, {}):
            raise ValueError(f"the embedding {one.tensor[:80]!r} is the second one of its token for the {component}")
        found.embeddings[one.token or token][component] = vectors
    if outputs:
        found.unused += outputs
        found.warnings.append(
            f"{len(outputs)} tensors of its tokens are lost, which no text encoder of the base takes "
            f"({shown(outputs, 3)}): vectors for T5 or in place of an encoder's answer"
        )
    return lost


def _encoder(base: BaseModel, places: Places, one: Embedding, vectors: torch.Tensor) -> str | None:
    """The component that an embedding is for. Raises ValueError where its width alone is to say so and does not."""
    if one.part != ANY_ENCODER:
        return places.component(one.part)
    wide = {}
    for name in base.architecture.encoders:
        if base.part(name) is not None:
            wide[name] = base.part(name).get_input_embeddings().weight.shape[1]
    fitting = [name for name, width in wide.items() if vectors.ndim == 2 and vectors.shape[1] == width]
    if len(fitting) != 1:
        raise ValueError(
            f"the embedding {one.tensor[:80]!r} of {tuple(vectors.shape)} does not fit width "
            f"{', '.join(map(str, wide.values()))}{' alone' if fitting else ''}"
        )
    return fitting[0]


MOST_RANK = 8192  # of factors whose product is measured
_FLAGS = ("alpha", "on_input", "scaled")  # of whatever type


def _one_adapter(names: AdapterNames, adapter: str | None) -> None:
    if adapter is not None and adapter not in names.adapters:
        held = ", ".join(names.adapters[:20]) or "no named ones"
        raise ValueError(f"there is no adapter {adapter!r} in it; it holds {held}")
    if adapter is None and len(names.adapters) > 1:
        raise ValueError(f"it holds several adapters ({', '.join(names.adapters[:20])}): choose one with --adapter")


def _apply_group(
    base: BaseModel,
    found: Tuned,
    group: Group,
    place: tuple[str, Target],
    tensors: Tensors,
    scaling: Scaling,
    lora_scale: float,
) -> ModuleChange:
    component, target = place
    network = found.networks.get(component)
    if network is None:
        network = found.networks[component] = sharing_copy(base.part(component))
    values = {role: tensors.get(name) for role, name in group.tensors.items()}
    weight, bias = gathered(network, target), gathered(network, target, "bias")
    if weight is None:
        raise ValueError(f"{target.modules[0]} has no weights to change")
    weight, bias = weight.float(), None if bias is None else bias.float()
    module = marked(group.module)[1] if not group.flat else target.modules[0]
    try:
        if group.naming is not Naming.kohya:
            _check_configured(group, module, tensors, scaling)
        after, after_bias = changed(
            group.algorithm, values, weight, bias, lora_scale, scaling.of(module), scaling.rank_stabilised,
            rank=scaling.rank_of(module), start=scaling.start, rotation=scaling.rotation,
            turned_weights=group.flat or "scaled" in group.tensors,
        )  # fmt: skip
        if not torch.isfinite(after).all():
            raise ValueError("its change is not finite")
    except (ValueError, RuntimeError, IndexError, KeyError, AssertionError, TypeError) as error:
        raise ValueError(f"{group.module[:120]}: {str(error)[:240]}") from error
    scatter(network, target, after)
    if after_bias is not None and after_bias is not bias:
        scatter(network, target, after_bias, "bias")
    norm = norm_of(after - weight)
    if after_bias is not None and after_bias is not bias:
        norm = (norm**2 + norm_of(after_bias - bias if bias is not None else after_bias) ** 2) ** 0.5
    return ModuleChange(component, target.modules[0], norm, norm_of(weight))


def _check_configured(group: Group, module: str, tensors: Tensors, scaling: Scaling) -> None:
    """Raise ValueError where PEFT, with the file's configuration, would not put these tensors into effect."""
    if not scaling.admits(module):
        raise ValueError("its configuration leaves this module out, its tensors do not")
    decomposed = bool({"magnitude", "dora_scale"} & set(group.tensors))
    if scaling.decomposed is not None and scaling.decomposed != decomposed:
        raise ValueError(f"its configuration says use_dora = {scaling.decomposed}, its tensors say otherwise")
    told = scaling.rank_of(module)
    if told is not None and group.algorithm in (Algorithm.lora, Algorithm.loha):
        rank = rank_of(group.algorithm, {role: tensors.info[name].shape for role, name in group.tensors.items()})
        if rank != told:
            raise ValueError(f"its configuration says rank {told:g}, its tensors {rank}")


def norm_of(tensor: torch.Tensor) -> float:
    """Its Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _lost_norm(group: Group, tensors: Tensors, scaling: Scaling) -> float:
    """The norm of the change of a group that has no place: that of the product for LoRA, else that of its tensors."""
    if group.algorithm is Algorithm.lora and "mid" not in group.tensors:
        return lora_norm(tensors, group, scaling)
    return sum(norm_of(tensors.get(name)) ** 2 for role, name in group.tensors.items() if role != "alpha") ** 0.5


def lora_norm(tensors: Tensors, group: Group, scaling: Scaling) -> float:
    """The norm of up @ down * alpha / rank, from the factors' Gram matrices: the product is never made.

    Raises ValueError where there is no rank.
    """
    up = tensors.get(group.tensors["up"]).flatten(1).double()
    down = tensors.get(group.tensors["down"]).flatten(1).double()
    alpha = scaling.of(group.module)
    if "alpha" in group.tensors:
        alpha = float(tensors.get(group.tensors["alpha"]).flatten()[0])
    rank = down.shape[0]
    if rank < 1:
        raise ValueError(f"{group.module[:120]}: it has no rank")
    if up.shape[1] != rank or rank > MOST_RANK:  # the Gram matrices would be larger than the file
        return norm_of(up) * norm_of(down)
    scale = alpha / (rank**0.5 if scaling.rank_stabilised else rank) if alpha else 1.0
    product = float(((up.T @ up) * (down @ down.T)).sum())
    return max(product, 0.0) ** 0.5 * abs(scale)
