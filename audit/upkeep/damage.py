"""Whether a workspace is as recorded: every stored file against its hash, every row against what it refers to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

from audit.engine.state import read_run
from audit.errors import CheckpointError
from audit.models.checkpoint import hash_file, identity_of, layout_of
from audit.models.formats.headers import read_any_header
from audit.models.formats.scaling import with_config_beside
from audit.progress import Tell, quiet
from audit.report.pages import pages
from audit.schemas import TABLES
from audit.workspace import Workspace
from audit.workspace.verify import Problem, table_problems
from crawlers.store import Store

MOST_OF_A_RULE = 100
RULES = {
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


def verify(workspace: Workspace, tell: Tell = quiet) -> list[Problem]:
    """What is damaged, missing or not what was recorded; ``tell`` hears of (what is read, how much, of how much).

    Table files, manifests and the states of runs that cannot be read are named; all else passes them over. Raises
    WorkspaceError where no manifest of a table can be read.
    """
    found: list[Problem] = []
    for name in TABLES:
        found += table_problems(workspace, workspace.table(name), tell)
    for part in (_runs(workspace), _checkpoints(workspace, tell), _rows(workspace), _quarantined(workspace),
                 _ground_truth(workspace), _pages(workspace)):  # fmt: skip
        found += part
    return found


def _runs(workspace: Workspace) -> Iterator[Problem]:
    for entry in workspace.files.list("runs"):
        if entry.key.endswith(".json") and read_run(workspace, entry.key) is None and workspace.files.exists(entry.key):
            yield Problem(entry.key, "the state of a run is damaged or of another version")


def _checkpoints(workspace: Workspace, tell: Tell) -> Iterator[Problem]:
    recorded = workspace.rows(
        "SELECT identity, list(DISTINCT checkpoint_sha256) AS hashes FROM checkpoints "
        "WHERE identity IS NOT NULL AND source <> 'file' AND state <> 'opted-out' GROUP BY identity"
    )
    for number, row in enumerate(recorded):
        tell("verifying", number, len(recorded))
        key = f"checkpoints/{row['identity']}.safetensors"
        problem = _checkpoint_problem(workspace, key, row["identity"], row["hashes"])
        if problem is not None:
            yield Problem(key, problem)
    tell("verifying", len(recorded), len(recorded))


def _checkpoint_problem(workspace: Workspace, key: str, identity: str, hashes: list[str]) -> str | None:
    try:
        path = Store(workspace).fetch(identity)
        if path is None:
            raise FileNotFoundError(key)
        header = read_any_header(path)
        sha256, tensors = hash_file(path, header)
        header = replace(header, metadata=with_config_beside(path, header.metadata))
    except FileNotFoundError:
        return "the file is missing"
    except CheckpointError as error:
        return str(error)
    if identity_of(tensors, layout_of(header)) != identity:
        return "its tensors are not those that were recorded"
    return None if sha256 in hashes else "its header is not one that was recorded"


def _rows(workspace: Workspace) -> Iterator[Problem]:
    for problem, sql in RULES.items():
        for row in workspace.rows(f"SELECT DISTINCT audit_id FROM ({sql}) LIMIT {MOST_OF_A_RULE}"):
            yield Problem(f"audit {row['audit_id']}", problem)


def _quarantined(workspace: Workspace) -> Iterator[Problem]:
    for entry in workspace.files.list("checkpoints/quarantined"):
        if entry.key.endswith(".bin"):
            digest = hashlib.sha256(workspace.files.read(entry.key) or b"").hexdigest()
            if not entry.key.endswith(f"/{digest}.bin"):
                yield Problem(entry.key, "its content is not what its name says")


def _ground_truth(workspace: Workspace) -> Iterator[Problem]:
    """Known training images against their list."""
    for entry in workspace.files.list("ground-truth", recursive=True):
        if not entry.key.endswith("/source.json"):
            continue
        folder = entry.key.removesuffix("/source.json")
        try:
            names = [str(one["file"]) for one in json.loads(workspace.files.read(entry.key) or b"")["pictures"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            yield Problem(entry.key, "the list of its pictures is damaged")
            continue
        for name in names:
            if not workspace.files.exists(f"{folder}/{name}"):
                yield Problem(f"{folder}/{name}", "the file is missing")


def _pages(workspace: Workspace) -> Iterator[Problem]:
    """Pages of sets that were removed, and pages that do not say what they show."""
    rows = workspace.rows('SELECT DISTINCT reference_set FROM "references"')
    there = {row["reference_set"] for row in rows}
    for key, facts in pages(workspace):
        if facts is None:
            yield Problem(key, "it does not say which reference sets it shows: write it again with 'lora-audit report'")
            continue
        for name in sorted(set(facts.reference_sets) - there):
            told = f"it shows the removed reference set {name}: 'lora-audit references remove {name}' takes it away"
            yield Problem(key, told)
