"""The weights that an adapter's tensors put into effect, algorithm by algorithm.

Sizes are compared with the weight to be changed before anything is multiplied: a file of some kilobytes can declare
factors whose product would fill any memory. Formulas: LoRA arXiv 2106.09685; LoHa, LoKr, IA3, OFT and BOFT as the
LyCORIS library defines them (arXiv 2309.14859, https://github.com/KohakuBlueleaf/LyCORIS); DoRA arXiv 2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from audit.models.formats.names import Algorithm

Tensors = Mapping[str, torch.Tensor]


def changed(
    algorithm: Algorithm,
    tensors: Tensors,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    strength: float = 1.0,
    alpha: float | None = None,
    rank_stabilised: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias after the change; ``weight`` [out, in, ...] and ``bias`` [out] float32 are left as they are.

    ``strength`` multiplies the change (LyCORIS' multiplier). ``alpha`` stands for a missing alpha tensor;
    ``rank_stabilised`` divides it by the square root of the rank. Raises ValueError where shapes do not fit.
    """
    given = _alpha(tensors, alpha)
    if algorithm is Algorithm.full:
        return weight + strength * _fitting(tensors["diff"], weight), _add(bias, tensors.get("diff_b"), strength)
    if algorithm is Algorithm.norm:
        return weight + strength * _fitting(tensors["w_norm"], weight), _add(bias, tensors.get("b_norm"), strength)
    if algorithm is Algorithm.ia3:
        return _ia3(tensors, weight, strength), bias
    if algorithm in (Algorithm.oft, Algorithm.boft):
        return _rotated(algorithm, tensors, weight, given or 0.0, strength), bias
    if algorithm in (Algorithm.peft_oft, Algorithm.peft_boft, Algorithm.peft_ia3):
        return _by_peft(algorithm, tensors, weight, strength), bias
    if algorithm is Algorithm.glora:
        return weight + strength * _glora(tensors, weight, given), bias
    delta = low_rank_change(algorithm, tensors, weight.shape, given, rank_stabilised)
    if "magnitude" in tensors:  # PEFT: the strength is part of the direction
        merged = weight + strength * delta
        return _decomposed(merged, tensors["magnitude"].reshape(-1), True, 1.0), bias
    if "dora_scale" in tensors:  # LyCORIS: the strength interpolates the whole
        on_out = _on_out(tensors["dora_scale"], weight)
        return _decomposed(weight + delta, tensors["dora_scale"].reshape(-1), on_out, strength), bias
    if "up_bias" in tensors:
        rank = tensors["down"].shape[0]
        bias = _add(bias, tensors["up_bias"], strength * _scaling(given, rank, rank_stabilised))
    return weight + strength * delta, bias


def low_rank_change(
    algorithm: Algorithm,
    tensors: Tensors,
    shape: torch.Size | tuple[int, ...],
    alpha: float | None = None,
    rank_stabilised: bool = False,
) -> torch.Tensor:
    """The change of LoRA (with or without CP decomposition), LoHa or LoKr, of ``shape``, at strength 1."""
    if algorithm is Algorithm.lora:
        down, up = tensors["down"], tensors["up"]
        rank = down.shape[0]
        if "mid" in tensors:
            delta = _tucker(tensors["mid"], up.flatten(1).T, down.flatten(1), shape)
        else:
            delta = _product(up, down, shape)
    elif algorithm is Algorithm.loha:
        w1a, w1b, w2a, w2b = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        rank = w1b.shape[0]
        if "hada_t1" in tensors and "hada_t2" in tensors:
            delta = _tucker(tensors["hada_t1"], w1a, w1b, shape) * _tucker(tensors["hada_t2"], w2a, w2b, shape)
        else:
            delta = _product(w1a, w1b, shape) * _product(w2a, w2b, shape)
    else:
        delta, factored = _kronecker(tensors, shape)
        if factored is None:  # both factors are whole: there is no rank, and LyCORIS does not scale
            return delta
        rank = factored
    return delta * _scaling(alpha, rank, rank_stabilised)


