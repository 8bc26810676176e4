"""SQL that asks for neighbours: ``SELECT * FROM nearest('SET', TOP, 'AUDIT')``.

DuckDB has no table functions in Python. Its own parser tells which calls a statement has; what each of them asks for is
worked out by the index, exactly, and put where a macro of that name finds it. The statement itself runs as it was
written: nothing of it is put together with other text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from audit.descriptors.pdq import MIN_QUALITY
from audit.errors import WorkspaceError
from audit.references.index import Bank, open_bank
from audit.references.index.hashes import packed
from audit.references.match import AT_ONCE
from audit.sampling.spooled import vectors_of
from audit.workspace import Workspace

CALLED = re.compile(r"\bnearest\b", re.IGNORECASE)
TOP = 3  # where a call does not say
MOST_TOP = 1000
MOST_CALLS = 16
MOST_ROWS = 5_000_000  # of one call
FORM = "write nearest('SET'), nearest('SET', TOP) or nearest('SET', TOP, 'AUDIT'), with a text and a number"
TABLES = "extractions references audits"
NEIGHBOURS = pa.schema(
    [
        ("audit_id", pa.string()), ("rank", pa.int32()), ("reference_set", pa.string()), ("reference_id", pa.string()),
        ("position", pa.int32()), ("similarity", pa.float64()), ("pdq_distance", pa.int32()),
    ]
)  # fmt: skip
_MACRO = f"""CREATE TEMP MACRO nearest(asked_set, asked_top := {TOP}, asked_audit := '') AS TABLE
SELECT {", ".join(NEIGHBOURS.names)} FROM _neighbours
WHERE of_set = asked_set AND of_top = asked_top AND of_audit = asked_audit"""
_EXTRACTIONS = """SELECT e.audit_id, e.rank, e.descriptor, e.pdq, e.pdq_quality, a.descriptor AS descriptor_name
FROM extractions AS e JOIN audits AS a USING (audit_id)
WHERE starts_with(audit_id, ?) AND a.descriptor IN (SELECT descriptor_name FROM "references" WHERE reference_set = ?)
ORDER BY audit_id, rank"""


@dataclass(frozen=True)
class Call:
    """What a call asks for: the ``top`` nearest of a set to all extractions of audits that begin with ``audit``."""

    name: str
    top: int = TOP
    audit: str = ""


def answered(workspace: Workspace, sql: str) -> pa.Table:
    """What ``sql`` answers over the workspace's tables, in which ``nearest`` can be asked.

    Raises duckdb.Error for SQL that fails, and WorkspaceError for a call that asks for what is not there, or too much.
    """
    if not CALLED.search(sql):
        return workspace.select(sql)

    def ask(connection: duckdb.DuckDBPyConnection) -> pa.Table:
        calls = calls_of(connection, sql)
        if calls:
            found = [_tagged(one, _neighbours(connection, workspace, one)) for one in calls]
            connection.register("_neighbours", pa.concat_tables(found))
            connection.execute(_MACRO)
        relation = connection.sql(sql)
        return relation.to_arrow_table() if relation is not None else pa.table({})

    return workspace.asked(ask, f"{sql}\n{TABLES}")


def calls_of(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Call]:
    """The calls of ``nearest`` in ``sql``, each once; none in what is no SELECT. Raises WorkspaceError for others."""
    [[text]] = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    parsed = json.loads(text)
    calls = [] if parsed.get("error") else [_call(one) for one in _functions(parsed["statements"])]
    found = list(dict.fromkeys(calls))
    if len(found) > MOST_CALLS:
        raise WorkspaceError(f"the statement asks for neighbours in {len(found)} ways: {MOST_CALLS} are the most")
    return found


def _functions(node: Any) -> Iterator[dict[str, Any]]:
    """The calls among the tables of a parsed statement."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if one.get("type") == "TABLE_FUNCTION" and one["function"]["function_name"].lower() == "nearest":
                yield one["function"]
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _call(function: dict[str, Any]) -> Call:
    """What a call asks for. DuckDB 1 writes arguments in another way than DuckDB 2."""
    given = function["arguments"] if "arguments" in function else function.get("children", [])
    values = [_constant(one.get("expression", one)) for one in given]
    if not 1 <= len(values) <= 3 or any(one.get("name") for one in given):
        raise WorkspaceError(f"nearest takes a set, a number and an audit: {FORM}")
    name, top, audit = [*values, None, None][:3]
    number = str(TOP) if top is None else top
    if name is None or not re.fullmatch(r"[0-9]{1,9}", number) or not 1 <= int(number) <= MOST_TOP:
        raise WorkspaceError(f"nearest takes numbers from 1 to {MOST_TOP}: {FORM}")
    return Call(name, int(number), audit or "")


