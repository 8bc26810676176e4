"""Each limit of a picture: what is just below it is read, what is just above is refused in words."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from audit.descriptors import Descriptor, open_image
from audit.errors import FetchError, ReferenceSetError
from audit.files import Files
from audit.references import sets as set_module
from audit.references.sets import ReferenceSets
from audit.untrusted.parsers.pictures import (
    MAX_EXIF_TAGS,
    MAX_METADATA_BYTES,
    MAX_PROFILE_BYTES,
    MAX_SAMPLE_BYTES,
    MAX_SCANS,
    PictureLimits,
    decode,
)
from audit.workspace import Workspace
from crawlers import training_data
from crawlers.training_data import unpack
from tests.crawlers.test_training_data import packed, png
from tests.descriptors.test_pictures import COLOURS, GREYS, PICTURE, saved

PIXELS = PICTURE.width * PICTURE.height


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [*GREYS, *COLOURS])
def test_a_picture_out_of_a_child_is_the_one_that_is_decoded_here(kind: str) -> None:
    data = GREYS[kind]() if kind in GREYS else COLOURS[kind][0]()
    mine, found = decode(data), open_image(data)
    assert (found.mode, found.size) == ("RGB", mine.size)
    assert found.tobytes() == mine.tobytes()


def test_bands_are_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from audit.untrusted.parsers import pictures

    half = PICTURE.convert("RGBA")
    half.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))))
    files = [saved(half, "PNG"), GREYS["16 bits, PNG"](), GREYS["fractions"]()]
    whole = [decode(data).tobytes() for data in files]
    monkeypatch.setattr(pictures, "_BAND", 64 * 5)
    assert [decode(data).tobytes() for data in files] == whole


def test_a_colour_profile_stays_with_its_picture() -> None:
    assert open_image(saved(PICTURE, "JPEG", icc_profile=b"a profile")).info == {"icc_profile": b"a profile"}


def test_pixels() -> None:
    data = saved(PICTURE, "PNG")
    assert decode(data, PictureLimits(pixels=PIXELS)).size == PICTURE.size
    with pytest.raises(ValueError, match="64 x 48 pixels are too many"):
        decode(data, PictureLimits(pixels=PIXELS - 1))


@pytest.mark.parametrize(
    ("mode", "kind", "each"),
    [("L", "PNG", 1), ("RGB", "PNG", 3), ("RGBA", "PNG", 4), ("LA", "PNG", 2), ("CMYK", "JPEG", 4), ("F", "TIFF", 4),
     ("I", "TIFF", 4), ("I;16", "PNG", 2)],
)  # fmt: skip
def test_pixels_times_channels(mode: str, kind: str, each: int) -> None:
    data = saved(PICTURE.convert("I" if mode == "I;16" else mode).convert(mode), kind)
    assert decode(data, PictureLimits(sample_bytes=PIXELS * each)).size == PICTURE.size
    with pytest.raises(ValueError, match=f"64 x 48 pixels of {each} bytes each .* are too many"):
        decode(data, PictureLimits(sample_bytes=PIXELS * each - 1))


@pytest.mark.parametrize(("side", "words"), [(8660, "not a readable picture"), (8661, "of 4 bytes each")])
def test_a_transparent_picture_may_have_fewer_pixels_than_another(side: int, words: str) -> None:
    assert (4 * side**2 > MAX_SAMPLE_BYTES) is ("each" in words)
    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=words):
        open_image(whole)


def gif_of_frames(count: int) -> bytes:
    """1 x 1 pixels, the first frame black and the others white."""

    def frame(code: int) -> bytes:
        return b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02" + bytes([0x44 | code << 3, 0x01]) + b"\0"

    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + frame(0) + frame(1) * (count - 1) + b"\x3b"


def apng_of_frames(count: int) -> bytes:
    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    control = struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 100, 0, 0)
    first = chunk(b"IHDR", head) + chunk(b"acTL", struct.pack(">II", count, 0)) + chunk(b"fcTL", control)
    return b"\x89PNG\r\n\x1a\n" + first + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data", [gif_of_frames(200_000), apng_of_frames(1_000_000)], ids=["GIF", "APNG"])
def test_frames_are_not_counted(data: bytes) -> None:
    began = time.thread_time()
    assert decode(data).getpixel((0, 0)) == (0, 0, 0)
    assert time.thread_time() - began < 0.2


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose first scan is repeated."""
    whole = saved(PICTURE.resize((16, 16)).convert("L"), "JPEG", progressive=True)
    first = whole.index(b"\xff\xda")
    second = whole.index(b"\xff\xc4", first)
    there = whole.count(b"\xff\xda")
    return whole[:first] + whole[first:second] * (count - there) + whole[first:]


def test_scans() -> None:
    assert jpeg_of_scans(20).count(b"\xff\xda") == 20
    assert open_image(jpeg_of_scans(MAX_SCANS)).size == (16, 16)
    with pytest.raises(ValueError, match=f"16 x 16 pixels in more than {MAX_SCANS} scans are too many"):
        open_image(jpeg_of_scans(MAX_SCANS + 1))


