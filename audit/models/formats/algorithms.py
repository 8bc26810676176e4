"""The weights that an adapter's tensors put into effect, algorithm by algorithm.

Sizes are compared with the weight to be changed before anything is multiplied: a file of some kilobytes can declare
factors whose product would fill any memory. Formulas: LoRA arXiv 2106.09685; LoHa, LoKr, IA3, OFT and BOFT as the
LyCORIS library defines them (arXiv 2309.14859, https://github.com/KohakuBlueleaf/LyCORIS); DoRA arXiv 2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from audit.models.formats.by_peft import by_peft, taken_at_the_start
from audit.models.formats.names import Algorithm
from audit.models.formats.scaling import Rotation

Tensors = Mapping[str, torch.Tensor]


def changed(
    algorithm: Algorithm,
    tensors: Tensors,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_scale: float = 1.0,
    alpha: float | None = None,
    rank_stabilised: bool = False,
    *,
    rank: float | None = None,
    start: str | None = None,
    rotation: Rotation | None = None,
    turned_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias after the change; ``weight`` [out, in, ...] and ``bias`` [out] float32 are left as they are.

    ``lora_scale`` multiplies the change (LyCORIS' multiplier). ``alpha`` stands for a missing alpha tensor;
    ``rank_stabilised`` divides it by the square root of the rank. Of PEFT's configuration are ``rank``, which divides
    alpha where no factor shows one, ``start`` (how LoRA took its first factors from the weight) and ``rotation``.
    ``turned_weights``: OFT turns a convolution's weights as OneTrainer does. Raises ValueError where shapes do not fit.
    """
    if start is not None and (algorithm is not Algorithm.lora or {"magnitude", "dora_scale", "mid"} & set(tensors)):
        raise ValueError(f"{start} with {algorithm} and weight decomposition is not read")
    bias = _add(bias, tensors.get("diff_b"), lora_scale)
    given = _alpha(tensors, alpha)
    if algorithm is Algorithm.full:
        return (weight + lora_scale * _fitting(tensors["diff"], weight) if "diff" in tensors else weight), bias
    if algorithm is Algorithm.norm:
        return weight + lora_scale * _fitting(tensors["w_norm"], weight), _add(bias, tensors.get("b_norm"), lora_scale)
    if algorithm is Algorithm.ia3:
        return _ia3(tensors, weight, lora_scale), bias
    if algorithm in (Algorithm.oft, Algorithm.boft):
        return _rotated(algorithm, tensors, weight, given or 0.0, lora_scale), bias
    if algorithm is Algorithm.oft_kohya:
        return _rotated_rows(tensors, weight, given, lora_scale), bias
    if algorithm in (Algorithm.peft_oft, Algorithm.peft_boft, Algorithm.peft_ia3):
        return by_peft(algorithm, tensors, weight, lora_scale, rotation or Rotation(), turned_weights), bias
    if algorithm is Algorithm.glora:
        return weight + lora_scale * _glora(tensors, weight, given), bias
    if algorithm is Algorithm.tlora:
        return weight + lora_scale * _tlora(tensors, weight, given), bias
    delta = low_rank_change(algorithm, tensors, weight.shape, given, rank_stabilised, rank)
    if "magnitude" in tensors:  # PEFT: the lora_scale is part of the direction
        merged = weight + lora_scale * delta
        return _decomposed(merged, tensors["magnitude"].reshape(-1), True, 1.0), bias
    if "dora_scale" in tensors:  # LyCORIS: the lora_scale interpolates the whole
        on_out = _on_out(tensors["dora_scale"], weight)
        return _decomposed(weight + delta, tensors["dora_scale"].reshape(-1), on_out, lora_scale), bias
    if "up_bias" in tensors:
        rows = tensors["down"].shape[0]
        bias = _add(bias, tensors["up_bias"], lora_scale * _scaling(given, rows, rank_stabilised))
    if start is not None:
        rows = tensors["down"].shape[0]
        delta = delta - taken_at_the_start(start, weight, rows, _scaling(given, rows, rank_stabilised))
    return weight + lora_scale * delta, bias


