"""What every part is given: the record, the device, the sizes, a folder, and pairs of real size made once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from benchmarks.gpu.facts import Record
from benchmarks.gpu.measure import is_cuda, release
from benchmarks.gpu.models import Kind
from benchmarks.gpu.subject import RealPair

Size = TypeVar("Size")
GOLDEN = Path(__file__).with_name("golden.npz")


@dataclass
class Bench:
    """One run on one device; ``tiny`` is every part at toy size."""

    record: Record
    device: str
    tiny: bool
    golden: Path = GOLDEN
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lora-audit-gpu-")))
    _pairs: dict[Kind, RealPair] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return is_cuda(self.device)

    def size(self, real: Size, tiny: Size) -> Size:
        """``real``, or ``tiny`` at toy size."""
        return tiny if self.tiny else real

    def pair(self, kind: Kind, make: Callable[[], RealPair]) -> RealPair:
        """The pair of ``kind``; made where no part before has left one."""
        if kind not in self._pairs:
            self._pairs[kind] = make()
        return self._pairs[kind]

    def forget(self, kind: Kind | None = None) -> None:
        """Give back the memory of the pair of ``kind``, or of all."""
        for one in [kind] if kind else list(self._pairs):
            self._pairs.pop(one, None)
        release(self.device)
