"""What is known of a descriptor without loading it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DescriptorFacts:
    """``source`` is what it is asked for by; ``name`` identifies model and preprocessing in every table.

    ``threshold`` is the cosine from which two images count as a match, ``input_size`` the side of its input, pixels.
    """

    source: str
    name: str
    threshold: float
    input_size: int
