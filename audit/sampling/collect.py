"""Filling the spool: sample, describe and keep, batch by batch, so that a stopped run goes on where it was.

While one batch is sampled on a GPU, the one before it is described, hashed and written by threads. Pixels go into the
spool as they are: nearly all of them are thrown away after clustering, and only what is kept becomes a PNG.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pyarrow as pa

from audit.descriptors import Descriptor, pdq_hash
from audit.sampling.pictures import statistics
from audit.sampling.sampler import Batch, Sampler, image_seed
from audit.sampling.spooled import MOST_THREADS, SPOOL_COLUMNS, SPOOLED
from audit.schemas import GENERATIONS
from audit.workspace import Spool

MOST_UNKEPT = 2  # batches that wait to be described and written; sampling waits for them then


class Collector:
    """Sample ``images`` images into ``spool``; those already there are not sampled again.

    ``overlap``: describe and write in threads while the next batch is sampled; by default where a GPU samples. On a CPU
    both would compete for the same cores.
    """

    def __init__(
        self,
        sampler: Sampler,
        descriptor: Descriptor,
        spool: Spool,
        audit_id: str,
        images: int,
        pixels: bool,
        overlap: bool | None = None,
    ) -> None:
        self.sampler, self.descriptor, self.spool = sampler, descriptor, spool
        self.audit_id, self.images, self.pixels = audit_id, images, pixels
        self.overlap = sampler.pair.device.type != "cpu" if overlap is None else overlap

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Sample what is missing. ``progress`` is told (images done, of how many).

        Raises SamplingError, DeviceMemoryError and WorkspaceError; what is finished by then is in the spool.
        """
        tell = progress or (lambda done, total: None)
        there = self.spool.indices()
        missing = [index for index in range(self.images) if index not in there]
        done = self.images - len(missing)
        tell(done, self.images)
        with ExitStack() as stack:
            keep = self._keeper(stack)
            started = time.monotonic()
            for batch in self.sampler.batches(missing):
                took = (time.monotonic() - started) / len(batch.indices)
                for kept in keep(batch, took):
                    done += kept
                    tell(done, self.images)
                started = time.monotonic()
            for kept in keep(None, 0.0):
                done += kept
                tell(done, self.images)

    def _keeper(self, stack: ExitStack) -> Callable[[Batch | None, float], Iterator[int]]:
        """Takes a batch (None: no more) and yields the sizes of batches that have come into the spool."""
        if not self.overlap:
            return lambda batch, took: iter([self._keep(batch, took)] if batch else [])
        threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
        writer = ThreadPoolExecutor(1)  # one: batches are written in order
        stack.callback(threads.shutdown)
        stack.callback(writer.shutdown)  # leaving waits for what is under way: a finished batch is not lost
        waiting: deque[Future[int]] = deque()

        def keep(batch: Batch | None, took: float) -> Iterator[int]:
            if batch is not None:
                waiting.append(writer.submit(self._keep, batch, took, threads))
            while waiting and (batch is None or len(waiting) > MOST_UNKEPT or waiting[0].done()):
                yield waiting.popleft().result()

        return keep

    def _keep(self, batch: Batch, took: float, threads: ThreadPoolExecutor | None = None) -> int:
        started = time.monotonic()
        hashes = threads.map(pdq_hash, batch.images) if threads else map(pdq_hash, batch.images)
        vectors = self.descriptor.describe(batch.images, threads)
        cell = self.sampler.pair.architecture.vae_scale_factor(self.sampler.pair.base)
        contrast, roughness = zip(*(statistics(image, cell) for image in batch.images), strict=True)
        rows = self._rows(batch, vectors, list(hashes))
        if threads is None:  # what is done beside the sampling costs it no time
            took += (time.monotonic() - started) / len(batch.indices)
        count, height, width, _ = batch.images.shape
        columns = ([took] * count, [height] * count, [width] * count, contrast, roughness)
        for (name, kind, _), values in zip(SPOOL_COLUMNS, columns, strict=True):
            rows = rows.append_column(SPOOLED.field(name), pa.array(values, kind))
        self.spool.add(batch.indices[0], rows)
        return count

    def _rows(self, batch: Batch, vectors: np.ndarray, hashes: list[tuple[bytes, int]]) -> pa.Table:
        return pa.table(
            {
                "audit_id": [self.audit_id] * len(batch.indices),
                "index": batch.indices,
                "seed": [image_seed(self.sampler.seed, index) for index in batch.indices],
                "caption": [self.sampler.caption_of(index) for index in batch.indices],
                "w": [self.sampler.w] * len(batch.indices),
                "descriptor": list(vectors),
                "pdq": [packed for packed, _ in hashes],
                "pdq_quality": [quality for _, quality in hashes],
                "image": [image.tobytes() if self.pixels else None for image in batch.images],
            },
            schema=GENERATIONS,
        )
