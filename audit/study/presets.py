"""The paper's settings as factors (arXiv 2410.03039, section 5.1, and its reference code), for SD v1.4 and the like.

A study file that names a preset may give any factor or setting itself; its own are the stronger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Parts of a study, levels of factors each, and settings of its audits."""

    parts: tuple[dict[str, Any], ...]
    settings: dict[str, Any] = field(default_factory=lambda: {"solver": "ddim", "steps": 50})


_COMMON: dict[str, Any] = {"steps": 200, "batch": 1, "schedule": "constant", "images": 50, "clustering": "cliques"}
_LORA = {**_COMMON, "method": "lora", "layout": "diffusers", "rank": 64, "targets": "attention", "lr": 1e-4}
_DREAMBOOTH = {**_COMMON, "method": "dreambooth", "lr": 2e-6}
_BASELINES = {"extraction": ["direct", "cfg"], "w": "auto"}
PRESETS = {
    "paper-lora": Preset(
        ({**_LORA, **_BASELINES}, {**_LORA, "extraction": "model-guidance", "w": 5.0, "k": 0.0})
    ),
    "paper-dreambooth": Preset(
        ({**_DREAMBOOTH, **_BASELINES}, {**_DREAMBOOTH, "extraction": "model-guidance", "w": 3.0, "k": -0.02})
    ),
}  # fmt: skip
