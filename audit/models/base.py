"""Load a base model: a diffusers folder, a single safetensors file, or a pinned revision on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from audit.errors import CheckpointError
from audit.models.checkpoint import variant_of
from audit.models.families.base import ModelFamily
from audit.models.families.identify import family_of_shapes
from audit.models.families.registry import FAMILIES, of_pipeline
from audit.models.families.unaudited import by_pipeline, by_tensors
from audit.models.hub import CONFIG_FILES, download_snapshot, is_hub_id
from audit.models.index import class_of, is_absent, left_out_of, read_index
from audit.models.limits import check_configs
from audit.models.placement import channels_last, is_placed, place
from audit.models.published import ALIASES, source_of
from audit.models.quiet import be_quiet
from audit.models.safetensors_header import TensorInfo, read_header
from audit.models.single_file import check_alone, empty_denoiser, follow, is_alone, missing_parts, said_by
from audit.models.stored import check_complete, files_of, stem_of, stored_dtype, variant_in
from audit.models.tokenizers import check_tokenizers


@dataclass(frozen=True)
class BaseModel:
    """The public model a checkpoint started from, on the CPU: in float32, or in the precision that its files store.

    ``revision`` identifies the weights: the hub's commit, or a SHA256 of the local files. ``pipeline`` is diffusers'
    own, with all its parts. ``placed`` holds copies of parts on devices, so that they are made once for all
    checkpoints.
    """

    name: str
    revision: str
    architecture: ModelFamily
    pipeline: Any
    sha256: str = ""  # of its file, where that is one
    placed: dict[tuple[str, str, torch.dtype], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def family(self) -> str:
        """The family of its weights: of two that share a pipeline, the one its sizes show."""
        return self.architecture.variant_of(self.pipeline)

    @cached_property
    def weight_norm(self) -> float:
        """The norm of all weights that a checkpoint can change; summed once for all checkpoints."""
        parts = [self.part(name) for name in self.architecture.networks if name != "vae"]
        parameters = [one for part in parts if part is not None for one in part.parameters()]
        return sum(float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2 for one in parameters) ** 0.5

    @property
    def denoiser(self) -> Any:
        """The UNet or the transformer."""
        return self.part(self.architecture.denoiser)

    def part(self, name: str) -> Any:
        """One of its networks by its component's name; None where this model has none of it."""
        return getattr(self.pipeline, name)

    def part_on(self, name: str, device: torch.device, dtype: torch.dtype) -> Any:
        """The network ``name`` in ``dtype`` on ``device``: itself where it is there already. All are channels-last."""
        network = self.part(name)
        if network is None or is_placed(network, device, dtype):
            return network
        key = name, str(device), dtype
        if key not in self.placed:
            self.placed[key] = place(network, device, dtype)
        return self.placed[key]

    def forget(self, dtype: torch.dtype | None = None) -> None:
        """Let go of the copies on devices in ``dtype``, or of all."""
        for key in [key for key in self.placed if dtype in (None, key[2])]:
            del self.placed[key]


@dataclass(frozen=True)
class BaseLocation:
    """Where a base model's files are, found and checked but not loaded. ``path`` is a folder or a single file.

    ``config`` has the configuration of a single file; where that holds the denoiser alone (``denoiser_alone``),
    everything else too, and ``file_sha256`` is that of the file, which claims of a base's hash mean.
    ``boundary``: the share of the schedule from which on the first of two experts is asked; None with one network.
    """

    name: str
    revision: str
    path: Path
    config: Path | None = None
    denoiser_alone: bool = False
    file_sha256: str | None = None
    boundary: float | None = None

    @property
    def sha256(self) -> str:
        """What claims of a base's hash mean: that of the one file, else the revision."""
        return self.file_sha256 or self.revision

    @property
    def folder(self) -> Path:
        """The folder of all parts, but for the denoiser where that is a file of its own."""
        return self.config if self.denoiser_alone and self.config else self.path


