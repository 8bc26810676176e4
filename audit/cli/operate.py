"""`lora-audit status`, `failures`, `verify`, `compact` and `config show`: what an operator asks of a workspace."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import (
    JsonOption,
    console,
    print_json,
    progress_display,
    result_console,
)
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config
from audit.states import Attempt

if TYPE_CHECKING:
    from audit.workspace import Workspace

config_app = typer.Typer(no_args_is_help=True, help="The configuration.")
EXIT_DAMAGED = 1


@configured("workspace")
def status(config: Config, as_json: JsonOption = False) -> None:
    """What the workspace holds, and what runs are doing."""
    from rich.markup import escape
    from rich.table import Table

    from audit.engine.run import is_alive, read_runs
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, reading=True, create=False)
    catalog = opened.rows("SELECT source, state, count(*) AS items FROM checkpoints GROUP BY ALL ORDER BY ALL")
    audits = opened.rows(
        "SELECT count(*) AS audits, coalesce(sum(images), 0)::BIGINT AS images, max(finished_at) AS last FROM audits"
    )[0]
    matched = opened.rows("SELECT count(DISTINCT audit_id) AS n FROM matches WHERE is_match")[0]["n"]
    failing = opened.rows(f"SELECT state, count(*) AS audits FROM ({LATEST_FAILURES}) GROUP BY ALL ORDER BY ALL")
    runs = [{**asdict(run), "alive": is_alive(run)} for run in read_runs(opened)[:10]]
    found = {"catalog": catalog, **audits, "matched_audits": matched, "failures": failing, "runs": runs}
    if as_json:
        print_json(found)
        return
    out = result_console()
    table = Table("source", "state", "items", title="catalog")
    for row in catalog:
        table.add_row(escape(row["source"]), escape(row["state"]), str(row["items"]))
    out.print(table)
    last = f", the last at {audits['last']:%Y-%m-%d %H:%M} UTC" if audits["last"] else ""
    out.print(f"{audits['audits']} audits, {matched} with matches, {audits['images']} images{last}", highlight=False)
    for row in failing:
        out.print(f"{row['audits']} {row['state']} (lora-audit failures)", highlight=False)
    for run in runs:
        sign = "running" if run["alive"] else ("lost" if run["state"] == "running" else run["state"])
        begun = datetime.fromtimestamp(run["started_at"], UTC)
        out.print(
            f"run {escape(run['run_id'])} on {escape(run['host'])}, shard {escape(run['shard'])}, "
            f"since {begun:%Y-%m-%d %H:%M} UTC: "
            f"{sign}, {run['finished']} done, {run['failed']} failed, {run['quarantined']} quarantined, "
            f"{run['waiting']} waiting, {run['workers']} workers", highlight=False,
        )  # fmt: skip


# The last word on every audit that has failed and is not finished since: also one that is sampled but not matched.
LATEST_FAILURES = """SELECT * FROM failures AS f WHERE state <> 'forgiven'
    AND NOT EXISTS (SELECT 1 FROM audits AS a WHERE a.audit_id = f.audit_id AND a.finished_at > f.failed_at)
    AND failed_at > coalesce((SELECT max(failed_at) FROM failures AS g WHERE g.audit_id = f.audit_id
        AND g.state = 'forgiven'), TIMESTAMPTZ 'epoch')
    QUALIFY row_number() OVER (PARTITION BY audit_id ORDER BY failed_at DESC) = 1"""


@configured("workspace")
def failures(
    config: Config,
    retry: Annotated[bool, typer.Option("--retry", help="Let the next run try all of these again.")] = False,
    kind: Annotated[
        str | None,
        typer.Option(help="Only these: input, worker-died, device-lost, deadline, out-of-memory, storage, error."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Audits that failed, grouped by reason.

    A file that has failed under several configurations counts once, with what was said of it last; [bold]--retry[/bold]
    releases it under all of them.
    """
    from rich.markup import escape
    from rich.table import Table

    from audit.workspace import Workspace

    opened = Workspace(config.workspace, reading=not retry, create=False)
    rows = [row for row in opened.rows(LATEST_FAILURES) if kind in (None, row["kind"])]
    if retry and rows:
        latest = max(row["failed_at"] for row in rows) + timedelta(microseconds=1)  # also where a clock was set back
        now = max(datetime.now(UTC), latest)
        opened.append("failures", [row | {"state": Attempt.forgiven, "failed_at": now} for row in rows])
    groups = _groups(rows)
    if as_json:
        print_json({"forgiven": len(rows) if retry else 0, "groups": [asdict(group) for group in groups]})
        return
    if not rows:
        say("no audit has failed")
        return
    table = Table("audits", "state", "kind", "the newest reason", "of", "at (UTC)")
    for group in groups:
        table.add_row(
            str(group.audits), escape(group.state), escape(group.kind), escape(group.newest_reason[:400]),
            escape(group.items[0]),
            f"{group.newest_at:%Y-%m-%d %H:%M}",
        )  # fmt: skip
    result_console().print(table)
    if retry:
        say(f"{len(rows)} audits will be tried again by the next run")


