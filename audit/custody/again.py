"""An audit run once more from what is recorded of it, and compared with what it found then."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.custody.originals import Originals
from audit.custody.record import NAMING, OTHERS
from audit.custody.statement import versions
from audit.errors import ConfigError, CustodyError
from audit.progress import Tell, quiet
from audit.report.facts import AuditFacts, collect, find_audit
from audit.schemas import KEY_COLUMNS, TABLES
from audit.states import SetKind
from audit.workspace import Workspace

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.config import Latents, Settings
    from audit.job import Request

# What an audit of an earlier version has none of: then there is nothing to compare.
LATER = {
    "control_generations", "control_similarity", "control_index", "allowed_by", "policy", "inliers", "coverage",
    "mirrored", "normalized_similarity", "part", "whole_similarity",
}  # fmt: skip
TOLERANCE = 1e-3  # of numbers that other devices and versions come to, such as those of unit vectors
# What is of the run and not of the result.
OF_THE_RUN = {"audit_id", "checkpoint_name", "base_name", "device", "versions", "finished_at", "seconds_sampling",
              "seconds_total", "training_images_source", "captions", "warnings"}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One column of a table, or the verdicts: of how many rows, how many are equal to the last bit.

    ``largest`` is the largest difference between two numbers of it, None where they are no numbers, or are not alike.
    """

    table: str
    column: str
    rows: int
    equal: int
    largest: float | None

    @property
    def exact(self) -> bool:
        """Whether all of it is equal."""
        return self.equal == self.rows

    @property
    def close(self) -> bool:
        """Whether what is not equal is within TOLERANCE."""
        return self.exact or (self.largest is not None and self.largest <= TOLERANCE)


@dataclass(frozen=True)
class Reproduced:
    """What came of it. ``others`` are what differs of the device, the precision and the versions, as (then, now).

    ``left_out`` says of which sets nothing was compared, and why.
    """

    audit_id: str
    parts: list[Part]
    others: dict[str, tuple[str, str]]
    left_out: list[str]

    @property
    def exact(self) -> bool:
        """Whether everything that was compared is equal to the last bit."""
        return all(part.exact for part in self.parts)

    @property
    def agrees(self) -> bool:
        """Whether the verdicts are the same."""
        return all(part.exact for part in self.parts if part.table == VERDICTS)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit reproduce --json`` prints them."""
        parts = [{**asdict(part), "exact": part.exact, "close": part.close} for part in self.parts]
        others = {name: {"then": then, "now": now} for name, (then, now) in self.others.items()}
        return {"audit_id": self.audit_id, "agrees": self.agrees, "exact": self.exact, "parts": parts,
                "others": others, "left_out": self.left_out}  # fmt: skip


VERDICTS = "verdicts"


def reproduce(
    workspace: Workspace,
    audit: str,
    checkpoint: str | Path,
    base: str,
    *,
    base_config: str | None = None,
    references: Sequence[str | Path] = (),
    descriptor: str | None = None,
    device: str | None = None,
    batch_size: int = 0,
    tell: Tell = quiet,
) -> Reproduced:
    """Run the audit that begins with ``audit`` again in a temporary workspace, and compare what it finds.

    ``checkpoint`` and ``base`` have to be those of the audit; ``references`` are folders with the original pictures of
    its sets and decoys. ``descriptor`` is for one in a file of one's own. Nothing is written into ``workspace``. Raises
    CustodyError where a file is another one, and where this version comes to another audit.
    """
    from audit.bench import Bench
    from audit.claims.captions import Caption
    from audit.devices import default_device
    from audit.recovery.kept import carry

    audit_id = find_audit(workspace, audit)
    [row] = workspace.rows("SELECT * FROM audits WHERE audit_id = ?", [audit_id])
    bench = Bench(device or default_device(), batch_size)
    request = _request(row, Path(checkpoint), base, base_config, bench)
    source = descriptor or _descriptor_of(row["descriptor"])
    _same_audit(request, source, bench, row)
    with tempfile.TemporaryDirectory(prefix="lora-audit-reproduce-") as name:
        folder = Path(name)
        sets = _Sets(workspace, row, Originals.below([Path(one) for one in references], tell), folder)
        again = Workspace(folder / "workspace")
        carry(workspace, again, [Caption(text, "user") for text in request.captions])
        parts: list[Part] = []
        found: list[tuple[AuditFacts, AuditFacts]] = []
        for group in sets.groups or [[]]:
            now = _scan(request, sets, group, source, again, bench, tell)
            facts = collect(workspace, audit_id, group)
            found.append((facts, now))
        asked = {made: name for made, name in sets.names.items() if name not in sets.background}
        for table in KEY_COLUMNS:
            then = _rows(workspace, audit_id, table, list(asked.values()))
            parts += compared(table, then, _rows(again, audit_id, table, list(asked), sets.names))
        parts += [part for then, now in found for part in _verdicts(then, now, sets.names)]
        return Reproduced(audit_id, parts, _others(row, found[0][1].row), sets.left_out)


def _request(row: dict[str, Any], checkpoint: Path, base: str, base_config: str | None, bench: Bench) -> Request:
    """The question that the audit answered. Raises CustodyError for another checkpoint or base."""
    from audit.job import Request

    opened = bench.open(checkpoint)
    if opened.sha256 != row["checkpoint_sha256"]:
        raise CustodyError(
            f"{checkpoint} is not the file that was audited: its SHA256 is {opened.sha256}, that of the audit "
            f"{row['checkpoint_sha256']}"
        )
    located = bench.locate(base, base_config)
    if located.revision != row["base_revision"]:
        raise CustodyError(
            f"{base} is not the base model of the audit: its revision is {located.revision}, that of the audit "
            f"{row['base_revision']}"
        )
    n0 = None if row["training_images_source"] == "default" else row["training_images"]
    captions = [one["caption"] for one in row["captions"]]
    return Request(checkpoint, base, base_config, captions, None, n0, settings_of(row["settings"]))


def settings_of(text: str) -> Settings:
    """The settings in a row of audits. Raises CustodyError for those of another version."""
    from pydantic import TypeAdapter, ValidationError

    from audit.config import Settings

    try:
        return TypeAdapter(Settings).validate_json(text, extra="forbid")
    except (ValidationError, ConfigError) as error:
        raise CustodyError(f"the audit's settings are none of this version: {str(error)[:300]}") from error


def _descriptor_of(name: str) -> str:
    """What the descriptor called ``name`` in tables is asked for by. Raises CustodyError for a file of one's own."""
    from audit.descriptors.kinds import NetworkKind
    from audit.descriptors.registry import DESCRIPTORS

    for source, kind in DESCRIPTORS.items():
        label = kind.spec.label if isinstance(kind, NetworkKind) else source
        if name.partition("@")[0] == label:
            return source
    raise CustodyError(f"the audit's descriptor {name} is a file of somebody's own: give it with --descriptor FILE")


