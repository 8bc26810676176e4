"""The same workspace on a disk and on S3-compatible storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from audit.workspace import Workspace
from tests.test_files import s3

__all__ = ["s3"]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a workspace can be made."""
    if request.param == "disk":
        return str(tmp_path / "place")
    return f"s3://bucket/{tmp_path.name}?{request.getfixturevalue('s3')}"


@pytest.fixture
def either(place: str) -> Workspace:
    return Workspace(place)
