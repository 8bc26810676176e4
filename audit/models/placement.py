"""Where networks run and in which precision: copies on devices, made tensor by tensor.

A network is never copied as a whole on the host: beside the base, as its file stores it, there is one tensor at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from audit.config import Precision
from audit.devices import supports_bfloat16
from audit.errors import ConfigError
from audit.models.formats.parts import dtype_of, layout_of, sharing_copy

DTYPES = {Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}
NAMES = {dtype: precision for precision, dtype in DTYPES.items()}


def choose_precision(precision: Precision, half: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that networks run in: the one asked for; by default float32 on a CPU, on a GPU the family's ``half``.

    A family of bfloat16 overflows in float16 (T5 does), so that on cards without bfloat16 it runs in float32. Raises
    ConfigError where bfloat16 is asked of such a card.
    """
    if precision is Precision.auto:
        if device.type == "cpu" or (half is torch.bfloat16 and not supports_bfloat16(device)):
            return torch.float32
        return half
    if precision is Precision.bf16 and not supports_bfloat16(device):
        raise ConfigError(f"--precision bf16: {device} does not compute in bfloat16; use fp32 or auto")
    return DTYPES[precision]


def next_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What to try where ``dtype`` has overflowed: bfloat16, which has float32's range, then float32, then nothing."""
    if dtype is torch.float16 and supports_bfloat16(device):
        return torch.bfloat16
    return None if dtype is torch.float32 else torch.float32


def decoder_precision(vae: Any, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a VAE beside networks in ``dtype``.

    One that says ``force_upcast`` (Stable Diffusion XL's) overflows in float16, which is a matter of range: bfloat16
    has float32's. Where the device has no bfloat16, it runs in float32.
    """
    if dtype is torch.float16 and vae.config.get("force_upcast"):
        return torch.bfloat16 if supports_bfloat16(device) else torch.float32
    return dtype


def is_placed(network: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every tensor of ``network`` is on ``device`` in the dtype that it runs in there."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return all(
        tensor.device.type == device.type
        and (not tensor.is_floating_point() or tensor.dtype is dtype_of(network, name, dtype))
        for name, tensor in tensors
    )


def place(
    network: nn.Module, device: torch.device, dtype: torch.dtype, like: tuple[nn.Module, nn.Module] | None = None
) -> Any:
    """A copy of ``network`` on ``device`` in ``dtype``, tensor by tensor, channels-last.

    ``like`` is (a network, its copy on the device): what ``network`` shares with the first, the new copy shares with
    the second. Where a module's class wants float32, it stays so.
    """
    copied = sharing_copy(network)
    known: dict[int, torch.Tensor] = {}
    if like is not None:
        before, there = like
        known = {
            id(old): new
            for kind in ("named_parameters", "named_buffers")
            for (_, old), (_, new) in zip(getattr(before, kind)(), getattr(there, kind)(), strict=True)
        }
    for prefix, module in copied.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    floating = tensor.is_floating_point()
                    wanted = dtype_of(network, f"{prefix}.{name}", dtype) if floating else tensor.dtype
                    known[id(tensor)] = _moved(tensor, device, wanted)
                tensors[name] = known[id(tensor)]
    return copied.eval()


def channels_last(network: nn.Module) -> Any:
    """``network`` with the weights that have four axes channels-last; convolutions of videos have five."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return network


def _moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    layout = layout_of(tensor.ndim, torch.preserve_format)
    moved = tensor.detach().to(device, dtype, memory_format=layout)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
