"""How much leaks, by the rank of the LoRA: a plot over a workspace of finished audits.

    python examples/leak_by_rank.py WORKSPACE [leak_by_rank.svg]

The share of an audit is how many of the reference pictures it was compared with came out of it alike, by the fixed
threshold of the descriptor, each picture once; that is a figure over many audits, and no verdict on any. Audits that
tell nothing are left out. It prints a row a rank, and draws every audit and the mean of a rank. Drawing
needs matplotlib: pip install 'lora-audit[plots]'.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import audit

SQL = """
WITH compared AS (
    SELECT DISTINCT audit_id, reference_set FROM matches
), asked AS (
    SELECT audit_id, count(DISTINCT r.reference_id) AS pictures
    FROM compared JOIN audits AS a USING (audit_id)
    JOIN "references" AS r ON r.reference_set = compared.reference_set AND r.descriptor_name = a.descriptor
    GROUP BY audit_id
), alike AS (
    SELECT audit_id, count(DISTINCT reference_id) AS pictures FROM matches WHERE is_match GROUP BY audit_id
), ranks AS (
    SELECT checkpoint_sha256, min(tensor_rank) AS rank FROM checkpoints WHERE tensor_rank IS NOT NULL GROUP BY ALL
)
SELECT rank, coalesce(alike.pictures, 0) / asked.pictures AS share
FROM audits JOIN ranks USING (checkpoint_sha256) JOIN asked USING (audit_id) LEFT JOIN alike USING (audit_id)
WHERE tells_nothing IS NULL ORDER BY rank, share
"""


@dataclass(frozen=True)
class Leak:
    """One audit: the rank of its LoRA, and the share of the reference pictures that came out of it alike."""

    rank: int
    share: float


def leaks(workspace: audit.Workspace) -> list[Leak]:
    """Every audit of a LoRA that was compared with reference pictures, by rank."""
    return [Leak(**row) for row in workspace.sql(SQL).to_pylist()]


def by_rank(found: list[Leak]) -> dict[int, list[float]]:
    """The shares of the audits of each rank."""
    return {rank: [one.share for one in found if one.rank == rank] for rank in sorted({one.rank for one in found})}


def draw(shares: dict[int, list[float]], file: Path) -> None:
    """Write the picture: a dot an audit, a line through the means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    ranks = list(shares)
    dots = [(rank, share) for rank, some in shares.items() for share in some]
    axes.scatter(*zip(*dots, strict=True), s=28, alpha=0.35, linewidths=0, color="#4477aa", label="one audit")
    axes.plot(ranks, [mean(shares[rank]) for rank in ranks], "o-", color="#aa3377", label="mean of a rank")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{rank}\nn = {len(shares[rank])}" for rank in ranks])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("rank of the LoRA, and how many audits")
    axes.set_ylabel("reference pictures that came out alike")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    """Print the table, and draw it where matplotlib is installed."""
    if len(sys.argv) < 2:
        raise SystemExit((__doc__ or "").split("\n\n")[1].strip())
    shares = by_rank(leaks(audit.Workspace(sys.argv[1], reading=True, create=False)))
    if not shares:
        raise SystemExit("no finished audit of a LoRA was compared with reference pictures here")
    print("rank  audits  alike")
    for rank, some in shares.items():
        print(f"{rank:4}  {len(some):6}  {mean(some):9.1%}")
    file = Path(sys.argv[2] if len(sys.argv) > 2 else "leak_by_rank.svg")
    try:
        draw(shares, file)
    except ModuleNotFoundError:
        raise SystemExit("no picture: pip install 'lora-audit[plots]'") from None
    print(f"picture: {file}")


if __name__ == "__main__":
    main()
