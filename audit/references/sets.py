"""Reference sets: images (or only their descriptors and hashes) that extractions are compared with."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from audit.descriptors.facts import DescriptorFacts
from audit.errors import ReferenceSetError
from audit.references import staging
from audit.references.describe import Wanted, at_once, described
from audit.references.folder import SkippedImage
from audit.references.index import forget
from audit.references.inputs.given import Pictures, chunks
from audit.references.inputs.parquet import Embeddings
from audit.references.inputs.source import folder_pictures
from audit.references.lists import read_list
from audit.references.parts import require_few
from audit.references.policy import Policy, policies, require_in_force
from audit.references.staging import Staging
from audit.schemas import REFERENCES
from audit.stages.membership import Membership
from audit.states import SetKind
from audit.workspace import Workspace
from audit.workspace.names import KEY

if TYPE_CHECKING:
    from audit.descriptors import Descriptor

log = logging.getLogger(__name__)
PDQ_NAME = "pdq"  # the descriptor that describes a picture by its PDQ hash
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_SET_SECONDS = 1800  # that its pictures may take to decode, beside
SECONDS_A_PICTURE = 2  # of each


@dataclass(frozen=True)
class Added:
    """What `add` did: the set's name, how many images it now has, and what was passed over."""

    name: str
    images: int
    skipped: list[SkippedImage]


@dataclass(frozen=True)
class Removed:
    """What `remove` did: pictures, matches with them, and report pages that showed them."""

    name: str
    pictures: int
    matches: int
    pages: list[str]


MOST_PASSED_OVER = 10_000  # that are kept of a set


def _passed_rows(name: str, descriptor_name: str, now: datetime, passed: list[SkippedImage]) -> list[dict[str, Any]]:
    kept = passed[:MOST_PASSED_OVER]
    if len(passed) > len(kept):
        kept[-1] = SkippedImage("...", f"{len(passed) - len(kept) + 1} more files")
    return [
        {"reference_set": name, "descriptor_name": descriptor_name, "name": one.name, "reason": one.reason,
         "added_at": now}
        for one in kept
    ]  # fmt: skip


class _Patience:
    """The seconds that the pictures of a set may take to decode: many that are each just within limits add up."""

    def __init__(self) -> None:
        self.left = float(MAX_SET_SECONDS)

    def spend(self, seconds: float, label: str) -> None:
        """Raise ReferenceSetError where the pictures so far, ``label`` the last, have taken more than is given."""
        self.left += SECONDS_A_PICTURE - seconds
        if self.left < 0:
            raise ReferenceSetError(
                f"the pictures take far more time to decode than pictures do, {label} {seconds:.0f} s: they may be "
                "made to; take away those that are large for nothing, or add the set in parts"
            )


