"""A run's condition chooses among what may be audited; it cannot bring back what opted out."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from audit.cli import app
from audit.config import load_config
from audit.engine.due import Due, Skipped
from audit.errors import ConfigError, CrawlError
from audit.workspace import Workspace
from crawlers.catalog import Catalog

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def catalog(workspace: Workspace) -> Workspace:
    """One network that may be audited, one whose owner opted out."""
    for item, digit, state in (("folder:a:free", "1", "stored"), ("folder:a:out", "2", "opted-out")):
        row = {"item_id": item, "source": "folder", "identity": digit * 64, "format": "lora-kohya", "state": state,
               "name": item, "seen_at": NOW, "first_seen_at": NOW}  # fmt: skip
        workspace.append("checkpoints", [row])
    return workspace


def chosen(workspace: Workspace, where: str) -> list[str]:
    named = {"workspace": str(workspace.root), "descriptor": "nano", "bases.sd1": "x", "run.where": where}
    return Due(workspace, load_config(None, {}, named), Skipped({}))._identities()


@pytest.mark.parametrize(
    "where", ["TRUE", "FALSE OR TRUE", "state = 'opted-out' OR TRUE", "TRUE -- all", "name IS NOT NULL\n",
              "item_id IN (SELECT item_id FROM checkpoints)"]
)  # fmt: skip
def test_no_condition_brings_back_what_opted_out(catalog: Workspace, where: str) -> None:
    assert chosen(catalog, where) == ["1" * 64]


@pytest.mark.parametrize(
    "where",
    ["TRUE) OR (TRUE", "TRUE)) OR ((TRUE", "TRUE) UNION ALL (SELECT * FROM checkpoints WHERE TRUE",
     "TRUE) GROUP BY ALL UNION ALL SELECT identity, 0, '', now() FROM checkpoints --", "TRUE, TRUE", "TRUE; SELECT 1",
     "TRUE -- \n) OR (TRUE", "/* */ TRUE) OR TRUE /* */ OR (TRUE", ""],
)  # fmt: skip
def test_a_condition_is_one_expression(catalog: Workspace, where: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.where"):
        chosen(catalog, where)
    with pytest.raises(CrawlError, match="the condition"):
        app(["catalog", "--where", where, "--state", "stored", "--workspace", str(catalog.root)], standalone_mode=False)


def test_a_comment_behind_a_condition_hides_nothing(catalog: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    app(["catalog", "--where", "TRUE --", "--state", "stored", "--workspace", str(catalog.root)], standalone_mode=False)
    said = capfd.readouterr().out
    assert "folder:a:free" in said
    assert "folder:a:out" not in said


def test_asking_again_leaves_alone_what_opted_out(catalog: Workspace) -> None:
    catalog.append("checkpoints", [{"item_id": "civitai:1", "source": "civitai", "state": "opted-out", "seen_at": NOW}])
    assert Catalog(catalog).longest_unasked("state = 'opted-out' OR TRUE", 10, ["civitai"]).num_rows == 0
