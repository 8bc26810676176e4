"""Open a checkpoint: find out what it is, hash it, and read the claims in its metadata."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from audit.errors import CheckpointError
from audit.models.formats.detect import Format, detect_format
from audit.models.formats.headers import read_any_header
from audit.models.formats.scaling import identifying, with_config_beside
from audit.models.safetensors_header import Header


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed the header checks. ``files`` maps a part ("adapter", "unet", "all",
    "text_encoder") to its file and header; the further files of a part in several are "unet/2" and so on.
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


def layout_of(header: Header) -> list[object]:
    """Name, type, shape and offset of every tensor, sorted, and an alpha that only the metadata has."""
    tensors = sorted((name, info.dtype, info.shape, info.start) for name, info in header.tensors.items())
    return [*tensors, *identifying(header.metadata)]


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
        header = read_any_header(path)
        kind, part = detect_format(path, header)
        if kind.is_adapter:
            header = replace(header, metadata=with_config_beside(path, header.metadata))
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


_PARTS = {
    "unet": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model", "text_encoder_3": "model",
}  # fmt: skip
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def _folder_files(path: Path) -> dict[str, tuple[Path, Header]]:
    files = {}
    for part, stem in _PARTS.items():
        folder = path / part
        if not folder.is_dir():
            continue
        found = [folder / f"{stem}.safetensors"] if (folder / f"{stem}.safetensors").is_file() else []
        found = found or sorted(one for one in folder.glob(f"{stem}-*.safetensors") if _SHARD.search(one.name))
        if not found:
            raise CheckpointError(
                f"{folder} has no {stem}.safetensors: only safetensors weights are read; save the model again "
                "with safe_serialization=True"
            )
        for number, one in enumerate(found, start=1):
            match = _SHARD.search(one.name)
            if match and int(match[2]) != len(found):
                raise CheckpointError(f"{folder} has {len(found)} of the {int(match[2])} files of {stem}")
            files[part if number == 1 else f"{part}/{number}"] = one, read_any_header(one)
    if not files:
        raise CheckpointError(
            f"{path} has none of {', '.join(f'{part}/' for part in _PARTS)}: give the folder save_pretrained() wrote"
        )
    return files
