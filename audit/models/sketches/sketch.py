"""A short vector of what an adapter changes: two re-saves of one adapter have nearly the same, two adapters do not.

With dW_l the change of layer l, entry j is the sum over layers of p_lj^T dW_l q_lj, where p and q are fixed vectors of
signs: the inner product of two sketches estimates sum_l <dW_l, dW'_l>, without dW ever being made (of factors U D it is
(p^T U)(D q)). So the cosine of two sketches estimates that of the two changes, up to about 1 / sqrt(SIZE) where they
are unrelated and far closer where they are nearly equal. It does not see precision, a common scale (alpha), how a rank
is split between the factors, names of the file, or in which of a model's layouts its modules are.

Signs depend on the sides of a layer and on the layer's name in one spelling (``families.spelling``); a layer that is
several of another layout's has theirs. Read with numpy alone, by the checked header: crawlers make sketches too, and
have no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audit.models.families.identify import family_of_shapes
from audit.models.families.spelling import place_of
from audit.models.formats.names import read_names
from audit.models.formats.scaling import problems, read_scaling, scaling_of
from audit.models.safetensors_header import Header
from audit.models.sketches.entries import entry, work
from audit.models.sketches.reader import Reader
from audit.models.sketches.signs import KIND as KIND
from audit.models.sketches.signs import SIZE as SIZE

NEAR = 0.9  # cosine from which two are re-saves of one adapter (docs/models.md has how it was measured)
MOST_WORK = 10**12  # multiplications of one file; a LoRA of rank 128 of all of SDXL takes a tenth


@dataclass(frozen=True)
class Sketch:
    """``vector``: float32 [SIZE], of length 1. ``norm``: the estimated Frobenius norm of all changes; ``modules``: how
    many are in it, ``left_out``: how many change in a way that has no sketch.
    """

    vector: np.ndarray
    norm: float
    modules: int
    left_out: int


def sketch_of(files: Iterable[tuple[Path, Header]]) -> Sketch | None:
    """The sketch of an adapter in checked files; None where it has no change that can be sketched.

    Raises ValueError where its tensors do not fit each other, or are not finite.
    """
    total, modules, left_out, spent = np.zeros(SIZE), 0, 0, 0
    for path, header in files:
        if problems(header.metadata):  # what its configuration says changes what its tensors do
            return None
        read, scalings = Reader(path, header), read_scaling(header.metadata)
        family = family_of_shapes(header.tensors)
        placed = [(place_of(one.part, one.module, family), one) for one in read_names(header.tensors).groups]
        for place, group in sorted(placed, key=lambda pair: (pair[0].part, pair[0].modules)):  # the same in all layouts
            found = None
            try:
                spent += work(group, read) * SIZE
                if spent <= MOST_WORK:
                    with np.errstate(all="ignore"):  # what overflows is refused below
                        found = entry(group, read, scaling_of(scalings, group.part, group.module), place)
            except (IndexError, KeyError, TypeError) as error:
                raise ValueError(f"{group.module[:120]}: {str(error)[:200]}") from error
            if found is None:
                left_out += 1
                continue
            if not np.isfinite(found).all():
                raise ValueError(f"{group.module[:120]} is not finite")
            total += found
            modules += 1
    length = float(np.linalg.norm(total))
    if not modules or not 0 < length < math.inf:
        return None
    return Sketch((total / length).astype(np.float32), length / SIZE**0.5, modules, left_out)
