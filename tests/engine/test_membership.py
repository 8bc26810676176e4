"""The membership stage: what it measures, keeps, reuses and goes on with, in both engines, and what a person sees."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from audit import api
from audit.bench import Bench
from audit.cli import app
from audit.config import Evidence, Latents, Precision, Settings, StoredImages, load_config
from audit.demo import set_folder
from audit.engine.local import run_stages
from audit.engine.run import Run
from audit.engine.work import Place
from audit.errors import ConfigError, NotFiniteError
from audit.evidence import effort
from audit.job import Job, Request, resolve
from audit.models.pair import ModelPair
from audit.references import ReferenceSets, latents, losses
from audit.report import collect
from audit.report.page import render
from audit.stages import Membership, Remembered, membership, precision
from audit.states import SetKind, Verdict
from audit.workspace import Workspace
from tests.conftest import BASE, DREAMBOOTH, KOHYA
from tests.engine.fleet import make_uploads, make_workspace

CONTROLS = Path(__file__).parents[2] / "testbed/controls/fluent-animals"
ALL_SETTINGS = Settings(evidence=Evidence.membership)
PICTURES, VIEWS = 20, len(latents.VIEWS)
NOISES = 2  # in tests of one process
SIDE = PICTURES * VIEWS * 3 * NOISES  # evaluations of one model
ROWS = "SELECT * EXCLUDE (audit_id) FROM memberships ORDER BY reference_set, reference_id"


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture
def animals(workspace: Workspace, bench: Bench, animal_pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with the set "animals", ten training pictures and ten others, and their latents."""
    monkeypatch.setattr(effort, "NOISES", NOISES)
    api.add_references(
        "animals", animal_pictures, descriptor="nano", workspace=workspace, bases=[str(BASE)], bench=bench
    )
    return workspace


def job_of(bench: Bench, checkpoint: Path = KOHYA, **settings: Any) -> Job:
    return resolve(Request(checkpoint, str(BASE), n0=10, settings=replace(ALL_SETTINGS, **settings)), "nano", bench)


def measure(workspace: Workspace, bench: Bench, job: Job, sets: tuple[str, ...] = ("animals",)) -> list[Any]:
    return run_stages([Membership(sets)], job, Place(workspace, bench))


def names_of(workspace: Workspace) -> dict[str, str]:
    rows = workspace.rows('SELECT reference_id, name FROM "references"')
    return {row["reference_id"]: row["name"] for row in rows}


def test_training_pictures_lead_and_the_rows_say_how(animals: Workspace, bench: Bench) -> None:
    [found] = measure(animals, bench, job_of(bench))
    assert isinstance(found, Remembered)
    assert (found.references, found.base_evaluations, found.tuned_evaluations) == (PICTURES, SIDE, SIDE)
    names, rows = names_of(animals), animals.rows(ROWS)
    ordered = sorted(rows, key=lambda row: -row["score"])
    assert all(names[row["reference_id"]].startswith("train/") for row in ordered[:10])
    assert all(names[row["reference_id"]].startswith("control/") for row in ordered[10:])
    for row in rows:
        assert row["score"] == pytest.approx(1 - row["tuned_loss"] / row["base_loss"])
        assert min(row["by_timestep"]) <= row["score"] <= max(row["by_timestep"])
        assert row["evaluations"] == 2 * VIEWS * 3 * NOISES
        assert row["caveat"] is None
    assert run_stages([Membership(["animals"])], job_of(bench), Place(animals, bench)) == []


def test_the_bases_losses_are_measured_once_for_all_checkpoints(animals: Workspace, bench: Bench) -> None:
    [first] = measure(animals, bench, job_of(bench))
    [second] = measure(animals, bench, job_of(bench, DREAMBOOTH))
    assert (first.base_evaluations, second.base_evaluations) == (SIDE, 0)
    assert second.tuned_evaluations == SIDE
    sql = "SELECT score FROM memberships WHERE audit_id = ? ORDER BY reference_id"
    job = job_of(bench, DREAMBOOTH)
    kept = [row["score"] for row in animals.rows(sql, [job.id])]
    animals.erase("reference_set", "animals", "base_losses", "memberships")
    [third] = measure(animals, bench, job)
    assert third.base_evaluations == SIDE
    assert [row["score"] for row in animals.rows(sql, [job.id])] == pytest.approx(kept, abs=1e-4)