@dataclass(frozen=True)
class FailureGroup:
    """Audits that failed for one reason, but for names and numbers; ``items`` are at most 100, the newest first."""

    state: str
    kind: str
    reason: str
    audits: int
    items: list[str]
    newest_reason: str
    newest_at: datetime


def _groups(rows: list[dict[str, Any]]) -> list[FailureGroup]:
    """``rows`` grouped by reason, each item once with its newest row; the largest group first."""
    newest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["failed_at"], reverse=True):
        newest.setdefault(row["item_id"], row)
    members: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in newest.values():
        members.setdefault((row["state"], row["kind"], _general(row["reason"])), []).append(row)
    found = [
        FailureGroup(*key, len(of), [row["item_id"] for row in of[:100]], of[0]["reason"], of[0]["failed_at"])
        for key, of in members.items()
    ]
    return sorted(found, key=lambda group: -group.audits)


def _general(reason: str) -> str:
    """A reason without what differs from case to case: quoted names, paths, numbers and trace ids."""
    reason = re.sub(r" \(trace [0-9a-f]{8}\)", "", reason)
    return re.sub(r"'[^']*'|(?<![^\s'])[^\s/']*/\S+|\b[0-9a-f]{12,}\b|\d+", "*", reason[:2000])[:200]


@configured("workspace")
def compact(
    config: Config,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="Give up the rows of files that cannot be read, and remove them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge the small files of every table, and remove what earlier merges have replaced."""
    from audit.schemas import TABLES
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, create=False)
    merged = {table: opened.compact(table, drop_damaged, every=True) for table in TABLES}
    files = {table: len(opened.keys(table)) for table in TABLES}
    if as_json:
        print_json({"merged": merged, "files": files})
        return
    for table in TABLES:
        say(f"{table}: {merged[table]} files merged, {files[table]} now")


@configured("workspace")
def verify(config: Config, as_json: JsonOption = False) -> None:
    """Check every stored file against its recorded hash, every row against what it refers to. Exit code 1: damage.

    Table files, manifests and the states of runs that cannot be read are named; all else passes them over.
    """
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, reading=True, create=False)
    out = console()
    problems: list[dict[str, str]] = []
    with progress_display(out) as progress:
        _verify_tables(opened, problems, progress)
        _verify_checkpoints(opened, problems, progress)
        _verify_rows(opened, problems)
        _verify_files(opened, problems)
        _verify_pages(opened, problems)
    if as_json:
        print_json({"problems": problems})
    else:
        for one in problems[:100]:
            say(f"{one['where']}: {one['problem']}")
        say(f"{len(problems)} problems" if problems else "everything is as recorded")
    if problems:
        raise typer.Exit(EXIT_DAMAGED)


def _verify_tables(workspace: Workspace, problems: list[dict[str, str]], progress: Any) -> None:
    from audit.engine.run import read_run
    from audit.schemas import TABLES
    from audit.workspace.verify import table_problems

    for name in TABLES:
        problems += [asdict(one) for one in table_problems(workspace, workspace.table(name), progress)]
    for entry in workspace.files.list("runs"):
        if entry.key.endswith(".json") and read_run(workspace, entry.key) is None and workspace.files.exists(entry.key):
            problems.append({"where": entry.key, "problem": "the state of a run is damaged or of another version"})


def _verify_checkpoints(workspace: Workspace, problems: list[dict[str, str]], progress: Any) -> None:
    from audit.errors import CheckpointError
    from audit.models.checkpoint import hash_file, identity_of, layout_of
    from audit.models.safetensors_header import read_header

    recorded = workspace.rows(
        "SELECT identity, list(DISTINCT checkpoint_sha256) AS hashes FROM checkpoints "
        "WHERE identity IS NOT NULL AND source <> 'file' AND state <> 'opted-out' GROUP BY identity"
    )
    for number, row in enumerate(recorded):
        progress("verifying", number, len(recorded))
        key = f"checkpoints/{row['identity']}.safetensors"
        try:
            path = workspace.files.fetch(key)
            header = read_header(path)
            sha256, tensors = hash_file(path, header)
        except FileNotFoundError:
            problems.append({"where": key, "problem": "the file is missing"})
            continue
        except CheckpointError as error:
            problems.append({"where": key, "problem": str(error)})
            continue
        if identity_of(tensors, layout_of(header)) != row["identity"]:
            problems.append({"where": key, "problem": "its tensors are not those that were recorded"})
        elif sha256 not in row["hashes"]:
            problems.append({"where": key, "problem": "its header is not one that was recorded"})
    progress("verifying", len(recorded), len(recorded))


