"""Full weights in place of the base's: files of the original layouts, diffusers' files and folders, GGUF."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from audit.models.base import BaseModel
from audit.models.families.keys import Target, module_targets
from audit.models.formats.adapter import ModuleChange, Tuned, norm_of
from audit.models.formats.names import CONDITIONER
from audit.models.formats.parts import gathered, narrow, scatter, sharing_copy
from audit.models.formats.prediction import PREDICTION_MARKERS
from audit.models.formats.tensors import Tensors

# Where the parts of a single file are. The VAE is not audited, and the rest are constants of samplers and of training.
_PREFIXES = (
    ("model.diffusion_model.", "denoiser"), ("net.", "denoiser"),
    ("cond_stage_model.transformer.", "te1"), ("cond_stage_model.model.", "te1"),
    ("conditioner.embedders.0.transformer.", "te1"), ("conditioner.embedders.1.model.", "te2"),
    ("conditioner.embedders.0.model.", "te2"),
    ("text_encoders.clip_l.transformer.", "te1"), ("text_encoders.clip_g.transformer.", "te2"),
    ("text_encoders.t5xxl.transformer.", "te3"), ("text_encoders.qwen3_06b.transformer.", "te1"),
)  # fmt: skip
_VAE = re.compile(r"^(?:first_stage_model\.|vae\.|model_ema\.)")
_IGNORED = re.compile(  # constants, some of them infinite: OpenCLIP's mask, the noise of the first step
    r"^(?:betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|lvlb_|model_ema$|denoiser\.sigmas$|scaled_fp8$|logvar$|scale_factor$|global_step$|"
    r".*position_ids$|.*logit_scale$|.*attn_mask$|.*\.scale_(?:weight|input)$|.*\.(?:weight|input)_scale$|"
    r".*\.weight_scale_inv$|.*\.comfy_quant$|(?:model\.diffusion_model\.)?pos_embed(?:\.pos_embed)?$|"
    r"(?:net\.|model\.diffusion_model\.)?(?:pos_embedder\.(?:seq|dim_(?:spatial|temporal)_range)|accum_\w+)$|"
    r"(?:net\.|model\.diffusion_model\.)?(?:[\w.]+\.)?(?:_extra_state|rotary_emb\.inv_freq)$|"
    r".*embed_tokens\.weight$)"
)
_OF_PARAMETER = re.compile(r"\.(?:weight|bias|scale)\.")
_FIRST_LAYERS = ("conv_in", "x_embedder", "pos_embed.proj")  # what takes the latents, and more in variants
_SPECIAL = {  # OpenCLIP's own parameters, which are no modules' weights there
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
}


@dataclass(frozen=True)
class _Place:
    component: str
    target: Target
    parameter: str


def apply_weights(
    base: BaseModel,
    tensors: Tensors,
    part: str | None,
    dtype: torch.dtype | None = None,
    denoiser: str | None = None,
) -> Tuned:
    """The base's networks with the file's weights; ``part`` is the component it is of, None for an original layout.

    Of an original layout ``denoiser`` is the component that its denoiser is, where the base has several.

    A tensor that is the base's own, rounded as the file stores it, is no change: the base's is kept. Changed ones are
    kept in ``dtype``. Raises ValueError where tensors do not fit, or a network has some of its weights only.
    """
    found = Tuned()
    covered: dict[str, set[str]] = {}
    targets: dict[str, dict[str, Target]] = {}
    used = lost = 0.0
    blind = set()
    tensors.check_quantisation()
    for name in tensors:
        place = _place(base, name, part, targets, denoiser)
        if place is None:
            if _VAE.match(name):
                tensors.check_finite([name])
            elif not _IGNORED.match(name) and name not in PREDICTION_MARKERS and not _left_out(base, name, part):
                _check_known(base, name, part, targets, denoiser)
                found.unused.append(name)
                lost += norm_of(tensors.get(name)) ** 2
            continue
        network = base.part(place.component)
        value, before = _fitted(name, tensors.weight(name), network, place)
        done = covered.setdefault(place.component, set())
        done |= _named(place)
        used += norm_of(value) ** 2
        stored = tensors.as_stored(name, before.float().contiguous())
        if stored is None:
            blind.add(tensors.info[name].dtype)
        elif torch.equal(stored.reshape(value.shape), value):
            continue
        if place.component not in found.networks:
            found.networks[place.component] = sharing_copy(network)
        scatter(found.networks[place.component], place.target, value, place.parameter)
        for module in place.target.modules:
            narrow(found.networks[place.component], module, dtype, network)
        norm = norm_of(value - before)
        found.changes.append(ModuleChange(place.component, place.target.modules[0], norm, norm_of(before)))
    for component, names in covered.items():
        missing = _missing(base.part(component), names)
        if missing:
            raise ValueError(f"{len(missing)} tensors of its {component} are missing, such as {missing[0][:100]!r}")
    if not covered:
        raise ValueError("none of its tensors has a place in the base")
    if blind:
        found.warnings.append(
            f"it is quantised as {', '.join(sorted(blind))}: what that changed cannot be told from fine-tuning"
        )
    found.unused_share = lost / (lost + used) if lost + used > 0 else 0.0
    return found


def fill(base: BaseModel, tensors: Tensors, dtype: torch.dtype) -> None:
    """Put the file's weights, in ``dtype``, into the networks of ``base`` that they are of: its denoiser has none yet.

    Raises ValueError where a tensor has no place, a place has two, one does not fit or is not finite, or a network has
    some of its weights only.
    """
    covered: dict[str, set[str]] = {}
    targets: dict[str, dict[str, Target]] = {}
    tensors.check_quantisation()
    for name in weights_of(tensors):
        place = _place(base, name, None, targets, None)
        if place is None:
            raise ValueError(f"{name[:120]} has no place in it")
        network = base.part(place.component)
        value, _ = _fitted(name, tensors.weight(name), network, place)
        if not torch.isfinite(value).all():
            raise ValueError(f"{name[:120]} is not finite")
        done = covered.setdefault(place.component, set())
        if done & _named(place):
            raise ValueError(f"{name[:120]} is there twice, in two spellings")
        done |= _named(place)
        scatter(network, place.target, value.to(dtype), place.parameter)
    denoiser = base.architecture.denoiser
    for component in {denoiser, *covered}:
        missing = _missing(base.part(component), covered.get(component, set()))
        if missing:
            raise ValueError(f"{len(missing)} tensors of its {component} are missing, such as {missing[0][:100]!r}")
    if any(parameter.is_meta for parameter in base.denoiser.parameters()):
        raise ValueError(f"weights of its {denoiser} are missing")


def _named(place: _Place) -> set[str]:
    """The parameters that a place is."""
    return {f"{module}.{place.parameter}".removeprefix(".") for module in place.target.modules}


def _fitted(name: str, value: torch.Tensor, network: nn.Module, place: _Place) -> tuple[torch.Tensor, torch.Tensor]:
    """A file's tensor in the shape that ``network`` has at ``place``, and what is there. Raises ValueError."""
    before = gathered(network, place.target, place.parameter)
    if name.endswith("text_projection") and value.ndim == 2:
        value = value.T
    flat = value.ndim == 1 and place.parameter not in ("weight", "bias")  # a table's rows one behind the other
    fits = before is not None and (flat or _same_but_ones(value.shape, before.shape))
    if before is None or not fits or value.numel() != before.numel():
        wanted = "nothing" if before is None else tuple(before.shape)
        is_first = place.target.modules[0] in _FIRST_LAYERS
        variant = ": inpainting, depth, edit and other variants cannot be audited" if is_first else ""
        raise ValueError(f"{name[:120]} has the shape {tuple(value.shape)}, the base {wanted}{variant}")
    return value.reshape(before.shape), before


