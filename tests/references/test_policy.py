"""Policies of sets: known-good pictures silence their copies and nothing else, and old audits keep what they had."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image

from audit import match
from audit.config import Rule, Settings, VerdictSettings
from audit.demo import set_folder
from audit.descriptors import Descriptor
from audit.descriptors.pdq import PdqDescriptor
from audit.errors import ReferenceSetError
from audit.references import ReferenceSets
from audit.references.audits import match_audit
from audit.references.index import open_bank
from audit.references.index.bank import Bank
from audit.references.policy import Policy, clear_policy, policies, set_policy
from audit.references.silence import rules_of, silenced
from audit.report import collect
from audit.report.page import render
from audit.schemas import AUDITS
from audit.states import Role
from audit.workspace import Workspace
from tests.references.test_match import extractions_of

TRAIN = set_folder("fluent-animals", "train")
AUDIT = "a" * 32
FIXED = VerdictSettings(Rule.fixed)
NAMES = sorted(path.name for path in TRAIN.glob("*.png"))


@pytest.fixture
def audited(workspace: Workspace, nano: Descriptor) -> Workspace:
    """A finished audit that gave back the first three pictures of a set of ten as they are."""
    now = datetime(2026, 5, 1, tzinfo=UTC)
    row = dict.fromkeys(AUDITS.names) | {
        "audit_id": AUDIT, "checkpoint_sha256": "c" * 64, "checkpoint_name": "x.safetensors", "descriptor": nano.name,
        "threshold": nano.threshold, "descriptor_size": nano.input_size, "finished_at": now,
        "settings": json.dumps(Settings().as_dict()),
        "versions": "{}", "captions": [], "warnings": [], "images": 3, "training_images": 3, "base_name": "nano",
        "base_revision": "r", "precision": "fp32", "device": "cpu", "tensors_sha256": "t" * 64, "evaluations": 1,
        "training_images_source": "user", "seconds_sampling": 1.0, "seconds_total": 1.0, "weight_change": 0.1,
        "prediction_change": 0.1,
    }  # fmt: skip
    workspace.append("audits", [row])
    workspace.append("checkpoints", [{"item_id": "file:x", "checkpoint_sha256": "c" * 64, "seen_at": now,
                                      "claimed_metadata": "{}", "source": "file", "bytes": 5, "format": "kohya",
                                      "identity": "i" * 64}])  # fmt: skip
    pictures = [np.asarray(Image.open(TRAIN / name).convert("RGB")) for name in NAMES[:3]]
    rows = extractions_of(np.stack(pictures), nano).to_pylist()
    workspace.append("extractions", [
        one | {"audit_id": AUDIT, "index": number, "confidence": 0.5, "size": 2, "tightness": 0.9,
               "members": [2 * number, 2 * number + 1]}
        for number, one in enumerate(rows)
    ])  # fmt: skip
    ReferenceSets(workspace).add("mine", TRAIN, nano)
    return workspace


def add(workspace: Workspace, name: str, files: list[str], descriptor: Descriptor, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in files:
        shutil.copy(TRAIN / file, folder / file)
    ReferenceSets(workspace).add(name, folder, descriptor)


def matched(workspace: Workspace, asked: VerdictSettings = FIXED) -> Any:
    match_audit(workspace, AUDIT, ["mine"])
    return collect(workspace, AUDIT, ["mine"], asked)


def allowed(workspace: Workspace, descriptor: Descriptor) -> dict[str, str]:
    """Which references of the set are silenced now."""

    def ask(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
        banks = {"mine": open_bank(connection, workspace, "mine", descriptor.name)}
        return rules_of(connection, workspace, descriptor.name, descriptor.threshold, banks)["mine"].allowed

    return workspace.asked(ask, '"references" policies')


def test_an_allow_bank_silences_copies_and_nothing_else(audited: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    before = matched(audited)
    assert sorted(one.name for one in before.verdict.matched) == NAMES[:3]
    assert before.as_json()["policies"] == {}
    add(audited, "logos", [NAMES[0], NAMES[5]], nano, tmp_path)
    assert sorted(one.name for one in matched(audited).verdict.matched) == NAMES[:3]  # a set alone silences nothing
    set_policy(audited, "logos", role=Role.allow, owner="press", notes="<b>official</b>")
    assert sorted(one.name for one in collect(audited, AUDIT, ["mine"], FIXED).verdict.matched) == NAMES[:3]  # as then
    after = matched(audited)
    assert sorted(one.name for one in after.verdict.matched) == NAMES[1:3]
    assert [(one.name, one.allowed_by) for one in after.verdict.silenced] == [(NAMES[0], "logos")]
    [said] = [one for one in after.verdict.explanation if "silenced" in one]
    assert "2 by the allow bank logos" in said
    assert "1 of them came out" in said
    page = render(after)
    assert "silenced by the allow bank" in page
    assert "&lt;b&gt;official" in page
    assert "<b>official" not in page
    found = after.as_json()
    assert found["policies"]["mine"]["silenced"] == {"logos": 2}
    assert [one["allowed_by"] for one in found["silenced_references"]] == ["logos"]
    caveats = {row["reference_id"]: row["caveat"] for row in audited.rows("SELECT * FROM chances")}
    assert sum("allow bank logos has a copy" in (one or "") for one in caveats.values()) == 2
    [whole] = audited.rows("SELECT pictures FROM set_chances")
    small = sum(one is not None for one in caveats.values()) - 2
    assert whole["pictures"] == 10 - 2 - small
    clear_policy(audited, "logos")
    assert collect(audited, AUDIT, ["mine"], FIXED).as_json()["policies"]["mine"]["silenced"] == {"logos": 2}
    assert sorted(one.name for one in matched(audited).verdict.matched) == NAMES[:3]


def test_an_allow_bank_is_in_force_for_its_time_and_its_sets(
    audited: Workspace, nano: Descriptor, tmp_path: Path
) -> None:
    add(audited, "logos", [NAMES[0]], nano, tmp_path)
    add(audited, "other", [NAMES[4]], nano, tmp_path)
    yesterday, tomorrow = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    for changes, silences in (
        ({}, 1), ({"expires_at": yesterday}, 0), ({"expires_at": tomorrow}, 1), ({"disabled_until": tomorrow}, 0),
        ({"disabled_until": yesterday}, 1), ({"sets": ["other"]}, 0), ({"sets": ["other", "mine"]}, 1),
        ({"role": Role.deny, "sets": None}, 0),
    ):  # fmt: skip
        set_policy(audited, "logos", **{"role": Role.allow, **changes})
        assert len(allowed(audited, nano)) == silences, changes


def test_removing_an_allow_bank_leaves_it_to_be_weighed_again(
    audited: Workspace, nano: Descriptor, tmp_path: Path
) -> None:
    add(audited, "logos", [NAMES[0]], nano, tmp_path)
    set_policy(audited, "logos", role=Role.allow)
    matched(audited)
    ReferenceSets(audited).remove("logos")
    assert audited.rows("SELECT * FROM policies") == audited.rows("SELECT * FROM set_chances") == []
    assert [one.allowed_by for one in collect(audited, AUDIT, ["mine"], FIXED).verdict.silenced] == ["logos"]
    assert matched(audited).verdict.silenced == []


def bank(vectors: np.ndarray, hashes: list[int], quality: list[int]) -> Bank:
    import pyarrow as pa

    words = np.zeros((len(hashes), 4), np.uint64)
    words[:, 0] = hashes
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    number = len(unit)
    return Bank(pa.array([str(one) for one in range(number)]), unit, words, np.array(quality, np.int16),
                np.full(number, -1, np.int32))  # fmt: skip


def test_what_only_resembles_an_allowed_picture_is_not_silenced() -> None:
    near, turned = np.array([1.0, 0.1, 0]), np.array([1.0, 0.9, 0])
    mine = bank(np.stack([near, turned, near, near, near]), [0, 0, 0xFFFFFFFF, 0, 0], [90, 90, 90, 10, 90])
    allowed = bank(np.array([[1.0, 0, 0]]), [0], [90])
    # far by the descriptor, by PDQ, and a hash that says nothing where the other's does
    assert silenced(mine, allowed, 0.9, 31).tolist() == [0, 4]
    assert silenced(mine, bank(np.array([[1.0, 0, 0]]), [0], [-1]), 0.9, 31).tolist() == [3]
    assert silenced(mine, allowed, 0.9, 32).tolist() == [0, 2, 4]
    assert silenced(mine, bank(np.empty((0, 3)), [], []), 0.9, 31).tolist() == []


def test_an_allow_bank_may_be_stricter_and_never_laxer(audited: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    add(audited, "logos", [NAMES[0]], nano, tmp_path)
    set_policy(audited, "logos", role=Role.allow, threshold=0.01)
    assert [one.name for one in matched(audited).verdict.silenced] == [NAMES[0]]
    rows = audited.rows("SELECT policy FROM set_chances")
    assert json.loads(rows[0]["policy"])["silenced"] == {"logos": 1}


def test_a_set_has_a_threshold_of_its_own(audited: Workspace, nano: Descriptor) -> None:
    scores = sorted(
        row["similarity"] for row in audited.rows("SELECT similarity FROM matches WHERE position = 1")
    ) or [1.0]  # fmt: skip
    assert scores[-1] > 0.99
    set_policy(audited, "mine", threshold=1.0, pdq_distance=0)
    facts = matched(audited)
    [policy] = [one.policy for one in facts.verdict.applied.values()]
    assert (policy["cosine"], policy["threshold_of"], policy["pdq_distance"]) == (1.0, nano.name, 0)
    said = " ".join(facts.verdict.explanation)
    assert "count as alike from similarity 1.00" in said
    assert "PDQ agrees where 0 bits differ or fewer" in said
    nearest = [one.matches[0] for one in facts.extractions]
    assert {one.alike_from for one in nearest} == {1.0}
    assert {one.pdq_limit for one in nearest} == {0}
    for one in nearest:
        assert one.is_match == (one.similarity >= 1.0)
    set_policy(audited, "mine", threshold=None)
    assert "similarity 1.00" not in " ".join(matched(audited).verdict.explanation)
    assert len(facts.extractions) == 3


def test_what_cannot_be_is_refused(audited: Workspace, nano: Descriptor, tmp_path: Path) -> None:
    ReferenceSets(audited).add("both", TRAIN, nano)
    ReferenceSets(audited).add("both", TRAIN, PdqDescriptor())
    for name, changes, why in (
        ("none", {"role": Role.allow}, "no reference set 'none'"), ("mine", {"threshold": 1.5}, "no cosine above 0"),
        ("mine", {"threshold": float("nan")}, "no cosine"), ("mine", {"pdq_distance": 32}, "from 0 to 31"),
        ("mine", {"notes": "x" * 2001}, "notes have more than 2000"),
        ("mine", {"sets": ["both"]}, "only an allow bank"),
        ("mine", {"role": Role.allow, "sets": ["mine"]}, "no other reference set 'mine'"),
        ("both", {"threshold": 0.5}, "a cosine holds for one descriptor"),
        ("both", {"threshold": 0.5, "threshold_of": "sscd"}, "a cosine holds for one descriptor"),
    ):  # fmt: skip
        with pytest.raises(ReferenceSetError, match=why):
            set_policy(audited, name, **changes)
    assert policies(audited) == {}
    assert set_policy(audited, "both", threshold=0.5, threshold_of="pdq").cosine("pdq", 0.7) == 0.5
    assert Policy("a", pdq_distance=16).cosine("pdq", 0.7) == 1 - 16 / 128


def test_a_set_that_is_not_in_force_is_not_matched_with(audited: Workspace, nano: Descriptor) -> None:
    set_policy(audited, "mine", expires_at=datetime(2026, 1, 31, tzinfo=UTC))
    for ask in (lambda: match(["mine"], workspace=audited), lambda: ReferenceSets(audited).require("mine", nano)):
        with pytest.raises(ReferenceSetError, match="mine has expired, on 2026-01-31T00:00:00"):
            ask()
    set_policy(audited, "mine", expires_at=None, role=Role.allow)
    with pytest.raises(ReferenceSetError, match="mine is an allow bank"):
        match(["mine"], workspace=audited)
    assert [row["role"] for row in ReferenceSets(audited).list()] == ["allow"]


def test_dates_and_cosines_of_the_command_line() -> None:
    import typer

    from audit.cli.references import _date, _number

    assert _date("--expires", "2027-01-31") == datetime(2027, 1, 31, tzinfo=UTC)
    assert _date("--expires", "2027-01-31T10:00+02:00") == datetime(2027, 1, 31, 8, tzinfo=UTC)
    assert (_date("--expires", "never"), _date("--expires", None)) == (None, None)
    assert (_number("0.8"), _number("own"), _number(None)) == (0.8, None, None)
    for wrong in (lambda: _date("--expires", "soon"), lambda: _number("much")):
        with pytest.raises(typer.BadParameter):
            wrong()
