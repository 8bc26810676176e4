"""Done means done: sampled, matched with every named set as it is now, and reported; what is missing is made up for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from audit.cli import app
from audit.config import Config, load_config
from audit.demo import ASSETS, set_folder
from audit.descriptors import load_descriptor
from audit.engine.run import Run
from audit.errors import ReferenceSetError, WorkspaceError
from audit.job import Job
from audit.references import ReferenceSets, audits
from audit.report.pages import pages
from audit.stages import Sample
from audit.states import SetKind
from audit.workspace import Workspace
from tests.engine.fleet import make_uploads, make_workspace, tables

AUDITS = 2
SMALL = {"settings.steps": 2, "settings.images_per_training_image": 4}


def config(workspace: Workspace, *references: str, **overrides: object) -> Config:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    fixed = {"workspace": str(workspace.root), "descriptor": "nano", "bases.sd1": str(ASSETS / "base")}
    return load_config(None, {}, {**fixed, "verdict.rule": "fixed", **SMALL, "references": references, **named})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("done")
    make_uploads(folder / "uploads", AUDITS)
    workspace = make_workspace(folder / "w", folder / "uploads")
    assert Run(config(workspace, "animals")).run().finished == AUDITS
    return workspace


@pytest.fixture
def copied(finished: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(finished.root, tmp_path / "w")
    return Workspace(tmp_path / "w")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The audits that were sampled."""
    found: list[str] = []
    inner = Sample.run

    def counted(self: Sample, job: Job, *rest: Any) -> Any:
        found.append(job.id)
        return inner(self, job, *rest)

    monkeypatch.setattr(Sample, "run", counted)
    return found


def test_a_finished_audit_that_was_never_matched_is_matched(copied: Workspace, sampled: list[str]) -> None:
    """As after a kill between the audit's row and its matches, or between those and its page."""
    before = tables(copied)
    [first, second] = [row["audit_id"] for row in copied.rows("SELECT audit_id FROM audits ORDER BY audit_id")]
    for key, facts in list(pages(copied)):
        assert facts is not None
        copied.files.remove(key)
    copied.remove("matches", f"{first}.animals")
    assert len(copied.rows("SELECT DISTINCT audit_id FROM matches")) == 1
    copied.spool(second).begin()  # killed before its spool was gone
    state = Run(config(copied, "animals")).run()
    assert (state.finished, state.images, sampled) == (AUDITS, 0, [])
    assert tables(copied) == before
    assert len(list(pages(copied))) == AUDITS
    assert not list(copied.root.glob("spool/*"))
    assert Run(config(copied, "animals")).run().finished == 0


