"""Open a checkpoint: find out what it is, hash it, and read the claims in its metadata."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from audit.choices import Expert
from audit.errors import CheckpointError
from audit.models.experts import PAIR, check_given_as, named_in, told_by_name
from audit.models.formats.detect import Format, detect_format
from audit.models.formats.headers import read_any_header
from audit.models.formats.prediction import Prediction, said, said_by_scheduler
from audit.models.formats.scaling import identifying, joined_configurations, with_config_beside
from audit.models.safetensors_header import Header


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed the header checks. ``files`` maps a part ("adapter", "unet", "all",
    "text_encoder") to its file and header; the further files of a part in several are "unet/2" and so on. Of two files
    for a base's two experts the parts are called as the experts are; one file is for ``expert``, once that is known.
    ``claimed_bases`` (text, field): what others than its headers say that it was trained on.
    """

    path: Path
    format: Format
    sha256: str
    tensors_sha256: str
    files: dict[str, tuple[Path, Header]]
    label: str | None = None
    expert: Expert | None = None
    claimed_bases: tuple[tuple[str, str], ...] = ()

    @property
    def own_experts(self) -> tuple[Expert, ...] | None:
        """The experts that it says itself to change, by parts or names; None where it does not say."""
        if {*PAIR} <= {*self.files}:
            return PAIR
        if self.format is Format.diffusers_folder:
            return tuple(one for one, part in zip(PAIR, TRANSFORMERS, strict=True) if part in self.files)
        return named_in(name for _, header in self.files.values() for name in header.tensors) or None

    @property
    def name(self) -> str:
        """What it is called: its label, else the name of its folder, its file or its two files without the path."""
        own = self.path.resolve().name
        second = self.files.get(Expert.low_noise)
        return self.label or (own if second is None or self.path.is_dir() else f"{own} and {second[0].name}")

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(header.file_bytes for _, header in self.files.values())

    @property
    def identity(self) -> str:
        """SHA256 of the tensors and their layout: the same bytes under other names or shapes are another network."""
        layouts = {part: layout_of(header) for part, (_, header) in self.files.items()}
        whole = self.format is Format.diffusers_folder or len(layouts) > 1
        only = None if whole else next(iter(layouts.values()))
        return identity_of(self.tensors_sha256, only or layouts)

    @property
    def metadata(self) -> dict[str, str]:
        """What its author wrote into the headers: claims, not proofs. PEFT's configurations of all parts are joined."""
        headers = [header for _, header in self.files.values()]
        first = headers[0].metadata
        if len(headers) == 1 or not self.format.is_adapter:
            return first
        if {*PAIR} <= {*self.files}:
            return {**headers[1].metadata, **first}
        return {**first, **joined_configurations([header.metadata for header in headers])}

    @property
    def prediction(self) -> Prediction:
        """What it says that it predicts. Raises ValueError for what contradicts itself or is not sampled here."""
        names = [name for _, header in self.files.values() for name in header.tensors]
        told = said(names, self.metadata)
        if told.kind is None and self.format is Format.diffusers_folder:
            return said_by_scheduler(self.path)
        return told


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


def open_checkpoint(path: Path, low_noise: Path | None = None) -> Checkpoint:
    """Open a LoRA or full-weight file, or a diffusers folder with ``unet`` and perhaps ``text_encoder``.

    With ``low_noise``, or of a folder with a high-noise and a low-noise file, both are the checkpoint. Raises
    CheckpointError for anything missing, unsafe, damaged or of an unknown layout.
    """
    if low_noise is not None:
        return _pair(path, low_noise)
    if path.is_dir():
        if adapter := _only_adapter(path):
            return replace(open_checkpoint(adapter), path=path)
        if pair := _experts_in(path):
            return replace(_pair(*pair), path=path)
        files = _adapter_files(path)
        kind = Format.lora_peft if files else Format.diffusers_folder
        files = files or _folder_files(path)
    elif not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path of the checkpoint")
    else:
        header = read_any_header(path)
        kind, part = detect_format(path, header)
        if kind is Format.lora_peft:  # a kohya file has its own alpha, whatever lies beside it
            header = replace(header, metadata=with_config_beside(path, header.metadata))
        files = {part: (path, header)}
    return _opened(path, kind, files)


def _opened(path: Path, kind: Format, files: dict[str, tuple[Path, Header]]) -> Checkpoint:
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


