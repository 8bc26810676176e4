"""Weights of 8 bits and the scales beside them: as ComfyUI, its converters and DeepSeek's layout write them.

A weight is its stored number times its scale: one for the tensor, one a row, or one a block of rows and columns. What
ComfyUI's marker (``comfy_quant``, or ``_quantization_metadata`` in the header) says beyond that is refused, since a
rotated or packed weight has the same shape and type as a plain one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from audit.models.safetensors_header import TensorInfo
from audit.untrusted.documents import parse_json

if TYPE_CHECKING:  # crawlers sketch what they store, and have no torch
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")  # all are factors, the last one by its name's spite
MARKER = ".comfy_quant"
HEADER_KEY = "_quantization_metadata"
MAX_MARKER_BYTES = 1 << 16
_FORMATS = re.compile(r"float8_e(?:4m3fn|5m2)(?:_rowwise|_blockwise|_block3d)?|int8_tensorwise")
_HARMLESS = frozenset({
    "format", "group_size", "block_size", "full_precision_matrix_mult", "orig_dtype", "orig_shape",
})  # fmt: skip


def scale_name(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The tensor that scales ``name``, where it is a weight of 8 bits that has one."""
    if tensors[name].dtype not in (*FLOAT8, "I8") or not name.endswith(".weight"):
        return None
    return next((found for s in SCALES if (found := name.removesuffix(".weight") + s) in tensors), None)


def expanded(name: str, scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``scale`` (float32) so that it multiplies a weight of ``shape``. Raises ValueError where it cannot be placed."""
    sizes = list(scale.shape)
    while len(sizes) > max(len(shape), 1) and sizes[-1] == 1:
        sizes.pop()
    if scale.numel() == 1:
        return scale.reshape(())
    if len(sizes) == 1 and shape and sizes[0] == shape[0]:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if len(sizes) == len(shape) and all(whole % part == 0 for whole, part in zip(shape, sizes, strict=True)):
        blocks = scale.reshape(sizes)
        for axis, (whole, part) in enumerate(zip(shape, sizes, strict=True)):
            blocks = blocks.repeat_interleave(whole // part, dim=axis)
        return blocks
    raise ValueError(f"the scale of {name[:120]} has the shape {tuple(scale.shape)}, the weight {tuple(shape)}")


def check_kind(name: str, info: TensorInfo, scaled: bool) -> None:
    """Raise ValueError where the numbers of a tensor are not what they stand for: packed, or integers without scale."""
    if info.dtype in (*FLOATS, *FLOAT8) or (info.dtype == "I8" and scaled):
        return
    raise ValueError(
        f"{name[:120]} is stored as {info.dtype}, which is not read: give the file in float16, bfloat16 or float8"
    )


def check_marker(name: str, claims: Any) -> None:
    """Raise ValueError where ComfyUI's marker ``name`` says more than that a weight is multiplied by its scale."""
    kind = claims.get("format") if isinstance(claims, dict) else None
    if not isinstance(kind, str) or not _FORMATS.fullmatch(kind):
        raise ValueError(f"{name[:120]} is quantised as {str(kind)[:40]}, which is not read: give it in float16")
    further = sorted(key for key, value in claims.items() if key not in _HARMLESS and value not in (None, False))
    if further:
        raise ValueError(f"{name[:120]} is quantised with {', '.join(further)[:80]}, which is not read")


def parsed_marker(name: str, tensor: torch.Tensor) -> Any:
    """The JSON in a marker's bytes (uint8 [n]). Raises ValueError."""
    import torch

    if tensor.dtype is not torch.uint8 or tensor.numel() > MAX_MARKER_BYTES:
        raise ValueError(f"{name[:120]} is no marker of a quantisation")
    return marker_of(name, bytes(tensor.flatten().tolist()))


def marker_of(name: str, content: bytes) -> Any:
    """The JSON in the bytes of a marker. Raises ValueError."""
    try:
        return parse_json(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name[:120]} is no marker of a quantisation: {str(error)[:80]}") from error


def header_markers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a header says of the quantisation of its layers. Raises ValueError where it cannot be read."""
    if HEADER_KEY not in metadata:
        return {}
    try:
        layers = parse_json(metadata[HEADER_KEY]).get("layers") or {}
        return {str(name): claims for name, claims in layers.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {HEADER_KEY} cannot be read: {str(error)[:80]}") from error
