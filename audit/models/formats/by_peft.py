"""What PEFT itself computes: its OFT, BOFT and IA3, and the factors that it takes from the base's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from audit.models.formats.names import Algorithm
from audit.models.formats.scaling import Rotation

MOST_TERMS = 64  # of Cayley's series


def by_peft(
    algorithm: Algorithm,
    tensors: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    lora_scale: float,
    rotation: Rotation,
    turned_weights: bool,
) -> torch.Tensor:
    """PEFT's own OFT, BOFT and IA3, merged by PEFT into a layer of this weight.

    ``turned_weights``: OneTrainer's OFT, the same for a linear layer, turns a convolution's weights the other way
    round. Raises ValueError where shapes do not fit.
    """
    if algorithm is Algorithm.peft_oft:
        merged = _turned(tensors, weight, rotation, turned_weights)
    elif algorithm is Algorithm.peft_boft:
        merged = _butterflies(tensors, weight)
    else:
        merged = _scaled(tensors, weight)
    return merged if lora_scale == 1 else weight + lora_scale * (merged - weight)


def _turned(
    tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, rotation: Rotation, turned_weights: bool
) -> torch.Tensor:
    from peft import OFTConfig

    numbers = tensors["oft_r"]
    if numbers.ndim != 2:
        raise ValueError(f"rotations of {tuple(numbers.shape)} do not fit {tuple(weight.shape)}")
    turns, half = numbers.shape
    side = round((1 + math.sqrt(1 + 8 * half)) / 2)
    inputs = math.prod(weight.shape[1:])
    if half < 1 or side * (side - 1) // 2 != half or inputs % side or turns not in (1, inputs // side):
        raise ValueError(f"rotations of {tuple(numbers.shape)} do not fit {tuple(weight.shape)}")
    shared = turns == 1 and inputs != side
    if rotation.shared is not None and rotation.shared != shared and inputs != side:
        raise ValueError(f"its configuration says block_share = {rotation.shared}, its {turns} rotations otherwise")
    if not 2 <= rotation.terms <= MOST_TERMS:
        raise ValueError(f"its configuration says num_cayley_neumann_terms = {rotation.terms}")
    if "scaled" in tensors:  # OneTrainer's marker: true, or 1 where the file was cast to another type
        if tensors["scaled"].numel() != 1 or float(tensors["scaled"]) != 1:
            raise ValueError(f"its scaled_oft is {tensors['scaled'].flatten().tolist()[:4]}, not true")
        numbers = numbers / (2 * math.sqrt(side - 1))
    if weight.ndim > 2 and turned_weights:
        # a linear layer's inputs are turned, a convolution's weights: the same with the signs of Q exchanged
        numbers = -numbers
    config = OFTConfig(
        target_modules=["layer"], r=0, oft_block_size=side, block_share=shared, coft=rotation.constrained,
        eps=rotation.eps, use_cayley_neumann=rotation.cayley_neumann, num_cayley_neumann_terms=rotation.terms,
    )  # fmt: skip
    return _merged(config, weight, {"oft_R.x.weight": numbers})


def _butterflies(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    from peft import BOFTConfig

    factors, count, side, _ = tensors["boft_r"].shape
    if count * side != math.prod(weight.shape[1:]):
        raise ValueError(f"rotations of {tuple(tensors['boft_r'].shape)} do not fit {tuple(weight.shape)}")
    config = BOFTConfig(target_modules=["layer"], boft_block_size=side, boft_n_butterfly_factor=factors)
    return _merged(config, weight, {"boft_R.x": tensors["boft_r"], "boft_s.x": tensors["boft_s"]})


def _scaled(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    from peft import IA3Config

    scale = tensors["ia3_l"]
    on_input = scale.ndim >= 2 and scale.shape[0] == 1 and scale.shape[1] == weight.shape[1]
    if scale.numel() != weight.shape[1 if on_input else 0]:
        raise ValueError(f"factors of {tuple(scale.shape)} do not fit a weight of {tuple(weight.shape)}")
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if on_input else [])
    return _merged(config, weight, {"ia3_l.x": scale})


def taken_at_the_start(start: str, weight: torch.Tensor, rank: int, scaling: float) -> torch.Tensor:
    """What PiSSA (arXiv 2404.02948) or OLoRA (2406.01775) took out of the weight, as PEFT does it when it loads one.

    Raises ValueError for a convolution, which PEFT does not begin so, and for a rank that is larger than the weight.
    """
    if weight.ndim != 2 or not 0 < rank <= min(weight.shape) or scaling == 0:
        raise ValueError(f"{start} of rank {rank} does not fit a weight of {tuple(weight.shape)}")
    from peft import LoraConfig

    config = LoraConfig(target_modules=["layer"], r=rank, lora_alpha=1, init_lora_weights=start)
    holder = _holder(weight)
    config.lora_alpha = scaling * rank  # a fraction as well as a whole number
    _inject(config, holder)
    wrapped: Any = holder["layer"]
    return weight - wrapped.get_base_layer().weight.detach().reshape(weight.shape)


def _holder(weight: torch.Tensor) -> Any:
    layer: Any
    if weight.ndim == 2:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    elif weight.ndim == 4:
        sizes = weight.shape[2], weight.shape[3]
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], sizes, bias=False, device="meta")
    else:
        raise ValueError(f"a weight of {tuple(weight.shape)} is neither a matrix nor a convolution")
    layer.weight = torch.nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    return torch.nn.ModuleDict({"layer": layer})


def _inject(config: Any, holder: Any) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, holder, adapter_name="x")


def _merged(config: Any, weight: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    holder = _holder(weight)
    _inject(config, holder)
    state = holder.state_dict()
    for name, value in values.items():
        if state[f"layer.{name}"].shape != value.shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, not {tuple(state[f'layer.{name}'].shape)}")
        state[f"layer.{name}"] = value
    holder.load_state_dict(state)
    wrapped: Any = holder["layer"]
    wrapped.merge(safe_merge=True, adapter_names=["x"])
    return wrapped.get_base_layer().weight.detach()
