"""Work in several processes of this machine, each with its share of the cores' threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


def threads_each(workers: int, threads: int = 0) -> int:
    """The threads of each of ``workers`` processes, of ``threads`` in all; 0: OMP_NUM_THREADS, or one a core."""
    return max(1, (threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)) // workers)


def spread(work: Callable[[Item, int], Result], items: Sequence[Item], workers: int, threads: int) -> Iterator[Result]:
    """What ``work(item, threads)`` gives of every item: here and in order, or in ``workers`` processes as they end.

    Raises what the work raises, and then begins no further item.
    """
    if workers == 1:
        for item in items:
            yield work(item, threads)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(work, item, threads) for item in items]
        try:
            for done in as_completed(running):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