def _constant(expression: dict[str, Any]) -> str:
    if expression.get("type") == "VALUE_CONSTANT":
        value = expression.get("literal") or expression["value"]
        found = value.get("text", value.get("value"))
        if isinstance(found, str | int) and value.get("kind", "") in ("STRING", "INTEGER", ""):
            return str(found)
    raise WorkspaceError(f"nearest is asked with constants alone, not with what a query finds: {FORM}")


def _neighbours(connection: duckdb.DuckDBPyConnection, workspace: Workspace, call: Call) -> pa.Table:
    """The rows that a call stands for."""
    there = connection.sql('SELECT DISTINCT reference_set FROM "references"').fetchall()
    if (call.name,) not in there:
        names = ", ".join(sorted(one for (one,) in there)) or "none"
        raise WorkspaceError(f"nearest: there is no reference set {call.name!r} (there are: {names})")
    extractions = connection.sql(_EXTRACTIONS, params=[call.audit, call.name]).to_arrow_table()
    if extractions.num_rows * call.top > MOST_ROWS:
        raise WorkspaceError(
            f"nearest({call.name!r}, {call.top}) would have {extractions.num_rows * call.top} rows, and {MOST_ROWS} "
            "are the most: ask for fewer, or for one audit"
        )
    names = extractions["descriptor_name"].to_numpy(zero_copy_only=False)
    parts = [NEIGHBOURS.empty_table()]
    for descriptor_name in dict.fromkeys(names.tolist()):
        bank = open_bank(connection, workspace, call.name, descriptor_name)
        mine = extractions.filter(pa.array(names == descriptor_name))
        for start in range(0, mine.num_rows, AT_ONCE):
            parts.append(_nearest(mine.slice(start, AT_ONCE), call, bank))
    return pa.concat_tables(parts)


def _nearest(extractions: pa.Table, call: Call, bank: Bank) -> pa.Table:
    near = bank.nearest(vectors_of(extractions), call.top)
    first = np.concatenate([[True], near.query[1:] != near.query[:-1]]) if len(near.query) else np.empty(0, bool)
    starts = np.flatnonzero(first)
    position = np.arange(len(first)) - np.repeat(starts, np.diff([*starts, len(first)])) + 1
    missing = extractions["pdq"].is_null().to_numpy()
    quality = np.where(missing, -1, extractions["pdq_quality"].fill_null(-1).to_numpy())
    hashes = b"".join(one if one is not None else bytes(32) for one in extractions["pdq"].to_pylist())
    bits = packed(np.frombuffer(hashes, np.uint8).reshape(-1, 32))[near.query] ^ bank.hashes[near.row]
    unknown = (quality[near.query] < MIN_QUALITY) | (bank.quality[near.row] < MIN_QUALITY)
    columns: Sequence[Any] = [
        extractions["audit_id"].take(pa.array(near.query)), extractions["rank"].take(pa.array(near.query)),
        pa.array([call.name] * len(position), pa.string()), bank.ids.take(pa.array(near.row)),
        pa.array(position, pa.int32()), pa.array(near.similarity),
        pa.array(np.bitwise_count(bits).sum(axis=1, dtype=np.int32), mask=unknown),
    ]  # fmt: skip
    return pa.table(columns, schema=NEIGHBOURS)


def _tagged(call: Call, rows: pa.Table) -> pa.Table:
    """Rows beside the arguments by which the macro finds them."""
    for name, value in (("of_set", call.name), ("of_top", call.top), ("of_audit", call.audit)):
        rows = rows.append_column(name, pa.repeat(pa.scalar(value), rows.num_rows))
    return rows
