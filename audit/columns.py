"""How a table's schema is written down: a sentence for the table, and one a column."""

from __future__ import annotations

import pyarrow as pa


def table_schema(doc: str, *columns: tuple[str, pa.DataType, str]) -> pa.Schema:
    """The schema of columns (name, type, sentence); the sentences are metadata under "doc"."""
    fields = [pa.field(name, kind, metadata={"doc": text}) for name, kind, text in columns]
    return pa.schema(fields, metadata={"doc": doc})
