"""A second look at pairs: copies have points in common, different pictures have not, and nothing is made of either."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from audit.demo import set_folder
from audit.descriptors import Descriptor
from audit.descriptors.base import to_png
from audit.references import ReferenceSets, second_look
from audit.references.audits import match_audit
from audit.references.second_look import MOST_PAIRS, NEAREST, chosen_pairs, look_again
from audit.workspace import Workspace

pytest.importorskip("cv2")
CHANCE = 5  # points in common that different pictures can have
PICTURES = [Image.open(one).convert("RGB") for one in sorted(set_folder("fluent-animals", "train").glob("*.png"))]
AUDIT = "ab" * 16


def test_copies_have_points_in_common_and_different_pictures_have_not() -> None:
    one = PICTURES[0]
    with io.BytesIO() as file:
        one.save(file, "JPEG", quality=60)
        copy = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    for made, mirrored in (
        (copy, False), (one.crop((4, 6, 58, 60)), False), (copy.transpose(Image.Transpose.FLIP_LEFT_RIGHT), True),
        (one.resize((300, 300)).rotate(20), False),
    ):  # fmt: skip
        found = look_again(one, made)
        assert found.inliers > CHANCE
        assert found.mirrored is mirrored
        assert 0.05 < found.coverage <= 1
        assert look_again(one, made) == found  # the same pictures, the same answer
    assert all(look_again(one, other).inliers <= CHANCE for other in PICTURES[1:6])


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3000, 2), (2, 3000), (900, 700)])
def test_pictures_of_every_shape_are_looked_at_within_bounds(size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert max(second_look._grey(noise).shape) <= second_look.MOST_SIDE
    for other in (noise, Image.new("RGB", size), PICTURES[0]):
        assert look_again(noise, other).inliers >= 0
    assert look_again(Image.new("RGB", size), Image.new("RGB", size)).inliers == 0


def test_what_is_alike_is_looked_at_and_else_the_nearest() -> None:
    def rows(alike: int, unlike: int) -> pa.Table:
        return pa.table(
            {"audit_id": ["a"] * (alike + unlike), "reference_set": ["s"] * (alike + unlike),
             "evidence": ["none"] * unlike + ["descriptor"] * alike,
             "similarity": np.linspace(0.1, 0.9, alike + unlike)}
        )  # fmt: skip

    assert chosen_pairs(rows(0, 9)) == list(range(9 - NEAREST, 9))
    assert chosen_pairs(rows(6, 9)) == list(range(9, 15))
    assert len(chosen_pairs(rows(100, 9))) == MOST_PAIRS
    assert chosen_pairs(rows(0, 0)) == []


@pytest.fixture
def matched(workspace: Workspace, nano: Descriptor) -> Any:
    """A function that matches an audit that draws PICTURES[0], and gives its rows, by position."""
    ReferenceSets(workspace).add("mine", set_folder("fluent-animals", "train"), nano)
    row = {"audit_id": AUDIT, "descriptor": nano.name, "threshold": 0.7, "descriptor_size": 64,
           "finished_at": datetime.now(UTC)}  # fmt: skip
    workspace.write("audits", AUDIT, [row])
    drawn = {"audit_id": AUDIT, "rank": 1, "descriptor": nano.describe([PICTURES[0]])[0], "image": to_png(PICTURES[0])}

    def match(**changed: Any) -> list[dict[str, Any]]:
        workspace.write("extractions", AUDIT, [drawn | changed])
        match_audit(workspace, AUDIT, ["mine"])
        return workspace.rows("SELECT * FROM matches ORDER BY position")

    return match


def test_matches_say_what_a_second_look_found(matched: Any) -> None:
    first, *others = matched()
    assert (first["verdict"], first["mirrored"]) == ("match", False)
    assert first["inliers"] > CHANCE
    assert first["coverage"] > 0.05
    assert others
    assert all(row["inliers"] is not None and row["inliers"] <= CHANCE for row in others)


@pytest.mark.parametrize("image", [None, b"", b"no picture", to_png(PICTURES[0])[:200]])
def test_nothing_is_said_of_pictures_that_are_not_kept_or_are_none(matched: Any, image: bytes | None) -> None:
    first = matched(image=image)[0]
    assert (first["verdict"], first["inliers"], first["coverage"], first["mirrored"]) == ("match", None, None, None)


def test_without_opencv_matches_are_the_same_but_for_that(matched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = matched()
    monkeypatch.setattr(second_look, "INSTALLED", False)
    plain = matched()
    columns = ("inliers", "coverage", "mirrored")
    assert [row | dict.fromkeys(columns) for row in looked] == plain
