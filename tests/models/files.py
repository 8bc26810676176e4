"""Checkpoints written by other libraries' own means, over nano models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.models.base import BaseModel
from audit.workspace import Workspace


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


def lora(base: BaseModel, path: Path, prefix: str, only: str = "", rank: int = 2) -> Path:
    """A LoRA in kohya's style on the denoiser's linear layers whose name has ``only``."""
    generator = torch.Generator().manual_seed(12)
    state = {}
    for name, module in base.denoiser.named_modules():
        if isinstance(module, torch.nn.Linear) and only in name:
            stem = f"{prefix}{name.replace('.', '_')}"
            state[f"{stem}.lora_down.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.1
            state[f"{stem}.lora_up.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.1
    save_file(state, path)
    return path


def configured(pipeline: Any, part: str, **values: Any) -> Any:
    """``pipeline`` as far as its parts are looked at, with other values in the configuration of one."""
    config = SimpleNamespace(**{**getattr(pipeline, part).config, **values})
    return SimpleNamespace(**{**pipeline.components, part: SimpleNamespace(config=config)})


def audited(base: Path, file: Path, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """``lora-audit scan`` of ``file`` with three random pictures as references: its row, and rows of other tables."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, pixels in enumerate(np.random.default_rng(3).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    arguments = [
        "scan", str(file), "--base", str(base), "--references", str(pictures), "--descriptor", "nano", "--n0", "2",
        "--steps", "2", "--images-per-training-image", "2", "--caption", "a photo of sks dog", "--resolution", "64",
        "--workspace", str(folder / "w"), "--set", "settings.membership_evaluations=120", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 11, done.output  # random networks sample noise
    assert Path(json.loads(done.stdout)["report"]).is_file()
    workspace = Workspace(folder / "w")
    [row] = workspace.rows("SELECT * FROM audits")
    [counts] = workspace.rows("SELECT count(score) AS membership FROM memberships")
    return row, counts
