"""Descriptors: unit vectors, the same through TorchScript and ONNX, pinned downloads, PDQ."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_httpserver import HTTPServer

from audit.demo import DESCRIPTOR as NANO
from audit.demo import load_set
from audit.descriptors import Descriptor, load_descriptor, open_image, pdq_distance, pdq_hash
from audit.descriptors.base import MAX_PIXELS, to_png
from audit.descriptors.facts import Spec
from audit.descriptors.networks import OnnxDescriptor, TorchScriptDescriptor
from audit.descriptors.pdq import PdqDescriptor
from audit.descriptors.registry import download
from audit.errors import DescriptorError

PICTURES = load_set("fluent-animals", "train")


def test_nano_gives_unit_vectors_in_order(nano: Descriptor) -> None:
    vectors = nano.describe(PICTURES)
    assert vectors.shape == (10, nano.dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(nano.describe(PICTURES[3:4]), vectors[3:4], atol=1e-5)
    assert nano.describe([]).shape == (0, nano.dimensions)


def test_a_copy_is_above_the_threshold_and_other_pictures_of_the_set_are_below(nano: Descriptor) -> None:
    originals = nano.describe(PICTURES)
    copies = nano.describe(
        Image.fromarray(picture).resize((48, 48)).resize((90, 90), Image.Resampling.BICUBIC) for picture in PICTURES
    )
    between = originals @ originals.T - np.eye(10)
    assert ((originals * copies).sum(1) > nano.threshold).all()
    assert (between < nano.threshold).mean() > 0.95


def test_onnx_gives_what_torchscript_gives(nano: Descriptor, tmp_path: Path) -> None:
    model = torch.jit.load(str(NANO)).eval()
    path = tmp_path / "nano.onnx"
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 64, 64),),
        str(path),
        input_names=["images"],
        dynamic_axes={"images": {0: "batch"}},
        dynamo=False,
    )
    onnx = OnnxDescriptor(path, Spec("nano", 64, 0.7))
    assert onnx.dimensions == nano.dimensions
    np.testing.assert_allclose(onnx.describe(PICTURES), nano.describe(PICTURES), atol=1e-4)


def test_files_that_are_no_descriptor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"not torchscript")
    (tmp_path / "a.onnx").write_bytes(b"not onnx")
    for name in ("a.pt", "a.onnx"):
        (tmp_path / f"{name}.json").write_text('{"threshold": 0.5, "size": 64}')
        with pytest.raises(DescriptorError, match="does not load"):
            load_descriptor(str(tmp_path / name))
    with pytest.raises(DescriptorError, match="no descriptor 'sccd'"):
        load_descriptor("sccd")
    with pytest.raises(DescriptorError, match="not the pinned"):
        TorchScriptDescriptor(NANO, Spec("nano", 64, 0.7, "0" * 64))


def test_a_download_is_kept_only_if_it_is_the_pinned_file(
    httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good = b"the model"
    digest = hashlib.sha256(good).hexdigest()
    httpserver.expect_request("/good.pt").respond_with_data(good)
    httpserver.expect_request("/tampered.pt").respond_with_data(b"the m0del")
    httpserver.expect_request("/endless.pt").respond_with_data(good * 1000)
    path = download(httpserver.url_for("/good.pt"), digest, len(good))
    assert path.read_bytes() == good
    httpserver.clear()  # a second time nothing is asked
    assert download(httpserver.url_for("/good.pt"), digest, len(good)) == path
    httpserver.expect_request("/tampered.pt").respond_with_data(b"the m0del")
    httpserver.expect_request("/endless.pt").respond_with_data(good * 1000)
    with pytest.raises(DescriptorError, match="not the pinned"):
        download(httpserver.url_for("/tampered.pt"), digest, len(good))
    with pytest.raises(DescriptorError, match="more than 9 bytes"):
        download(httpserver.url_for("/endless.pt"), digest, len(good))
    with pytest.raises(DescriptorError, match="cannot be downloaded"):
        download(httpserver.url_for("/missing.pt"), digest, len(good))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_pdq_distances_are_differing_bits_and_its_cosine_follows_them() -> None:
    first, second = PICTURES[0], PICTURES[1]
    (a, quality), (b, _) = pdq_hash(first), pdq_hash(second)
    assert (len(a), pdq_distance(a, a)) == (32, 0)
    assert 0 <= quality <= 100
    bits = np.unpackbits(np.frombuffer(a, np.uint8)) != np.unpackbits(np.frombuffer(b, np.uint8))
    assert pdq_distance(a, b) == bits.sum()
    vectors = PdqDescriptor().describe([first, second])
    assert vectors[0] @ vectors[1] == pytest.approx(1 - pdq_distance(a, b) / 128, abs=1e-6)


def test_transparent_pictures_are_read_on_white_and_turned_upright(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert open_image(to_png(clear)).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (6, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (2, 6)


@pytest.mark.parametrize("content", [b"", b"not a picture", to_png(Image.new("RGB", (50, 50)))[:60]])
def test_broken_pictures_raise_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable picture"):
        open_image(content)


def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    bomb = Image.new("1", (20_000, MAX_PIXELS // 20_000 + 1))
    with pytest.raises(ValueError, match="too many"):
        open_image(to_png(bomb))