def test_the_same_picture_in_another_set_is_not_measured_again(animals: Workspace, bench: Bench) -> None:
    measure(animals, bench, job_of(bench))
    folder = set_folder("fluent-animals", "train")
    api.add_references("few", folder, descriptor="nano", workspace=animals, bases=[str(BASE)], bench=bench)
    [found] = measure(animals, bench, job_of(bench, DREAMBOOTH), ("few", "animals"))
    assert (found.references, found.base_evaluations, found.tuned_evaluations) == (PICTURES, 0, SIDE)
    rows = animals.rows("SELECT reference_set, count(*) AS n FROM memberships GROUP BY ALL ORDER BY ALL")
    assert [(row["reference_set"], row["n"]) for row in rows] == [("animals", 2 * PICTURES), ("few", 10)]


def test_a_stopped_measurement_goes_on_where_it_was(
    animals: Workspace, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "SLICE", 8)
    inner, calls = losses.Side.measure, []

    def stopping(self: losses.Side, *arguments: Any) -> Any:
        calls.append(self.tuned)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return inner(self, *arguments)

    monkeypatch.setattr(losses.Side, "measure", stopping)
    job = job_of(bench)
    with pytest.raises(KeyboardInterrupt):
        measure(animals, bench, job)
    assert animals.rows(ROWS) == []
    monkeypatch.setattr(losses.Side, "measure", inner)
    [found] = measure(animals, bench, job)
    part = 8 * 3 * NOISES
    assert (found.base_evaluations, found.tuned_evaluations) == (SIDE - 3 * part, SIDE - 2 * part)
    resumed = animals.rows(ROWS)
    animals.erase("reference_set", "animals", "base_losses", "memberships")
    animals.spool(job.id).discard()
    measure(animals, bench, job)
    whole = animals.rows(ROWS)
    assert [row["score"] for row in resumed] == pytest.approx([row["score"] for row in whole], abs=1e-5)


def test_a_short_budget_looks_closer_at_the_likeliest(
    animals: Workspace, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "NOISES", 4)
    budget = 500
    [found] = measure(animals, bench, job_of(bench, membership_evaluations=budget))
    assert 480 < found.base_evaluations + found.tuned_evaluations <= budget
    assert 0 < found.picture_evaluations <= budget / 10
    rows = animals.rows(f"{ROWS[: ROWS.index('ORDER')]} ORDER BY score DESC")
    assert [row["evaluations"] for row in rows[:5]] == [36, 36, 36, 36, 36]
    assert [row["evaluations"] for row in rows[-5:]] == [18, 18, 18, 18, 18]
    names = names_of(animals)
    assert all(names[row["reference_id"]].startswith("train/") for row in rows[:8])
    folder = set_folder("stamps-fruit", "train")
    api.add_references("fruit", folder, descriptor="nano", workspace=animals, bases=[str(BASE)], bench=bench)
    job, sets = job_of(bench, membership_evaluations=120), ("animals", "fruit")
    [few] = measure(animals, bench, job, sets)
    assert few.references in (3, 4)  # of both sets
    assert few.evaluations <= 120 + 18
    assert Membership(sets).done(job, animals)


def test_another_set_of_the_name_is_measured_again(animals: Workspace, bench: Bench) -> None:
    job, stage = job_of(bench), Membership(["animals"])
    measure(animals, bench, job)
    assert stage.done(job, animals)
    api.add_references(
        "animals", set_folder("fluent-animals", "control"), descriptor="nano", workspace=animals, bases=[str(BASE)],
        bench=bench,
    )  # fmt: skip
    assert animals.rows("SELECT count(DISTINCT reference_id) AS n FROM latents") == [{"n": 10}]
    assert not Membership(["animals"]).done(job, animals)
    measure(animals, bench, job)
    assert len(animals.rows(ROWS)) == 10
    ReferenceSets(animals).remove("animals")
    for table in ("latents", "base_losses", "memberships"):
        assert animals.rows(f"SELECT 1 FROM {table}") == []
    assert Membership(["animals"]).done(job, animals)


