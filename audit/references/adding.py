"""Adding a reference set, of whatever input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from audit.config import Config, CrawlSettings
from audit.devices import default_device
from audit.errors import ConfigError
from audit.progress import Tell, quiet
from audit.references.folder import image_files
from audit.references.inputs.source import opener_of
from audit.references.inputs.videos import EVERY
from audit.references.inputs.web import is_urls
from audit.references.lists import is_list
from audit.references.parts import FIVE
from audit.references.sets import PDQ_NAME, Added, ReferenceSets
from audit.states import SetKind
from audit.workspace import Workspace

if TYPE_CHECKING:
    from audit.bench import Bench


def add_references(
    name: str,
    source: str | Path,
    *,
    descriptor: str = "sscd",
    workspace: Workspace | str | Path = Config.workspace,
    thumbnails: bool = True,
    bases: Sequence[str] = (),
    resolution: int | None = None,
    kind: SetKind = SetKind.reference,
    decoys_of: Sequence[str] = (),
    drawn: bool = False,
    workers: int = 1,
    described_by: str | None = None,
    every: float = EVERY,
    crawl: CrawlSettings | None = None,
    parts: bool = False,
    progress: Tell | None = None,
    bench: Bench | None = None,
) -> Added:
    """Describe the pictures of ``source`` and keep them as the reference set ``name``, in place of one so called.

    A source is a folder, a .tar as img2dataset writes it, a .parquet with pictures, a video (a frame ``every`` so many
    seconds), a list of URLs (.txt, .csv), or "hf:owner/name@COMMIT", a data set of the hub; ``crawl`` says how hosts
    are asked. A list of PDQ hashes (.txt, .csv, .jsonl, .json) is kept as it is, and wants ``descriptor`` pdq. So are
    the vectors of a .parquet, or of a folder of such, where ``described_by`` names the descriptor that has made them.

    Latents of the pictures under each of ``bases``, in ``resolution`` or the base's own, are kept too: membership is
    measured on them. ``kind`` background makes them decoys, of the reference sets ``decoys_of``, or of any; ``drawn``
    declares that they and these sets, as they are now, are a random split of one collection. What is passed over is
    listed with its reason. ``workers`` are processes that describe; a call that is stopped goes on, when it is made
    again, with what was described. ``parts``: five overlapping crops of each picture are described as well, and the
    best counts; decoys have to be added so, too. Raises ReferenceSetError where nothing can be read, or one of those
    sets is not there.
    """
    from audit.bench import Bench
    from audit.references.latents import codec_id, keep_latents

    if drawn and not decoys_of:
        raise ConfigError(f"{name}: say with which set the decoys are a random split of one collection: --of SET")
    bench, tell = bench or Bench(default_device()), progress or quiet
    opened = workspace if isinstance(workspace, Workspace) else Workspace(workspace)
    path = Path(source)
    if parts and (described_by is not None or (is_list(path) and not is_urls(path))):
        raise ConfigError(f"{path} has no pictures, of which parts (--parts) could be described")
    if is_list(path) and not is_urls(path):
        if descriptor != PDQ_NAME or kind is not SetKind.reference or bases:
            raise ConfigError(
                f"{path} is a list of PDQ hashes, without pictures: give --descriptor pdq. It can be no decoys, and "
                "no base model has latents of it"
            )
        return ReferenceSets(opened).add_list(name, path)
    if described_by is not None:
        if kind is not SetKind.reference or bases:
            raise ConfigError(f"{path} are vectors, without pictures: they can be no decoys, and have no latents")
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        return ReferenceSets(opened).add_vectors(name, files, bench.load_descriptor(descriptor), described_by)
    if bases and not path.is_dir():
        raise ConfigError(f"latents (--base) are kept of the pictures of folders, and {source} is none")
    located = [bench.locate(base) for base in bases]
    added = ReferenceSets(opened).add(
        name, opener_of(str(source), crawl or CrawlSettings(), every), bench.load_descriptor(descriptor), thumbnails,
        lambda done, total: tell("describing", done, total), kind, decoys_of,
        decoys_of if drawn else (), workers, descriptor, FIVE if parts else None,
    )  # fmt: skip
    for one in located:
        codec = partial(bench.codec_of, one, resolution)
        keep_latents(opened, name, image_files(path), codec, codec_id(one.revision, resolution), tell)
    return added
