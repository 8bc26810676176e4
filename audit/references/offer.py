"""The pictures that may be decoys, as the tables have them, and which of them are those of a reference set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.evidence.kind import FEATURES
from audit.references.decoys import Decoys, Paired, caveat_of, is_for, paired
from audit.sampling.spooled import vectors_of

if TYPE_CHECKING:
    from audit.descriptors.facts import DescriptorFacts
    from audit.workspace import Workspace

# What is read of a picture, of the table references as r.
PICTURE = """r.reference_set, r.reference_id, r.name, r.descriptor, r.look, r.pdq_quality, r.width, r.height, r.kind,
    r.decoys_of"""
ORDER = " ORDER BY r.reference_set, r.reference_id"


def looks_of(table: pa.Table) -> np.ndarray:
    """[N, F]; NaN for pictures that were added before looks were taken."""
    none = [np.nan] * FEATURES
    return np.array([one or none for one in table["look"].to_pylist()], np.float32).reshape(-1, FEATURES)


def counting(table: pa.Table, input_size: int) -> np.ndarray:
    """Which pictures count, booleans [N]."""
    rows = table.select(["pdq_quality", "width", "height"]).to_pylist()
    return np.array([caveat_of(row, input_size) is None for row in rows], bool)


def on_offer(table: pa.Table, input_size: int, cosines: np.ndarray, scores: np.ndarray) -> Decoys:
    """The pictures of backgrounds in ``table``, with their ``cosines`` [N] and membership ``scores`` [N]."""
    names = [np.array(table[name].to_pylist(), object) for name in ("reference_set", "reference_id", "name")]
    vectors = vectors_of(table) if table.num_rows else np.empty((0, 0), np.float32)
    return Decoys(names[0], names[1], names[2], vectors, looks_of(table), cosines, scores, counting(table, input_size))


def pairing_of(name: str, mine: pa.Table, offer: Decoys, serves: Sequence[list[str] | None], threshold: float,
               input_size: int) -> Paired:  # fmt: skip
    """The decoys of the set ``name`` with the pictures ``mine``; ``serves`` are the sets that each on offer is for."""
    here = [is_for(one, name) and other != name for one, other in zip(serves, offer.backgrounds, strict=True)]
    looks = looks_of(mine)[counting(mine, input_size)]
    return paired(vectors_of(mine), looks, offer.where(np.array(here, bool)), threshold)


def decoys_of(workspace: Workspace, descriptor: DescriptorFacts, sets: Sequence[str]) -> set[tuple[str, str]]:
    """(background, picture) of the decoys of ``sets``: by their looks alone, and none where nothing follows from them.

    They are those that references are compared with, once they have scores.
    """
    table = workspace.select(
        f"""SELECT {PICTURE} FROM "references" AS r WHERE r.descriptor_name = ?
        AND (r.kind = 'background' OR list_contains(?::VARCHAR[], r.reference_set)){ORDER}""",
        [descriptor.name, list(sets)],
    )
    backgrounds = table.filter(pc.fill_null(pc.equal(table["kind"], "background"), False))
    if not backgrounds.num_rows:
        return set()
    unknown = np.full(backgrounds.num_rows, np.nan)
    offer = on_offer(backgrounds, descriptor.input_size, unknown, unknown)
    serves, found = backgrounds["decoys_of"].to_pylist(), set()
    for name in sets:
        mine = table.filter(pc.equal(table["reference_set"], name))
        if mine.num_rows:
            pairing = pairing_of(name, mine, offer, serves, descriptor.threshold, descriptor.input_size)
            if pairing.problem is None:
                found |= set(zip(pairing.decoys.backgrounds.tolist(), pairing.decoys.ids.tolist(), strict=True))
    return found