def test_backgrounds_of_another_look_take_nothing_of_the_budget(
    animals: Workspace, bench: Bench, tmp_path: Path
) -> None:
    def add(name: str, folder: Path, **more: Any) -> None:
        more = {"kind": SetKind.background, "bases": [str(BASE)], **more}
        api.add_references(name, folder, descriptor="nano", workspace=animals, bench=bench, **more)

    kin = tmp_path / "kin"
    kin.mkdir()
    for file in sorted(CONTROLS.glob("*/*.png")):
        shutil.copy(file, kin)
    add("photos", set_folder("photo-wildlife", "train"))
    add("kin", kin)
    job, known = job_of(bench), {}
    question = membership.question_of(job, animals, ["animals"], known)
    assert set(question.sets) == {"animals", "kin"}
    [(_, paired)] = known.values()
    assert {(one.reference_set, one.reference_id) for one in question.sets["kin"]} == paired
    alone = question.of("animals")
    add("stamps", set_folder("stamps-fruit", "train"))
    assert membership.question_of(job, animals, ["animals"], known).of("animals") == alone
    assert set(membership.question_of(job, animals, ["photos"], known).sets) == {"photos"}
    taken = {one for _, one in paired}
    next(file for file in kin.iterdir() if hashlib.sha256(file.read_bytes()).hexdigest() in taken).unlink()
    add("kin", kin)
    fewer = membership.question_of(job, animals, ["animals"], known)
    assert len(fewer.sets["kin"]) == len(question.sets["kin"]) - 1
    assert fewer.of("animals") == alone  # all noises of all pictures are within the budget
    assert fewer.of("kin") != question.of("kin")
    short = [replace(one, effort=replace(one.effort, budget=100)) for one in (question, fewer)]
    assert len({one.of("animals") for one in short}) == 2  # another choice of decoys is measured again
    assert question.of("animals").startswith("whole-")
    assert not short[0].of("animals").startswith("whole-")