def _pair(high_noise: Path, low_noise: Path) -> Checkpoint:
    """Two files, one for each of a base's experts."""
    opened = {}
    for expert, path in zip(PAIR, (high_noise, low_noise), strict=True):
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder: give the {expert} file, or a folder that holds both files")
        opened[expert] = one = open_checkpoint(path)
        check_given_as(expert, path, path.name, one.metadata)
        if named_in(name for _, header in opened[expert].files.values() for name in header.tensors):
            raise CheckpointError(f"{path} holds both experts' tensors: audit it alone")
    high, low = opened.values()
    if high.format.is_adapter != low.format.is_adapter or not (high.format.is_adapter or high.format is low.format):
        raise CheckpointError(f"{high_noise} is {high.format}, {low_noise} is {low.format}: they are no pair")
    if high.identity == low.identity:
        raise CheckpointError(f"{high_noise} and {low_noise} hold the same: audit one of them with --expert both")
    return _opened(high_noise, high.format, {str(one): next(iter(it.files.values())) for one, it in opened.items()})


def _experts_in(folder: Path) -> tuple[Path, Path] | None:
    """The high-noise and the low-noise file in ``folder``, told by their names; None where there are none.

    Raises CheckpointError where there are several of one.
    """
    if any((folder / part).is_dir() for part in _PARTS):
        return None
    files = sorted(folder.glob("*.safetensors"))
    high, low = ([path for path in files if told_by_name(path.name) is expert] for expert in PAIR)
    if not high or not low:
        return None
    if len(high) > 1 or len(low) > 1:
        raise CheckpointError(
            f"{folder} has {len(high)} high-noise and {len(low)} low-noise files: name the two of one step, the second "
            "with --low-noise"
        )
    return high[0], low[0]


TRANSFORMERS = ("transformer", "transformer_2")
_PARTS = {
    "unet": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model",
    "transformer_2": "diffusion_pytorch_model", "text_encoder": "model",
    "text_encoder_2": "model", "text_encoder_3": "model", "text_conditioner": "diffusion_pytorch_model",
}  # fmt: skip
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?:\.(?P<variant>[\w-]+))?\.safetensors$")
ADAPTER_NAME, DIFFUSERS_NAME = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_VARIANTS = ("", "fp16", "bf16", "fp32")


def _only_adapter(path: Path) -> Path | None:
    """The adapter in a folder that PEFT or diffusers saved, where it has no parts of its own."""
    if any((path / part).is_dir() for part in _PARTS):
        return None
    return next((path / name for name in (ADAPTER_NAME, DIFFUSERS_NAME) if (path / name).is_file()), None)


def _adapter_files(path: Path) -> dict[str, tuple[Path, Header]]:
    """The adapters that PEFT saved in the folders of the parts; empty where there are none."""
    found = {}
    for part in _PARTS:
        file = path / part / ADAPTER_NAME
        if not file.is_file():
            continue
        header = read_any_header(file)
        names = {f"{part}.{_bare(name, part)}": name for name in header.tensors}
        found[part] = (
            file,
            replace(
                header,
                tensors={new: header.tensors[name] for new, name in names.items()},
                metadata=with_config_beside(file, header.metadata, part),
                stored_as=names,
            ),
        )
    return found


def _bare(name: str, part: str) -> str:
    """A tensor's name without PEFT's and the part's own prefix."""
    return name.removeprefix("base_model.model.").removeprefix(f"{part}.")


def _folder_files(path: Path) -> dict[str, tuple[Path, Header]]:
    files = {}
    for part, stem in _PARTS.items():
        folder = path / part
        if not folder.is_dir():
            continue
        found = weight_files(folder, stem)
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


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The weights in ``folder``, whole or in several files: those without a variant, else of the first that is there.

    Empty where there are none.
    """
    for variant in _VARIANTS:
        ending = f".{variant}.safetensors" if variant else ".safetensors"
        whole = folder / f"{stem}{ending}"
        if whole.is_file():
            return [whole]
        # diffusers names them stem.variant-00001-of-00002 or stem-00001-of-00002.variant, by its version
        parts = sorted(
            one
            for one in folder.glob(f"{stem}*.safetensors")
            if (match := _SHARD.search(one.name))
            and (one.name[: match.start()], match["variant"] or "")
            in ((f"{stem}.{variant}" if variant else stem, ""), (stem, variant))
        )
        if parts:
            return parts
    return []


def variant_of(path: Path, stem: str) -> str | None:
    """The variant ("fp16") in the name of a file that ``weight_files`` found; None without."""
    rest = _SHARD.sub(lambda match: f".{match['variant']}" if match["variant"] else "", path.name.removeprefix(stem))
    return rest.removesuffix(".safetensors").strip(".") or None
