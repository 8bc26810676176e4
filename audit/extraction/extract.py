"""The extraction stage: sample, describe and keep, batch by batch, so that a stopped run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from audit.descriptors import Descriptor, pdq_hash
from audit.descriptors.base import to_png
from audit.extraction.sampling import Batch, Sampler, image_seed
from audit.schemas import GENERATIONS
from audit.storage import Spool

SPOOLED = GENERATIONS.append(
    pa.field("seconds", pa.float64(), metadata={"doc": "wall time of its batch / its images, s"})
)


class Extract:
    """Sample ``images`` images into ``spool``; those already there are not sampled again."""

    def __init__(
        self, sampler: Sampler, descriptor: Descriptor, spool: Spool, audit_id: str, images: int, pixels: bool
    ) -> None:
        self.sampler, self.descriptor, self.spool = sampler, descriptor, spool
        self.audit_id, self.images, self.pixels = audit_id, images, pixels

    def run(self, progress: Callable[[int, int], None] | None = None) -> pa.Table:
        """Sample what is missing and return all rows (schema SPOOLED), in order of their numbers.

        ``progress`` is told (images done, of how many). Raises SamplingError and WorkspaceError.
        """
        kept = self.spool.read()
        done = set(kept["index"].to_pylist()) if kept is not None else set()
        missing = [index for index in range(self.images) if index not in done]
        if progress:
            progress(len(done), self.images)
        started = time.monotonic()
        for batch in self.sampler.batches(missing):
            rows = self._rows(batch)
            took = (time.monotonic() - started) / len(batch.indices)
            self.spool.add(
                batch.indices[0], rows.append_column(SPOOLED.field("seconds"), pa.array([took] * rows.num_rows))
            )
            started = time.monotonic()
            done.update(batch.indices)
            if progress:
                progress(len(done), self.images)
        table = self.spool.read()
        if table is None:
            raise ValueError("an audit samples at least one image")
        return table.sort_by("index")

    def _rows(self, batch: Batch) -> pa.Table:
        vectors = self.descriptor.describe(batch.images)
        hashes, pictures = self._hashes_and_pictures(batch.images)
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
                "image": pictures,
            },
            schema=GENERATIONS,
        )

    def _hashes_and_pictures(self, images: np.ndarray) -> tuple[list[tuple[bytes, int]], list[bytes | None]]:
        return [pdq_hash(image) for image in images], [to_png(image) if self.pixels else None for image in images]


def vectors_of(table: pa.Table) -> np.ndarray:
    """The ``descriptor`` column as float32 [N, D]."""
    column = table["descriptor"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