def rank_of(algorithm: Algorithm, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank of a low-rank change, None where there is none."""
    if algorithm is Algorithm.lora:
        return shapes["down"][0]
    if algorithm is Algorithm.loha:
        return shapes["hada_w1_b"][0]
    if algorithm is Algorithm.lokr:
        name = next((n for n in ("lokr_w1_a", "lokr_w2_a") if n in shapes), None)
        if name is None:
            return None
        return shapes[name][0 if name == "lokr_w2_a" and "lokr_t2" in shapes else 1]
    if algorithm is Algorithm.glora:
        return shapes["a2"][0]
    return None


def _alpha(tensors: Tensors, alpha: float | None) -> float | None:
    if "alpha" not in tensors:
        return alpha
    if tensors["alpha"].numel() != 1:
        raise ValueError(f"alpha has the shape {tuple(tensors['alpha'].shape)}, not that of one number")
    value = float(tensors["alpha"])
    if not math.isfinite(value):
        raise ValueError("alpha is not finite")
    return value


def _scaling(alpha: float | None, rank: int, rank_stabilised: bool) -> float:
    """alpha / rank; without alpha, or with 0 (sd-scripts and LyCORIS take it for unset), 1."""
    if not alpha:
        return 1.0
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def _fitting(change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if change.numel() != weight.numel():
        raise ValueError(f"a change of {tuple(change.shape)} does not fit a weight of {tuple(weight.shape)}")
    return change.reshape(weight.shape)


def _add(bias: torch.Tensor | None, change: torch.Tensor | None, strength: float) -> torch.Tensor | None:
    if change is None:
        return bias
    return strength * change if bias is None else bias + strength * _fitting(change, bias)


def _product(up: torch.Tensor, down: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """up [out, r, ...] times down [r, in, ...], as ``shape``."""
    rows, columns = up.flatten(1), down.flatten(1)
    size = math.prod(shape)
    if rows.shape[1] != columns.shape[0] or rows.shape[0] * columns.shape[1] != size or rows.shape[0] != shape[0]:
        raise ValueError(f"factors of {tuple(up.shape)} and {tuple(down.shape)} do not make a weight of {tuple(shape)}")
    return (rows @ columns).reshape(shape)


def _tucker(
    core: torch.Tensor, up: torch.Tensor, down: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """core [r, r, k, k] with up [r, out] and down [r, in] on its first two sides: the CP or Tucker decomposition."""
    wanted = (up.shape[-1], down.shape[-1], *core.shape[2:])
    fits = core.ndim == len(shape) and up.ndim == down.ndim == 2 and core.shape[:2] == (up.shape[0], down.shape[0])
    if not fits or wanted != tuple(shape):
        raise ValueError(f"a core of {tuple(core.shape)} does not make a weight of {tuple(shape)}")
    return torch.einsum("ij...,ip,jr->pr...", core, up, down)


def _kronecker(tensors: Tensors, shape: torch.Size | tuple[int, ...]) -> tuple[torch.Tensor, int | None]:
    """kron(w1, w2), and the rank of the factored one of them."""
    rank: int | None = None
    w1, w2 = tensors.get("lokr_w1"), tensors.get("lokr_w2")
    sides = [_kronecker_shape(tensors, "lokr_w1"), _kronecker_shape(tensors, "lokr_w2")]
    if sides[0][0] * sides[1][0] != shape[0] or math.prod(sides[0]) * math.prod(sides[1]) != math.prod(shape):
        raise ValueError(f"factors of {sides[0]} and {sides[1]} do not make a weight of {tuple(shape)}")
    if w2 is None:
        a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        if "lokr_t2" in tensors:
            rank = a.shape[0]
            core = tensors["lokr_t2"]
            w2 = _tucker(core, a, b, (a.shape[1], b.shape[1], *core.shape[2:]))
        else:
            rank = a.shape[1]
            w2 = _product(a, b, (a.shape[0], *b.shape[1:]))
    if w1 is None:
        a, b = tensors["lokr_w1_a"], tensors["lokr_w1_b"]
        rank = a.shape[1]
        w1 = _product(a, b, (a.shape[0], b.shape[1]))
    if w2.ndim == 2 and len(shape) > 2:  # a convolution's second factor is stored flat
        w2 = w2.reshape(w2.shape[0], -1, *shape[2:])
    w1 = w1.reshape(*w1.shape[:2], *[1] * (w2.ndim - 2))
    return torch.kron(w1, w2.contiguous()).reshape(shape), rank


def _kronecker_shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name in tensors:
        return tuple(tensors[name].shape)
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in tensors:
        return (a.shape[1], b.shape[1], *tensors["lokr_t2"].shape[2:])
    return (a.shape[0], *b.shape[1:])


def _on_out(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether DoRA's magnitude is one number an output, not one an input (early LyCORIS files)."""
    if scale.numel() == weight.shape[0] and (scale.ndim < 2 or scale.shape[0] == weight.shape[0]):
        return True
    if scale.numel() != weight.shape[1]:
        raise ValueError(f"a magnitude of {tuple(scale.shape)} does not fit a weight of {tuple(weight.shape)}")
    return False


def _decomposed(weight: torch.Tensor, magnitude: torch.Tensor, on_out: bool, strength: float) -> torch.Tensor:
    """DoRA: ``weight`` with the norm of every output (or input) set to ``magnitude``."""
    side = 0 if on_out else 1
    if magnitude.numel() != weight.shape[side]:
        raise ValueError(f"a magnitude of {magnitude.numel()} does not fit a weight of {tuple(weight.shape)}")
    others = [axis for axis in range(weight.ndim) if axis != side]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    shape = [1] * weight.ndim
    shape[side] = -1
    return weight * (strength * (magnitude.reshape(shape) / norm - 1) + 1)


def _ia3(tensors: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """LyCORIS' IA3: every input or output channel scaled by 1 + weight."""
    side = 1 if bool(tensors["on_input"].flatten()[0]) else 0
    scale = tensors["weight"].reshape(-1)
    if len(scale) != weight.shape[side]:
        raise ValueError(f"{len(scale)} factors do not fit a weight of {tuple(weight.shape)}")
    shape = [1] * weight.ndim
    shape[side] = -1
    return weight * (1 + strength * scale.reshape(shape))


def _rotated(
    algorithm: Algorithm, tensors: Tensors, weight: torch.Tensor, constraint: float, strength: float
) -> torch.Tensor:
    """OFT and butterfly OFT of LyCORIS: blocks of outputs turned by Cayley rotations; alpha is the constraint."""
    from lycoris.functional import boft, diag_oft

    blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
    count, side = blocks.shape[-3], blocks.shape[-1]
    if blocks.shape[-2] != side or count * side != weight.shape[0] or blocks.ndim not in (3, 4) or side == 0:
        raise ValueError(f"blocks of {tuple(blocks.shape)} do not fit a weight of {tuple(weight.shape)}")
    if rescale is not None:
        rescale = rescale.reshape(-1, *[1] * (weight.ndim - 1))
        if len(rescale) != weight.shape[0]:
            raise ValueError(f"{len(rescale)} scales do not fit a weight of {tuple(weight.shape)}")
    limit = constraint * weight.shape[0]
    if algorithm is Algorithm.boft:
        if side % 2 or 2 ** (blocks.shape[0] - 1) * (side // 2) * 2 > weight.shape[0]:
            raise ValueError(f"blocks of {tuple(blocks.shape)} do not fit a weight of {tuple(weight.shape)}")
        change = boft.diff_weight(weight, blocks, rescale, constraint=limit, scale=strength, backend="torch")
        return weight + change
    if strength == 1:
        return weight + diag_oft.diff_weight(weight, blocks, rescale, constraint=limit, backend="torch")
    rotation = diag_oft.get_r(blocks, constraint=limit)
    eye = torch.eye(side)
    turned = torch.einsum("knm,kn...->km...", strength * (rotation - eye) + eye, weight.unflatten(0, (count, side)))
    turned = turned.flatten(0, 1)
    return turned if rescale is None else rescale * turned


def _glora(tensors: Tensors, weight: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """GLoRA: W A + B with A = a1 a2 on the inputs and B = b1 b2 (arXiv 2306.07967), as LyCORIS scales it."""
    a1, a2, b1, b2 = (tensors[name] for name in ("a1", "a2", "b1", "b2"))
    rank = a2.shape[0]
    inputs = weight.shape[1]
    mixing = _product(a1, a2, (inputs, inputs))
    on_inputs = torch.einsum("oi...,ij->oj...", weight, mixing)
    if "bm" in tensors:
        added = _tucker(tensors["bm"], b1.flatten(1).T, b2.flatten(1), weight.shape)
    else:
        added = _product(b1, b2, weight.shape)
    return (on_inputs + added) * _scaling(alpha, rank, False)


def _by_peft(algorithm: Algorithm, tensors: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """PEFT's own OFT, BOFT and IA3, merged by PEFT into a layer of this weight."""
    from peft import BOFTConfig, IA3Config, OFTConfig, inject_adapter_in_model

    layer: Any
    if weight.ndim == 2:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]), bias=False)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    holder = torch.nn.ModuleDict({"layer": layer})
    wrapped: Any
    config: Any
    if algorithm is Algorithm.peft_oft:
        turns, half = tensors["oft_r"].shape
        side = round((1 + math.sqrt(1 + 8 * half)) / 2)
        inputs = math.prod(weight.shape[1:])
        if side * (side - 1) // 2 != half or inputs % side or turns not in (1, inputs // side):
            raise ValueError(f"rotations of {tuple(tensors['oft_r'].shape)} do not fit {tuple(weight.shape)}")
        shared = turns == 1 and inputs != side
        config = OFTConfig(target_modules=["layer"], r=0, oft_block_size=side, block_share=shared)
        values = {"oft_R.x.weight": tensors["oft_r"]}
    elif algorithm is Algorithm.peft_boft:
        factors, count, side, _ = tensors["boft_r"].shape
        if count * side != math.prod(weight.shape[1:]):
            raise ValueError(f"rotations of {tuple(tensors['boft_r'].shape)} do not fit {tuple(weight.shape)}")
        config = BOFTConfig(target_modules=["layer"], boft_block_size=side, boft_n_butterfly_factor=factors)
        values = {"boft_R.x": tensors["boft_r"], "boft_s.x": tensors["boft_s"]}
    else:
        scale = tensors["ia3_l"]
        on_input = scale.ndim >= 2 and scale.shape[0] == 1 and scale.shape[1] == weight.shape[1]
        if scale.numel() != weight.shape[1 if on_input else 0]:
            raise ValueError(f"factors of {tuple(scale.shape)} do not fit a weight of {tuple(weight.shape)}")
        config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if on_input else [])
        values = {"ia3_l.x": scale}
    inject_adapter_in_model(config, holder, adapter_name="x")
    state = holder.state_dict()
    for name, value in values.items():
        if state[f"layer.{name}"].shape != value.shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, not {tuple(state[f'layer.{name}'].shape)}")
        state[f"layer.{name}"] = value
    holder.load_state_dict(state)
    wrapped = holder["layer"]
    wrapped.merge(safe_merge=True, adapter_names=["x"])
    merged = wrapped.get_base_layer().weight.detach()
    return merged if strength == 1 else weight + strength * (merged - weight)
