"""PDQ hashes within a distance, exactly, among many.

Two hashes of 256 bits that differ in 31 at most differ, of 16 parts of 16 bits, in one by one bit at most (two in
each would be 32: the pigeonhole principle, as in multi-index hashing, arXiv 1307.2982). So a look-up reads 17 buckets
of each part. A bucket lies in one piece, and holds 128 other bits of each hash: which of them are close enough is told
without looking at the hash itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PARTS = 16
MOST_DISTANCE = 2 * PARTS - 1  # that the parts can find
BRUTE = 20_000  # hashes: fewer are all looked at
WORDS = 4  # a hash is four numbers of 64 bits


def packed(hashes: np.ndarray) -> np.ndarray:
    """Hashes as bytes, uint8 [N, 32], as uint64 [N, 4]."""
    return np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, WORDS)


@dataclass(frozen=True)
class Parts:
    """What look-ups read: of each part its buckets ``starts`` int64 [16, 65537], and in their order the ``others``,
    uint64 [16, N, 2], and the hashes' numbers ``order``, int32 [16, N].
    """

    starts: np.ndarray
    others: np.ndarray
    order: np.ndarray


def part_values(hashes: np.ndarray, part: int) -> np.ndarray:
    """The 16 bits of a part of uint64 [N, 4], uint16 [N]."""
    return np.ascontiguousarray(hashes).view(np.uint16).reshape(-1, PARTS)[:, part]


def others_of(part: int) -> tuple[int, int]:
    """The two words, of four, that a part's buckets hold: not the one that the part is of."""
    return (part // 4 + 1) % 4, (part // 4 + 2) % 4


def build_part(hashes: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, others, order) of one part."""
    values = np.ascontiguousarray(part_values(hashes, part))
    order = np.argsort(values, kind="stable").astype(np.int32)
    counts = np.bincount(values, minlength=1 << 16)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return starts, hashes[order][:, list(others_of(part))], order


def build_parts(hashes: np.ndarray) -> Parts:
    """All parts of uint64 [N, 4], in memory."""
    made = [build_part(hashes, part) for part in range(PARTS)]
    return Parts(*(np.stack(column) for column in zip(*made, strict=True)))


def within(
    hashes: np.ndarray, parts: Parts | None, queries: np.ndarray, distance: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(query, hash, distance), int64 each, of all pairs within ``distance``, by query and hash.

    ``hashes`` and ``queries`` are uint64 [N, 4] and [Q, 4]. Without ``parts``, or for a distance that they cannot find,
    every pair is looked at.
    """
    if parts is None or distance > MOST_DISTANCE:
        return _all_pairs(hashes, queries, distance)
    from audit.references.index.lookup import look_up

    return look_up(hashes, parts, queries, distance)


def _all_pairs(
    hashes: np.ndarray, queries: np.ndarray, distance: int, block: int = 1 << 18
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number, query in enumerate(queries):
        for start in range(0, len(hashes), block):
            bits = np.bitwise_count(hashes[start : start + block] ^ query).sum(axis=1, dtype=np.int64)
            near = np.flatnonzero(bits <= distance)
            found.append((np.full(len(near), number), near + start, bits[near]))
    if not found:
        return (np.empty(0, np.int64),) * 3
    query_of, rows, bits = (np.concatenate(column).astype(np.int64) for column in zip(*found, strict=True))
    return query_of, rows, bits