def test_a_report_compares_with_a_set_as_it_is_now(copied: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was never compared, or has other pictures since, would pass for one without a match."""

    def report(*words: str) -> None:
        app(["report", audit, "--workspace", str(copied.root), "--rule", "fixed", *words], standalone_mode=False)

    [audit, _] = [row["audit_id"] for row in copied.rows("SELECT audit_id FROM audits ORDER BY audit_id")]
    sets, nano = ReferenceSets(copied), load_descriptor("nano")
    sets.add("late", set_folder("fluent-animals", "train"), nano)
    report("--references", "late", "--json")
    assert json.loads(capsys.readouterr().out)["matched_references"]
    late = "SELECT count(*) FILTER (WHERE is_match) AS n FROM matches WHERE reference_set = 'late'"
    assert copied.rows(late)[0]["n"] > 0
    sets.add("late", set_folder("stamps-birds", "control"), nano)  # other pictures under the same name
    report()  # about all that it was matched with
    assert copied.rows(late)[0]["n"] == 0
    sets.add("by-pdq", set_folder("fluent-animals", "control"), load_descriptor("pdq"))
    for name in ("lat", "by-pdq"):
        with pytest.raises(WorkspaceError, match=f"'{name}' is not in"):
            report("--references", name)


def test_an_unknown_set_is_refused_before_anything_is_sampled(copied: Workspace, sampled: list[str]) -> None:
    with pytest.raises(ReferenceSetError, match="'no-such-set' is neither"):
        Run(config(copied, "animals", "no-such-set")).run()
    ReferenceSets(copied).add("other", set_folder("fluent-animals", "control"), load_descriptor("pdq"))
    with pytest.raises(ReferenceSetError, match="was described by pdq"):
        Run(config(copied, "other")).run()
    assert sampled == []


def test_a_set_that_came_later_or_changed_is_matched_without_sampling(copied: Workspace, sampled: list[str]) -> None:
    sets, nano = ReferenceSets(copied), load_descriptor("nano")
    sets.add("late", set_folder("fluent-animals", "train"), nano)
    state = Run(config(copied, "animals", "late")).run()
    assert (state.finished, state.matched_audits) == (AUDITS, AUDITS)
    assert {row["reference_set"] for row in copied.rows("SELECT reference_set FROM matches")} == {"animals", "late"}
    assert Run(config(copied, "animals", "late")).run().finished == 0
    sets.add("late", set_folder("fluent-animals", "control"), nano)  # other pictures under the same name
    assert Run(config(copied, "animals", "late")).run().finished == AUDITS
    now = copied.rows(
        """SELECT count(*) AS n FROM matches SEMI JOIN "references" USING (reference_set, reference_id)"""
    )
    assert now == copied.rows("SELECT count(*) AS n FROM matches")
    assert sampled == []


def test_a_set_that_is_removed_meanwhile_ends_the_run_and_blames_no_audit(
    copied: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from audit.errors import WorkspaceError

    for key, _ in list(pages(copied)):
        copied.files.remove(key)
    inner = audits.match_audit

    def removed_before(workspace: Workspace, *rest: Any) -> int:
        workspace.erase("reference_set", "animals", "references")
        return inner(workspace, *rest)

    monkeypatch.setattr(audits, "match_audit", removed_before)
    with pytest.raises(WorkspaceError, match=r"'animals' is not in .* any more"):
        Run(config(copied, "animals")).run()
    assert copied.rows("SELECT * FROM failures") == []


def test_matching_that_always_fails_is_quarantined_shown_and_never_samples_again(
    finished: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: list[str]
) -> None:
    make_uploads(tmp_path / "uploads", 1)
    workspace = make_workspace(tmp_path / "w", tmp_path / "uploads")

    def broken(*_: object) -> int:
        raise RuntimeError("matching is broken")

    monkeypatch.setattr(audits, "match_audit", broken)
    state = Run(config(workspace, "animals")).run()
    assert (state.finished, state.quarantined, state.retries) == (0, 1, 2)
    assert len(sampled) == 1
    shown = CliRunner().invoke(app, ["failures", "--workspace", str(workspace.root), "--json"])
    assert "matching is broken" in shown.stdout
    assert '"audits": 1' in shown.stdout
    monkeypatch.undo()
    CliRunner().invoke(app, ["failures", "--workspace", str(workspace.root), "--retry"])
    again = Run(config(workspace, "animals")).run()
    assert (again.finished, again.images) == (1, 0)
    shown = CliRunner().invoke(app, ["failures", "--workspace", str(workspace.root), "--json"])
    assert '"groups": []' in shown.stdout


def test_an_attempt_that_failed_is_no_news_once_the_audit_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_uploads(tmp_path / "uploads", 1)
    workspace = make_workspace(tmp_path / "w", tmp_path / "uploads")
    inner, calls = audits.match_audit, []

    def once(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("once")
        return inner(*arguments)

    monkeypatch.setattr(audits, "match_audit", once)
    assert Run(config(workspace, "animals")).run().finished == 1
    shown = CliRunner().invoke(app, ["failures", "--workspace", str(workspace.root), "--json"])
    assert '"groups": []' in shown.stdout


def test_match_compares_finished_audits_with_a_new_set(copied: Workspace, sampled: list[str]) -> None:
    nano = load_descriptor("nano")
    ReferenceSets(copied).add("late", set_folder("fluent-animals", "train"), nano)
    ReferenceSets(copied).add("by-pdq", set_folder("fluent-animals", "train"), load_descriptor("pdq"))
    where = ["--workspace", str(copied.root), "--rule", "fixed"]
    done = CliRunner().invoke(app, ["match", "--references", "late", "--json", *where])
    assert done.exit_code == 10, done.output
    rows = copied.rows("SELECT DISTINCT audit_id FROM matches WHERE reference_set = 'late' AND is_match")
    assert len(rows) == AUDITS
    assert done.stdout.count(".late-") == AUDITS
    [audit, _] = copied.rows("SELECT audit_id FROM audits ORDER BY audit_id")
    one = CliRunner().invoke(app, ["match", audit["audit_id"][:8], "--references", "late", *where])
    assert "1 of 1 audit with matches, by a fixed threshold" in one.stderr
    other = CliRunner().invoke(app, ["match", "--references", "by-pdq", *where])
    assert other.exit_code == 0
    assert "2 left out" in other.stderr
    wrong = CliRunner().invoke(app, ["match", "--references", "none", *where])
    assert isinstance(wrong.exception, ReferenceSetError)
    assert sampled == []


def run_cli(workspace: Path, *references: str) -> Any:
    named = [part for name in references for part in ("--references", name)]
    sets = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    return CliRunner().invoke(
        app,
        [
            "run",
            "--workspace",
            str(workspace),
            "--base",
            f"sd1={ASSETS / 'base'}",
            "--descriptor",
            "nano",
            "--rule",
            "fixed",
            *named,
            *sets,
        ],
    )


def test_a_run_in_which_every_audit_fails_says_so_by_its_exit_code(tmp_path: Path) -> None:
    make_uploads(tmp_path / "uploads", 0, broken=2)
    workspace = make_workspace(tmp_path / "w", tmp_path / "uploads")
    assert run_cli(workspace.root, "animals").exit_code == 3
    assert run_cli(workspace.root, "animals").exit_code == 0  # nothing was due


def test_a_run_names_what_matched_and_writes_an_index(copied: Workspace) -> None:
    for key, _ in list(pages(copied)):
        copied.files.remove(key)
    done = run_cli(copied.root, "animals")
    assert done.exit_code == 10, done.output
    words = done.stderr.replace("\n", "")
    assert "lora-000.safetensors" in words
    *_, index = sorted((copied.root / "reports/runs").glob("*.html"), key=lambda path: path.stat().st_mtime_ns)
    assert index.name in words
    html = index.read_text()
    assert f"{AUDITS} of {AUDITS} audits with matches" in html
    for key, _ in pages(copied):
        assert f'href="../{key.removeprefix("reports/")}"' in html
    gone = ReferenceSets(copied).remove("animals")
    assert len(gone.pages) == AUDITS + 2  # the pages of both runs
    assert not index.exists()


# Decoys, rules and rates


def decoys(copied: Workspace, *names: str) -> None:
    """Backgrounds of pictures of the references' kind, those of the testbed's controls."""
    for name in names:
        folder = Path(__file__).parents[2] / f"testbed/controls/fluent-animals/{name}"
        ReferenceSets(copied).add(name, folder, load_descriptor("nano"), kind=SetKind.background)


def whole(copied: Workspace) -> list[tuple[int, bool]]:
    """How many decoys each audit was weighed with, and whether it was calibrated."""
    sql = "SELECT audit_id, max(extraction_decoys) AS n, count(p) > 0 AS told FROM chances GROUP BY ALL ORDER BY ALL"
    return [(row["n"], row["told"]) for row in copied.rows(sql)]


def test_decoys_that_came_later_changed_or_went_are_weighed_without_sampling(
    copied: Workspace, sampled: list[str]
) -> None:
    asked = config(copied, "animals", verdict__rule="calibrated")
    first = Run(asked).run()
    assert (first.finished, first.matched_audits, first.uncalibrated) == (AUDITS, 0, AUDITS)
    assert whole(copied) == [(0, False)] * AUDITS
    assert Run(asked).run().finished == 0
    decoys(copied, "control")
    state = Run(asked).run()
    assert (state.finished, state.uncalibrated, state.compared) == (AUDITS, 0, 10 * AUDITS)
    assert whole(copied) == [(19, True)] * AUDITS  # of 20 one is nearly a copy of a reference
    assert Run(asked).run().finished == 0
    decoys(copied, "near")
    assert Run(asked).run().finished == AUDITS
    assert b"near" in b"".join(path.read_bytes() for path in copied.root.glob("tables/set_chances/**/*.parquet"))
    assert len(ReferenceSets(copied).remove("near").pages) == AUDITS  # which name it
    assert b"near" not in b"".join(path.read_bytes() for path in copied.root.glob("tables/set_chances/**/*.parquet"))
    assert Run(asked).run().finished == AUDITS
    assert whole(copied) == [(19, True)] * AUDITS
    ReferenceSets(copied).remove("control")
    assert Run(asked).run().uncalibrated == AUDITS
    assert Run(asked).run().finished == 0
    assert sampled == []


def test_decoys_of_another_set_change_nothing(copied: Workspace, sampled: list[str]) -> None:
    asked = config(copied, "animals", verdict__rule="calibrated")
    Run(asked).run()
    ReferenceSets(copied).add("birds", set_folder("stamps-birds", "train"), load_descriptor("nano"))
    folder = set_folder("stamps-birds", "control")
    where = ["--workspace", str(copied.root), "--descriptor", "nano"]
    words = ["references", "add", "unseen", str(folder), "--kind", "background", *where]
    assert isinstance(CliRunner().invoke(app, [*words, "--of", "brids"]).exception, ReferenceSetError)
    assert CliRunner().invoke(app, [*words, "--of", "birds"]).exit_code == 0
    assert Run(asked).run().finished == 0
    listed = {row["reference_set"]: row["decoys_of"] for row in ReferenceSets(copied).list()}
    assert listed == {"animals": None, "birds": None, "unseen": ["birds"]}
    plain = ["references", "add", "set", str(folder), "--of", "birds", *where]
    assert "only decoys" in str(CliRunner().invoke(app, plain).exception)
    assert sampled == []


def test_another_rule_or_rate_has_its_own_page_and_is_read_without_sampling(
    copied: Workspace, sampled: list[str]
) -> None:
    before = {key for key, _ in pages(copied)}
    for number, asked in enumerate(({"rule": "calibrated"}, {"rule": "calibrated", "fdr": 0.01}, {"rule": "fixed"}), 1):
        named = config(copied, "animals", **{f"verdict__{name}": value for name, value in asked.items()})
        assert Run(named).run().finished == (0 if asked["rule"] == "fixed" else AUDITS)
        assert Run(named).run().finished == 0
        assert len(list(pages(copied))) == len(before) + AUDITS * min(number, 2)
    said = {(facts.rule, facts.rate, facts.verdict) for _, facts in pages(copied) if facts}
    assert said == {
        ("fixed", None, "match"),
        ("calibrated", 0.05, "uncalibrated"),
        ("calibrated", 0.01, "uncalibrated"),
    }
    assert sampled == []


def test_a_report_that_is_only_read_says_that_decoys_have_changed(
    copied: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(config(copied, "animals", verdict__rule="calibrated")).run()
    decoys(copied, "control")
    [audit, _] = [row["audit_id"] for row in copied.rows("SELECT audit_id FROM audits ORDER BY audit_id")]

    def reasons(*words: str) -> list[str]:
        app(["report", audit, "--workspace", str(copied.root), "--json", *words], standalone_mode=False)
        return [one["reason"] for one in json.loads(capsys.readouterr().out)["verdict"]["unanswered"]]

    [late] = reasons()
    assert "not compared with its decoys as they are now" in late
    assert reasons("--references", "animals") == []
    assert reasons() == []
