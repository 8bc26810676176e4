"""What a command names as the input of a set, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from audit.config import CrawlSettings
from audit.errors import ReferenceSetError
from audit.references.folder import SkippedImage, survey
from audit.references.inputs import hub, parquet, tars, videos, web
from audit.references.inputs.given import Given, Pictures
from audit.storable import path_as_text

KINDS = "a folder of pictures, a .tar, a .parquet, a video, a list of URLs or hashes, or hf:owner/name@COMMIT"
Known = Mapping[str, str]  # names of pictures that were described before, and the SHA256 of their files


def opener_of(source: str, how: CrawlSettings, every: float = videos.EVERY) -> Callable[[Known], Pictures]:
    """What opens an input of pictures, given what was described of it before. Raises ReferenceSetError for no input."""
    if (data := hub.named(source)) is not None:
        return partial(hub.hub_pictures, data, how)
    path = Path(source)
    if path.is_dir():
        return lambda known: folder_pictures(path, every)
    if tars.is_tar(path):
        return lambda known: tars.tar_pictures(path)
    if videos.is_video(path):
        return lambda known: videos.video_pictures(path, every)
    if parquet.is_parquet(path):
        return lambda known: parquet.parquet_pictures(path)
    if web.is_urls(path):
        return partial(web.url_pictures, path, how)
    if not path.exists():
        raise ReferenceSetError(f"{source} is not a folder, and not there: give {KINDS}")
    raise ReferenceSetError(f"{source} is none of these: {KINDS}")


def folder_pictures(folder: Path, every: float = videos.EVERY) -> Pictures:
    """The pictures below ``folder``, and behind them those of tars and videos there.

    Raises ReferenceSetError as ``survey`` does.
    """
    root = folder.resolve()
    within = sorted(
        one for one in (root.rglob("*") if folder.is_dir() else ())
        if (tars.is_tar(one) or videos.is_video(one)) and one.resolve().is_relative_to(root)
    )  # fmt: skip
    paths, passed = survey(folder, or_other=bool(within))
    held = {path_as_text(str(one.relative_to(root))) for one in within}
    passed = [SkippedImage(one.name, one.reason) for one in passed if one.name not in held]
    given = (Given(path_as_text(str(path.relative_to(root))), path) for path in paths)
    return Pictures(str(folder), chain(given, _within(within, root, every)), None if within else len(paths), passed)


def _within(files: list[Path], root: Path, every: float) -> Iterator[Given]:
    for path in files:
        parent = str(path.parent.relative_to(root))
        prefix = "" if parent == "." else f"{path_as_text(parent)}/"
        yield from tars.given_in(path, prefix) if tars.is_tar(path) else videos.given_in(path, every, prefix)
