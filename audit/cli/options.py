"""The options of the commands, made from the fields of the configuration: one setting has one name, help and limit.

A command names the settings that it uses, and gets the configuration in force: file, environment, --set and options
taken together, the later the stronger.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import Field, fields
from datetime import UTC, datetime
from enum import Enum
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from audit.config import FREE, Config, field_of, leaves, load_config
from audit.locations import without_credentials

Command = Callable[..., None]
PANELS = {
    "settings": "Settings (all of them are part of the audit's id)",
    "verdict": "What counts as a match (nothing is sampled again for another)",
    "captions": "Captions that nobody has given (scan)",
    "run": "How it goes about the work",
    "crawl": "How the source is asked",
}
# The command at work, and the options and arguments that it was given, those left at their defaults among them not.
GIVEN: ContextVar[tuple[str, dict[str, Any]]] = ContextVar("GIVEN")
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", envvar="LORA_AUDIT_CONFIG", help="A TOML or YAML file (see 'lora-audit config show')."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting, such as settings.steps=25.")
]


def configured(
    *names: str, asks: type | None = None, left_out: Sequence[str] = (), **renamed: str
) -> Callable[[Command], Command]:
    """Give a command options for the settings ``names``, and the configuration in force as ``config``.

    "settings.*" is a whole group. The fields of ``asks`` become options too, and the command gets one as ``asked``.
    ``left_out`` are parameters of the command that are no options here; ``renamed`` are options that go by another name
    here: ``endpoint="crawl.rate"``.
    """
    chosen = [(option_of(dotted), dotted) for name in names for dotted in _expanded(name)]
    chosen += [(option.replace("_", "-"), dotted) for option, dotted in renamed.items()]

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        own = [
            one.replace(annotation=hints[one.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for one in inspect.signature(command).parameters.values()
            if one.name not in ("config", "asked", *left_out)
        ]
        made = [_parameter(option, dotted) for option, dotted in chosen]
        made += [_keyword("config_file", ConfigFile), _keyword("sets", Sets)]
        last = [one for one in own if one.name == "as_json"]
        wanted = asked_of(asks) if asks else []
        every = [*wanted, *(one for one in own if one not in last), *made, *last]

        @wraps(command)
        def run(**given: Any) -> None:
            defaults = {one.name: one.default for one in every}
            told = {name: value for name, value in given.items() if value not in (None, [], defaults.get(name))}
            GIVEN.set((command.__name__, {name.removeprefix("option_"): value for name, value in told.items()}))
            file, sets = given.pop("config_file", None), given.pop("sets", None)
            overrides = overrides_of(sets)
            for option, dotted in chosen:
                overrides |= _override(option, dotted, given.pop(_name(option), None))
            if asks:
                given["asked"] = take_asked(asks, given)
            command(**given, config=load_config(file, None, overrides))

        del run.__wrapped__  # its signature is not the command's
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in every} | {"return": None}
        return run

    return decorate


def option_of(dotted: str) -> str:
    """The option of a setting, without its dashes: images-per-training-image."""
    return str(field_of(dotted).metadata.get("option") or dotted.rpartition(".")[2]).replace("_", "-")


def overrides_of(sets: list[str] | None) -> dict[str, Any]:
    """Dotted settings from --set. Raises typer.BadParameter."""
    found: dict[str, Any] = {}
    for one in sets or []:
        name, equals, value = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"{one!r}: write NAME=VALUE", param_hint="--set")
        found[name.strip()] = value.strip()
    return found


def _expanded(name: str) -> Iterator[str]:
    group, star = name.removesuffix("*"), name.endswith(".*")
    yield from (dotted for dotted, _ in leaves(Config()) if dotted.startswith(group)) if star else (name,)


def _name(option: str) -> str:
    """The Python name of an option; "set" and the like are kept from those of Python."""
    return f"option_{option.replace('-', '_')}"


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(option: str, dotted: str) -> inspect.Parameter:
    """What typer makes an option of; None where it is not given."""
    default, panel = dict(leaves(Config()))[dotted][0], PANELS.get(dotted.partition(".")[0])
    return _made(option, _name(option), field_of(dotted), _hint(dotted), default, panel, dotted in FREE)


def _made(
    option: str, name: str, about: Field[Any], hint: Any, default: Any, panel: str | None, many: bool
) -> inspect.Parameter:
    kind: Any = _kind(hint)
    limits: dict[str, Any] = {}
    if kind in (int, float):
        limits = {name: about.metadata[name] for name in ("min", "max") if name in about.metadata}
    if "word" in about.metadata:  # a number or a word: it comes as text
        kind, limits = str, {}
    shown = about.metadata.get("word") if default is None else default
    if isinstance(shown, tuple):
        shown = ", ".join(shown)
    ends = "" if shown in (None, "", {}) or shown is False else f" \\[default: {shown}]"
    words: dict[str, Any] = {
        "help": f"{about.metadata['help']}{ends}", "metavar": about.metadata.get("metavar"), "show_default": False,
        **limits,
    }  # fmt: skip
    annotation: Any = list[str] | None if many or get_origin(hint) is tuple else kind | None
    if about.metadata.get("argument"):
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, positional, annotation=Annotated[kind, typer.Argument(**words)])
    if kind is datetime:
        words["formats"] = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]
    flags = [f"--{option}/--no-{option}" if kind is bool else f"--{option}"]
    return _keyword(name, Annotated[annotation, typer.Option(*flags, rich_help_panel=panel, **words)])


def asked_of(asks: type) -> list[inspect.Parameter]:
    """The parameters of a command for the fields of ``asks``, a dataclass that is no part of the configuration."""
    hints = get_type_hints(asks)
    found = []
    for one in fields(asks):
        option = str(one.metadata.get("option") or one.name).replace("_", "-")
        found.append(_made(option, f"asked_{one.name}", one, hints[one.name], one.default, None, False))
    return found


def take_asked(asks: type, given: dict[str, Any]) -> Any:
    """The ``asks`` of what was given for ``asked_of``'s parameters, which are taken out of ``given``; times are UTC."""
    found = {}
    for one in fields(asks):
        value = given.pop(f"asked_{one.name}", None)
        if value is None or value == []:
            continue
        if isinstance(value, datetime):
            value = value.replace(tzinfo=UTC)
        found[one.name] = tuple(value) if isinstance(value, list) else value
    return asks(**found)


def _hint(dotted: str) -> Any:
    kind: Any = Config
    for part in dotted.split("."):
        kind = get_type_hints(kind)[part]
    return kind


def _kind(hint: Any) -> Any:
    """The type of a setting without None; str for what is given as text."""
    if get_origin(hint) in (Union, UnionType):
        [hint] = [one for one in get_args(hint) if one is not type(None)]
    given = int | float | bool | Enum | Path | datetime
    return hint if isinstance(hint, type) and issubclass(hint, given) else str


def _override(option: str, dotted: str, value: Any) -> dict[str, Any]:
    if value is None or (value == [] and dotted not in FREE):
        return {}
    if dotted not in FREE:
        return {dotted: tuple(value) if isinstance(value, list) else value}
    found = {}
    for one in value:
        name, equals, source = one.partition("=")
        if not name or not equals or not source:
            told = without_credentials(one)
            raise typer.BadParameter(f"{told!r}: write FAMILY=SOURCE, such as sd1=folder", param_hint=f"--{option}")
        found[f"{dotted}.{name}"] = source
    return found