def _check_known(
    base: BaseModel, name: str, part: str | None, targets: dict[str, dict[str, Target]], denoiser: str | None
) -> None:
    """Raise ValueError for a tensor that may change what the others mean: one more of a module that has its weights
    in the file or of one of its parameters (``weight.absmax``), or one of the file as a whole.
    """
    component, rest = _component(base, name, part, denoiser)
    module = _OF_PARAMETER.split(rest, 1)[0] if _OF_PARAMETER.search(rest) else rest.rpartition(".")[0]
    if (component is not None and module in targets.get(component, {})) or "." not in name:
        raise ValueError(f"{name[:120]} is of no known format: what it does to the other tensors is not known")


def weights_of(names: Iterable[str]) -> list[str]:
    """Those of a file's tensors that are weights, not constants, some of which are infinite."""
    return [name for name in names if not _IGNORED.match(name) and name not in PREDICTION_MARKERS]


def _place(
    base: BaseModel, name: str, part: str | None, targets: dict[str, dict[str, Target]], denoiser: str | None
) -> _Place | None:
    component, rest = _component(base, name, part, denoiser)
    if component is None:
        return None
    network = base.part(component)
    if component not in targets:
        targets[component] = module_targets(network)
    rest = _SPECIAL.get(rest, rest)
    if part is None and component in base.architecture.denoisers:
        rest = base.architecture.own_parameter(rest)
    rest = rest.replace(".in_proj_", ".in_proj.")
    module, _, parameter = rest.rpartition(".")
    parameter = "weight" if parameter == "scale" else parameter
    target = targets[component].get(module)
    if target is None and isinstance(getattr(network, parameter, None), nn.Parameter) and not module:
        target = Target(("",))  # of the network itself
    if target is None or not (parameter in ("weight", "bias") or _has_parameter(network, target, parameter)):
        return None
    return _Place(component, target, parameter)


