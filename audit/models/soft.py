"""Soft prompts: vectors that a text encoder is given in place of token embeddings. Captions that are no words.

Each goes by a name, "soft prompt" and 16 hex digits of its SHA256, wherever a caption is a text: in jobs, in tables,
on pages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call

MOST_VECTORS = 16  # of one prompt
MOST_WIDTH = 16_384  # of a vector
_NAME = re.compile(r"soft prompt [0-9a-f]{16}")


def name_of(vectors: torch.Tensor) -> str:
    """What the soft prompt float32 [V, width] is called."""
    return f"soft prompt {hashlib.sha256(vectors.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]}"


def is_soft(caption: str) -> bool:
    """Whether ``caption`` is the name of a soft prompt."""
    return _NAME.fullmatch(caption) is not None


def soft_prompt(name: str, vectors: Sequence[Sequence[float]]) -> torch.Tensor:
    """float32 [V, width] of the numbers that are kept under ``name``. Raises ValueError where they are not its own."""
    if not 0 < len(vectors) <= MOST_VECTORS or not 0 < len(vectors[0]) <= MOST_WIDTH:
        raise ValueError(f"{name}: a soft prompt has up to {MOST_VECTORS} vectors of up to {MOST_WIDTH} numbers")
    if any(len(one) != len(vectors[0]) for one in vectors):
        raise ValueError(f"{name}: its vectors differ in length")
    found = torch.tensor(vectors, dtype=torch.float32)
    if not found.isfinite().all() or name_of(found) != name:
        raise ValueError(f"{name}: its numbers are not those that it was named by")
    return found


class Embedded:
    """Text states of soft prompts by one text encoder, with gradients."""

    def __init__(self, encoder: Any, tokenizer: Any, device: torch.device) -> None:
        self.encoder, self.table = encoder, encoder.get_input_embeddings().weight
        self.name = next(name for name, one in encoder.named_parameters() if one is self.table)
        empty = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        self.empty = torch.tensor(empty.input_ids, device=device)

    def states(self, soft: torch.Tensor) -> torch.Tensor:
        """[P, tokens, width] of ``soft`` [P, V, width]: start token, vectors, and what follows an empty caption."""
        prompts, count, width = soft.shape
        table = torch.cat([self.table, soft.reshape(-1, width).to(self.table)])
        ids = torch.arange(prompts * count, device=self.table.device).reshape(prompts, count) + len(self.table)
        rest = self.empty[1 : len(self.empty) - count].expand(prompts, -1)
        ids = torch.cat([self.empty[:1].expand(prompts, 1), ids, rest], dim=1)
        found: torch.Tensor = functional_call(self.encoder, {self.name: table}, (ids,), {"attention_mask": None})[0]
        return found
