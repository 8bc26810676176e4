"""Put an adapter file's changes into copies of the base's networks, and account for every tensor of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from audit.models.base import BaseModel
from audit.models.families.keys import Target, flat_targets, module_targets
from audit.models.formats.algorithms import changed
from audit.models.formats.names import AdapterNames, Algorithm, Group, read_names
from audit.models.formats.parts import gathered, narrow, scatter, sharing_copy
from audit.models.formats.scaling import Scaling, read_scaling
from audit.models.formats.tensors import Tensors


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
    """Where the modules that a file names are in a base model."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._targets: dict[str, dict[str, Target]] = {}
        self._flat: dict[str, dict[str, Target]] = {}

    def component(self, part: str) -> str | None:
        """The component that a file's part is ("denoiser", "te1", ...); None where this base has none of it."""
        if part == "denoiser":
            return self.base.architecture.denoiser
        name = self.base.architecture.encoder_names.get(part)
        return name if name and self.base.part(name) is not None else None

    def find(self, group: Group) -> tuple[str, Target] | None:
        """(component, target) of a group; None where the base has no such module."""
        component = self.component(group.part)
        if component is None:
            return None
        if component not in self._targets:
            self._targets[component] = module_targets(self.base.part(component))
            self._flat[component] = flat_targets(self._targets[component])
        target = (self._flat if group.flat else self._targets)[component].get(group.module)
        return None if target is None else (component, target)


def apply_adapter(
    base: BaseModel,
    tensors: Tensors,
    metadata: dict[str, str],
    strength: float,
    adapter: str | None,
    token: str,
    dtype: torch.dtype | None = None,
) -> Tuned:
    """The base's networks with the adapter in effect at ``strength``.

    ``adapter`` chooses one of several in the file; ``token`` names an embedding that has no name of its own. Changes
    are computed in float32 and, once a module is finished, kept in ``dtype``. Raises ValueError where tensors do not
    fit the modules they name.
    """
    names = read_names(tensors.info, adapter)
    _one_adapter(names, adapter)
    scalings = read_scaling(metadata)
    places = Places(base)
    found = Tuned(unused=list(names.unknown))
    used = 0.0
    lost = sum(norm_of(tensors.get(name)) ** 2 for name in names.unknown)
    placed = [(group, places.find(group)) for group in names.groups]
    unfinished = Counter((place[0], module) for _, place in placed if place for module in place[1].modules)
    for group, place in placed:
        if place is None:
            found.unused += group.tensors.values()
            lost += _lost_norm(group, tensors, scalings.get(group.part, Scaling())) ** 2
            continue
        change = _apply_group(base, found, group, place, tensors, scalings.get(group.part, Scaling()), strength)
        found.changes.append(change)
        used += change.norm**2 / max(strength**2, 1e-12)
        part, target = place
        for module in target.modules:
            unfinished[part, module] -= 1
            if not unfinished[part, module]:
                narrow(found.networks[part], module, dtype, base.part(part))
    for one in names.embeddings:
        component = places.component(one.part)
        if component is None:
            found.unused.append(one.tensor)
            continue
        vectors = tensors.get(one.tensor)
        vectors = vectors[None] if vectors.ndim == 1 else vectors
        width = base.part(component).get_input_embeddings().weight.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != width or not 1 <= len(vectors) <= MAX_VECTORS:
            raise ValueError(f"the embedding {one.tensor[:80]!r} of {tuple(vectors.shape)} does not fit width {width}")
        found.embeddings.setdefault(one.token or token, {})[component] = vectors
    found.unused_share = lost / (lost + used) if lost + used > 0 else 0.0
    if not names.groups and not names.embeddings:
        found.unused_share = 1.0
    if not scalings and any(name.startswith("base_model.model.") for name in tensors):
        found.warnings.append(
            "its alpha is in no tensor and its adapter_config.json is not beside it: alpha is taken to be the rank"
        )
    return found


MAX_VECTORS = 256  # of one token
MOST_RANK = 8192  # of factors whose product is measured


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
    strength: float,
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
    try:
        after, after_bias = changed(
            group.algorithm, values, weight, bias, strength, scaling.of(group.module), scaling.rank_stabilised
        )
    except (ValueError, RuntimeError, IndexError, KeyError, AssertionError, TypeError) as error:
        raise ValueError(f"{group.module[:120]}: {str(error)[:200]}") from error
    scatter(network, target, after)
    if after_bias is not None and after_bias is not bias:
        scatter(network, target, after_bias, "bias")
    norm = norm_of(after - weight)
    if after_bias is not None and after_bias is not bias:
        norm = (norm**2 + norm_of(after_bias - bias if bias is not None else after_bias) ** 2) ** 0.5
    return ModuleChange(component, target.modules[0], norm, norm_of(weight))


def norm_of(tensor: torch.Tensor) -> float:
    """Its Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _lost_norm(group: Group, tensors: Tensors, scaling: Scaling) -> float:
    """The norm of the change of a group that has no place: that of the product for LoRA, else that of its tensors."""
    if group.algorithm is Algorithm.lora and "mid" not in group.tensors:
        return lora_norm(tensors, group, scaling)
    return sum(norm_of(tensors.get(name)) ** 2 for role, name in group.tensors.items() if role != "alpha") ** 0.5


def lora_norm(tensors: Tensors, group: Group, scaling: Scaling) -> float:
    """The norm of up @ down * alpha / rank, from the factors' Gram matrices: the product is never made."""
    up = tensors.get(group.tensors["up"]).flatten(1)
    down = tensors.get(group.tensors["down"]).flatten(1)
    alpha = scaling.of(group.module)
    if "alpha" in group.tensors:
        alpha = float(tensors.get(group.tensors["alpha"]).flatten()[0])
    rank = down.shape[0]
    if up.shape[1] != rank or rank > MOST_RANK:  # the Gram matrices would be larger than the file
        return norm_of(up) * norm_of(down)
    scale = alpha / (rank**0.5 if scaling.rank_stabilised else rank) if alpha else 1.0
    product = float(((up.T @ up) * (down @ down.T)).double().sum())
    return max(product, 0.0) ** 0.5 * abs(scale)
