"""Every regular expression of the code takes time linear in its text: strangers write names, prompts and prose."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import _constants as constants
from re import _parser as parser
from types import ModuleType
from typing import Any

import pytest

from audit.models.bases import known_bases
from audit.models.families import unaudited

ROOT = Path(__file__).parents[1]
CALLS = ("compile", "search", "match", "fullmatch", "sub", "subn", "findall", "finditer", "split")
# Expressions of strangers, which are bounded one by one before they are compiled, as is the text they are tried on.
NOT_OURS = {"audit/models/formats/patterns.py": 2}
# Compiled one by one; the survey finds the compiled ones, and those of the tables of models.
IN_TABLES = {"audit/devices.py": 1, "audit/models/bases.py": 1, "audit/models/families/unaudited.py": 3}
SIZES = (500, 2000, 8000, 32_000)
LEAST = 0.004  # s of processor time: below it growth is not measured
MOST_GROWTH = 8.0  # for four times the text; linear is 4, quadratic 16
TRIES = 4
ENDS = ("", "\0", "!", "\n\n", "x")


@dataclass(frozen=True)
class Expression:
    """A regular expression, how it is applied, and where it stands."""

    place: str
    pattern: re.Pattern[str]
    method: str


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("audit", "crawlers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if "import re\n" in text:
                yield str(path.relative_to(ROOT)), ast.parse(text)


def evaluated(node: ast.expr, module: ModuleType) -> Any:
    return eval(compile(ast.Expression(node), "expression", "eval"), vars(module))


def uses(tree: ast.Module, name: str) -> set[str]:
    """The methods that a module calls on the compiled expression ``name``."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    found = {
        func.attr
        for func in calls
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == name
    }
    return found & set(CALLS) or {"search"}


def patterns_in(value: Any) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, tuple | list | set | frozenset):
        for one in value:
            yield from patterns_in(one)
    elif isinstance(value, dict):
        yield from patterns_in([*value, *value.values()])


def survey() -> tuple[list[Expression], dict[str, int]]:
    """Every expression, and how many calls a file has whose expression is not known before it runs."""
    found: dict[tuple[str, int, str], Expression] = {}
    unknown: dict[str, int] = {}
    for path, tree in modules():
        module = importlib.import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        own = [name for name, value in vars(module).items() if any(True for _ in patterns_in(value))]
        for name in own:
            for pattern in patterns_in(getattr(module, name)):
                for method in sorted(uses(tree, name)):
                    found[pattern.pattern, pattern.flags, method] = Expression(f"{path}: {name}", pattern, method)
        known = {pattern.pattern for name in own for pattern in patterns_in(getattr(module, name))}
        for node in ast.walk(tree):
            func = node.func if isinstance(node, ast.Call) else None
            if not isinstance(func, ast.Attribute) or not isinstance(func.value, ast.Name) or func.value.id != "re":
                continue
            if func.attr not in CALLS:
                continue
            assert isinstance(node, ast.Call)
            try:
                text = evaluated(node.args[0], module)
            except NameError:
                unknown[path] = unknown.get(path, 0) + 1
                continue
            if isinstance(text, re.Pattern) or (func.attr == "compile" and text in known):
                continue
            place = {"sub": 4, "split": 3}.get(func.attr, 2)
            flags = [one.value for one in node.keywords if one.arg == "flags"] + node.args[place:]
            if func.attr == "compile":
                flags = node.args[1:]
            pattern = re.compile(text, evaluated(flags[0], module) if flags else 0)
            method = "search" if func.attr == "compile" else func.attr
            found[text, pattern.flags, method] = Expression(f"{path}:{node.lineno}", pattern, method)
    for base in known_bases().values():
        for text in base.names:
            found[text, 0, "fullmatch"] = Expression(f"known_bases.toml: {base.key}", re.compile(text), "fullmatch")
    for one in unaudited.TABLE:
        for text, method in ((one.called, "search"), (one.pipelines, "match"), (one.tensors or "", "search")):
            found[text, 0, method] = Expression(f"unaudited.py: {one.title}", re.compile(text), method)
    return list(found.values()), unknown


def example(items: Any) -> str:
    """A text that the parsed items would match, each repetition a few times."""
    text = ""
    for kind, value in items:
        if kind is constants.LITERAL:
            text += chr(value)
        elif kind is constants.NOT_LITERAL:
            text += "b" if value != ord("b") else "c"
        elif kind is constants.ANY:
            text += "a"
        elif kind is constants.IN:
            text += next(iter(members(value)))
        elif kind in (constants.MAX_REPEAT, constants.MIN_REPEAT, constants.POSSESSIVE_REPEAT):
            low, high, inner = value
            text += example(inner) * max(low, min(int(high), 2))
        elif kind is constants.SUBPATTERN:
            text += example(value[-1])
        elif kind is constants.ATOMIC_GROUP:
            text += example(value)
        elif kind is constants.BRANCH:
            text += example(value[1][0])
    return text