def locate_base(source: str, config: str | None = None) -> BaseLocation:
    """Find ``source``: a local diffusers folder or .safetensors file, ``owner/name@commit``, or a short name of one.

    ``config`` is a folder, ``owner/name@commit`` or a short name with the configuration of a single file, and with all
    other parts where the file is the denoiser alone. Only safetensors weights are read. Raises CheckpointError for what
    is missing, unsafe, or not pinned to a commit, and ConfigError for a published model that has no short name.
    """
    source, config = source_of(source), source_of(config) if config else None
    path = Path(source)
    if path.is_dir():
        boundary = _check_folder(path)
        return BaseLocation(path.resolve().name, _folder_revision(path), path, boundary=boundary)
    if path.is_file():
        return _locate_file(path, config)
    if is_hub_id(source.partition("@")[0]) and not source.startswith((".", "/")):
        folder = download_snapshot(source, CONFIG_FILES)
        architecture = _architecture(folder)
        folder = _download(source, architecture.networks)
        boundary = _check_folder(folder)
        return BaseLocation(source.partition("@")[0], source.partition("@")[2], folder, boundary=boundary)
    raise CheckpointError(
        f"{source} is neither a folder, nor a .safetensors file, nor a hub id, nor one of {', '.join(ALIASES)}: check "
        "the path of the base model"
    )


def load_base(location: BaseLocation, as_stored: bool = False) -> BaseModel:
    """Load a located base model in float32; ``as_stored``: in the precision of its files, where all of a part have one.

    As stored it holds the same numbers, in half the host's memory where a GPU computes. Raises CheckpointError where
    it is of no family that can be audited.
    """
    be_quiet()
    whole = location.config is not None and not location.denoiser_alone
    return _from_file(location, as_stored) if whole else _from_folder(location, as_stored)


def _download(source: str, parts: Iterable[str]) -> Path:
    return download_snapshot(source, [*CONFIG_FILES, *(f"{part}/*.safetensors" for part in parts)])


def _folder_revision(folder: Path, but: str | None = None) -> str:
    """A SHA256 of the files in ``folder``, without the weights of the part ``but``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] == but and path.suffix == ".safetensors":
            continue
        if path.is_file() and path.suffix in (".safetensors", ".json", ".txt", ".model") and len(relative.parts) <= 2:
            digest.update(str(relative).encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _architecture(folder: Path) -> ModelFamily:
    """The family of the pipeline in ``folder``. Raises CheckpointError for one that cannot be audited."""
    index = read_index(folder)
    kind = index["_class_name"]
    family = of_pipeline(kind)
    if family is None:
        known = by_pipeline(str(kind)[:80])
        why = f"{known.sentence}; " if known else ""
        raise CheckpointError(
            f"{folder} is a {str(kind)[:80]}, which cannot be audited: {why}give the text-to-image model of one of "
            f"{', '.join(one.pipeline for one in FAMILIES.values())}"
        )
    family.check_folder(folder, index)
    check_configs(folder)
    check_tokenizers(folder)
    return family


def _check_folder(folder: Path, but: str | None = None) -> float | None:
    """Where the two experts of the model in ``folder`` part, None with one. Raises CheckpointError where parts lack."""
    architecture = _architecture(folder)
    index = read_index(folder)
    for part in architecture.networks:
        if part == but or is_absent(index, part):
            continue  # T5 of Stable Diffusion 3 may be missing; what must not be, diffusers asks for
        found = files_of(folder, part)
        if not found:
            raise CheckpointError(
                f"{folder / part} has no {stem_of(part)}.safetensors: only safetensors weights are read"
            )
        for path in found:
            read_header(path)
    try:
        return architecture.boundary_in(index)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _from_folder(location: BaseLocation, as_stored: bool) -> BaseModel:
    folder = location.folder
    architecture = _architecture(folder)
    options = {
        "image_encoder": None,
        "use_safetensors": True,
        "local_files_only": True,
        "variant": variant_in(folder, architecture),
        "dtype": {
            part: stored_dtype((folder / part).glob("*.safetensors")) if as_stored else torch.float32
            for part in architecture.networks
        },
        **architecture.left_out,
        **left_out_of(folder, architecture),
    }
    try:
        if location.denoiser_alone:
            options[architecture.denoiser] = empty_denoiser(architecture, folder)
        pipeline = architecture.load(folder, options)
    except Exception as error:  # whatever the libraries meet in the files
        raise CheckpointError(
            f"{folder} is not a {architecture.pipeline} that diffusers loads: {str(error)[:300]}"
        ) from error
    for part in architecture.networks:
        if part != architecture.denoiser or not location.denoiser_alone:
            check_complete(folder, part, getattr(pipeline, part))
    if location.denoiser_alone:
        _fill(BaseModel(location.name, location.revision, architecture, pipeline, location.sha256), location, as_stored)
        follow(pipeline, architecture, location.path)
    return _base_of(pipeline, architecture, location)


def _fill(base: BaseModel, location: BaseLocation, as_stored: bool) -> None:
    """Put the file's weights into the denoiser, which has none. Raises CheckpointError where not each has its place."""
    from audit.models.formats.tensors import Tensors
    from audit.models.formats.weights import fill  # it is made of what is here

    try:
        with Tensors([(location.path, read_header(location.path))]) as tensors:
            fill(base, tensors, stored_dtype([location.path]) if as_stored else torch.float32)
    except Exception as error:  # whatever is in the file
        raise CheckpointError(
            f"{location.path} is no {base.architecture.denoiser} of the {base.architecture.pipeline} in "
            f"{location.folder}: {str(error)[:300]}; give the matching folder with --base-config"
        ) from error