def low_rank_change(
    algorithm: Algorithm,
    tensors: Tensors,
    shape: torch.Size | tuple[int, ...],
    alpha: float | None = None,
    rank_stabilised: bool = False,
    whole_rank: float | None = None,
) -> torch.Tensor:
    """The change of LoRA (with or without CP decomposition), LoHa or LoKr, of ``shape``, at lora_scale 1.

    ``whole_rank`` divides alpha where both of LoKr's factors are whole: PEFT scales them too.
    """
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
            return delta if whole_rank is None or not alpha else delta * (alpha / whole_rank)
        rank = factored
    return delta * _scaling(alpha, rank, rank_stabilised)


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
    if rank < 1:
        raise ValueError("it has no rank")
    if not alpha:
        return 1.0
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def _fitting(change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if change.numel() != weight.numel():
        raise ValueError(f"a change of {tuple(change.shape)} does not fit a weight of {tuple(weight.shape)}")
    return change.reshape(weight.shape)


def _add(bias: torch.Tensor | None, change: torch.Tensor | None, lora_scale: float) -> torch.Tensor | None:
    if change is None:
        return bias
    return lora_scale * change if bias is None else bias + lora_scale * _fitting(change, bias)


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


def _decomposed(weight: torch.Tensor, magnitude: torch.Tensor, on_out: bool, lora_scale: float) -> torch.Tensor:
    """DoRA: ``weight`` with the norm of every output (or input) set to ``magnitude``."""
    side = 0 if on_out else 1
    if magnitude.numel() != weight.shape[side]:
        raise ValueError(f"a magnitude of {magnitude.numel()} does not fit a weight of {tuple(weight.shape)}")
    others = [axis for axis in range(weight.ndim) if axis != side]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    shape = [1] * weight.ndim
    shape[side] = -1
    return weight * (lora_scale * (magnitude.reshape(shape) / norm - 1) + 1)


def _ia3(tensors: Tensors, weight: torch.Tensor, lora_scale: float) -> torch.Tensor:
    """LyCORIS' IA3: every input or output channel scaled by 1 + weight."""
    side = 1 if bool(tensors["on_input"].flatten()[0]) else 0
    scale = tensors["weight"].reshape(-1)
    if len(scale) != weight.shape[side]:
        raise ValueError(f"{len(scale)} factors do not fit a weight of {tuple(weight.shape)}")
    shape = [1] * weight.ndim
    shape[side] = -1
    return weight * (1 + lora_scale * scale.reshape(shape))


def _rotated(
    algorithm: Algorithm, tensors: Tensors, weight: torch.Tensor, constraint: float, lora_scale: float
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
        change = boft.diff_weight(weight, blocks, rescale, constraint=limit, scale=lora_scale, backend="torch")
        return weight + change
    if lora_scale == 1:
        return weight + diag_oft.diff_weight(weight, blocks, rescale, constraint=limit, backend="torch")
    rotation = diag_oft.get_r(blocks, constraint=limit)
    eye = torch.eye(side)
    turned = torch.einsum("knm,kn...->km...", lora_scale * (rotation - eye) + eye, weight.unflatten(0, (count, side)))
    turned = turned.flatten(0, 1)
    return turned if rescale is None else rescale * turned


def _rotated_rows(tensors: Tensors, weight: torch.Tensor, constraint: float | None, lora_scale: float) -> torch.Tensor:
    """sd-scripts' OFT: consecutive rows of the weight each with blocks of their own, all under one constraint.

    The rotation is Cayley's, (I + Q) / (I - Q) with Q = B - B^T shrunk to the norm of constraint times rows.
    """
    if constraint is None:
        raise ValueError("it has no alpha, which constrains its rotations")
    names = [name for number in range(8) if (name := f"oft_blocks_{number}") in tensors]
    if len(names) != sum(name.startswith("oft_blocks_") for name in tensors) or names != [
        f"oft_blocks_{number}" for number in range(len(names))
    ]:
        raise ValueError(f"blocks {', '.join(sorted(tensors))} are not numbered from 0 on")
    sizes = []
    for name in names:
        blocks = tensors[name]
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.numel() == 0:
            raise ValueError(f"blocks of {tuple(blocks.shape)} are no rotations")
        sizes.append(blocks.shape[0] * blocks.shape[1])
    if sum(sizes) != weight.shape[0]:
        raise ValueError(f"blocks of {sizes} rows do not fit a weight of {tuple(weight.shape)}")
    turned = []
    for name, rows in zip(names, weight.split(sizes), strict=True):
        blocks = tensors[name]
        skew = blocks - blocks.transpose(1, 2)
        norm = torch.linalg.vector_norm(skew)
        skew = skew * ((norm.clamp(max=constraint * len(rows)) + 1e-8) / (norm + 1e-8))
        eye = torch.eye(blocks.shape[1])
        rotation = lora_scale * ((eye + skew) @ torch.linalg.inv(eye - skew) - eye) + eye
        parts = rows.unflatten(0, (blocks.shape[0], blocks.shape[1]))
        turned.append(torch.einsum("knm,kn...->km...", rotation, parts).flatten(0, 1))
    return torch.cat(turned)


def _tlora(tensors: Tensors, weight: torch.Tensor, alpha: float | None) -> torch.Tensor:
    """T-LoRA (arXiv 2507.05964): P diag(s) Q less what it began with, all ranks in effect, as LyCORIS applies it.

    Files hold the beginning, or leave it out: then it is the weight's own principal part. Raises ValueError where it
    cannot have been that: the factors would be nowhere near it.
    """
    q, p, values = tensors["q_layer"].flatten(1), tensors["p_layer"].flatten(1), tensors["lambda_layer"].reshape(-1)
    rank = q.shape[0]
    flat = weight.flatten(1)
    if q.shape[1] != flat.shape[1] or p.shape != (flat.shape[0], rank) or len(values) != rank:
        raise ValueError(f"factors of {tuple(p.shape)} and {tuple(q.shape)} do not fit {tuple(weight.shape)}")
    held = [name in tensors for name in ("base_q", "base_p", "base_lambda")]
    if all(held):
        q0, p0 = tensors["base_q"].flatten(1), tensors["base_p"].flatten(1)
        values0 = tensors["base_lambda"].reshape(-1)
        if q0.shape != q.shape or p0.shape != p.shape or len(values0) != rank:
            raise ValueError(f"a beginning of {tuple(p0.shape)} and {tuple(q0.shape)} does not fit its factors")
        began = (p0 * values0) @ q0
    elif any(held):
        raise ValueError("it holds a part of what it began with")
    else:
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        began = (u[:, :rank] * s[:rank]) @ v[:rank]
    change = (p * values) @ q - began
    if not all(held) and torch.linalg.vector_norm(change) > torch.linalg.vector_norm(began):
        raise ValueError(
            "its factors are not near the principal part of the base's weights, and what they began with is not in "
            "the file: T-LoRA from another start, or of another base, is not read"
        )
    return (change * _scaling(alpha, rank, False)).reshape(weight.shape)


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
