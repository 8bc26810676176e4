"""The safe opening of pictures from strangers: of few formats, bounded, upright, in the colours that they show.

What Pillow would open but not in its own colours is read here (more than 8 bits a channel, CMYK with a profile,
transparency) or refused in words. Of an animation the first frame is the picture.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # pixels: what a JPEG can have
MAX_FILE_BYTES = 200_000_000
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # an EPS would reach Ghostscript, whatever its name
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
SUFFIXES = HEIF_SUFFIXES | {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
}  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_PHOTOMETRIC = 262  # the TIFF tag; 0 is "white is zero"


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file. Raises ValueError where it is larger than MAX_FILE_BYTES or cannot be read."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES // 1_000_000} MB")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"not a readable picture ({error.strerror or error})") from error


def open_image(source: Path | bytes) -> Image.Image:
    """A picture from a stranger as RGB: upright, on white where it is transparent, bounded in bytes and pixels.

    Raises ValueError saying what is wrong with it, and nothing else: decoders raise anything on damaged files.
    """
    data = read_picture(source) if isinstance(source, Path) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_formats()) as opened:
                if max(opened.size) > MAX_SIDE:
                    raise _RefusedError(f"{opened.width} x {opened.height} pixels: a side may have {MAX_SIDE} at most")
                if opened.width * opened.height > MAX_PIXELS:
                    raise _RefusedError(f"{opened.width} x {opened.height} pixels are too many")
                opened.load()  # the first frame
                return _as_rgb(ImageOps.exif_transpose(opened), _white_is_zero(opened))
    except _RefusedError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"not a readable picture ({_unknown(data)})") from error
    except Exception as error:
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"not a readable picture ({detail[:160]})") from error


class _RefusedError(ValueError):
    """A picture that is understood well enough to say in words why it is not read."""


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


def _as_rgb(picture: Image.Image, white_is_zero: bool) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        if white_is_zero:  # Pillow turns it round in 8 bits only
            raise _RefusedError("white is zero in more than 8 bits: save it in 8 bits")
        return _from_numbers(np.asarray(picture)).convert("RGB")
    if picture.mode == "CMYK" and picture.info.get("icc_profile"):
        return _from_profile(picture)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _from_numbers(values: np.ndarray) -> Image.Image:
    """8-bit grey of wider numbers: integers of 8 or 16 bits, fractions from 0 to 1, or numbers from 0 to 255."""
    if not np.isfinite(values).all() or values.min() < 0:
        raise _RefusedError("its numbers are negative or not finite: which of them is black is not known")
    highest = float(values.max())
    fractions = np.issubdtype(values.dtype, np.floating) and highest <= 1
    if fractions:
        scale = 255.0
    elif highest <= 255:
        scale = 1.0
    elif highest <= 65_535 and not np.issubdtype(values.dtype, np.floating):
        scale = 255 / 65_535
    else:
        raise _RefusedError(f"its numbers reach {highest:.6g}: which of them is white is not known; save it in 8 bits")
    return Image.fromarray(np.rint(values.astype(np.float64) * scale).astype(np.uint8))


def _from_profile(picture: Image.Image) -> Image.Image:
    """CMYK inks as the colours that the embedded profile says they are."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
    converted = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if converted is None:
        raise _RefusedError("its colour profile does not apply to it")
    return converted
