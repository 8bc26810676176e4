"""One picture of an input, and an input: a stream of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from audit.references.folder import SkippedImage

BYTES_AT_ONCE = 64 << 20  # of pictures that are in hand


@dataclass(frozen=True)
class Given:
    """A picture as it is given: a file or its bytes, ``metadata`` as JSON text, or ``refused``, why there is none.

    Of one that was described before, ``digest`` is the SHA256 of its file, which is not given again.
    """

    name: str
    source: Path | bytes = b""
    metadata: str | None = None
    refused: str | None = None
    digest: str | None = None


@dataclass
class Pictures:
    """An input: where it is from, its pictures in an order that stays, how many they are where that is known, and
    what was passed over without a look at it.
    """

    label: str
    given: Iterable[Given]
    total: int | None = None
    passed: list[SkippedImage] = field(default_factory=list)


def chunks(given: Iterable[Given], size: int) -> Iterator[list[Given]]:
    """``given`` in lists of ``size`` at most, that hold no more than some BYTES_AT_ONCE."""
    chunk: list[Given] = []
    held = 0
    for one in given:
        chunk.append(one)
        held += len(one.source) if isinstance(one.source, bytes) else 0
        if len(chunk) >= size or held >= BYTES_AT_ONCE:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