_RULES = {
    "audits without their checkpoint": "SELECT audit_id FROM audits WHERE checkpoint_sha256 NOT IN "
    "(SELECT checkpoint_sha256 FROM checkpoints WHERE checkpoint_sha256 IS NOT NULL)",
    "audits that lack generations": "SELECT a.audit_id FROM audits AS a LEFT JOIN (SELECT audit_id, count(*) AS n, "
    'count(DISTINCT "index") AS d FROM generations GROUP BY audit_id) AS g USING (audit_id) '
    "WHERE g.n IS DISTINCT FROM a.images OR g.d IS DISTINCT FROM a.images",
    "audits without extractions": "SELECT audit_id FROM audits ANTI JOIN extractions USING (audit_id)",
    "audits that are there twice": "SELECT audit_id FROM audits GROUP BY audit_id HAVING count(*) > 1",
    "extractions whose image was never sampled": "SELECT e.audit_id FROM extractions AS e ANTI JOIN generations AS g "
    'ON e.audit_id = g.audit_id AND e."index" = g."index"',
    "matches with a reference set that is not there: 'lora-audit references remove' takes them away": "SELECT audit_id "
    'FROM matches WHERE reference_set NOT IN (SELECT reference_set FROM "references")',
    "matches without their extraction": "SELECT m.audit_id FROM matches AS m ANTI JOIN extractions AS e "
    "ON m.audit_id = e.audit_id AND m.rank = e.rank",
}


def _verify_rows(workspace: Workspace, problems: list[dict[str, str]]) -> None:
    for problem, sql in _RULES.items():
        for row in workspace.rows(f"SELECT DISTINCT audit_id FROM ({sql}) LIMIT 100"):
            problems.append({"where": f"audit {row['audit_id']}", "problem": problem})


def _verify_pages(workspace: Workspace, problems: list[dict[str, str]]) -> None:
    """Pages of sets that were removed, and pages that do not say what they show."""
    from audit.report.pages import pages

    rows = workspace.rows('SELECT DISTINCT reference_set FROM "references"')
    there = {row["reference_set"] for row in rows}
    for key, facts in pages(workspace):
        if facts is None:
            told = "it does not say which reference sets it shows: write it again with 'lora-audit report'"
            problems.append({"where": key, "problem": told})
            continue
        for name in sorted(set(facts.reference_sets) - there):
            told = f"it shows the removed reference set {name}: 'lora-audit references remove {name}' takes it away"
            problems.append({"where": key, "problem": told})


def _verify_files(workspace: Workspace, problems: list[dict[str, str]]) -> None:
    """Ground truth against its list, quarantined files against their names."""
    for entry in workspace.files.list("checkpoints/quarantined"):
        if entry.key.endswith(".bin"):
            digest = hashlib.sha256(workspace.files.read(entry.key) or b"").hexdigest()
            if not entry.key.endswith(f"/{digest}.bin"):
                problems.append({"where": entry.key, "problem": "its content is not what its name says"})
    for entry in workspace.files.list("ground-truth", recursive=True):
        if entry.key.endswith("/source.json"):
            folder = entry.key.removesuffix("/source.json")
            try:
                names = [str(one["file"]) for one in json.loads(workspace.files.read(entry.key) or b"")["pictures"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                problems.append({"where": entry.key, "problem": "the list of its pictures is damaged"})
                continue
            for name in names:
                if not workspace.files.exists(f"{folder}/{name}"):
                    problems.append({"where": f"{folder}/{name}", "problem": "the file is missing"})


@config_app.command("show")
@configured("workspace")
def config_show(config: Config, as_json: JsonOption = False) -> None:
    """The configuration in force, with what every setting means: file, environment and --set taken together."""
    from rich.markup import escape
    from rich.table import Table

    from audit.config import leaves, variable_of
    from audit.files import shown as location_shown
    from audit.locations import plain_without_credentials, without_credentials

    config = replace(config, workspace=location_shown(config.workspace))
    if as_json:
        print_json(plain_without_credentials(asdict(config)))
        return
    table = Table("setting", "value", "meaning", "environment")
    for dotted, (value, text) in leaves(config):
        shown = (
            "auto"
            if dotted == "settings.w" and value is None
            else ("" if value is None else without_credentials(str(value)))
        )
        table.add_row(dotted, escape(shown), escape(text), variable_of(dotted))
    result_console().print(table)
