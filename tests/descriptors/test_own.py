"""Descriptors of one's own: what the file does not say is said beside it, and what neither says is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from audit.demo import load_set
from audit.descriptors import load_descriptor
from audit.descriptors.registry import descriptor_facts
from audit.errors import DescriptorError

PICTURES = [Image.fromarray(one) for one in load_set("fluent-animals", "train")[:5]]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Network(nn.Module):
    """A fixed network of pictures of ``side`` pixels: another size has another number of features, and fails."""

    def __init__(self, side: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(4 * (side // 8) ** 2, 6))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        found = self.layers(pictures)
        return found / found.norm(dim=1, keepdim=True)


class OfBytes(nn.Module):
    """The same for uint8 [N, S, S, 3], as public exports of SSCD are: normalisation is within."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = (pictures.float() / 255 - MEAN) / STD
        return self.network(pixels.permute(0, 3, 1, 2))


def export(network: nn.Module, path: Path, given: torch.Tensor, fixed: bool = False) -> Path:
    axes = {} if fixed else {"x": {0: "n"}}
    torch.onnx.export(network, (given,), str(path), input_names=["x"], dynamic_axes=axes, dynamo=False)
    return path


def say(path: Path, **said: Any) -> str:
    path.with_name(path.name + ".json").write_text(json.dumps(said))
    return str(path)


def expected(side: int) -> np.ndarray:
    small = [np.array(p.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0)) for p in PICTURES]
    with torch.inference_mode():
        return OfBytes(Network(side))(torch.from_numpy(np.stack(small))).numpy()


@pytest.mark.parametrize("layout", ["float32 NCHW", "uint8 NHWC", "float16 NCHW", "uint8 NHWC, one at a time"])
def test_an_onnx_file_is_fed_what_it_takes(tmp_path: Path, layout: str) -> None:
    """A file of fixed 224 pixels, of every type and layout: the vectors are those of the network itself."""
    network = Network(224).eval()
    if layout == "float32 NCHW":
        export(network, tmp_path / "mine.onnx", torch.zeros(2, 3, 224, 224))
    elif layout == "float16 NCHW":
        export(network.half(), tmp_path / "mine.onnx", torch.zeros(2, 3, 224, 224).half())
    else:
        fixed = layout.endswith("time")
        given = torch.zeros(1 if fixed else 2, 224, 224, 3, dtype=torch.uint8)
        export(OfBytes(network), tmp_path / "mine.onnx", given, fixed)
    found = load_descriptor(say(tmp_path / "mine.onnx", threshold=0.6))
    assert (found.input_size, found.threshold, found.dimensions) == (224, 0.6, 6)
    tolerance = 5e-3 if "16" in layout else 1e-5
    np.testing.assert_allclose(found.describe(PICTURES), expected(224), atol=tolerance)


def test_a_torchscript_file_has_its_size_threshold_and_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.jit.trace(Network(96).eval(), torch.zeros(1, 3, 96, 96)).save(str(path))
    name = say(path, threshold=0.55, size=96)
    found = load_descriptor(name)
    np.testing.assert_allclose(found.describe(PICTURES), expected(96), atol=1e-5)
    assert descriptor_facts(name).name == found.name
    assert found.name.startswith("mine@")
    assert found.name.endswith("/skew96/t0.55")
    other = load_descriptor(say(path, threshold=0.55, size=96, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], label="ours"))
    assert other.name.startswith("ours@")
    assert other.name.rpartition("/")[2].startswith("n")
    assert np.abs(other.describe(PICTURES) - found.describe(PICTURES)).max() > 0.01


def test_names_tell_thresholds_apart(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.jit.trace(Network(96).eval(), torch.zeros(1, 3, 96, 96)).save(str(path))
    names = {descriptor_facts(say(path, threshold=threshold, size=96)).name for threshold in (0.5, 0.6)}
    assert len(names) == 2  # the clusters of an audit depend on it, so the audit's id does


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "descriptor of your own: say in"),
        ("[]", "is no table"),
        ("{", "cannot be read"),
        ('{"size": 96}', "as threshold"),
        ('{"threshold": true, "size": 96}', "as threshold"),
        ('{"threshold": NaN, "size": 96}', "as threshold"),
        ('{"threshold": 0.5}', "as size"),
        ('{"threshold": 0.5, "size": "96"}', "as size"),
        ('{"threshold": 0.5, "size": 96, "treshold": 1}', "'treshold' is not known"),
        ('{"threshold": 0.5, "size": 96, "mean": [1, 2]}', "mean is three numbers"),
        ('{"threshold": 0.5, "size": 96, "std": [1, 1, 0]}', "std is to be above 0"),
        ('{"threshold": 0.5, "size": 96, "label": "a b"}', "label is letters"),
        ('{"threshold": 0.5, "size": 64}', "does not load"),
    ],
)
def test_what_is_not_said_is_refused(tmp_path: Path, said: str | None, words: str) -> None:
    path = tmp_path / "mine.pt"
    torch.jit.trace(Network(96).eval(), torch.zeros(1, 3, 96, 96)).save(str(path))
    if said is not None:
        (tmp_path / "mine.pt.json").write_text(said)
    with pytest.raises(DescriptorError, match=words):
        load_descriptor(str(path))


def test_an_onnx_file_that_takes_something_else_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    two = tmp_path / "two.onnx"
    torch.onnx.export(Two(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)), str(two), dynamo=False)
    export(nn.Flatten(), tmp_path / "wide.onnx", torch.zeros(1, 3, 64, 96))
    export(nn.Flatten(), tmp_path / "grey.onnx", torch.zeros(1, 1, 64, 64))
    export(nn.Identity(), tmp_path / "same.onnx", torch.zeros(1, 3, 64, 64))
    export(Network(224), tmp_path / "large.onnx", torch.zeros(1, 3, 224, 224))
    for name, size, words in (
        ("two", 64, "2 inputs"), ("wide", 64, "only squares"), ("grey", 64, r"\[N, 3, S, S\]"),
        ("same", 64, "one vector"), ("large", 64, "takes pictures of 224"),
    ):  # fmt: skip
        with pytest.raises(DescriptorError, match=words):
            load_descriptor(say(tmp_path / f"{name}.onnx", threshold=0.5, size=size))
