"""A network of one's own, named by its path: what it is used with is said beside it, in FILE.json.

``{"threshold": 0.6, "size": 224, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "label": "mine"}``: the cosine from
which two pictures count as a match, without which no verdict can be given; the side of its input in pixels, where the
file leaves it open; and what normalises its input, which is ImageNet's where nothing is said.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from audit.descriptors.facts import IMAGENET_MEAN, IMAGENET_STD, Spec
from audit.descriptors.kinds import NetworkKind
from audit.descriptors.networks import fixed_size
from audit.errors import DescriptorError

MAX_SPEC_BYTES = 1 << 16
KEYS = ("threshold", "size", "mean", "std", "label")


class OwnFile(NetworkKind):
    """The TorchScript or ONNX file at ``file``. Raises DescriptorError where what is beside it says not enough."""

    def __init__(self, file: Path) -> None:
        self._file, self._spec = file, spec_of(file)

    @property
    def name(self) -> str:  # type: ignore[override]
        """What it is asked for by."""
        return str(self._file)

    @property
    def spec(self) -> Spec:
        """What FILE.json says."""
        return self._spec

    def path(self) -> Path:
        """The file itself."""
        return self._file


def spec_of(file: Path) -> Spec:
    """How the network in ``file`` is used, as ``file``.json says. Raises DescriptorError."""
    beside = file.with_name(file.name + ".json")
    said = _read(beside, file)
    size = fixed_size(file) if file.suffix == ".onnx" else None
    wanted = said.get("size", size)
    if size is not None and wanted != size:
        raise DescriptorError(f"{beside}: size is {wanted!r}, {file.name} takes pictures of {size} pixels a side")
    if type(wanted) is not int or not 8 <= wanted <= 4096:
        raise DescriptorError(f"{beside}: say the side of its input in pixels as size, from 8 to 4096")
    threshold = said.get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 < threshold <= 1:
        raise DescriptorError(f"{beside}: say the cosine from which two pictures count as a match as threshold")
    mean, std = _three(beside, said, "mean", IMAGENET_MEAN), _three(beside, said, "std", IMAGENET_STD)
    if min(std) <= 0:
        raise DescriptorError(f"{beside}: std is to be above 0")
    label = said.get("label", file.stem)
    if not isinstance(label, str) or not re.fullmatch(r"[\w.-]{1,64}", label):
        raise DescriptorError(f"{beside}: label is letters, digits, '.', '_' and '-', 64 at most")
    suffix = f"/t{threshold:g}"  # vectors under another threshold are another question
    if (mean, std) != (IMAGENET_MEAN, IMAGENET_STD):
        suffix += f"/n{hashlib.sha256(json.dumps([mean, std]).encode()).hexdigest()[:8]}"
    return Spec(label, wanted, float(threshold), None, mean, std, suffix)


def _read(beside: Path, file: Path) -> dict[str, Any]:
    example = '{"threshold": 0.6, "size": 224}'
    try:
        with beside.open("rb") as opened:
            said = json.loads(opened.read(MAX_SPEC_BYTES))
    except FileNotFoundError:
        raise DescriptorError(
            f"{file} is a descriptor of your own: say in {beside} what it is used with, such as {example}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DescriptorError(f"{beside} cannot be read: {str(error)[:200]}") from error
    if not isinstance(said, dict):
        raise DescriptorError(f"{beside} is no table: write one such as {example}")
    unknown = sorted(set(said) - set(KEYS))
    if unknown:
        raise DescriptorError(f"{beside}: {unknown[0][:80]!r} is not known (there are: {', '.join(KEYS)})")
    return said


def _three(beside: Path, said: dict[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, float, float]:
    found = said.get(name, list(default))
    numbers = isinstance(found, list) and len(found) == 3
    if not numbers or not all(type(one) in (int, float) and abs(one) < 1000 for one in found):
        raise DescriptorError(f"{beside}: {name} is three numbers, of red, green and blue from 0 to 1")
    first, second, third = (float(one) for one in found)
    return first, second, third
