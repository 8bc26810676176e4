"""Look-ups in the parts of PDQ hashes, compiled."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from audit.references.index.hashes import PARTS, Parts, others_of

CHUNK = 256  # queries of a thread's turn
_OTHERS = np.array([others_of(part) for part in range(PARTS)], np.int64)


@intrinsic
def _popcount(typing_context, number):  # type: ignore[no-untyped-def]
    """The bits of a uint64 that are set."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        function = builder.module.declare_intrinsic("llvm.ctpop", [ir.IntType(64)])
        return builder.call(function, arguments)

    return types.uint64(types.uint64), generate


def look_up(
    hashes: np.ndarray, parts: Parts, queries: np.ndarray, distance: int, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(query, hash, distance) of all pairs within ``distance``, by query and hash; see ``hashes.within``."""
    turns = [queries[start : start + CHUNK] for start in range(0, len(queries), CHUNK)]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        answers = pool.map(lambda some: _answer(hashes, parts, some, distance), turns)
        found = [
            (mine + number * CHUNK, rows, bits) for number, (mine, rows, bits) in enumerate(answers)
        ]  # fmt: skip
    if not found:
        return (np.empty(0, np.int64),) * 3
    query_of, rows, bits = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((rows, query_of))
    return query_of[order], rows[order], bits[order]


def _answer(
    hashes: np.ndarray, parts: Parts, queries: np.ndarray, distance: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    room = 64 * len(queries)
    while True:
        found = np.empty((room, 3), np.int64)
        number = _walk(hashes, parts.starts, parts.others, parts.order, _OTHERS, queries, distance, found)
        if number <= room:
            mine = found[:number]
            return mine[:, 0], mine[:, 1], mine[:, 2]
        room = number


@numba.njit(nogil=True, cache=True)
def _walk(hashes, starts, others, order, words, queries, distance, found):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Write the pairs into ``found`` as far as there is room; how many they are."""
    number = 0
    for query in range(queries.shape[0]):
        for part in range(16):
            shift = np.uint64(16 * (part % 4))
            value = (queries[query, part // 4] >> shift) & np.uint64(0xFFFF)
            first, second = words[part, 0], words[part, 1]
            one, two = queries[query, first], queries[query, second]
            for flip in range(17):
                bucket = value if flip == 16 else value ^ (np.uint64(1) << np.uint64(flip))
                for place in range(starts[part, bucket], starts[part, bucket + np.uint64(1)]):
                    bits = np.int64(_popcount(others[part, place, 0] ^ one) + _popcount(others[part, place, 1] ^ two))
                    if bits > distance:
                        continue
                    row = order[part, place]
                    bits = _distance(hashes[row], queries[query])
                    if bits <= distance and not _found_before(hashes[row], queries[query], part):
                        if number < found.shape[0]:
                            found[number, 0] = query
                            found[number, 1] = row
                            found[number, 2] = bits
                        number += 1
    return number


@numba.njit(nogil=True, cache=True)
def _distance(first, second):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    bits = np.uint64(0)
    for word in range(4):
        bits += _popcount(first[word] ^ second[word])
    return np.int64(bits)


@numba.njit(nogil=True, cache=True)
def _found_before(first, second, part):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether a part before ``part`` has found this pair, too."""
    for earlier in range(part):
        shift = np.uint64(16 * (earlier % 4))
        differing = ((first[earlier // 4] ^ second[earlier // 4]) >> shift) & np.uint64(0xFFFF)
        if _popcount(differing) <= 1:
            return True
    return False
