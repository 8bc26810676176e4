"""The configuration tree: file, environment and command line through one function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from audit.api import verdict_settings
from audit.config import Config, EngineName, Method, Rule, VerdictSettings, leaves, load_config
from audit.errors import ConfigError

TOML = """
workspace = "s3://bucket/audits"
references = ["portfolio", "stolen"]
[bases]
sd1 = "owner/name@0123456789012345678901234567890123456789"
[settings]
method = "cfg"
w = "auto"
steps = 25
[run]
engine = "ray"
max_gpu_hours = 1.5
"""
YAML = """
workspace: s3://bucket/audits
references: [portfolio, stolen]
bases: {sd1: owner/name@0123456789012345678901234567890123456789}
settings: {method: cfg, w: auto, steps: 25}
run: {engine: ray, max_gpu_hours: 1.5}
"""


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_files_say_everything(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = load_config(tmp_path / name, {})
    assert (config.workspace, config.references) == ("s3://bucket/audits", ("portfolio", "stolen"))
    assert list(config.bases) == ["sd1"]
    assert (config.settings.method, config.settings.w, config.settings.steps) == (Method.cfg, None, 25)
    assert (config.run.engine, config.run.max_gpu_hours) == (EngineName.ray, 1.5)
    assert config.run.attempts == Config().run.attempts


def test_the_later_is_the_stronger(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[settings]\nsteps = 1\nseed = 1\nk = 0.1\n")
    environment = {"LORA_AUDIT_SETTINGS__STEPS": "2", "LORA_AUDIT_SETTINGS__SEED": "2", "OTHER": "x"}
    config = load_config(tmp_path / "a.toml", environment, {"settings.steps": 3, "run.limit": None})
    assert (config.settings.steps, config.settings.seed, config.settings.k) == (3, 2, 0.1)


def test_every_setting_has_a_variable_and_a_meaning() -> None:
    found = dict(leaves(Config()))
    assert {"workspace", "settings.steps", "run.limit", "bases"} <= set(found)
    assert all(len(text) > 10 for _, text in found.values())
    assert load_config(None, {"LORA_AUDIT_REFERENCES": "a, b", "LORA_AUDIT_RUN__LIMIT": "5"}).references == ("a", "b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz = 3", "there is no setting 'stepz'"),
        ("[settings]\nstepz = 3", "there is no setting 'stepz'"),
        ("[settings]\nsteps = 'many'", r"settings\.steps = 'many'"),
        ("[run]\nengine = 'slurm'", r"run\.engine"),
        ("[run", "is not valid"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "a.toml", {})


def test_other_mistakes_are_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- a list")
    for arguments, words in (
        ((tmp_path / "none.toml", {}), "cannot be read"),
        ((tmp_path / "a.yaml", {}), "not a table"),
        ((None, {"LORA_AUDIT_RUN__LIMIT": "few"}), r"run\.limit"),
        ((None, {}, {"run.limits": 3}), "there is no setting 'run.limits'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(*arguments)  # type: ignore[arg-type]


def test_config_show_prints_what_is_in_force(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    command = [sys.executable, "-c", "from audit.cli import main; main()", "config", "show", "--config",
               str(tmp_path / "a.toml"), "--set", "settings.steps=7", "--json"]  # fmt: skip
    shown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert (shown["settings"]["steps"], shown["run"]["engine"], shown["run"]["attempts"]) == (7, "ray", 3)


def test_credentials_of_a_workspace_are_not_shown() -> None:
    command = [sys.executable, "-c", "from audit.cli import main; main()", "config", "show", "--set",
               "workspace=s3://KEY:SECRET@bucket/x?region=r", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "SECRET" not in done.stdout
    assert json.loads(done.stdout)["workspace"] == "s3://bucket/x"


def test_a_rate_of_errors_and_a_rule_are_refused_where_they_mean_nothing() -> None:
    assert load_config(None, {"LORA_AUDIT_VERDICT__FDR": "0.5"}).verdict.fdr == 0.5
    for rate in (0, 0.51, -1, float("nan")):
        with pytest.raises(ConfigError, match="fdr"):
            load_config(None, {}, {"verdict.fdr": rate})
    with pytest.raises(ConfigError, match=r"verdict\.rule"):
        load_config(None, {}, {"verdict.rule": "calibrate"})
    with pytest.raises(ConfigError, match="one of calibrated, either, fixed"):
        verdict_settings("calibrate", 0.05)
    assert verdict_settings("fixed", 0.05) == VerdictSettings(Rule.fixed)
