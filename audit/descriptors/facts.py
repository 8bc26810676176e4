"""What is known of a descriptor without loading it."""

from __future__ import annotations

import re
from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


_OWN = (
    "nano, this project's own descriptor for pictures of 64 pixels. It is not SSCD, which published work judges by, "
    "and it is less strict: scores of the two do not compare"
)
_SSCD = "SSCD (sscd_disc_mixup), the descriptor that published work judges by"
_IN_WORDS = {"nano": _OWN, "sscd_disc_mixup": _SSCD, "sscd_disc_mixup_int8": f"{_SSCD}, in numbers of 8 bits"}


def in_words(name: str) -> str:
    """Who judges, for people, by the ``name`` in the tables: a descriptor that we know, or one of the user's own."""
    known = re.fullmatch(r"(\w+)@[0-9a-f]{12}/skew\d+", name)  # that of a file of one's own ends with its threshold
    if known and known[1] in _IN_WORDS:
        return _IN_WORDS[known[1]]
    if name == "pdq":
        return "PDQ, a hash that finds copies, not crops or recoloured versions"
    return f"{name}, a descriptor of the user's choice"


@dataclass(frozen=True)
class DescriptorFacts:
    """``source`` is what it is asked for by; ``name`` identifies model and preprocessing in every table.

    ``threshold`` is the cosine from which two images count as a match, ``input_size`` the side of its input, pixels.
    """

    source: str
    name: str
    threshold: float
    input_size: int


@dataclass(frozen=True)
class Spec:
    """How a network's file is used: how large its input is, what its numbers are, and what a match is.

    ``label`` begins its name in tables. ``input_size``: pixels a side. ``threshold``: as in DescriptorFacts. ``mean``
    and ``std``, red, green and blue of 0 to 1, normalise the input. ``sha256`` where the file is pinned. ``suffix``
    ends its name: what differs from the usual preprocessing.
    """

    label: str
    input_size: int
    threshold: float
    sha256: str | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    suffix: str = ""

    def name(self, sha256: str) -> str:
        """What the vectors of the file with this hash are called in every table."""
        return f"{self.label}@{sha256[:12]}/skew{self.input_size}{self.suffix}"
