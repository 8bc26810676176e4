"""Checkpoints written by other libraries' own means, over nano models."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from audit.models.base import BaseModel


def full_change(base: BaseModel, path: Path, only: str = "", size: float = 0.05) -> Path:
    """The denoiser's weights with noise on those whose name has ``only``, as save_pretrained() writes them."""
    generator = torch.Generator().manual_seed(11)
    state = {}
    for name, tensor in base.denoiser.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator) * size * (tensor.std() if tensor.numel() > 1 else 1)
        state[name] = (tensor + noise if only in name else tensor).contiguous()
    folder = path / base.architecture.denoiser
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return path