def _has_parameter(network: nn.Module, target: Target, name: str) -> bool:
    """Whether the one module of ``target`` has a parameter of its own of this name."""
    one = len(target.modules) == 1 and getattr(network.get_submodule(target.modules[0]), name, None)
    return isinstance(one, nn.Parameter)


def _component(base: BaseModel, name: str, part: str | None, denoiser: str | None = None) -> tuple[str | None, str]:
    """The component that a tensor is of, None where the base has none of it, and its name there."""
    if part is not None:
        return part, name
    architecture = base.architecture
    prefix, kind = next(((p, k) for p, k in _PREFIXES if name.startswith(p)), ("", "denoiser"))
    rest = name.removeprefix(prefix)
    inner = f"{CONDITIONER}."
    if kind == "denoiser" and rest.startswith(inner):
        kind, rest = "conditioner", rest.removeprefix(inner)
    component = denoiser or architecture.denoiser if kind == "denoiser" else architecture.encoder_names.get(kind)
    known = component is not None and base.part(component) is not None
    return component if known else None, rest


def _same_but_ones(a: Iterable[int], b: Iterable[int]) -> bool:
    return [size for size in a if size != 1] == [size for size in b if size != 1]


def _left_out(base: BaseModel, name: str, part: str | None) -> bool:
    """Whether diffusers leaves it out: SD 2 reads the last but one layer of OpenCLIP, without the projection."""
    component, rest = _component(base, name, part)
    if component is None or component in base.architecture.denoisers:
        return False
    match = re.match(r"transformer\.resblocks\.(\d+)\.", rest)
    return rest == "text_projection" or bool(match and int(match[1]) >= base.part(component).config.num_hidden_layers)


def _missing(network: nn.Module, names: set[str]) -> list[str]:
    return [
        name
        for name, _ in network.named_parameters()
        if name not in names and not name.endswith(("position_ids", "pos_embed")) and "text_projection" not in name
    ]
