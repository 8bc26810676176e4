"""Similarities beside what an extraction has in common with pictures that nobody trained on: score normalisation.

An extraction that is near to many pictures, of a common motif or with little in it, is near to a reference too. From
the cosine of extraction and whole reference the mean cosine of the extraction to its NEAREST nearest pictures of the
set's backgrounds is taken away, as the authors of SSCD advise (arXiv 2202.10261). It is kept beside the raw cosine and
decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audit.references.decoys import is_for
from audit.sampling.spooled import vectors_of

NEAREST = 10  # pictures of the backgrounds: with fewer nothing is said
WEIGHT = 1.0  # of their mean cosine
AT_ONCE = 1024  # extractions
COLUMN = "normalized_similarity"
_BACKGROUNDS = """SELECT reference_set, decoys_of, descriptor FROM "references"
WHERE kind = 'background' AND descriptor_name = ? ORDER BY reference_set, reference_id"""


def normalized(
    table: Callable[..., pa.Table], matches: pa.Table, extractions: pa.Table, descriptor_name: str
) -> pa.Table:
    """Rows of matches with the similarity beside the backgrounds of each set, null where they are too few.

    ``table`` answers SQL over references.
    """
    backgrounds = table(_BACKGROUNDS, descriptor_name)
    if not matches.num_rows or backgrounds.num_rows < NEAREST:
        return matches
    vectors, asked = vectors_of(backgrounds), vectors_of(extractions)
    names, serves = backgrounds["reference_set"].to_pylist(), backgrounds["decoys_of"].to_pylist()
    sets = matches["reference_set"].to_numpy(zero_copy_only=False)
    place = _places(matches, extractions)
    found = np.full(matches.num_rows, np.nan)
    similarity = pc.coalesce(matches["whole_similarity"], matches["similarity"]).to_numpy()
    for name in dict.fromkeys(sets.tolist()):
        here = np.array([is_for(of, name) and other != name for of, other in zip(serves, names, strict=True)], bool)
        if here.sum() < NEAREST:
            continue
        mine = np.flatnonzero(sets == name)
        found[mine] = similarity[mine] - WEIGHT * near_mean(asked, vectors[here])[place[mine]]
    at = matches.schema.get_field_index(COLUMN)
    return matches.set_column(at, matches.schema.field(at), pa.array(found, mask=np.isnan(found)))


def near_mean(asked: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Of each of ``asked``, unit float32 [E, D], the mean cosine to the NEAREST nearest of ``vectors`` [M, D]: [E]."""
    parts = [np.empty(0)]
    for start in range(0, len(asked), AT_ONCE):
        cosines = asked[start : start + AT_ONCE] @ vectors.T
        parts.append(np.partition(cosines, -NEAREST, axis=1)[:, -NEAREST:].astype(np.float64).mean(axis=1))
    return np.concatenate(parts)


def _places(matches: pa.Table, extractions: pa.Table) -> np.ndarray:
    """For each row of matches the number of its extraction."""

    def keys(rows: pa.Table) -> pa.Array:
        return pc.binary_join_element_wise(rows["audit_id"], rows["rank"].cast(pa.string()), " ").combine_chunks()

    return np.asarray(pc.index_in(keys(matches), value_set=keys(extractions)).to_numpy())