def _same_audit(request: Request, source: str, bench: Bench, row: dict[str, Any]) -> None:
    """Raise CustodyError where what would be run has another id than the audit: it would be another audit."""
    from audit.job import resolve

    job = resolve(request, source, bench)
    if job.descriptor.name != row["descriptor"]:
        raise CustodyError(
            f"the descriptor {source} is {job.descriptor.name}, the audit was judged by {row['descriptor']}"
        )
    if job.id != row["audit_id"]:
        raise CustodyError(
            f"lora-audit {versions()['lora-audit']} makes audit {job.id} of the recorded settings, not "
            f"{row['audit_id']}: its method has changed since, use the version that the audit records"
        )


class _Sets:
    """The reference sets of an audit whose originals are all at hand, each in a folder of its own.

    ``groups`` are the sets that were asked about together, as far as it matters; ``names`` maps those of the folders'
    sets to theirs.
    """

    def __init__(self, workspace: Workspace, row: dict[str, Any], originals: Originals, folder: Path) -> None:
        self.left_out: list[str] = []
        self.names: dict[str, str] = {}
        self.folders: dict[str, Path] = {}
        self.layouts: dict[str, str] = {}
        self._originals, self._folder = originals, folder / "sets"
        asked = workspace.rows(
            """SELECT s.reference_set AS name, any_value(m.question) AS question FROM
            (SELECT audit_id, reference_set FROM matches UNION SELECT audit_id, reference_set FROM chances
            UNION SELECT audit_id, reference_set FROM memberships) AS s
            LEFT JOIN memberships AS m USING (audit_id, reference_set)
            WHERE audit_id = ? GROUP BY ALL ORDER BY ALL""",
            [row["audit_id"]],
        )
        pictures = workspace.rows(
            """SELECT reference_set, reference_id, name, kind, parts_layout FROM "references" WHERE descriptor_name = ?
            ORDER BY reference_set, name""",
            [row["descriptor"]],
        )
        decoys = sorted({one["reference_set"] for one in pictures if one["kind"] == SetKind.background})
        self.background = [name for name in decoys if self._placed(name, pictures)]
        groups: dict[str, list[str]] = {}
        for one in asked:
            if one["name"] not in decoys and self._placed(one["name"], pictures):
                groups.setdefault(one["question"] or one["name"], []).append(one["name"])
        self.groups = list(groups.values())
        self.membership = any(one["question"] for one in asked)

    def _placed(self, name: str, pictures: list[dict[str, Any]]) -> bool:
        """Whether the originals of the set ``name`` are all there, and in a folder now."""
        mine = [one for one in pictures if one["reference_set"] == name]
        missing = [one["name"] for one in mine if one["reference_id"] not in self._originals.by_hash]
        if missing or not mine:
            why = "it was removed since"
            if missing:
                why = f"{len(missing)} of its {len(mine)} originals are not in --references, such as {missing[0]}"
            self.left_out.append(f"reference set {name}: {why}")
            return False
        from audit.references.asked import folder_set_name

        place = self._folder / str(len(self.folders))
        place.mkdir(parents=True)
        for number, one in enumerate(mine):
            original = self._originals.by_hash[one["reference_id"]]
            shutil.copyfile(original, place / f"{number:07d}{original.suffix.lower()}")
        self.folders[name] = place
        if mine[0]["parts_layout"]:
            self.layouts[name] = mine[0]["parts_layout"]
        self.names[folder_set_name(place)] = name
        return True


