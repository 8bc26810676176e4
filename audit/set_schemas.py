"""What is kept of reference sets beside their pictures: schemas that ``audit/schemas.py`` has with the others."""

from __future__ import annotations

import pyarrow as pa

from audit.columns import table_schema

POLICIES = table_schema(
    "One row a reference set that has a policy. It is read when audits are matched, and kept with what was found.",
    ("reference_set", pa.string(), "joins references"),
    ("role", pa.string(), "deny: its pictures are to be found; allow: they are known-good, and silence their copies"),
    ("threshold", pa.float64(), "descriptor cosine from which a picture counts; null for the descriptor's own"),
    ("threshold_of", pa.string(), "the descriptor whose cosine it is: for others it does not hold; null without"),
    ("pdq_distance", pa.int32(), "differing bits up to which PDQ agrees, 0 to 31; null for 31"),
    ("expires_at", pa.timestamp("us", "UTC"), "from when on it is not matched; null for never"),
    ("disabled_until", pa.timestamp("us", "UTC"), "until when it is not matched; null for not"),
    ("owner", pa.string(), "whose it is, as it was told"),
    ("notes", pa.string(), "what was told of it, 2000 characters at most"),
    ("sets", pa.list_(pa.string()), "of an allow bank: the reference sets that it silences; null for any"),
    ("set_at", pa.timestamp("us", "UTC"), "when"),
)

PASSED_OVER = table_schema(
    "One row a file of a reference set's folder that is not among its pictures; 10,000 a set at most.",
    ("reference_set", pa.string(), "joins references"),
    ("descriptor_name", pa.string(), "joins references"),
    ("name", pa.string(), "file name within the folder"),
    ("reason", pa.string(), "why"),
    ("added_at", pa.timestamp("us", "UTC"), "when"),
)
