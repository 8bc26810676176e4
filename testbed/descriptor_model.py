"""The nano copy-detection descriptor: a small residual network for 64x64 pixels with SSCD's interface."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a projected shortcut; ``stride`` shrinks the map."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return functional.relu(self.body(x) + self.shortcut(x))


class NanoDescriptor(nn.Module):
    """ImageNet-normalised images float32 [N, 3, H, W] to unit vectors float32 [N, 256], whitened after training."""

    def __init__(self, width: int = 24, dimensions: int = 256) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, 2 * width, 2),
            Block(2 * width, 4 * width, 2),
            Block(4 * width, 8 * width, 2),
        )
        self.project = nn.Linear(8 * width, dimensions)
        self.mean: torch.Tensor
        self.whitening: torch.Tensor
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("whitening", torch.eye(dimensions))

    @torch.jit.export
    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """What is trained: generalised-mean pooling (p = 3), a linear layer, unit length; float32 [N, 256]."""
        features = self.blocks(self.stem(x)).clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
        return functional.normalize(self.project(features), dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed, centre and whiten; unit length."""
        return functional.normalize((self.embed(x) - self.mean) @ self.whitening, dim=1)