def members(items: Any) -> list[str]:
    """A few characters of a class."""
    named = {
        constants.CATEGORY_DIGIT: "1", constants.CATEGORY_SPACE: " ", constants.CATEGORY_WORD: "a",
        constants.CATEGORY_NOT_DIGIT: "a", constants.CATEGORY_NOT_SPACE: "a", constants.CATEGORY_NOT_WORD: "-",
    }  # fmt: skip
    if items[0][0] is constants.NEGATE:
        taken = members(items[1:])
        ranges = [value for kind, value in items[1:] if kind is constants.RANGE]
        free = (c for c in "a1 -.,:_/#é" if c not in taken and not any(lo <= ord(c) <= hi for lo, hi in ranges))
        return list(free)[:3] or ["~"]
    found = []
    for kind, value in items:
        if kind is constants.LITERAL:
            found.append(chr(value))
        elif kind is constants.RANGE:
            found.append(chr(value[0]))
        elif kind is constants.CATEGORY:
            found.append(named[value])
    return found


def pieces(items: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """(what leads up to it, what is to be repeated), for every part of an expression at every depth."""
    items = list(items)
    for number, (kind, value) in enumerate(items):
        lead = before + example(items[:number])
        one = example([(kind, value)])
        yield lead, one
        if number + 1 < len(items):
            yield lead, one + example([items[number + 1]])
            yield "", lead + one
        if kind is constants.IN:
            yield from ((lead, character) for character in members(value))
        elif kind in (constants.MAX_REPEAT, constants.MIN_REPEAT, constants.POSSESSIVE_REPEAT):
            yield from pieces(value[2], lead)
        elif kind is constants.SUBPATTERN:
            yield from pieces(value[-1], lead)
        elif kind is constants.ATOMIC_GROUP:
            yield from pieces(value, lead)
        elif kind is constants.BRANCH:
            for branch in value[1]:
                yield lead, example(branch)
                yield from pieces(branch, lead)
    yield "", example(items)


def attacks(pattern: re.Pattern[str]) -> list[tuple[str, str, str]]:
    """(start, repeated, end) of texts made of an expression's own characters."""
    parsed = parser.parse(pattern.pattern, pattern.flags)
    found = {(lead, one) for lead, one in pieces(parsed) if one}
    found |= {("", one) for _, one in found}
    found |= {(lead, one[:-1]) for lead, one in found if len(one) > 1}
    return [(lead, one, end) for lead, one in sorted(found) for end in ENDS]


def seconds(expression: Expression, attack: tuple[str, str, str], size: int) -> float:
    start, one, end = attack
    text: Any = start + one * (size // len(one)) + end
    if isinstance(expression.pattern.pattern, bytes):
        text = text.encode("latin-1", "replace")
    method = getattr(expression.pattern, expression.method)
    began = time.thread_time()
    if expression.method in ("sub", "subn"):
        method("", text)
    elif expression.method == "finditer":
        list(method(text))
    else:
        method(text)
    return time.thread_time() - began


def grows(expression: Expression, attack: tuple[str, str, str]) -> float:
    """How much longer four times the text takes, at the first size at which it is more than linear; else 0."""
    if seconds(expression, attack, SIZES[1]) < LEAST / 20:  # not even its square would be slow at the largest size
        return 0.0
    for small, large in itertools.pairwise(SIZES):
        growth = 0.0
        for _ in range(TRIES):
            long = seconds(expression, attack, large)
            if long < LEAST:
                growth = 0.0
                break
            growth = long / max(min(seconds(expression, attack, small) for _ in range(2)), LEAST / 40)
            if growth < MOST_GROWTH:
                growth = 0.0
                break
        if growth:
            return growth
    return 0.0


EXPRESSIONS, UNKNOWN = survey()


def test_every_expression_of_the_code_is_known() -> None:
    assert UNKNOWN == NOT_OURS | IN_TABLES
    assert len(EXPRESSIONS) > 80


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda one: f"{one.place} {one.method}")
def test_an_expression_takes_time_linear_in_its_text(expression: Expression) -> None:
    slow = {
        attack: growth for attack in attacks(expression.pattern) if (growth := grows(expression, attack)) >= MOST_GROWTH
    }
    assert not slow, f"{expression.pattern.pattern!r}: {slow}"


@pytest.mark.parametrize(
    ("text", "method", "linear"),
    [
        (r"\s*,", "search", False),
        (r"train\w*\b[^.]{0,60}?\d+ images", "search", False),
        (r"\(([^()]*?)(?::\s*-?\d*\.?\d+)?\)", "search", False),
        (r"(a+)+b", "search", False),
        (r"\s+", "sub", True),
        (r"[a-z]+/[a-z]+", "fullmatch", True),
    ],
)
def test_the_measure_tells_linear_expressions_from_others(text: str, method: str, linear: bool) -> None:
    expression = Expression("here", re.compile(text), method)
    if text == r"(a+)+b":
        assert seconds(expression, ("", "a", ""), 22) > 20 * seconds(expression, ("", "a", ""), 12)
        return
    assert linear is not any(grows(expression, attack) for attack in attacks(expression.pattern))
