"""The pictures that may be decoys, as the tables have them, and which of them are those of a reference set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa

from audit.descriptors.pdq import MIN_QUALITY
from audit.evidence.kind import FEATURES
from audit.references.decoys import Decoys, Paired, is_for, paired
from audit.references.index import Bank, open_bank
from audit.references.parts import Parts, layouts_of, open_parts, parts_of
from audit.sampling.spooled import vectors_of

if TYPE_CHECKING:
    from audit.descriptors.facts import DescriptorFacts
    from audit.workspace import Workspace

# What is read of a picture, of the table references as r.
ABOUT = """r.reference_set, r.reference_id, r.name, r.look, r.pdq_quality, r.width, r.height, r.decoys_of"""
PICTURE = f"{ABOUT}, r.descriptor, r.parts_layout, r.parts"
BACKGROUND = "r.kind = 'background'"
MOST = 5000  # pictures whose looks are compared
ORDER = " ORDER BY r.reference_set, r.reference_id"


def looks_of(table: pa.Table) -> np.ndarray:
    """[N, F]; NaN for pictures that were added before looks were taken."""
    none = [np.nan] * FEATURES
    return np.array([one or none for one in table["look"].to_pylist()], np.float32).reshape(-1, FEATURES)


def counting(table: pa.Table, input_size: int) -> np.ndarray:
    """Which pictures count, booleans [N]: those that ``caveat_of`` says nothing against."""
    quality, width, height = (
        table[name].cast(pa.int64()).fill_null(unknown).to_numpy()
        for name, unknown in (("pdq_quality", MIN_QUALITY), ("width", 0), ("height", 0))
    )
    known = (width > 0) & (height > 0)
    return np.asarray((quality >= MIN_QUALITY) & ~(known & (np.minimum(width, height) < input_size)))


def on_offer(
    table: pa.Table, input_size: int, cosines: np.ndarray, controls: np.ndarray, scores: np.ndarray
) -> Decoys:  # fmt: skip
    """The pictures of backgrounds in ``table``, with their ``cosines`` [N] to extractions, ``controls`` [N] to control
    generations, and membership ``scores`` [N].
    """
    names = [np.array(table[name].to_pylist(), object) for name in ("reference_set", "reference_id", "name")]
    vectors = vectors_of(table) if table.num_rows else np.empty((0, 0), np.float32)
    return Decoys(
        names[0], names[1], names[2], vectors, looks_of(table), cosines, scores, counting(table, input_size),
        controls, layouts_of(table), parts_of(table),
    )  # fmt: skip


def pairing_of(name: str, bank: Bank, parts: Parts | None, mine: pa.Table, offer: Decoys,
               serves: Sequence[list[str] | None], threshold: float, input_size: int) -> Paired:  # fmt: skip
    """The decoys of the set ``name`` with the references ``bank`` and their ``parts``, pictures ``mine`` in any order;
    ``serves`` are the sets that each on offer is for.
    """
    here = [is_for(one, name) and other != name for one, other in zip(serves, offer.backgrounds, strict=True)]
    telling = np.flatnonzero(counting(mine, input_size))
    if len(telling) > MOST:  # more are no surer of their look
        telling = np.sort(np.random.default_rng(0).choice(telling, MOST, replace=False))
    looks = looks_of(mine.select(["look"]).take(pa.array(telling)))
    return paired(bank, looks, offer.where(np.array(here, bool)), threshold, parts)


def decoys_of(workspace: Workspace, descriptor: DescriptorFacts, sets: Sequence[str]) -> set[tuple[str, str]]:
    """(background, picture) of the decoys of ``sets``: by their looks alone, and none where nothing follows from them.

    They are those that references are compared with, once they have scores.
    """

    def ask(connection: duckdb.DuckDBPyConnection) -> set[tuple[str, str]]:
        def table(what: str, where: str, *values: Any) -> pa.Table:
            sql = f'SELECT {what} FROM "references" AS r WHERE r.descriptor_name = ? AND {where}{ORDER}'
            return connection.sql(sql, params=[descriptor.name, *values]).to_arrow_table()

        backgrounds = table(PICTURE, BACKGROUND)
        if not backgrounds.num_rows:
            return set()
        unknown = np.full(backgrounds.num_rows, np.nan)
        offer = on_offer(backgrounds, descriptor.input_size, unknown, unknown, unknown)
        serves, found = backgrounds["decoys_of"].to_pylist(), set()
        for name in sets:
            mine = table(ABOUT, "r.reference_set = ?", name)
            if not mine.num_rows:
                continue
            bank = open_bank(connection, workspace, name, descriptor.name)
            parts = open_parts(connection, bank, name, descriptor.name)
            pairing = pairing_of(name, bank, parts, mine, offer, serves, descriptor.threshold, descriptor.input_size)
            if pairing.problem is None:
                found |= set(zip(pairing.decoys.backgrounds.tolist(), pairing.decoys.ids.tolist(), strict=True))
        return found

    return workspace.asked(ask, '"references"')