def test_scans_times_pixels() -> None:
    data = jpeg_of_scans(20)
    assert decode(data, PictureLimits(scanned_pixels=20 * 256)).size == (16, 16)
    with pytest.raises(ValueError, match="16 x 16 pixels in more than 19 scans are too many"):
        decode(data, PictureLimits(scanned_pixels=20 * 256 - 1))


def test_what_is_no_scan_of_the_picture_is_none() -> None:
    """A film that a telephone appends, and a comment."""
    appended = saved(PICTURE, "JPEG", comment=b"\xff\xda" * 1000) + b"\xff\xda" * 10_000
    assert open_image(appended).size == PICTURE.size


def exif_of(tags: int) -> bytes:
    entries = b"".join(struct.pack("<HHII", 0x8000 + number, 3, 1, 1) for number in range(tags))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + b"\0\0\0\0"


def test_tags() -> None:
    assert open_image(saved(PICTURE, "JPEG", exif=exif_of(MAX_EXIF_TAGS))).size == PICTURE.size
    with pytest.raises(ValueError, match=f"its EXIF has {MAX_EXIF_TAGS + 1} tags, at most {MAX_EXIF_TAGS} are read"):
        open_image(saved(PICTURE, "JPEG", exif=exif_of(MAX_EXIF_TAGS + 1)))


def test_colour_profiles() -> None:
    profile = bytes(MAX_PROFILE_BYTES)
    assert len(open_image(saved(PICTURE, "JPEG", icc_profile=profile)).info["icc_profile"]) == MAX_PROFILE_BYTES
    with pytest.raises(ValueError, match="its colour profile has more than 8192 KiB"):
        open_image(saved(PICTURE, "JPEG", icc_profile=profile + b"\0"))


def png_with_texts(count: int) -> bytes:
    texts = PngImagePlugin.PngInfo()
    for number in range(count):
        texts.add_text(f"text{number}", "a" * (1 << 20), zip=True)
    return saved(PICTURE, "PNG", pnginfo=texts)


def test_packed_texts() -> None:
    most = MAX_METADATA_BYTES >> 20
    assert len(png_with_texts(most)) < 100_000
    assert open_image(png_with_texts(most)).size == PICTURE.size
    with pytest.raises(ValueError, match="its texts and other metadata have more than 16384 KiB"):
        open_image(png_with_texts(most + 1))


def test_a_packed_text_that_is_large_alone() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("text", "a" * ((1 << 20) + 1), zip=True)
    with pytest.raises(ValueError, match=r"not a readable picture .*too large"):
        open_image(saved(PICTURE, "PNG", pnginfo=texts))


def test_metadata_of_other_formats() -> None:
    assert open_image(saved(PICTURE, "WEBP", xmp=bytes(MAX_METADATA_BYTES - 100))).size == PICTURE.size
    with pytest.raises(ValueError, match="its texts and other metadata have more than"):
        open_image(saved(PICTURE, "WEBP", xmp=bytes(MAX_METADATA_BYTES + 1)))


@pytest.mark.parametrize("name", ["MAX_SET_PIXELS", "MAX_SET_SECONDS"])
def test_a_training_set_of_pictures_that_are_each_within_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pictures = {f"{number}.png": png() for number in range(3)}
    monkeypatch.setattr(training_data, name, 3 * 16 * 16)
    assert len(unpack(packed(pictures), Files(tmp_path), "out")) == 3
    monkeypatch.setattr(training_data, name, 3 * 16 * 16 - 1 if "PIXELS" in name else 0)
    with pytest.raises(FetchError, match=r"the training set (has|takes) more than"):
        unpack(packed(pictures), Files(tmp_path), "again")


def test_a_reference_set_of_pictures_that_are_each_within_limits(
    tmp_path: Path, workspace: Workspace, nano: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        PICTURE.rotate(90 * number).save(tmp_path / f"{number}.png")
    sets = ReferenceSets(workspace)
    assert sets.add("mine", tmp_path, nano).images == 3
    monkeypatch.setattr(set_module, "MAX_SET_SECONDS", 0)
    monkeypatch.setattr(set_module, "SECONDS_A_PICTURE", 0)
    with pytest.raises(ReferenceSetError, match=r"far more time to decode than pictures do, 0\.png"):
        sets.add("mine", tmp_path, nano)


def test_a_picture_that_needs_more_memory_than_a_child_has_is_refused() -> None:
    from audit.untrusted.limits import ChildLimits
    from audit.untrusted.pool import Pool, RefusedError

    large = io.BytesIO()
    Image.new("L", (9000, 9000)).save(large, "PNG", compress_level=1)
    pool = Pool(1, ChildLimits(memory=128 << 20))
    with pytest.raises(RefusedError, match="refused: it needs more than 128 MiB of memory"):
        pool.ask("picture", {}, large.getvalue(), most=3 * 9000**2)
    small = pool.ask("picture", {}, saved(PICTURE, "PNG"), most=3 * PIXELS)
    assert small.answer == {"size": [64, 48], "profile": 0}
    pool.close()
