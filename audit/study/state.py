"""The state of a fine-tuning that is under way: weights and optimiser as one safetensors file, nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from audit.errors import StudyError
from audit.files import whole_file

OF_ADAM = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    key: str,
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    losses: list[float],
) -> None:
    """Keep what is needed to go on behind ``step`` steps of the fine-tuning ``key``; whole or not at all."""
    tensors = {f"weight.{name}": one.detach().cpu().contiguous() for name, one in parameters.items()}
    for name, one in parameters.items():
        for what, value in optimizer.state[one].items():
            tensors[f"{what}.{name}"] = value.detach().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"key": key, "step": str(step), "losses": json.dumps(losses)}
    with whole_file(path) as file:
        file.write(save(tensors, metadata=said))


def load_state(
    path: Path, key: str, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.AdamW
) -> tuple[int, list[float]]:
    """Put back what ``save_state`` has kept; the steps that are done, and the losses of the last ones.

    (0, []) where there is no file, or it is of another fine-tuning. Raises StudyError for a damaged one.
    """
    if not path.is_file():
        return 0, []
    try:
        with safe_open(path, "pt") as file:
            said: dict[str, Any] = file.metadata() or {}
            if said.get("key") != key:
                return 0, []
            with torch.no_grad():
                for name, one in parameters.items():
                    one.copy_(file.get_tensor(f"weight.{name}"))
                    optimizer.state[one] = {
                        what: file.get_tensor(f"{what}.{name}").to("cpu" if what == "step" else one.device)
                        for what in OF_ADAM
                    }
            return int(said["step"]), [float(loss) for loss in json.loads(said["losses"])]
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise StudyError(f"{path} is damaged ({str(error)[:200]}): remove it; that fine-tuning begins again") from error
