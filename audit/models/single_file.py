"""A base model in one file: what such a file lacks, and one of the denoiser alone, as ComfyUI has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.errors import CheckpointError
from audit.models.families.base import ModelFamily
from audit.models.families.identify import family_of_shapes
from audit.models.families.registry import FAMILIES
from audit.models.formats.detect import detect
from audit.models.formats.prediction import Prediction, followed, said
from audit.models.index import class_of, is_absent, read_index
from audit.models.safetensors_header import read_header

if TYPE_CHECKING:
    from audit.models.safetensors_header import TensorInfo

_OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder")


def is_alone(tensors: Iterable[str]) -> bool:
    """Whether names of tensors are a denoiser's alone: none is of a VAE or a text encoder."""
    return not any(name.startswith(_OTHER_PARTS) for name in tensors)


def missing_parts(tensors: Iterable[str], architecture: ModelFamily) -> list[str]:
    """The parts of a single file that a pipeline of this family cannot do without and that are not in it."""
    names = list(tensors)
    wanted: dict[str, tuple[str, ...]] = {"VAE": ("first_stage_model.", "vae.")}
    prefixes = dict(zip(architecture.encoders, architecture.encoder_prefixes, strict=False))
    for number, encoder in enumerate(architecture.encoders, start=1):
        if encoder not in architecture.optional:
            what = "text encoder" if len(architecture.encoders) == 1 else f"text encoder {number}"
            wanted[what] = prefixes.get(encoder, ("cond_stage_model.", "text_encoders."))
    return [what for what, places in wanted.items() if not any(name.startswith(places) for name in names)]


def check_alone(path: Path, tensors: Mapping[str, TensorInfo], architecture: ModelFamily, folder: Path) -> None:
    """Raise CheckpointError where the file ``path`` is no denoiser of the pipeline in ``folder``."""
    found, family, index = detect(tensors), family_of_shapes(tensors), read_index(folder)
    if not is_absent(index, "transformer_2"):
        raise CheckpointError(
            f"{folder} has two denoisers: which of them {path} is cannot be told; give a whole folder"
        )
    if found is not None and found[0].is_adapter:
        raise CheckpointError(f"{path} is an adapter and no base model: give what it was trained on")
    shown = FAMILIES.get(family) if family else None
    if shown is not None and shown.denoiser_class != architecture.denoiser_class:
        raise CheckpointError(
            f"{path} is of family {family}, and {folder} is a {architecture.pipeline}: give the folder of a "
            f"{shown.pipeline} with --base-config"
        )
    if not (folder / architecture.denoiser / "config.json").is_file():
        raise CheckpointError(f"{folder} has no {architecture.denoiser}/config.json, which {path} is read by")
    said_by(path)


def said_by(path: Path) -> Prediction:
    """What the file of a base model says that it predicts. Raises CheckpointError for what is not sampled here."""
    header = read_header(path)
    try:
        return said(header.tensors, header.metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def follow(pipeline: Any, architecture: ModelFamily, path: Path) -> None:
    """Let ``pipeline`` predict what its file ``path`` says, whatever the configuration beside it does."""
    if not architecture.flow:
        pipeline.scheduler = followed(pipeline.scheduler, said_by(path))


def empty_denoiser(architecture: ModelFamily, folder: Path) -> Any:
    """The denoiser of the pipeline in ``folder`` without weights; tables that are no parameters are there."""
    import diffusers
    from accelerate import init_empty_weights

    name = class_of(read_index(folder), architecture.denoiser)
    if name != architecture.denoiser_class:
        raise ValueError(f"its {architecture.denoiser} is a {name[:80]}, not a {architecture.denoiser_class}")
    kind = getattr(diffusers, name)
    config = kind.load_config(folder / architecture.denoiser, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        return kind.from_config(config)
