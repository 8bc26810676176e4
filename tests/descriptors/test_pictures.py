"""Pictures from strangers: the colours they show, whatever the file's own way to store them, or a reason in words."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from audit.demo import load_set
from audit.descriptors import open_image
from audit.descriptors.pictures import FORMATS, SUFFIXES
from audit.untrusted.parsers.pictures import decode

PICTURE = Image.fromarray(load_set("fluent-animals", "train")[0]).resize((64, 48))
GREY = PICTURE.convert("L")


def saved(image: Image.Image, kind: str = "TIFF", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def away(found: Image.Image, wanted: Image.Image) -> float:
    """Mean difference of the pixels, of 255."""
    assert found.mode == "RGB"
    assert found.size == wanted.size
    return float(np.abs(np.asarray(found, np.float32) - np.asarray(wanted.convert("RGB"), np.float32)).mean())


def numbers(dtype: str, factor: float) -> Image.Image:
    return Image.fromarray((np.asarray(GREY).astype(np.float64) * factor).astype(dtype))


def inks() -> bytes:
    return saved(PICTURE.convert("CMYK"), "JPEG", quality=95)


def lab() -> bytes:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    converted = ImageCms.applyTransform(PICTURE, to_lab)
    assert converted is not None
    return saved(converted)


GREYS: dict[str, Callable[[], bytes]] = {
    "16 bits": lambda: saved(numbers("uint16", 257)),
    "16 bits, PNG": lambda: saved(numbers("uint16", 257), "PNG"),
    "16 bits, the other byte order": lambda: saved(Image.frombytes("I;16B", GREY.size, numbers("uint16", 257).tobytes()
                                                                   [::-1]).transpose(Image.Transpose.ROTATE_180)),
    "32 bits of 8": lambda: saved(numbers("int32", 1)),
    "32 bits of 16": lambda: saved(numbers("int32", 257)),
    "fractions": lambda: saved(numbers("float32", 1 / 255)),
    "floating point": lambda: saved(numbers("float32", 1)),
    "8 bits": lambda: saved(GREY),
}  # fmt: skip
COLOURS: dict[str, tuple[Callable[[], bytes], float]] = {
    "CMYK": (inks, 4.0),
    "LAB": (lab, 2.0),
    "YCbCr": (lambda: saved(PICTURE.convert("YCbCr")), 2.0),
    "palette": (lambda: saved(PICTURE.quantize(256), "PNG"), 6.0),
    "GIF": (lambda: saved(PICTURE, "GIF"), 20.0),
    "AVIF": (lambda: saved(PICTURE, "AVIF", quality=95), 4.0),
    "WebP": (lambda: saved(PICTURE, "WEBP", lossless=True), 0.0),
    "BMP": (lambda: saved(PICTURE, "BMP"), 0.0),
    "opaque": (lambda: saved(PICTURE.convert("RGBA"), "PNG"), 0.0),
    "two frames": (
        lambda: saved(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (64, 48))]), 0.0
    ),
    "two pages": (lambda: saved(PICTURE, save_all=True, append_images=[Image.new("RGB", (64, 48))]), 0.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(GREYS))
def test_grey_of_any_depth_is_the_picture_in_8_bits(kind: str) -> None:
    assert away(open_image(GREYS[kind]()), GREY) <= 0.5


@pytest.mark.parametrize("kind", list(COLOURS))
def test_colours_are_those_of_the_picture(kind: str) -> None:
    make, least = COLOURS[kind]
    assert away(open_image(make()), PICTURE) <= least


def test_inks_are_converted_by_the_profile_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile of the file decides, not the arithmetic of a device without one."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with pytest.raises(ValueError, match="not a readable picture"):  # an RGB profile says nothing of inks
        open_image(saved(PICTURE.convert("CMYK"), "JPEG", icc_profile=profile))


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG by its definition: uint16 [H, W, 3], no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_are_the_picture_in_8_bits() -> None:
    data = png_of_16_bits(np.asarray(PICTURE).astype(np.uint16) * 257)
    assert away(open_image(data), PICTURE) == 0


def test_two_colours_and_transparent_ones() -> None:
    dots = GREY.convert("1")
    assert away(open_image(saved(dots, "PNG")), dots) == 0
    keyed = Image.new("RGB", (4, 4), "black")
    assert open_image(saved(keyed, "PNG", transparency=(0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    clear = Image.new("LA", (4, 4), (0, 0))
    assert open_image(saved(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("dtype", "factor", "words"),
    [
        ("int32", -1, "negative"), ("int32", 65_536, "which of them is white"),
        ("float32", 9, "which of them is white"),
        ("float32", float("nan"), "not finite"),
    ],
)  # fmt: skip
def test_numbers_that_are_no_colours_are_refused_in_words(dtype: str, factor: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_image(saved(numbers(dtype, factor)))


def test_white_is_zero_is_read_in_8_bits_and_refused_in_16() -> None:
    whole = bytearray(saved(numbers("uint16", 257)))
    tag = whole.index(struct.pack("<HHI", 262, 3, 1))
    whole[tag + 8] = 0
    with pytest.raises(ValueError, match="white is zero"):
        open_image(bytes(whole))


OTHERS = ("EPS", "PDF", "PCX", "TGA", "ICO", "PPM", "SGI", "IM", "DDS", "JPEG2000", "XBM", "SPIDER", "MSP")


@pytest.mark.parametrize("kind", OTHERS)
def test_only_formats_of_the_list_are_opened(kind: str) -> None:
    mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    with pytest.raises(ValueError, match="not a readable picture"):
        open_image(saved(PICTURE.convert(mode), kind))


def test_every_format_of_the_list_is_opened_and_has_an_ending() -> None:
    for kind in FORMATS:
        assert away(open_image(saved(PICTURE, kind)), PICTURE) < 20
        assert f".{kind.lower()}" in SUFFIXES


def emf() -> bytes:
    return struct.pack("<II4i4i4s", 1, 100, 0, 0, 10, 10, 0, 0, 0, 0, b" EMF") + bytes(60)


BROKEN: dict[str, Callable[[], bytes]] = {
    "EMF": emf,
    "AVIF": lambda: saved(PICTURE, "AVIF")[:300] + b"\xff" * 300,
    "DDS": lambda: b"DDS " + struct.pack("<I", 124) + bytes(200),
    "EXIF": lambda: saved(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"),
    "EXIF of a PNG": lambda: saved(PICTURE, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "TIFF": lambda: saved(PICTURE)[:200],
    "WebP": lambda: saved(PICTURE, "WEBP")[:100] + b"\0" * 20,
    "GIF": lambda: saved(PICTURE, "GIF")[:-400],
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_whatever_a_decoder_raises_is_one_kind_of_error(kind: str) -> None:
    if kind.startswith("EXIF"):  # what cannot be read in it may be left out by Pillow itself
        with contextlib.suppress(ValueError):
            assert away(open_image(BROKEN[kind]()), PICTURE) < 10
        return
    with pytest.raises(ValueError, match="not a readable picture") as caught:
        open_image(BROKEN[kind]())
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["AVIF", "GIF", "JPEG", "PNG", "TIFF", "WEBP", "BMP"])
def test_flipped_bytes_raise_nothing_else(kind: str) -> None:
    whole = saved(PICTURE, kind)
    generator = np.random.default_rng(1)
    for _ in range(40):
        damaged = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 400), 4):
            damaged[place] = int(generator.integers(0, 256))
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except ValueError:
            continue


def test_heif_is_read_where_its_reader_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(PICTURE).save(buffer, quality=95)
    assert away(open_image(buffer.getvalue()), PICTURE) < 6


def test_heif_without_its_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"lora-audit\[heif\]"):
        decode(b"\0\0\0\x18ftypheic" + b"\0" * 100)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of black pixels in one bit each, written without holding them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    many = max(1, (1 << 20) // len(row))
    packed = b"".join(packer.compress(row * min(many, height - start)) for start in range(0, height, many))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = packed + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(1, 99_999_999), (99_999_999, 1), (65_536, 20)])
def test_a_picture_with_a_side_that_is_too_long_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    data = png_of_size(width, height)
    assert len(data) < 250_000
    with pytest.raises(ValueError, match=f"{width} x {height} pixels: a side may have 65535 at most"):
        open_image(data)
    monkeypatch.setattr(Image.Image, "load", None)  # what decodes
    with pytest.raises(ValueError, match=f"{width} x {height} pixels: a side may have 65535 at most"):
        decode(data)


def test_the_longest_side_that_is_read() -> None:
    assert open_image(png_of_size(65_535, 20)).size == (65_535, 20)
