"""Whether backgrounds of another look become decoys: what of several on offer is taken, by their looks alone.

    python -m benchmarks.pairing

References are the training pictures, or a third of the unseen pictures, of each set of the testbed; on offer are
backgrounds of other sets, and perhaps one of its own. Right: its own alone is taken; mixed: it and others; wrong:
others alone; nothing: there is no verdict. No model is needed; a minute or two.

Exit code 1 where several on offer are taken wrongly clearly more often than a single one is.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from audit.demo import ASSETS, load_set
from audit.evidence.kind import kind_problem, look_of, of_their_kind
from benchmarks.evidence import share
from benchmarks.tables import table
from testbed.controls import controls

ON_OFFER = (1, 2, 3, 5, 9)
OUTCOMES = ("right", "mixed", "wrong", "nothing")


def looks(pictures: np.ndarray) -> np.ndarray:
    """float32 [N, 17] of uint8 pictures [N, H, W, 3]."""
    return np.stack([look_of(Image.fromarray(one)) for one in pictures])


def outcome(references: np.ndarray, others: list[np.ndarray], own: np.ndarray | None) -> str:
    """What becomes of backgrounds of ``others``, and of one of the references' ``own`` set."""
    backgrounds = others if own is None else [*others, own]
    passed = of_their_kind(references, backgrounds) if len(backgrounds) > 1 else [True]
    pool = [one for one, good in zip(backgrounds, passed or [False] * len(backgrounds), strict=True) if good]
    if not pool or kind_problem(references, np.concatenate(pool)):
        return "nothing"
    if own is None or not any(one is own for one in pool):
        return "wrong"
    return "right" if len(pool) == 1 else "mixed"


def main(rounds: Annotated[int, typer.Option(help="Draws of other sets for each set.", min=1)] = 20) -> None:
    """Print how often each outcome comes about, by how many other sets are on offer."""
    names = sorted(one.name for one in (ASSETS / "sets").iterdir())
    trained = {name: looks(load_set(name, "train")) for name in names}
    unseen = {name: looks(controls(name)) for name in names}
    rng = np.random.default_rng(1)
    rows, wrong = [], {}
    for with_own in (False, True):
        for count in ON_OFFER:
            found: Counter[str] = Counter()
            for _ in range(rounds):
                for name in names:
                    drawn = rng.choice([one for one in names if one != name], count, replace=False)
                    others = [np.concatenate([trained[one], unseen[one]]) for one in drawn]
                    third = np.arange(len(unseen[name])) % 3 == 0
                    for references, own in (
                        (trained[name], unseen[name]),
                        (unseen[name][third], unseen[name][~third]),
                    ):
                        found[outcome(references, others, own if with_own else None)] += 1
            whole = found.total()
            rows.append(("yes" if with_own else "no", count, *(share(found[one], whole) for one in OUTCOMES)))
            if not with_own:
                wrong[count] = found["wrong"] / whole
    print(table(("its own on offer", "others on offer", *OUTCOMES), rows))
    if max(wrong.values()) > 1.5 * wrong[1] + 0.02:
        print(f"several are taken wrongly more often than one: {wrong}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
