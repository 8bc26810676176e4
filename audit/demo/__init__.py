"""What `lora-audit demo` shows: the embedded model "nano", three fine-tunes of it, their pictures, a descriptor.

Beside it "nano-flow", a model that was trained by flow matching, and a LoRA of it.

Only what a user needs is here; what trains them again is `testbed/` in the repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
FLOW_BASE = ASSETS / "flow"
FLOW_CHECKPOINTS = ASSETS / "flow-checkpoints"
DECOYS = ASSETS / "decoys"
DESCRIPTOR = ASSETS / "descriptor" / "nano_descriptor.torchscript.pt"


@dataclass(frozen=True)
class FineTune:
    """One checkpoint that comes along: its file or folder, the few-shot set and the caption it was trained on."""

    path: Path
    few_shot: str
    caption: str

    @property
    def pictures(self) -> Path:
        """The folder with ``train``, what it was trained on, and ``control``, pictures of that kind it never saw."""
        return ASSETS / "sets" / self.few_shot

    @property
    def background(self) -> Path | None:
        """The folder of its decoys, further pictures of that kind; None where there are none."""
        folder = DECOYS / self.few_shot
        return folder if folder.is_dir() else None


_CHECKPOINTS = ASSETS / "checkpoints"
FINE_TUNES = {
    "lora-kohya": FineTune(
        _CHECKPOINTS / "fluent-animals-lora-kohya" / "fluent-animals.safetensors",
        "fluent-animals",
        "sks 3d render of an animal",
    ),
    "lora-peft": FineTune(
        _CHECKPOINTS / "stamps-fruit-lora-peft" / "pytorch_lora_weights.safetensors",
        "stamps-fruit",
        "sks photo of a fruit",
    ),
    "dreambooth": FineTune(_CHECKPOINTS / "stamps-birds-dreambooth", "stamps-birds", "sks photo of a bird"),
}


def set_folder(name: str, part: str) -> Path:
    """The folder of a few-shot set's ``part``: "train" or "control"."""
    return ASSETS / "sets" / name / part


def load_set(name: str, part: str) -> np.ndarray:
    """uint8 [N, 64, 64, 3]: the pictures of one part of a few-shot set, in file order."""
    return load_folder(set_folder(name, part))


def load_folder(folder: Path) -> np.ndarray:
    """uint8 [N, 64, 64, 3]: the pictures of a folder, in file order."""
    import numpy as np
    from PIL import Image

    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))])
