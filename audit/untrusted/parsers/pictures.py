"""The decoding of pictures from strangers: of few formats, bounded, upright, in the colours that they show.

What Pillow would open but not in its own colours is read here (more than 8 bits a channel, CMYK with a profile,
transparency) or refused in words. Of an animation the first frame is the picture, and no others are counted. Every
limit is checked before what it bounds is made: sizes before pixels, scans before the first of them is decoded.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import AvifImagePlugin, Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from audit.untrusted.child import Item, RefusedError

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # pixels: what a JPEG can have
MAX_SAMPLE_BYTES = 300_000_000  # pixels times the bytes of each as it is decoded: RGB has 3, CMYK and RGBA 4
MAX_FILE_BYTES = 200_000_000
MAX_SCANS = 500  # of a JPEG; a progressive one has about 10
MAX_SCANNED_PIXELS = 2_000_000_000  # scans times pixels
MAX_EXIF_TAGS = 1000
MAX_PROFILE_BYTES = 8 * 1024**2  # of a colour profile; those of inks have up to 3
MAX_METADATA_BYTES = 16 * 1024**2  # of texts, EXIF, XMP and profile together
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # an EPS would reach Ghostscript, whatever its name
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
SUFFIXES = HEIF_SUFFIXES | {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
}  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_PHOTOMETRIC = 262  # the TIFF tag; 0 is "white is zero"
_ORIENTATION = 274  # the EXIF tag; from 2 on the picture is not upright
_BYTES_OF_MODE = {"1": 1, "L": 1, "P": 1, "LA": 2, "La": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3}
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in a JPEG's coded data, where 0 and restarts are no markers
_SCAN, _END = 0xDA, 0xD9
_BAND = 1 << 22  # pixels that are worked on together where a step needs memory of its own


@dataclass(frozen=True)
class PictureLimits:
    """What is decoded at most; see the constants of these names."""

    pixels: int = MAX_PIXELS
    side: int = MAX_SIDE
    sample_bytes: int = MAX_SAMPLE_BYTES
    scans: int = MAX_SCANS
    scanned_pixels: int = MAX_SCANNED_PIXELS
    exif_tags: int = MAX_EXIF_TAGS
    profile_bytes: int = MAX_PROFILE_BYTES
    metadata_bytes: int = MAX_METADATA_BYTES


def picture(item: Item) -> dict[str, Any]:
    """The picture in ``item.data``: its size; beside it its pixels (RGB, rows from the top) and its colour profile."""
    found = decode(item.data)
    write_pixels(found, item)
    profile = found.info.get("icc_profile")
    profile = profile if isinstance(profile, bytes) else b""
    item.write(profile)
    return {"size": list(found.size), "profile": len(profile)}


def write_pixels(picture: Image.Image, item: Item) -> None:
    """Write the pixels of an RGB picture beside the answer."""
    for top, bottom in _bands(picture.size):
        whole = (top, bottom) == (0, picture.height)
        item.write((picture if whole else picture.crop((0, top, picture.width, bottom))).tobytes())


def decode(data: bytes, limits: PictureLimits | None = None) -> Image.Image:
    """A picture from a stranger as RGB: upright, on white where it is transparent, within ``limits``.

    Raises RefusedError saying what is wrong with it, MemoryError, and nothing else: decoders raise anything on
    damaged files.
    """
    limits = limits or PictureLimits()
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a child may have no others
    PngImagePlugin.MAX_TEXT_MEMORY = limits.metadata_bytes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_formats()) as opened:
                _check_size(opened, limits)
                _check_scans(opened, data, limits)
                _check_metadata(opened, limits)
                opened.load()  # the first frame
                _check_metadata(opened, limits)  # a PNG may have some behind its pixels
                tags = opened.getexif()
                if len(tags) > limits.exif_tags:
                    raise RefusedError(f"its EXIF has {len(tags)} tags, at most {limits.exif_tags} are read")
                turned = tags.get(_ORIENTATION, 1) in range(2, 9)
                return _as_rgb(ImageOps.exif_transpose(opened) if turned else opened, _white_is_zero(opened))
    except (RefusedError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise RefusedError(f"not a readable picture ({_unknown(data)})") from error
    except Exception as error:
        if "MAX_TEXT_MEMORY" in str(error):
            raise RefusedError(_too_much_metadata(limits)) from error
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise RefusedError(f"not a readable picture ({detail[:160]})") from error


def _check_size(opened: Image.Image, limits: PictureLimits) -> None:
    size = f"{opened.width} x {opened.height} pixels"
    if max(opened.size) > limits.side:
        raise RefusedError(f"{size}: a side may have {limits.side} at most")
    if opened.width * opened.height > limits.pixels:
        raise RefusedError(f"{size} are too many")
    each = 2 if opened.mode.startswith("I;16") else _BYTES_OF_MODE.get(opened.mode, 4)
    if opened.width * opened.height * each > limits.sample_bytes:
        raise RefusedError(f"{size} of {each} bytes each ({opened.mode}) are too many")


def _check_scans(opened: Image.Image, data: bytes, limits: PictureLimits) -> None:
    if opened.format not in ("JPEG", "MPO"):
        return
    most = min(limits.scans, limits.scanned_pixels // max(1, opened.width * opened.height))
    if sum(1 for _ in zip(_scans(data), range(most + 1), strict=False)) > most:
        raise RefusedError(f"{opened.width} x {opened.height} pixels in more than {most} scans are too many")


def _scans(data: bytes) -> Iterator[int]:
    """Where the scans of a JPEG begin, up to its end; what is appended to it is not looked at."""
    place = 2
    while found := _MARKER.search(data, place):
        kind, place = data[found.end() - 1], found.end()
        if kind == _END:
            return
        if kind == _SCAN:
            yield place
        if kind not in (0x01, 0xD8):  # these two have no length
            place += int.from_bytes(data[place : place + 2], "big")


def _check_metadata(opened: Image.Image, limits: PictureLimits) -> None:
    sizes = {name: len(one) for name, one in opened.info.items() if isinstance(one, bytes | str)}
    if sizes.get("icc_profile", 0) > limits.profile_bytes:
        raise RefusedError(f"its colour profile has more than {limits.profile_bytes >> 10} KiB")
    if sum(sizes.values()) > limits.metadata_bytes:
        raise RefusedError(_too_much_metadata(limits))


def _too_much_metadata(limits: PictureLimits) -> str:
    return f"its texts and other metadata have more than {limits.metadata_bytes >> 10} KiB"


def _formats() -> list[str]:
    return [*FORMATS, "HEIF"] if _heif() else list(FORMATS)


def _heif() -> bool:
    """Whether HEIF is read: where pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _unknown(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and not _heif():
        return "HEIF is read with lora-audit[heif] installed"
    return f"damaged, or none of {', '.join(_formats())}"


def _white_is_zero(opened: Image.Image) -> bool:
    return isinstance(opened, TiffImagePlugin.TiffImageFile) and opened.tag_v2.get(_PHOTOMETRIC) == 0


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(first row, row behind the last) of parts of a picture, each of about ``_BAND`` pixels."""
    rows = max(1, _BAND // max(1, size[0]))
    for top in range(0, size[1], rows):
        yield top, min(top + rows, size[1])


def _as_rgb(picture: Image.Image, white_is_zero: bool) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        if white_is_zero:  # Pillow turns it round in 8 bits only
            raise RefusedError("white is zero in more than 8 bits: save it in 8 bits")
        return _from_numbers(picture).convert("RGB")
    if picture.mode == "CMYK" and picture.info.get("icc_profile"):
        return _from_profile(picture)
    if picture.has_transparency_data:
        return _on_white(picture)
    return picture.convert("RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    found = Image.new("RGB", picture.size)
    for top, bottom in _bands(picture.size):
        rgba = picture.crop((0, top, picture.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        found.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    return found


def _from_numbers(picture: Image.Image) -> Image.Image:
    """8-bit grey of wider numbers: integers of 8 or 16 bits, fractions from 0 to 1, or numbers from 0 to 255."""
    import numpy as np

    values = np.asarray(picture)
    if not np.isfinite(values).all() or values.min() < 0:
        raise RefusedError("its numbers are negative or not finite: which of them is black is not known")
    scale = _scale(values, float(values.max()))
    found = np.empty(values.shape, np.uint8)
    for top, bottom in _bands(picture.size):
        found[top:bottom] = np.rint(values[top:bottom].astype(np.float64) * scale).astype(np.uint8)
    return Image.fromarray(found)


def _scale(values: np.ndarray, highest: float) -> float:
    import numpy as np

    fractions = np.issubdtype(values.dtype, np.floating) and highest <= 1
    if fractions:
        return 255.0
    if highest <= 255:
        return 1.0
    if highest <= 65_535 and not np.issubdtype(values.dtype, np.floating):
        return 255 / 65_535
    raise RefusedError(f"its numbers reach {highest:.6g}: which of them is white is not known; save it in 8 bits")


def _from_profile(picture: Image.Image) -> Image.Image:
    """CMYK inks as the colours that the embedded profile says they are."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
    converted = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if converted is None:
        raise RefusedError("its colour profile does not apply to it")
    return converted


PARSERS = {"picture": picture}
