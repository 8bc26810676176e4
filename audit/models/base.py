"""Load a base model: a diffusers folder, a single safetensors file, or a pinned revision on the hub."""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from audit.errors import CheckpointError
from audit.models.safetensors_header import read_header

WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)
CONFIG_FILES = ["*.json", "*/*.json", "*/*.txt"]
# The configuration (not the weights) of a single-file Stable Diffusion 1.x comes from here unless one is given.
DEFAULT_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"


@dataclass(frozen=True)
class BaseModel:
    """The public model a checkpoint started from, in float32 on the CPU.

    ``revision`` identifies the weights: the hub's commit, or a SHA256 of the local files. ``placed`` holds copies
    of its parts on devices, so that they are made once for all checkpoints.
    """

    name: str
    revision: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    placed: dict[tuple[str, str, torch.dtype], Any] = field(default_factory=dict, repr=False, compare=False)

    def part_on(self, part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """The network ``part`` in ``dtype`` on ``device``; the float32 one stays on the CPU. All are channels-last."""
        network = getattr(self, part)
        if device.type == "cpu" and dtype is torch.float32:
            return network
        key = part, str(device), dtype
        if key not in self.placed:
            self.placed[key] = copy.deepcopy(network).to(device, dtype, memory_format=torch.channels_last).eval()
        return self.placed[key]


@dataclass(frozen=True)
class BaseLocation:
    """Where a base model's files are, found and checked but not loaded. ``path`` is a folder or a single file."""

    name: str
    revision: str
    path: Path
    config: Path | None = None


def locate_base(source: str, config: str | None = None) -> BaseLocation:
    """Find ``source``: a local diffusers folder, a local .safetensors file, or ``owner/name@commit`` on the hub.

    ``config`` is a folder or ``owner/name@commit`` with the configuration of a single file. Only safetensors weights
    are read. Raises CheckpointError for what is missing, unsafe, or not pinned to a commit.
    """
    path = Path(source)
    if path.is_dir():
        _check_folder(path)
        return BaseLocation(path.resolve().name, _folder_revision(path), path)
    if path.is_file():
        return _locate_file(path, config)
    if HUB_ID.fullmatch(source.partition("@")[0]) and not source.startswith((".", "/")):
        folder = download_snapshot(source, [*CONFIG_FILES, *(f"{part}/*.safetensors" for part in WEIGHT_FILES)])
        _check_folder(folder)
        return BaseLocation(source.partition("@")[0], source.partition("@")[2], folder)
    raise CheckpointError(
        f"{source} is neither a folder, nor a .safetensors file, nor a hub id: check the path of the base model"
    )


def load_base(location: BaseLocation) -> BaseModel:
    """Load a located base model. Raises CheckpointError where it is not Stable Diffusion 1.x in layout."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()
    return _from_file(location) if location.config else _from_folder(location)


def download_snapshot(source: str, patterns: list[str]) -> Path:
    """The local snapshot of ``owner/name@commit``, downloading the files that match ``patterns`` where needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    if not COMMIT.fullmatch(revision):
        raise CheckpointError(
            f"{source}: name the commit, as owner/name@<40 hex digits>; a branch can change under an audit "
            "(the commit is on the model page under 'Files and versions')"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be downloaded: {type(error).__name__}: {str(error)[:300]}") from error


def _folder_revision(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and path.suffix in (".safetensors", ".json", ".txt") and len(relative.parts) <= 2:
            digest.update(str(relative).encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json: give a folder that save_pretrained() of a pipeline wrote"
        )
    for part, stem in WEIGHT_FILES.items():
        found = sorted((folder / part).glob(f"{stem}*.safetensors"))
        if not found:
            raise CheckpointError(f"{folder / part} has no {stem}.safetensors: only safetensors weights are read")
        for path in found:
            read_header(path)


def _from_folder(location: BaseLocation) -> BaseModel:
    from diffusers import StableDiffusionPipeline

    whole = (location.path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            location.path,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            use_safetensors=True,
            local_files_only=True,
            variant=None if whole else "fp16",
            dtype=torch.float32,
        )
    except _LOADING_ERRORS as error:
        raise CheckpointError(
            f"{location.path} is not a Stable Diffusion model that diffusers loads: {str(error)[:300]}"
        ) from error
    return _base_of(pipeline, location)


def _locate_file(path: Path, config: str | None) -> BaseLocation:
    header = read_header(path)
    if not any(name.startswith("model.diffusion_model.") for name in header.tensors):
        raise CheckpointError(
            f"{path} is not a whole single-file Stable Diffusion checkpoint (no model.diffusion_model.* tensors): "
            "a base model needs the UNet, the VAE and the text encoder"
        )
    source = config or DEFAULT_CONFIG
    folder = Path(source) if Path(source).is_dir() else download_snapshot(source, CONFIG_FILES)
    with path.open("rb") as file:
        return BaseLocation(path.name, hashlib.file_digest(file, "sha256").hexdigest(), path, folder)


def _from_file(location: BaseLocation) -> BaseModel:
    from diffusers import StableDiffusionPipeline

    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(location.path),
            config=str(location.config),
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            dtype=torch.float32,
        )
    except _LOADING_ERRORS as error:
        raise CheckpointError(
            f"{location.path} does not load with the configuration in {location.config}: {str(error)[:300]}; "
            "give the matching one with --base-config"
        ) from error
    return _base_of(pipeline, location)


def _base_of(pipeline: Any, location: BaseLocation) -> BaseModel:
    parts = {
        part: getattr(pipeline, part).requires_grad_(False).to(memory_format=torch.channels_last).eval()
        for part in WEIGHT_FILES
    }
    if parts["unet"].config.in_channels != parts["vae"].config.latent_channels:
        raise CheckpointError(
            f"{location.name}: its UNet takes {parts['unet'].config.in_channels} channels, its latents have "
            f"{parts['vae'].config.latent_channels}: inpainting and other variants cannot be audited"
        )
    return BaseModel(
        location.name, location.revision, tokenizer=pipeline.tokenizer, scheduler=pipeline.scheduler, **parts
    )