def load_vae(location: BaseLocation, as_stored: bool = False) -> BaseModel:
    """As ``load_base``, but of the networks the VAE alone.

    The denoiser has its configuration and no weights (it is on the meta device), and there is no text encoder. Raises
    CheckpointError where a model's parts cannot be had apart.
    """
    import diffusers

    be_quiet()
    folder = location.config or location.path
    architecture = _architecture(folder)
    try:
        index = read_index(folder)
        classes = {part: getattr(diffusers, class_of(index, part)) for part in (architecture.denoiser, "vae")}
        with torch.device("meta"):
            kind = classes[architecture.denoiser]
            denoiser = kind.from_config(kind.load_config(folder / architecture.denoiser, local_files_only=True))
        parts = {architecture.denoiser: denoiser, "vae": _vae(classes["vae"], location, as_stored)}
        pipeline = architecture.assemble(folder, {**dict.fromkeys(architecture.networks), **parts})
    except Exception as error:  # whatever the libraries meet in the files
        raise CheckpointError(f"the VAE of {location.path} does not load alone: {str(error)[:300]}") from error
    _say_scale(pipeline)
    return BaseModel(location.name, location.revision, architecture, pipeline, location.sha256)


def _say_scale(pipeline: Any) -> None:
    """Pipelines of videos have a scale of places and one of times."""
    if not hasattr(pipeline, "vae_scale_factor"):
        pipeline.vae_scale_factor = pipeline.vae_scale_factor_spatial


def _vae(kind: Any, location: BaseLocation, as_stored: bool) -> Any:
    """The VAE of class ``kind``, as ``_base_of`` leaves it."""
    options = {"local_files_only": True}
    if location.config is None or location.denoiser_alone:
        files = files_of(location.folder, "vae")
        dtype = stored_dtype(files) if as_stored else torch.float32
        variant = variant_of(files[0], stem_of("vae"))
        vae = kind.from_pretrained(
            location.folder / "vae", use_safetensors=True, variant=variant, dtype=dtype, **options
        )
        check_complete(location.folder, "vae", vae)
    else:
        dtype = stored_dtype([location.path]) if as_stored else torch.float32
        vae = kind.from_single_file(
            str(location.path), config=str(location.config), subfolder="vae", dtype=dtype, **options
        )
    return channels_last(vae.requires_grad_(False)).eval()