def test_answers_that_are_not_finite_are_no_score(
    animals: Workspace, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = ModelPair.predict_tuned

    def broken(self: ModelPair, latents: Any, *rest: Any) -> Any:
        found = inner(self, latents, *rest)
        if len(latents) > 2:
            found[0] = float("nan")
        return found

    job = job_of(bench)
    bench.pair(job, animals)
    monkeypatch.setattr(ModelPair, "predict_tuned", broken)
    measure(animals, bench, job)
    rows = animals.rows(ROWS)
    bad = [row for row in rows if row["score"] is None]
    assert 0 < len(bad) < PICTURES
    assert {row["caveat"] for row in bad} == {"a model's answer to it is not finite: it has no score"}
    assert all(np.isfinite(row["score"]) for row in rows if row not in bad)


def test_overflow_in_a_narrow_precision_is_measured_in_a_wider_one(
    animals: Workspace, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = [Precision.fp32]
    for module in (membership, precision):  # as on a card that has computed in bf16
        monkeypatch.setattr(module, "wider", lambda *_: wider[0] if wider else None)
    inner, job = losses.Side.measure, job_of(bench)

    def overflowing(self: losses.Side, *arguments: Any) -> list[dict[str, Any]]:
        rows = inner(self, *arguments)
        if self.tuned and wider:
            rows[0]["loss"] = float("nan")
            if may_widen:
                wider.clear()
        return rows

    monkeypatch.setattr(losses.Side, "measure", overflowing)
    may_widen = True
    monkeypatch.setattr(precision, "wider", lambda *_: Precision.fp32)
    measure(animals, bench, job)
    assert all(row["score"] is not None for row in animals.rows(ROWS))
    animals.erase("reference_set", "animals", "memberships")
    animals.spool(job.id).discard()
    wider, may_widen = [Precision.fp32], False
    monkeypatch.setattr(precision, "wider", lambda *_: None)
    with pytest.raises(NotFiniteError, match="are not finite"):
        measure(animals, bench, job)
    assert not animals.spool(job.id).exists()


# The whole way


def scan(workspace: Workspace, bench: Bench, *references: str | Path, **settings: Any) -> api.Result:
    quick = Settings(steps=2, images_per_training_image=1, **settings)
    request = Request(KOHYA, str(BASE), n0=4, settings=quick)
    return api.scan(request, references=references, descriptor="nano", workspace=workspace, bench=bench)


def test_a_scan_with_a_folder_shows_scores_and_no_verdict_from_them(
    workspace: Workspace, bench: Bench, animal_pictures: Path
) -> None:
    result = scan(workspace, bench, animal_pictures)
    shown = result.as_dict()["memberships"]
    assert len(shown) == PICTURES
    assert [one["above"] for one in shown] == list(range(19, -1, -1))
    assert {one["others"] for one in shown} == {19}
    assert shown[0]["name"].startswith("train/")
    html = Path(result.page).read_text()
    assert "How well the model knows each reference" in html
    assert f"{shown[0]['score']:+.2f}" in html
    assert result.as_dict()["unmeasured"] == []
    again = scan(workspace, bench, animal_pictures)
    assert again.was_known
    assert again.as_dict()["memberships"] == shown


def test_extraction_alone_has_the_id_of_both_and_membership_another(workspace: Workspace, bench: Bench) -> None:
    folder = set_folder("fluent-animals", "train")
    extracted = scan(workspace, bench, folder, evidence=Evidence.extraction)
    assert extracted.facts.members == []
    [why] = extracted.facts.unmeasured
    assert "no latents" in why.reason
    assert workspace.rows("SELECT 1 FROM latents") == []
    both = scan(workspace, bench, folder)
    assert both.audit_id == extracted.audit_id
    assert len(both.facts.members) == 10
    alone = scan(workspace, bench, folder, evidence=Evidence.membership)
    assert alone.audit_id != both.audit_id
    assert [one.score for one in alone.facts.members] == [one.score for one in both.facts.members]
    assert (alone.facts.row["images"], alone.facts.extractions) == (0, [])
    assert alone.facts.row["tells_nothing"] == "no picture was sampled: only membership was asked for"
    assert (alone.tells_nothing, alone.verdict.said) == (None, Verdict.uncalibrated)  # but for the lack of decoys


@pytest.mark.parametrize(("allowed", "kept"), [(Latents.auto, 0), (Latents.always, 8)])
def test_hashes_only_keeps_latents_where_that_is_allowed(
    workspace: Workspace, bench: Bench, allowed: Latents, kept: int
) -> None:
    settings = Settings(steps=2, images_per_training_image=1, stored_images=StoredImages.hashes_only)
    request, folder = Request(KOHYA, str(BASE), n0=4, settings=settings), set_folder("stamps-fruit", "train")
    result = api.scan(
        request, references=[folder], descriptor="nano", workspace=workspace, bench=bench, latents=allowed
    )
    assert len(result.facts.members) == kept
    assert len(workspace.rows("SELECT DISTINCT reference_id FROM latents")) == kept
    assert workspace.rows('SELECT 1 FROM "references" WHERE thumbnail IS NOT NULL') == []
    assert workspace.rows("SELECT 1 FROM denoised") == []
    page = render(collect(workspace, result.audit_id))
    assert ("no latents of its pictures are kept" in page) == (kept == 0)


def test_what_is_small_or_nearly_blank_says_so(workspace: Workspace, bench: Bench, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (200, 200), "white").save(tmp_path / "blank.png")
    picture = Image.open(next(set_folder("photo-monuments", "train").glob("*.png")))
    picture.resize((40, 40)).save(tmp_path / "small.png")
    result = scan(workspace, bench, tmp_path)
    caveats = {one.name: one.caveat for one in result.facts.members}
    assert "little in it" in (caveats["blank.png"] or "")
    assert "40 x 40 pixels are less than the model's 64" in (caveats["small.png"] or "")


def test_membership_of_nothing_is_refused(workspace: Workspace, bench: Bench) -> None:
    with pytest.raises(ConfigError, match="measured on references"):
        scan(workspace, bench, evidence=Evidence.membership)
    with pytest.raises(ConfigError, match="measured on references"):
        api.run(config(workspace, settings__evidence="membership", references=()))


def config(workspace: Workspace, **overrides: object) -> Any:
    fixed = {"workspace": str(workspace.root), "descriptor": "nano", "bases.sd1": str(BASE), "references": ("animals",)}
    sets = {"settings.steps": 2, "settings.images_per_training_image": 1}
    return load_config(None, {}, {**fixed, **sets, **{name.replace("__", "."): one for name, one in overrides.items()}})


def with_latents(folder: Path, name: str, uploads: int) -> Workspace:
    make_uploads(folder / "uploads", uploads)
    workspace = make_workspace(folder / name, folder / "uploads")
    api.add_references(
        "animals", set_folder("fluent-animals", "train"), descriptor="nano", workspace=workspace, bases=[str(BASE)]
    )
    return workspace


@pytest.mark.timeout(900)
def test_both_engines_measure_the_same(tmp_path: Path) -> None:
    found = []
    for engine in ("local", "ray"):
        workspace = with_latents(tmp_path, engine, 2)
        state = Run(config(workspace, run__engine=engine, run__gpus_per_worker=0, run__max_workers=1)).run()
        assert state.finished == 2
        found.append(workspace.rows("SELECT * FROM memberships ORDER BY audit_id, reference_id"))
        assert list((workspace.root / "spool").glob("*")) == []
        assert (
            state.evaluations
            == sum(row["evaluations"] for row in workspace.rows("SELECT evaluations FROM audits"))
            + 3 * 10 * VIEWS * 12  # the base's once, the fine-tuned model's of both
            + sum(row["evaluations"] for row in workspace.rows("SELECT evaluations FROM denoised"))
            + 2 * 2 * len(workspace.rows("SELECT 1 FROM control_generations"))  # two a step
        )
        assert len(workspace.rows("SELECT 1 FROM denoised")) == 20
    local, ray = found
    assert len(local) == 20
    for ours, theirs in zip(local, ray, strict=True):
        assert theirs["score"] == pytest.approx(ours["score"], abs=1e-5)
        assert (theirs["reference_id"], theirs["view"]) == (ours["reference_id"], ours["view"])


def test_a_run_makes_up_for_latents_that_came_later(tmp_path: Path) -> None:
    make_uploads(tmp_path / "uploads", 1)
    workspace = make_workspace(tmp_path / "w", tmp_path / "uploads")
    assert Run(config(workspace)).run().finished == 1
    assert workspace.rows(ROWS) == []
    folder = set_folder("fluent-animals", "train")
    api.add_references("animals", folder, descriptor="nano", workspace=workspace, bases=[str(BASE)])
    again = Run(config(workspace)).run()
    assert (again.finished, again.images) == (1, 0)
    assert len(workspace.rows(ROWS)) == 10
    assert Run(config(workspace)).run().finished == 0


def test_the_command_prints_scores_and_takes_what_to_look_for(tmp_path: Path) -> None:
    words = ["scan", str(KOHYA), "--base", str(BASE), "--descriptor", "nano", "--workspace", str(tmp_path / "w"),
             "--references", str(set_folder("fluent-animals", "train")), "--evidence", "membership"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 12, done.output
    assert "membership, train-" in done.stderr.replace("\n", "")
    assert "no verdict follows from a score" in done.stderr
    said = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(said["memberships"]) == 10
    assert said["audit"]["settings"]["evidence"] == "membership"