class ReferenceSets:
    """The reference sets of a workspace. A set has one key a descriptor; adding again replaces it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @staticmethod
    def key_of(name: str, descriptor_name: str) -> str:
        """The key of a set's rows. Raises ReferenceSetError for a name that is none."""
        if not SET_NAME.fullmatch(name):
            raise ReferenceSetError(
                f"{name!r} cannot name a reference set: use up to 64 letters, digits, '.', '_', '-'"
            )
        return f"{name}.{hashlib.sha256(descriptor_name.encode()).hexdigest()[:12]}"

    def add(
        self,
        name: str,
        source: Path | Callable[[Mapping[str, str]], Pictures],
        descriptor: Descriptor,
        thumbnails: bool = True,
        progress: Callable[[int, int], None] | None = None,
        kind: SetKind = SetKind.reference,
        decoys_of: Sequence[str] = (),
        drawn_with: Sequence[str] = (),
        workers: int = 1,
        loaded_as: str = "",
        layout: str | None = None,
    ) -> Added:
        """Describe the pictures of ``source`` and keep them as the set ``name``, to be found or to be decoys.

        A source is a folder with all below it, or what opens a stream of pictures, given the names of those that were
        described before. A few pictures are in memory. The set appears
        when all are described, at once; until then the one that there was stays. Where this is stopped, it goes on with
        what was described. Several ``workers`` are processes that describe, on CPUs; they load the descriptor as
        ``loaded_as``. ``layout`` names parts that are described beside the whole (audit/references/parts.py).

        Decoys are for the sets ``decoys_of``, or for any, and are declared a random split of one collection with each
        of ``drawn_with``, as these are now. Raises ReferenceSetError where one of these is not there.

        Every file that is passed over is listed with its reason: what cannot be read or described, is too small, is
        no picture by its ending, or is the same file again. Raises ReferenceSetError where nothing can be read.
        """
        key = self.key_of(name, descriptor.name)
        if decoys_of and kind is not SetKind.background:
            raise ReferenceSetError(f"{name}: only decoys (--kind background) are for other sets (--of)")
        self.require_any(decoys_of)
        declared = self._declared(name, kind, drawn_with, descriptor)
        if layout and descriptor.name == PDQ_NAME:
            raise ReferenceSetError(f"{name}: parts are compared by a network's cosine, and pdq is a hash of the whole")
        how = f"{descriptor.name} {thumbnails} {layout}" if layout else f"{descriptor.name} {thumbnails}"
        kept = Staging(self.workspace.files, key, how)
        if kept.known:
            log.info("%s: %d pictures were described before and are not described again", name, len(kept.known))
        pictures = folder_pictures(source) if isinstance(source, Path) else source(kept.named)
        skipped: list[SkippedImage] = []
        names: dict[bytes, tuple[str, str | None]] = {}
        done, patience = 0, _Patience()
        known = frozenset(kept.known) if workers > 1 else kept.known
        wanted = Wanted(descriptor.name, loaded_as, thumbnails, known, layout)
        try:
            for found in described(chunks(pictures.given, at_once(layout)), descriptor, wanted, workers):
                kept.add(row for digest, row in found.rows.items() if bytes.fromhex(digest) not in kept.known)
                skipped += found.skipped
                for label, seconds in found.seconds:
                    patience.spend(seconds, label)
                for one in found.seen:
                    if (first := names.setdefault(bytes.fromhex(one.digest), (one.name, one.metadata)))[0] != one.name:
                        skipped.append(SkippedImage(one.name, f"the same file as {first[0]}"))
                require_few(len(names) if layout else 0, name)
                done += found.given
                if progress:
                    progress(done, pictures.total or 0)
        finally:
            kept.flush()
        passed = skipped + pictures.passed
        if not names:
            listed = "; ".join(f"{one.name}: {one.reason}" for one in passed[:3])
            raise ReferenceSetError(f"none of the {done} pictures in {pictures.label} can be read ({listed})")
        same = {"reference_set": name, "descriptor_name": descriptor.name, "added_at": datetime.now(UTC),
                "kind": kind, "decoys_of": sorted(set(decoys_of)) or None, "drawn_with": declared}  # fmt: skip
        self.put_whole(name, descriptor.name, kept.rows(names, same), passed)
        kept.discard()
        if not thumbnails:
            self._forget_pictures(name)
        return Added(name, len(names), passed)

    def add_list(self, name: str, path: Path) -> Added:
        """Keep the PDQ hashes of a list as the reference set ``name``, described by pdq; see ``read_list``."""
        found = read_list(path)
        columns: dict[str, Any] = found.rows()
        number, width = columns["descriptor"].shape
        offsets = np.arange(number + 1, dtype=np.int32) * width
        columns["descriptor"] = pa.ListArray.from_arrays(offsets, columns["descriptor"].reshape(-1))
        same = {"reference_set": name, "descriptor_name": PDQ_NAME, "added_at": datetime.now(UTC),
                "kind": str(SetKind.reference)}  # fmt: skip
        columns |= {one: pa.repeat(pa.scalar(value, REFERENCES.field(one).type), number) for one, value in same.items()}
        given = {one.name: columns.get(one.name, pa.nulls(number, one.type)) for one in REFERENCES}
        self.put_whole(name, PDQ_NAME, [pa.table(given).cast(REFERENCES)], found.skipped)
        self._forget_pictures(name)
        return Added(name, number, found.skipped)

    def put_whole(self, name: str, descriptor_name: str, parts: Iterable[pa.Table], passed: list[SkippedImage]) -> None:
        """Make ``parts`` the set ``name``, in place of the one that there is, at once."""
        key = self.key_of(name, descriptor_name)
        instead = [("reference_set", name), ("descriptor_name", descriptor_name)]
        singles = self.workspace.table("references").has_beginning(f"{key}.")  # which the key does not take away
        self.workspace.write_parts("references", key, parts, instead if singles else ())
        self.workspace.write("passed_over", key, _passed_rows(name, descriptor_name, datetime.now(UTC), passed))
        forget(self.workspace.files.scratch, name)
        self.forget_others(name)

    def add_vectors(self, name: str, files: Sequence[Path], descriptor: Descriptor, described_by: str) -> Added:
        """Keep the vectors in Parquet files, which the descriptor ``described_by`` has computed elsewhere, as a set.

        Raises ReferenceSetError where that is another one than ``descriptor``, or no vector can be used.
        """
        if described_by != descriptor.name:
            raise ReferenceSetError(
                f"the vectors are said to be by {described_by[:100]!r}, and audits of this descriptor compare with "
                f"{descriptor.name} alone: give the --descriptor that has made them"
            )
        found = Embeddings(name, files, described_by, descriptor.dimensions)
        self.put_whole(name, described_by, found.parts(), found.passed)
        self._forget_pictures(name)
        return Added(name, found.rows, found.passed)

    def layout_of(self, name: str, descriptor_name: str) -> str | None:
        """In what parts the set ``name`` is described; None for none, and for no set."""
        rows = self.workspace.rows(
            'SELECT any_value(parts_layout) AS layout FROM "references" '
            "WHERE reference_set = ? AND descriptor_name = ?",
            [name, descriptor_name],
        )
        found: str | None = rows[0]["layout"]
        return found

    def _declared(
        self, name: str, kind: SetKind, drawn_with: Sequence[str], descriptor: Descriptor
    ) -> list[str] | None:
        """The hashes of the pictures of the sets ``drawn_with`` as they are now; None for none."""
        if drawn_with and (kind is not SetKind.background or name in drawn_with):
            raise ReferenceSetError(f"{name}: only decoys (--kind background) are a random split with other sets")
        for one in drawn_with:
            self.require(one, descriptor)
        rows = self.workspace.rows(
            """SELECT sha256(string_agg(reference_id, ',' ORDER BY reference_id)) AS pictures FROM "references"
            WHERE descriptor_name = ? AND list_contains(?::VARCHAR[], reference_set) GROUP BY reference_set""",
            [descriptor.name, list(drawn_with)],
        )
        return sorted({row["pictures"] for row in rows}) or None

    def forget_others(self, name: str) -> None:
        """Let go of latents where some are of pictures that the set does not have any more."""
        stale = self.workspace.rows(
            "SELECT 1 FROM latents WHERE reference_set = ? AND reference_id NOT IN "
            '(SELECT reference_id FROM "references" WHERE reference_set = ?) LIMIT 1',
            [name, name],
        )
        if stale:
            for table in ("latents", "base_losses", "denoised"):
                self.workspace.remove_where(table, "reference_set", name)

    def _forget_losses(self, name: str) -> None:
        """Remove from the spools of unfinished audits what was measured on pictures of this set alone."""
        rows = self.workspace.rows(
            'SELECT reference_id FROM "references" GROUP BY reference_id HAVING bool_and(reference_set = ?)', [name]
        )
        gone = pa.array([row["reference_id"] for row in rows], pa.string())
        spools = {entry.key.split("/")[1] for entry in self.workspace.files.list("spool", recursive=True)}
        audits = [one for one in spools if KEY.fullmatch(one)]
        for audit_id in audits if len(gone) else ():
            self.workspace.spool(audit_id, Membership.batch).forget("reference_id", gone)

    def _forget_pictures(self, name: str) -> None:
        """Erase what models have made of the set's pictures: no picture of it is to be kept any more."""
        if self.workspace.rows("SELECT 1 FROM denoised WHERE reference_set = ? LIMIT 1", [name]):
            self.workspace.erase("reference_set", name, "denoised")

    def list(self) -> list[dict[str, Any]]:
        """A row a set and descriptor: reference_set, descriptor_name, kind, decoys_of, drawn, images, added_at,
        parts_layout; its role, and why it is not in force.
        """
        known, now = policies(self.workspace), datetime.now(UTC)
        rows = self.workspace.rows(
            "SELECT reference_set, descriptor_name, coalesce(any_value(kind), 'reference') AS kind, "
            "any_value(decoys_of) AS decoys_of, any_value(drawn_with) IS NOT NULL AS drawn, count(*) AS images, "
            'max(added_at) AS added_at, any_value(parts_layout) AS parts_layout FROM "references" '
            "GROUP BY reference_set, descriptor_name ORDER BY ALL"
        )
        own = [known.get(row["reference_set"], Policy(row["reference_set"])) for row in rows]
        return [
            row | {"role": str(one.role), "out_of_force": one.out_of_force(now)}
            for row, one in zip(rows, own, strict=True)
        ]

    def remove(self, name: str) -> Removed:
        """Remove the set ``name`` under every descriptor, all matches with it, and the pages that speak of it.

        No table file, no page and no list of a manifest holds anything of it afterwards. Raises ReferenceSetError where
        there is none.
        """
        from audit.custody.statement import remove_pictures
        from audit.report.pages import pages_with, remove_page

        rows = self.workspace.rows(
            'SELECT count(DISTINCT reference_id) AS pictures FROM "references" WHERE reference_set = ?', [name]
        )
        pages = pages_with(self.workspace, name)
        matches = self.workspace.rows(
            "SELECT count(DISTINCT (audit_id, reference_id)) AS n FROM matches WHERE reference_set = ?", [name]
        )
        unfinished = staging.forget(self.workspace.files, lambda key: key.rpartition(".")[0] == name)
        if not rows[0]["pictures"] and not matches[0]["n"] and not pages and not unfinished:
            raise ReferenceSetError(f"there is no reference set {name!r} ({self._there(name)})")
        for page in pages:  # what shows pictures goes first
            remove_page(self.workspace, page)
        remove_pictures(self.workspace, name)
        self._forget_losses(name)
        # the set itself last: killed before, it is still there to be removed
        for row in self.workspace.rows(
            "SELECT DISTINCT reference_set FROM (SELECT reference_set, unnest(backgrounds) AS one FROM set_chances) "
            "WHERE one.background = ? UNION SELECT reference_set FROM set_chances WHERE contains(policy, ?)",
            [name, f'"{name}"'],
        ):  # they name the background or the allow bank, and have to be matched again without it
            self.workspace.erase("reference_set", row["reference_set"], "set_chances")
        tables = (
            "denoised", "latents", "base_losses", "memberships", "chances", "set_chances", "passed_over", "matches",
            "policies", "references",
        )  # fmt: skip
        self.workspace.erase("reference_set", name, *tables)
        forget(self.workspace.files.scratch, name)
        return Removed(name, rows[0]["pictures"], matches[0]["n"], pages)

    def require_any(self, names: Sequence[str]) -> None:
        """Raise ReferenceSetError where one of ``names`` is no set of this workspace, by whatever descriptor."""
        known = {row["reference_set"] for row in self.list()} if names else set()
        for name in names:
            if name not in known:
                raise ReferenceSetError(f"there is no reference set {name!r} ({self._there(name)})")

    def _there(self, name: str) -> str:
        """What to say where the set ``name`` is missing."""
        if any(key.rpartition(".")[0] == name for key in staging.unfinished(self.workspace.files)):
            return "it is half added: the same 'lora-audit references add' goes on with it"
        return f"there are: {', '.join(sorted({row['reference_set'] for row in self.list()})) or 'none'}"

    def require(self, name: str, descriptor: Descriptor | DescriptorFacts, in_force: bool = True) -> None:
        """Raise ReferenceSetError where the set does not exist, or only under another descriptor, or, ``in_force``,
        where its policy is against matching with it.
        """
        described_by = {row["descriptor_name"] for row in self.list() if row["reference_set"] == name}
        if descriptor.name in described_by:
            require_in_force(self.workspace, [name] if in_force else [])
            return
        if described_by:
            raise ReferenceSetError(
                f"the reference set {name!r} was described by {', '.join(sorted(described_by))}, the audit uses "
                f"{descriptor.name}: add it again with 'lora-audit references add {name} FOLDER --descriptor ...'"
                + (", or audit with --descriptor pdq" if PDQ_NAME in described_by else "")
            )
        raise ReferenceSetError(
            f"{name!r} is neither a folder nor a reference set of this workspace ({self._there(name)})"
        )
