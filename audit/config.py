"""The settings of an audit: one dataclass whose fields carry their help text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Method(StrEnum):
    """How sampling is steered."""

    direct = "direct"
    cfg = "cfg"
    model_guidance = "model-guidance"


class BaseCaption(StrEnum):
    """What the base's prediction is conditioned on in model guidance."""

    empty = "empty"
    same = "same"


class Solver(StrEnum):
    """Which of diffusers' schedulers integrates the sampling ODE."""

    ddim = "ddim"
    dpmpp = "dpm++"


class Clustering(StrEnum):
    """How generations become extractions."""

    peaks = "peaks"
    cliques = "cliques"


class StoredImages(StrEnum):
    """Which images a workspace keeps."""

    extractions = "extractions"
    all = "all"
    hashes_only = "hashes-only"


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Every setting that changes the result of an audit; all of them go into its id."""

    method: Method = _setting(Method.model_guidance, "How sampling is steered: direct, cfg or model-guidance.")
    w: float | None = _setting(
        None,
        "Guidance weight: a number, or auto: by how far fine-tuning has moved the predictions (3 for cfg). The paper: "
        "5 for LoRA, 3 for DreamBooth on Stable Diffusion.",
    )
    k: float = _setting(0.0, "Correction term of model guidance (the paper: -0.02 for DreamBooth, 0 for LoRA).")
    base_caption: BaseCaption = _setting(
        BaseCaption.empty, "What the base's prediction is conditioned on: the empty caption, or the same one."
    )
    solver: Solver = _setting(Solver.dpmpp, "ODE solver: dpm++, or ddim as in the paper (which wants 50 steps).")
    steps: int = _setting(15, "Solver steps an image.")
    seed: int = _setting(0, "Seed of all starting noise.")
    images_per_training_image: int = _setting(50, "Images sampled = this times N0.")
    lora_scale: float = _setting(1.0, "Strength at which a LoRA is applied.")
    clustering: Clustering = _setting(
        Clustering.peaks, "peaks (default, never times out) or cliques (the paper's, up to 30 s a threshold)."
    )
    stored_images: StoredImages = _setting(
        StoredImages.extractions,
        "Images kept: extractions, all, or hashes-only (no pixels leave memory: only descriptors and hashes are kept).",
    )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for hashing and storing."""
        return asdict(self)


def help_of(name: str) -> str:
    """The help text of one setting."""
    return str(Settings.__dataclass_fields__[name].metadata["help"])


def default_of(name: str) -> Any:
    """The default of one setting."""
    return Settings.__dataclass_fields__[name].default
