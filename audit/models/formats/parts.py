"""Copies of networks that share every weight that is not changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from audit.models.families.keys import Target


def sharing_copy(network: nn.Module) -> Any:
    """A copy whose parameters and buffers are the very ones of ``network``: replacing one leaves the other alone."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def gathered(network: nn.Module, target: Target, name: str = "weight") -> torch.Tensor | None:
    """Parameter ``name`` of the target's modules as the file has it: one under the other, halves in its order."""
    parts: list[torch.Tensor] = []
    for module in target.modules:
        part = getattr(network.get_submodule(module), name, None)
        if part is None:
            return None
        parts.append(part)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _swap(whole) if target.swapped else whole


def scatter(network: nn.Module, target: Target, value: torch.Tensor, name: str = "weight") -> None:
    """Put ``value`` into the target's modules. Raises ValueError where the rows do not fit."""
    if target.swapped:
        value = _swap(value)
    modules = [network.get_submodule(module) for module in target.modules]
    if len(modules) == 1 and name not in ("weight", "bias"):
        return set_parameter(modules[0], name, value)
    sizes = [_rows(module) for module in modules]
    if sum(sizes) != value.shape[0]:
        raise ValueError(f"{value.shape[0]} rows do not fit {', '.join(target.modules)} with {sum(sizes)}")
    for module, part in zip(modules, value.split(sizes), strict=True):
        set_parameter(module, name, part)


def layout_of(axes: int, otherwise: torch.memory_format = torch.contiguous_format) -> torch.memory_format:
    """Channels last for what convolutions of pictures take and have, which has four axes."""
    return torch.channels_last if axes == 4 else otherwise


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter, in the memory layout of the one that was there."""
    old = getattr(module, name)
    if old is not None:
        value = value.reshape(old.shape)
    setattr(module, name, nn.Parameter(value.clone(memory_format=layout_of(value.ndim)), requires_grad=False))


def narrow(network: nn.Module, module: str, dtype: torch.dtype | None, base: nn.Module) -> None:
    """Keep the changed parameters of one finished module in ``dtype``; None leaves them in float32.

    Those that are still ``base``'s own are left alone, and those that the network's class wants in float32.
    """
    if dtype is None or dtype is torch.float32:
        return
    own, before = network.get_submodule(module), base.get_submodule(module)
    for name, parameter in own.named_parameters(recurse=False):
        if parameter is not getattr(before, name):
            narrowed = parameter.detach().to(dtype_of(network, f"{module}.{name}", dtype))
            setattr(own, name, nn.Parameter(narrowed, requires_grad=False))


def dtype_of(network: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter ``name`` of a network that runs in ``dtype``.

    Its class may want some modules in float32: T5's ``wo`` in float16, which would overflow, and others in any half,
    which of diffusers' classes are all that they name.
    """
    if dtype is torch.float32:
        return dtype
    exact = tuple(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16 or type(network).__module__.startswith("diffusers."):
        exact += tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if any(part in exact for part in name.split(".")) else dtype


def _rows(module: Any) -> int:
    return module.weight.shape[0]


def _swap(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(reversed(rows.chunk(2))))
