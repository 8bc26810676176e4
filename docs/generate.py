"""Write what the documents take from the code: docs/tables.md from the schemas, docs/json.md from the public snapshot,
the factors of docs/study.md from their definitions, the paper's tables in docs/results.md from an exported study.

    python -m docs.generate           # make docs does it first
    python -m docs.generate --check   # exit code 1 where a document is stale; so does tests/test_docs.py

The meaning of a JSON key is that of the table's column it comes from, the help of its setting, or a sentence of
docs/json_keys.toml.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

from audit.config import Config, leaves
from audit.schemas import KEY_COLUMNS, TABLES
from audit.study.factors import FACTORS, TrainingFactors
from audit.study.paper import markdown

DOCS = Path(__file__).parent
SNAPSHOT = DOCS.parent / "tests" / "public.json"
STUDY = DOCS.parent / "benchmarks" / "results" / "paper-tables.json"
SENTENCES = DOCS / "json_keys.toml"
BEGIN, END = "<!-- generated: make docs -->", "<!-- end of what is generated -->"

# Where a command prints rows of tables: the path of the row, and the tables whose columns it has.
ROWS = {
    "catalog": {"[]": ("checkpoints",)},
    "scan": {
        "audit": ("audits",),
        "checkpoint": ("checkpoints",),
        "extractions[]": ("extractions",),
        "extractions[].matches[]": ("matches", "references"),
        "matched_references[]": ("matches", "references"),
        "passed_over[]": ("passed_over",),
        "memberships[]": ("memberships", "references"),
        "evaluations[]": ("evaluations",),
    },
    "failures": {"groups[]": ("failures",)},
    "references list": {"[]": ("references",)},
    "query": {"[]": ("audits",)},
}
SETTINGS_AT = {"scan": "audit.settings", "config show": ""}  # where settings stand; all of the document
SAME = {
    "report": "scan",
    "study resume": "study run",
    "study report": "study run",
}  # parts of another
WITHIN = {"status": ("runs[].", "run")}  # and elements that are another's


def columns(table: str) -> list[tuple[str, str, str]]:
    """Name, type and meaning of each column of a table."""
    return [(field.name, _kind(field.type), field.metadata[b"doc"].decode()) for field in TABLES[table]]


def _kind(kind: pa.DataType) -> str:
    """A type in DuckDB's words, which SQL over the tables speaks."""
    if pa.types.is_list(kind):
        return f"{_kind(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        return "STRUCT(" + ", ".join(f"{field.name} {_kind(field.type)}" for field in kind) + ")"
    if pa.types.is_timestamp(kind):
        return "TIMESTAMPTZ"
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind):
        return "BLOB"
    return {
        "string": "VARCHAR", "bool": "BOOLEAN", "int32": "INTEGER", "int64": "BIGINT", "float": "FLOAT",
        "double": "DOUBLE",
    }[str(kind)]  # fmt: skip


def tables_part() -> str:
    """The chapter of the tables' columns."""
    lines = [
        "One table a heading, one column a line; types are those that DuckDB shows. `query` and `export` see these.",
        "All times are UTC, vectors are unit vectors, and a PDQ hash has 32 bytes.",
        "",
    ]
    for table, schema in TABLES.items():
        lines += [f"### {table}", "", _cell(schema.metadata[b"doc"].decode()), ""]
        if keys := KEY_COLUMNS.get(table):
            lines += [
                f"Rows of one key are written and replaced together: {', '.join(f'`{key}`' for key in keys)}.",
                "",
            ]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {kind} | {_cell(text)} |" for name, kind, text in columns(table)]
        lines += [""]
    return "\n".join(lines)


def factors_part() -> str:
    """The table of a study's factors."""
    lines = ["| factor | of | default | limits | meaning |", "|---|---|---|---|---|"]
    for name, (kind, one) in FACTORS.items():
        about = one.metadata
        limits = f"{about['min']:g} to {about['max']:g}" if "min" in about else ""
        default = about.get("word") if one.default is None else str(one.default).lower()
        part = "fine-tuning" if kind is TrainingFactors else "audit"
        lines.append(f"| `{name}` | {part} | {default} | {limits} | {_cell(about['help'])} |")
    return "\n".join(lines)


def json_part() -> str:
    """The chapters of the commands' documents."""
    promised: dict[str, list[str]] = json.loads(SNAPSHOT.read_text())["json"]
    lines = []
    for command, keys in promised.items():
        lines += [f"### lora-audit {command}", ""]
        if same := SAME.get(command):
            absent = sorted(set(promised[same]) - set(keys))
            tops = ", ".join(f"`{key}`" for key in absent if not re.search(r"[.\[]", key))
            lines += [f"What `{same}` prints{f', but for {tops}' if tops else ''}.", ""]
            keys = [key for key in keys if key not in promised[same]]
            if not keys:
                continue
        lines += ["| key | meaning |", "|---|---|"]
        lines += [f"| `{key}` | {_cell(text)} |" for key in keys if (text := meaning(command, key, keys)) is not None]
        lines += [""]
    return "\n".join(lines)


def meaning(command: str, key: str, keys: list[str]) -> str | None:
    """What a key of a command's document says; None for one that only holds others. Raises SystemExit without one."""
    sentences = _sentences().get(command, {})
    if key in sentences:
        return str(sentences[key])
    if any(re.match(rf"{re.escape(above)}[.\[]", key) for above in sentences):
        return None
    within, other = WITHIN.get(command, ("", ""))
    if within and key.startswith(within):
        return meaning(other, key.removeprefix(within), [one.removeprefix(within) for one in keys])
    row, _, name = key.rpartition(".")
    for table in ROWS.get(command, {}).get(row, ()):
        for column, _, text in columns(table):
            if column == name:
                return text
    known = {dotted: text for dotted, (_, text) in leaves(Config())}
    at = SETTINGS_AT.get(command)
    if at is not None and (setting := key.replace(at, "settings", 1) if at else key) in known:
        return known[setting]
    if key.endswith("[]") or any(other.startswith((f"{key}.", f"{key}[]")) for other in keys):
        return None
    raise SystemExit(f"what {key!r} of `lora-audit {command} --json` means is not written: add it to {SENTENCES.name}")


def _sentences() -> dict[str, Any]:
    return tomllib.loads(SENTENCES.read_text())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def documents() -> dict[Path, str]:
    """The text of every document that is generated, whole or in part."""
    return {
        DOCS / "tables.md": _filled(DOCS / "tables.md", tables_part()),
        DOCS / "json.md": _filled(DOCS / "json.md", json_part()),
        DOCS / "study.md": _filled(DOCS / "study.md", factors_part()),
        DOCS / "results.md": _filled(DOCS / "results.md", markdown(STUDY)),
    }


def _filled(path: Path, part: str) -> str:
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path.name} has no place between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{part.strip()}\n\n{END}{after}"


def stale() -> list[Path]:
    """The documents that are not what the code says."""
    return [path for path, text in documents().items() if path.read_text() != text]


def main(
    check: Annotated[bool, typer.Option(help="Write nothing; exit code 1 where a document is stale.")] = False,
) -> None:
    """Write the generated documents, or say which are stale."""
    found = stale()
    for path in found:
        typer.echo(f"{path.name} is stale: make docs" if check else f"{path.name} is written")
        if not check:
            path.write_text(documents()[path])
    sys.exit(bool(check and found))


if __name__ == "__main__":
    typer.run(main)
