"""The alpha of PEFT files, which is not among their tensors: diffusers writes it into the header, PEFT beside the file.

It changes the network, so it is part of a checkpoint's identity wherever it is not the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audit.errors import CheckpointError

KEY = "lora_adapter_metadata"  # of the header's metadata, where diffusers keeps it
CONFIG_NAME = "adapter_config.json"  # beside the file, where PEFT keeps it
MAX_CONFIG_BYTES = 1 << 20
_COMPONENTS = {
    "unet": "denoiser", "transformer": "denoiser", "text_encoder": "te1", "text_encoder_2": "te2",
    "text_encoder_3": "te3",
}  # fmt: skip
_KEPT = ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "peft_type")


@dataclass(frozen=True)
class Scaling:
    """What a PEFT configuration says of one part's adapters."""

    alpha: float | None = None
    rank_stabilised: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str) -> float | None:
        """The alpha of a module: the pattern that its name ends with, else the general one."""
        found = [value for name, value in self.patterns.items() if module == name or module.endswith(f".{name}")]
        return found[0] if found else self.alpha


def read_scaling(metadata: Mapping[str, str]) -> dict[str, Scaling]:
    """By part ("denoiser", "te1", ...), from a header's metadata; empty where it says nothing that can be read."""
    try:
        claims = json.loads(metadata.get(KEY, "{}"))
        if not isinstance(claims, dict):
            return {}
        return {
            part: scaling
            for component, part in _COMPONENTS.items()
            if (
                scaling := _scaling({k.split(".", 1)[1]: v for k, v in claims.items() if k.startswith(f"{component}.")})
            )
        }
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        return {}


def _scaling(claims: dict[str, Any]) -> Scaling | None:
    alpha = claims.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        return None
    patterns = claims.get("alpha_pattern") or {}
    numbers = {str(k): float(v) for k, v in patterns.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    return Scaling(float(alpha), claims.get("use_rslora") is True, numbers)


def identifying(metadata: Mapping[str, str]) -> list[list[Any]]:
    """What of it belongs to a file's identity: nothing where every alpha is its rank, the usual case."""
    try:
        claims = json.loads(metadata.get(KEY, "{}"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(claims, dict):
        return []
    found = []
    for component, part in _COMPONENTS.items():
        own = {k.partition(".")[2]: v for k, v in claims.items() if k.startswith(f"{component}.")}
        scaling = read_scaling(metadata).get(part)
        if scaling and (scaling.alpha != own.get("r") or scaling.rank_stabilised or scaling.patterns):
            found.append([part, scaling.alpha, scaling.rank_stabilised, sorted(scaling.patterns.items())])
    return found


def with_config_beside(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """``metadata`` with what PEFT's adapter_config.json beside ``path`` says, where there is one.

    Raises CheckpointError where it cannot be read: without it the strength of the adapter would be a guess.
    """
    config = path.with_name(CONFIG_NAME)
    if KEY in metadata or not config.is_file():
        return metadata
    try:
        with config.open("rb") as file:
            claims = json.loads(file.read(MAX_CONFIG_BYTES))
        kept = {f"{part}.{name}": claims[name] for part in ("unet", "transformer") for name in _KEPT if name in claims}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config} cannot be read: {str(error)[:200]}; repair it or take it away") from error
    return {**metadata, KEY: json.dumps(kept)}