def _locate_file(path: Path, config: str | None) -> BaseLocation:
    header = read_header(path)
    if config and is_alone(header.tensors):
        return _locate_denoiser(path, header.tensors, config)
    if not any(name.startswith("model.diffusion_model.") for name in header.tensors):
        raise CheckpointError(
            f"{path} is not a whole single-file checkpoint (no model.diffusion_model.* tensors): "
            "a base model needs the UNet or transformer, the VAE and the text encoders; where the file is the denoiser "
            "alone, name the diffusers folder of the others with --base-config"
        )
    family = family_of_shapes(header.tensors)
    known = {str(one.name): one.default_config for one in FAMILIES.values()}
    source = config or (known.get(family) if family else None)
    if source is None:
        other = None if family else by_tensors(header.tensors)
        if other:
            raise CheckpointError(f"{path} is named as models of {other.title} are: {other.sentence}")
        kind = f"of family {family}" if family else "of no family that is known by its shapes"
        raise CheckpointError(f"{path} is {kind}: name the folder of its configuration with --base-config")
    folder = Path(source) if Path(source).is_dir() else download_snapshot(source, CONFIG_FILES)
    missing = missing_parts(header.tensors, _architecture(folder))
    if missing:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)}: a base model needs all its parts; give the whole checkpoint or "
            "a diffusers folder"
        )
    said_by(path)
    with path.open("rb") as file:
        return BaseLocation(path.name, hashlib.file_digest(file, "sha256").hexdigest(), path, folder)


def _locate_denoiser(path: Path, tensors: Mapping[str, TensorInfo], config: str) -> BaseLocation:
    local = Path(config).is_dir()
    folder = Path(config) if local else download_snapshot(config, CONFIG_FILES)
    architecture = _architecture(folder)
    check_alone(path, tensors, architecture, folder)
    if not local:
        folder = _download(config, [part for part in architecture.networks if part != architecture.denoiser])
    _check_folder(folder, but=architecture.denoiser)
    with path.open("rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest()
    rest = _folder_revision(folder, but=architecture.denoiser)
    revision = hashlib.sha256(f"{own} {rest}".encode()).hexdigest()
    return BaseLocation(path.name, revision, path, folder, denoiser_alone=True, file_sha256=own)


def _from_file(location: BaseLocation, as_stored: bool) -> BaseModel:
    import diffusers

    assert location.config is not None
    architecture = _architecture(location.config)
    if not hasattr(getattr(diffusers, architecture.pipeline), "from_single_file"):
        raise CheckpointError(f"{location.path}: a {architecture.pipeline} is read from a folder only")
    try:
        pipeline = getattr(diffusers, architecture.pipeline).from_single_file(
            str(location.path),
            config=str(location.config),
            local_files_only=True,
            dtype=stored_dtype([location.path]) if as_stored else torch.float32,
            **architecture.left_out,
        )
        follow(pipeline, architecture, location.path)
    except Exception as error:  # whatever the libraries meet in the file
        raise CheckpointError(
            f"{location.path} does not load with the configuration in {location.config}: {str(error)[:300]}; "
            "give the matching one with --base-config"
        ) from error
    return _base_of(pipeline, architecture, location)


def _base_of(pipeline: Any, architecture: ModelFamily, location: BaseLocation) -> BaseModel:
    for part in architecture.networks:
        network = getattr(pipeline, part)
        if network is not None:
            channels_last(network.requires_grad_(False)).eval()
    try:
        architecture.check(pipeline, location.name)
        architecture.settle(pipeline)
    except CheckpointError:
        raise
    except Exception as error:  # of a configuration that is not as its class writes it
        raise CheckpointError(
            f"{location.path} is not configured as a {architecture.pipeline}: {str(error)[:300]}"
        ) from error
    _say_scale(pipeline)
    return BaseModel(location.name, location.revision, architecture, pipeline, location.sha256)
