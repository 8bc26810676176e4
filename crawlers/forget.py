"""What goes when somebody opts out: what is there already, and what a crawl has fetched meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from audit.states import ItemState

if TYPE_CHECKING:
    from crawlers.catalog import Catalog, Outcome
    from crawlers.items import Item

log = logging.getLogger(__name__)
REASON = "on the opt-out list"


def forget_opted_out(catalog: Catalog) -> int:
    """Apply the opt-out list to what is in the catalog already. How many items."""
    from crawlers.catalog import Outcome, item_of

    workspace = catalog.workspace
    if not catalog.opt_outs.entries:
        return 0
    rows = workspace.rows(
        "SELECT * FROM checkpoints WHERE source <> 'file' AND state <> 'opted-out' AND model_id IS NOT NULL"
    )
    gone = [row for row in rows if catalog.opt_outs.covers(row["source"], row["model_id"], row["uploader"])]
    if gone:
        _forget_audits(catalog, gone)
        outcome = Outcome(ItemState.opted_out, REASON)
        catalog.record([(item_of(row), outcome) for row in gone], {row["item_id"]: row for row in gone})
        remove_unheld(catalog, {row["identity"] for row in gone if row["identity"]})
    for row in workspace.rows(  # of an item that two crawls have recorded at once
        "SELECT DISTINCT identity FROM sketches WHERE identity NOT IN "
        "(SELECT identity FROM checkpoints WHERE identity IS NOT NULL)"
    ):
        workspace.erase("identity", row["identity"], "sketches")
    return len(gone)


def withdraw(catalog: Catalog, outcomes: Sequence[tuple[Item, Outcome]]) -> tuple[list[tuple[Item, Outcome]], set[str]]:
    """``outcomes`` with those as opted out whose files were fetched while their owners opted out; their identities.

    Raises CrawlError where the list cannot be read any more.
    """
    from crawlers.catalog import Outcome

    if not any(outcome.stored for _, outcome in outcomes):
        return list(outcomes), set()
    catalog.opt_outs = catalog.opt_outs.as_it_is_now()
    found, withdrawn = [], set()
    for item, outcome in outcomes:
        if outcome.stored and catalog.opt_outs.covers(item.source, item.model_id, item.uploader):
            withdrawn.add(outcome.stored.identity)
            if outcome.ground_truth:
                catalog.workspace.files.remove_folder(f"ground-truth/{outcome.ground_truth.folder}")
            found.append((item, Outcome(ItemState.opted_out, REASON)))
        else:
            found.append((item, outcome))
    return found, withdrawn


def remove_unheld(catalog: Catalog, identities: Iterable[str]) -> None:
    """Remove the files and sketches of those of ``identities`` that no item of the catalog has."""
    workspace = catalog.workspace
    for identity in identities:
        if not workspace.rows("SELECT 1 FROM checkpoints WHERE identity = ? LIMIT 1", [identity]):
            catalog.store.remove(identity)
            workspace.erase("identity", identity, "sketches", "base_distances")


def _forget_audits(catalog: Catalog, gone: Sequence[dict[str, Any]]) -> None:
    """Remove training sets, audits and recovered captions that are of ``gone`` items alone."""
    from audit.upkeep.forget import forget_audits

    workspace = catalog.workspace
    for column in ("checkpoint_sha256", "ground_truth", "identity"):
        kept = workspace.rows(
            f"SELECT DISTINCT {column} AS one FROM checkpoints WHERE NOT list_contains(?::VARCHAR[], item_id)",
            [[row["item_id"] for row in gone]],
        )
        alone = {row[column] for row in gone if row[column]} - {row["one"] for row in kept}
        if column == "checkpoint_sha256" and (audits := forget_audits(workspace, alone)):
            log.info("opted out: %d audits are removed, with their pages", len(audits))
        for name in alone if column == "ground_truth" else ():
            workspace.files.remove_folder(f"ground-truth/{name}")
        for identity in alone if column == "identity" else ():
            workspace.erase("identity", identity, "recoveries", "sketches", "base_distances")