def _scan(
    request: Request, sets: _Sets, group: list[str], source: str, again: Workspace, bench: Bench, tell: Tell
) -> AuditFacts:
    """Run it for the sets of ``group``; what is sampled is sampled once for all groups."""
    from audit import api
    from audit.references.asked import folder_set_name
    from audit.references.sets import ReferenceSets

    for name in {*group, *sets.background} & set(sets.layouts):  # what is there in parts stays so when it is scanned
        place, described_by = sets.folders[name], bench.load_descriptor(source)
        ReferenceSets(again).add(folder_set_name(place), place, described_by, False, layout=sets.layouts[name])
    latents = _latents(sets.membership)
    done = api.scan(
        request, references=[sets.folders[name] for name in group], descriptor=source, workspace=again, latents=latents,
        background=[sets.folders[name] for name in sets.background] if group else (), bench=bench, progress=tell,
    )  # fmt: skip
    return done.facts


def _latents(membership: bool) -> Latents:
    from audit.config import Latents

    return Latents.always if membership else Latents.never


def _rows(
    workspace: Workspace, audit_id: str, table: str, sets: list[str], names: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The rows of the audit in ``table``, of ``sets`` where it is by set, under ``names``."""
    by_set = "reference_set" in TABLES[table].names
    where = " AND list_contains(?::VARCHAR[], reference_set)" if by_set else ""
    rows = workspace.rows(
        f"SELECT * FROM {table} WHERE audit_id = ?{where}", [audit_id, sets] if by_set else [audit_id]
    )
    return [_renamed(row, names) if names and by_set else row for row in rows]


def _renamed(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A row with the names that its sets had."""
    found = row | {"reference_set": names[row["reference_set"]]}
    if row.get("backgrounds"):
        named = [one | {"background": names[one["background"]]} for one in row["backgrounds"]]
        found["backgrounds"] = sorted(named, key=lambda one: str(one["background"]))
    return found


def compared(table: str, then: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[Part]:
    """A part a column of ``table``; a row that is on one side alone is unequal in all of them."""
    naming = NAMING.get(table, tuple(name for name in OTHERS if name in TABLES[table].names))
    first = {tuple(row[name] for name in naming): row for row in then}
    second = {tuple(row[name] for name in naming): row for row in now}
    keys = sorted({*first, *second}, key=repr)
    for column in TABLES[table].names if keys and not (table in LATER and not then) else ():
        if column in OF_THE_RUN or column in naming or column == "question":
            continue
        if column in LATER and all(row.get(column) is None for row in then):
            continue
        pairs = [(first.get(key, {}).get(column, ABSENT), second.get(key, {}).get(column, ABSENT)) for key in keys]
        distances = [_distance(one, other) for one, other in pairs]
        apart = [one for one in distances if one != 0.0]
        largest = None if any(one is None for one in apart) else max((one for one in apart if one), default=0.0)
        yield Part(table, column, len(pairs), len(pairs) - len(apart), largest)


ABSENT = object()


def _distance(one: Any, other: Any) -> float | None:
    """0 for equal values, how far numbers or vectors are apart, None for others that are not equal."""
    if one == other or (one != one and other != other):
        return 0.0
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        apart = [_distance(*pair) for pair in zip(one, other, strict=True)]
        return None if any(value is None for value in apart) else max(value for value in apart if value is not None)
    return None


def _verdicts(then: AuditFacts, now: AuditFacts, names: dict[str, str]) -> Iterator[Part]:
    """The verdicts of both as parts, by what they rest on; ``names`` has those of the sets now, and of then."""
    for name, of in (("matches", _matched), ("with an error rate", _told)):
        first, second = of(then, {}), of(now, names)
        keys = {*first, *second}
        yield Part(VERDICTS, name, len(keys), sum(first.get(key) == second.get(key) for key in keys), None)
    same = then.verdict.said == now.verdict.said
    yield Part(VERDICTS, "what is said", 1, int(same), None)


def _matched(facts: AuditFacts, names: dict[str, str]) -> dict[str, str]:
    found = {one.reference_id: "looks alike" for one in facts.verdict.alike}
    found |= {one.reference_id: "possible" for one in facts.verdict.possible}
    return found | {one.reference_id: "match" for one in facts.verdict.matched}


def _told(facts: AuditFacts, names: dict[str, str]) -> dict[str, str]:
    found = {one.reference_id: str(one.verdict) for one in facts.chances}
    return found | {names.get(one.reference_set, one.reference_set): str(one.verdict) for one in facts.set_chances}


def _others(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What differs of the two runs' devices, precisions and versions."""
    import json

    found = {name: (str(then[name]), str(now[name])) for name in ("device", "precision") if then[name] != now[name]}
    first, second = json.loads(then["versions"]), json.loads(now["versions"])
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            found[name] = str(first.get(name)), str(second.get(name))
    return found
