"""Why references are possible at most by the descriptor's fixed threshold, in words."""

from __future__ import annotations


def possible_by_threshold(small: int, by_part: int) -> list[str]:
    """Sentences on ``small`` references, smaller than the descriptor's input, and those alike ``by_part`` alone."""
    said = []
    if small:
        said.append(
            f"{small} possible: they reach it, but are smaller than what the descriptor looks at, and enlarged "
            "pictures look alike. Compare with the originals in full size."
        )
    if by_part:
        said.append(
            f"{by_part} possible by a part: a crop reaches it, and the whole picture does not. The threshold was found "
            "for whole pictures, and the best of several parts reaches it by chance more often."
        )
    return said
