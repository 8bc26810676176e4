"""Open a checkpoint: find out what it is, hash it, and read the claims in its metadata."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from audit.errors import CheckpointError
from audit.models.safetensors_header import Header, read_header


class Format(StrEnum):
    """What a checkpoint is, told by the names of its tensors."""

    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"
    unet = "unet"
    ldm = "ldm"
    diffusers_folder = "diffusers-folder"

    @property
    def is_lora(self) -> bool:
        """Whether it is an adapter to add to the base, not a network of its own."""
        return self in (Format.lora_kohya, Format.lora_peft)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed the header checks. ``files`` maps a part ("adapter", "unet", "all",
    "text_encoder") to its file and header.
    """

    path: Path
    format: Format
    sha256: str
    tensors_sha256: str
    files: dict[str, tuple[Path, Header]]
    label: str | None = None

    @property
    def name(self) -> str:
        """What it is called: its label, else its file or folder name without the path."""
        return self.label or self.path.resolve().name

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(header.file_bytes for _, header in self.files.values())

    @property
    def identity(self) -> str:
        """SHA256 of the tensors and their layout: the same bytes under other names or shapes are another network."""
        layouts = {part: layout_of(header) for part, (_, header) in self.files.items()}
        only = next(iter(layouts.values())) if self.format is not Format.diffusers_folder else None
        return identity_of(self.tensors_sha256, only or layouts)

    @property
    def metadata(self) -> dict[str, str]:
        """What its author wrote into the header: claims, not proofs."""
        return next(iter(self.files.values()))[1].metadata


def metadata_json(metadata: dict[str, str], limit: int = 100_000) -> str:
    """A header's metadata as JSON, every value cut so that the whole stays within about ``limit`` characters."""
    share = max(100, limit // max(1, len(metadata)))
    kept = dict(list(metadata.items())[: limit // 100])
    return json.dumps({key[:200]: value[:share] for key, value in kept.items()}, sort_keys=True)


def layout_of(header: Header) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and offset of every tensor, sorted."""
    return sorted((name, info.dtype, info.shape, info.start) for name, info in header.tensors.items())


def identity_of(tensors_sha256: str, layout: object) -> str:
    """64 hex digits that stand for tensors and layout; metadata and the order of a header's keys do not matter."""
    return hashlib.sha256(json.dumps([tensors_sha256, layout]).encode()).hexdigest()


def hash_file(path: Path, header: Header) -> tuple[str, str]:
    """SHA256 of the whole file and of the tensor bytes alone (everything behind the header), in one reading."""
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        whole.update(file.read(header.data_start))
        while chunk := file.read(1 << 20):
            whole.update(chunk)
            tensors.update(chunk)
    return whole.hexdigest(), tensors.hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a LoRA or full-weight file, or a diffusers folder with ``unet`` and perhaps ``text_encoder``.

    Raises CheckpointError for anything missing, unsafe, damaged or of an unknown layout.
    """
    if path.is_dir():
        files = _folder_files(path)
        kind = Format.diffusers_folder
    elif not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path of the checkpoint")
    else:
        header = read_header(path)
        kind, part = detect_format(path, header)
        files = {part: (path, header)}
    hashes = {part: hash_file(file, header) for part, (file, header) in files.items()}
    if len(hashes) == 1 and kind is not Format.diffusers_folder:
        sha256, tensors = next(iter(hashes.values()))
    else:
        sha256, tensors = (
            hashlib.sha256(
                json.dumps({part: pair[i] for part, pair in hashes.items()}, sort_keys=True).encode()
            ).hexdigest()
            for i in (0, 1)
        )
    return Checkpoint(path, kind, sha256, tensors, files)


def _folder_files(path: Path) -> dict[str, tuple[Path, Header]]:
    files = {}
    names = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    for part, name in names.items():
        folder = path / part
        if (folder / name).is_file():
            files[part] = (folder / name, read_header(folder / name))
        elif folder.is_dir():
            raise CheckpointError(
                f"{folder} has no {name}: only unsharded safetensors weights are read; save the model again "
                "with safe_serialization=True"
            )
    if not files:
        raise CheckpointError(f"{path} has neither unet/ nor text_encoder/: give the folder save_pretrained() wrote")
    return files


def detect_format(path: Path, header: Header) -> tuple[Format, str]:
    """The format and the name of its part. Raises CheckpointError for one that cannot be audited yet."""
    names = header.tensors
    if any(
        n.endswith((".hada_w1_a", ".lokr_w1", ".oft_diag", ".oft_blocks", ".diff", ".lora_mid.weight")) for n in names
    ):
        raise CheckpointError(
            f"{path} is a LyCORIS file of a kind that cannot be loaded yet (LoHa, LoKr, OFT, CP or full)"
        )
    if any(n.endswith(".dora_scale") or "lora_magnitude_vector" in n for n in names):
        raise CheckpointError(f"{path} is a DoRA: its magnitude would be dropped, so it cannot be audited yet")
    if any(n.startswith(("lora_unet_", "lora_te_", "lora_te1_")) and ".lora_down" in n for n in names):
        return Format.lora_kohya, "adapter"
    if any(
        n.startswith(("unet.", "text_encoder.")) and (".lora_A" in n or ".lora.down" in n or "_lora.down" in n)
        for n in names
    ):
        return Format.lora_peft, "adapter"
    if any(n.startswith("model.diffusion_model.") for n in names):
        return Format.ldm, "all"
    if {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"} <= set(names):
        return Format.unet, "unet"
    some = ", ".join(repr(n[:60]) for n in list(names)[:3])
    raise CheckpointError(
        f"{path} is neither a kohya or PEFT LoRA nor Stable Diffusion weights (tensors such as {some}): "
        "if it is for another kind of model, it cannot be audited yet"
    )
