"""Reference pictures as latents of a base model's codec: what membership is measured on.

A picture is made to fit the model's input as trainers do: the middle of it in the input's aspect, scaled to its size
(Lanczos). One that is smaller is enlarged, which its caveat says. Each view of it is encoded by itself, as the codec of
a mirrored picture gives no mirrored latents. References and decoys are treated alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from audit.descriptors.pictures import open_image, read_picture
from audit.progress import Tell, quiet

if TYPE_CHECKING:
    from audit.models.codec import Codec
    from audit.workspace import Workspace

WHOLE, MIRRORED, PADDED = "whole", "mirrored", "padded"
VIEWS = (WHOLE, MIRRORED, PADDED)
INNER = 0.75  # of each side, that a padded picture takes
VERSION = 2  # raised when the same picture comes to give other latents
CHUNK = 32  # pictures that are encoded and written together


def codec_id(base_revision: str, resolution: int | None) -> str:
    """16 hex digits: what latents of pictures depend on."""
    depends_on = json.dumps([VERSION, base_revision, resolution])
    return hashlib.sha256(depends_on.encode()).hexdigest()[:16]


def fitted(picture: Image.Image, size: tuple[int, int], view: str = WHOLE) -> np.ndarray:
    """uint8 [H, W, 3]: the middle of a picture in ``size`` (width, height), under a view.

    Padded: smaller, in the middle, with its edges drawn out: as part of a larger picture that it was cropped from.
    """
    if view == PADDED:
        width, height = (max(1, round(INNER * side)) for side in size)
        small = fitted(picture, (width, height))
        across, down = size[0] - width, size[1] - height
        return np.pad(small, ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0)), mode="edge")
    found = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    return np.asarray(ImageOps.mirror(found) if view == MIRRORED else found)


@dataclass(frozen=True)
class Encoded:
    """The latents of one picture under a view: float32 of the model's shape."""

    reference_id: str
    view: str
    latents: np.ndarray


def keep_latents(
    workspace: Workspace, name: str, paths: Sequence[Path], codec: Callable[[], Codec], codec_key: str,
    tell: Tell = quiet,
) -> int:  # fmt: skip
    """Encode the pictures of the set ``name`` among the files ``paths`` and keep their latents; how many pictures.

    Those that are kept already are not encoded again; without any new one ``codec`` is not asked for. Files that are no
    picture of the set are passed over: adding the set has said why.
    """
    wanted = _lacking(workspace, name, codec_key)
    encoded = 0
    waiting: dict[str, Image.Image] = {}
    for number, path in enumerate(paths if wanted else ()):
        found = _picture_of(path, wanted)
        if found is not None:
            digest, picture = found
            wanted.discard(digest)
            waiting[digest] = picture
        if len(waiting) == CHUNK or (number + 1 == len(paths) and waiting):
            _write(workspace, name, waiting, codec(), codec_key)
            encoded += len(waiting)
            waiting = {}
            tell("encoding", number + 1, len(paths))
    return encoded


def _lacking(workspace: Workspace, name: str, codec_key: str) -> set[str]:
    rows = workspace.rows(
        'SELECT DISTINCT reference_id FROM "references" WHERE reference_set = ? AND reference_id NOT IN '
        "(SELECT reference_id FROM latents WHERE reference_set = ? AND codec = ?)",
        [name, name, codec_key],
    )
    return {row["reference_id"] for row in rows}


def _picture_of(path: Path, wanted: set[str]) -> tuple[str, Image.Image] | None:
    """(SHA256, picture) of a file that is wanted."""
    try:
        data = read_picture(path)
        digest = hashlib.sha256(data).hexdigest()
        return (digest, open_image(data)) if digest in wanted else None
    except ValueError:
        return None


def _write(workspace: Workspace, name: str, pictures: dict[str, Image.Image], codec: Codec, codec_key: str) -> None:
    width, height = codec.picture_size
    items = [(digest, view) for digest in pictures for view in VIEWS]
    pixels = np.stack([fitted(pictures[digest], (width, height), view) for digest, view in items])
    latents = codec.encode_pictures(pixels).astype("<f2")
    rows = [
        {"reference_set": name, "reference_id": digest, "codec": codec_key, "view": view, "width": width,
         "height": height, "shape": list(one.shape), "latents": one.tobytes()}
        for (digest, view), one in zip(items, latents, strict=True)
    ]  # fmt: skip
    workspace.append("latents", rows)


def read_latents(workspace: Workspace, codec_key: str, ids: Sequence[str]) -> Iterator[Encoded]:
    """The kept latents of the pictures ``ids``, each once, of all views."""
    table = workspace.select(
        "SELECT reference_id, view, any_value(shape) AS shape, any_value(latents) AS latents FROM latents "
        "WHERE codec = ? AND list_contains(?::VARCHAR[], reference_id) GROUP BY ALL",
        [codec_key, list(ids)],
    )
    for row in table.to_pylist():
        yield Encoded(row["reference_id"], row["view"], _array(row))


def _array(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["latents"], "<f2").reshape(row["shape"]).astype(np.float32)
