"""Options are made from the configuration: every command takes file, environment and command line alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from audit.cli import app
from audit.cli.options import configured, option_of
from audit.config import Config, Settings, field_of, leaves, load_config, variable_of
from audit.errors import ConfigError


def commands(group: Any, path: str = "") -> dict[str, Any]:
    if not hasattr(group, "commands"):
        return {path: group}
    found = {path: group} if group.invoke_without_command else {}
    for name, one in group.commands.items():
        found |= commands(one, f"{path} {name}".strip())
    return found


EVERY = commands(typer.main.get_command(app))
WITHOUT_CONFIGURATION = {"inspect"}  # a file and nothing else


def options(command: Any) -> set[str]:
    return {flag for one in command.params for flag in one.opts}


def tried(*names: str, **renamed: str) -> typer.Typer:
    """A command that prints the configuration that it got."""
    small = typer.Typer()

    @small.command()
    @configured(*names, **renamed)
    def show(config: Config, as_json: bool = False) -> None:
        typer.echo(json.dumps({dotted: value for dotted, (value, _) in leaves(config)}, default=str))

    return small


def shown(small: typer.Typer, *words: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    done = CliRunner().invoke(small, list(words), env=environment or {}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_command_takes_a_configuration() -> None:
    for name, command in EVERY.items():
        assert name in WITHOUT_CONFIGURATION or {"--config", "--set"} <= options(command), name


@pytest.mark.parametrize("command", ["scan", "run"])
def test_every_setting_of_an_audit_is_an_option(command: str) -> None:
    assert {f"--{option_of(dotted)}" for dotted, _ in leaves(Config()) if dotted.startswith("settings.")} <= options(
        EVERY[command]
    )


def test_every_option_that_is_a_setting_has_its_words() -> None:
    settings = {option_of(dotted): dotted for dotted, _ in leaves(Config())}
    for name, command in EVERY.items():
        for one in command.params:
            dotted = settings.get(one.opts[0].removeprefix("--"))
            if one.name and one.name.startswith("option_") and dotted:
                text = str(field_of(dotted).metadata["help"])
                alike = [
                    str(field_of(d).metadata["help"]) for d, _ in leaves(Config()) if option_of(d) == option_of(dotted)
                ]
                assert any((one.help or "").startswith(words) for words in [text, *alike]), (name, one.opts)


def test_the_later_is_the_stronger_for_a_command(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[settings]\nsteps = 1\nseed = 1\nk = 0.1\nlora_scale = 0.5\n")
    environment = {"LORA_AUDIT_SETTINGS__STEPS": "2", "LORA_AUDIT_SETTINGS__SEED": "2", "LORA_AUDIT_SETTINGS__K": "2"}
    words = (
        "--config",
        str(tmp_path / "a.toml"),
        "--set",
        "settings.steps=3",
        "--set",
        "settings.seed=3",
        "--steps",
        "4",
    )
    found = shown(tried("settings.*"), *words, environment=environment)
    assert [found[f"settings.{name}"] for name in ("steps", "seed", "k", "lora_scale")] == [4, 3, 2, 0.5]
    assert found["settings.images_per_training_image"] == Settings().images_per_training_image


def test_kinds_of_settings_come_through() -> None:
    small = tried(
        "references", "bases", "settings.w", "crawl.allow_private", "crawl.opt_out", endpoint="crawl.hub_endpoint"
    )
    found = shown(
        small, "--references", "a", "--references", "b", "--base", "sd1=x=y", "--base", "sdxl=z", "--w", "2.5",
        "--allow-private", "--opt-out", "list.txt", "--endpoint", "http://localhost",
    )  # fmt: skip
    assert found["references"] == ["a", "b"]
    assert found["bases"] == {"sd1": "x=y", "sdxl": "z"}
    assert (found["settings.w"], found["crawl.allow_private"], found["crawl.opt_out"]) == (2.5, True, "list.txt")
    assert found["crawl.hub_endpoint"] == "http://localhost"
    environment = {"LORA_AUDIT_CRAWL__ALLOW_PRIVATE": "true", "HF_ENDPOINT": "http://b", "LORA_AUDIT_SETTINGS__W": "5"}
    found = shown(small, "--no-allow-private", "--w", "auto", environment=environment)
    assert (found["crawl.allow_private"], found["crawl.hub_endpoint"], found["settings.w"]) == (False, "http://b", None)


def test_a_list_of_the_command_line_replaces_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('references = ["a", "b"]\n[bases]\nsd1 = "x"\nsdxl = "y"\n')
    config = ("--config", str(tmp_path / "a.toml"))
    assert shown(tried("references"), *config)["references"] == ["a", "b"]
    assert shown(tried("references"), *config, "--references", "c")["references"] == ["c"]
    assert shown(tried("bases"), *config, "--base", "sd1=z")["bases"] == {"sd1": "z", "sdxl": "y"}


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("settings.steps", 0), ("settings.steps", 1001), ("settings.seed", -1), ("settings.resolution", 8),
        ("settings.w", -1), ("settings.w", 1001), ("settings.k", "nan"), ("settings.lora_scale", "inf"),
        ("run.limit", 0), ("run.attempts", 0), ("run.metrics_port", 65536), ("crawl.downloads", 33), ("crawl.rate", -1),
    ],
)  # fmt: skip
def test_a_number_out_of_its_limits_is_refused_wherever_it_comes_from(tmp_path: Path, dotted: str, value: Any) -> None:
    name = dotted.rpartition(".")[2]
    group, _, _ = dotted.partition(".")
    (tmp_path / "a.toml").write_text(f"[{group}]\n{name} = {value}\n")
    for arguments in (
        (tmp_path / "a.toml", {}),
        (None, {variable_of(dotted): str(value)}),
        (None, {}, {dotted: value}),
    ):
        with pytest.raises(ConfigError, match=rf"{name} = .*number"):
            load_config(*arguments)  # type: ignore[arg-type]


def test_a_setting_out_of_its_limits_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match=r"steps = 0: it is a number from 1 to 1000"):
        Settings(steps=0)


@pytest.mark.parametrize("variable", ["LORA_AUDIT_SETTINGS__STEP", "LORA_AUDIT_RUN__", "LORA_AUDIT_CRAWL__RATES"])
def test_a_variable_that_names_no_setting_is_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable} names no setting"):
        load_config(None, {variable: "1"})


def test_a_scan_takes_its_settings_from_the_environment(tmp_path: Path) -> None:
    """Refused at once, by the value of the environment: nothing else looks at it."""
    environment = {"LORA_AUDIT_SETTINGS__STEPS": "0", "LORA_AUDIT_WORKSPACE": str(tmp_path / "w")}
    done = CliRunner().invoke(app, ["scan", "x.safetensors", "--base", "nano"], env=environment)
    assert isinstance(done.exception, ConfigError)
    assert "steps = 0" in str(done.exception)
