"""Changes of bytes, of JSON documents and of text: every one a function of a random generator, so that it repeats."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

RAW = "@raw@"  # begins texts that stand for JSON which json.dumps does not write
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    "", " ", "\x00", "\x1b[31m", "\u202egnp.exe", "\ud800", "\udcff", "\u0085", "\u2028", "a" * 5000,
    "../../etc/passwd",     "//\\\\x", "https://[", "https://h:99999999/",
    "javascript:alert(1)", "<script>", "'; DROP TABLE x; --", "9" * 5000,
    "-1", "1e999", "NaN", "(" * 400, "[" * 400, "((((a:1.1):1.1):1.1):1.1)", "<lora:x:1>", "\U0001f600" * 50, "\ufeff",
    "2026-13-45T99:99:99Z", "9999-12-31T23:59:59+23:59", "0001-01-01T00:00:00+00:00", "trained on 9999 images " * 60,
    "(a+)+$", "(.*)*x", "\\", "%s%n{0}", "a:b@c", "s3://k:s@", "\t\n\r", "<" * 3000, "x" * 500 + "." + "y" * 500,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**18, 10**400, 0.0, -0.5, 1e308, [], {}, [[]],
    [None], {"": None}, {"a": {"a": {}}}, [1, "a", None, {}], f"{RAW}NaN", f"{RAW}Infinity", f"{RAW}-Infinity",
    f"{RAW}1e999", f"{RAW}" + "9" * 4400, f"{RAW}-0", f"{RAW}" + "[" * 3000 + "]" * 3000,
    f"{RAW}" + '{"a":' * 1500 + "1" + "}" * 1500, f'{RAW}{{"a":1,"a":2}}',
)  # fmt: skip


def chance(choose: Random, share: float) -> bool:
    """True in ``share`` of all cases."""
    return choose.random() < share


# Bytes


def _flip(data: bytearray, choose: Random) -> None:
    at = choose.randrange(len(data))
    data[at] ^= 1 << choose.randrange(8)


def _set(data: bytearray, choose: Random) -> None:
    data[choose.randrange(len(data))] = choose.choice((0, 1, 0x20, 0x22, 0x2C, 0x7F, 0x80, 0xFF))


def _number(data: bytearray, choose: Random) -> None:
    """An edge of a number's range, or one more or less, over 1 to 8 bytes in either order."""
    size, order = choose.choice((1, 2, 4, 8)), choose.choice(("little", "big"))
    at = choose.randrange(len(data))
    value = (choose.choice(EDGES) + choose.randint(-2, 2)) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, order)  # type: ignore[arg-type]


def _cut(data: bytearray, choose: Random) -> None:
    del data[choose.randrange(len(data)) :]


def _remove(data: bytearray, choose: Random) -> None:
    at = choose.randrange(len(data))
    del data[at : at + choose.randint(1, 40)]


def _repeat(data: bytearray, choose: Random) -> None:
    at = choose.randrange(len(data))
    piece = data[at : at + choose.randint(1, 64)]
    data[at:at] = piece * choose.choice((1, 2, 50))


def _insert(data: bytearray, choose: Random) -> None:
    at = choose.randrange(len(data) + 1)
    data[at:at] = choose.randbytes(choose.randint(1, 24))


_BYTES: tuple[Callable[[bytearray, Random], None], ...] = (
    _flip, _flip, _set, _set, _number, _number, _cut, _remove, _repeat, _insert,
)  # fmt: skip


def changed_bytes(data: bytes, choose: Random, most: int = 4) -> bytes:
    """``data`` with one to ``most`` changes; at most 1 MiB."""
    found = bytearray(data)
    for _ in range(choose.randint(1, most)):
        if not found:
            return choose.randbytes(choose.randint(0, 40))
        choose.choice(_BYTES)(found, choose)
    return bytes(found[: 1 << 20])


def spliced(one: bytes, other: bytes, choose: Random) -> bytes:
    """The beginning of ``one`` and the end of ``other``."""
    return one[: choose.randrange(len(one) + 1)] + other[choose.randrange(len(other) + 1) :]


# JSON


def _places(value: Any, found: list[tuple[Any, Any]], most: int = 400) -> list[tuple[Any, Any]]:
    """Every (container, key) in ``value``, at most ``most``."""
    waiting = [value]
    while waiting and len(found) < most:
        one = waiting.pop()
        inner = list(one.items()) if isinstance(one, dict) else list(enumerate(one)) if isinstance(one, list) else []
        for key, below in inner:
            found.append((one, key))
            if isinstance(below, dict | list):
                waiting.append(below)
    return found


def odd_value(choose: Random) -> Any:
    """Anything that JSON can hold, and what it hardly can."""
    return copy.deepcopy(choose.choice(VALUES)) if chance(choose, 0.6) else choose.choice(TEXTS)


def _replace(container: Any, key: Any, choose: Random) -> None:
    container[key] = odd_value(choose)


def _swap_type(container: Any, key: Any, choose: Random) -> None:
    value = container[key]
    others = [[value], {"a": value}, str(value)[:2000], None]
    container[key] = choose.choice(others)


def _drop(container: Any, key: Any, choose: Random) -> None:
    del container[key]


def _more(container: Any, key: Any, choose: Random) -> None:
    if isinstance(container, dict):
        container[choose.choice(TEXTS)[:600]] = copy.deepcopy(container[key])
    elif len(container) < 200:
        container.extend(copy.deepcopy(container[key]) for _ in range(choose.choice((1, 3, 100))))


def _near(container: Any, key: Any, choose: Random) -> None:
    """A number a little or much larger, a text with an odd one in it."""
    value = container[key]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        container[key] = odd_value(choose)
    elif isinstance(value, str):
        at = choose.randrange(len(value) + 1)
        container[key] = value[:at] + choose.choice(TEXTS) + value[at:]
    else:
        container[key] = choose.choice((value + 1, value - 1, -value, value * 2**20, value * 10**20, -value * 2**31))


_JSON = (_replace, _replace, _swap_type, _drop, _more, _near, _near)


def changed_json(value: Any, choose: Random, most: int = 3) -> Any:
    """``value``, a tree of its own, with up to ``most`` changes within."""
    for _ in range(choose.randint(1, most)):
        places = _places(value, [])
        if not places or chance(choose, 0.01):
            return odd_value(choose)
        container, key = choose.choice(places)
        choose.choice(_JSON)(container, key, choose)
    return value


def as_bytes(value: Any, choose: Random | None = None) -> bytes:
    """The JSON of ``value``, with what stands behind RAW as it is; now and then damaged as bytes."""
    text = _with_raw(json.dumps(value, ensure_ascii=choose is None or chance(choose, 0.7), default=str))
    data = text.encode("utf-8", "surrogatepass")
    return changed_bytes(data, choose, 2) if choose is not None and chance(choose, 0.1) else data


def _with_raw(text: str) -> str:
    first, *others = text.split(f'"{RAW}')
    return first + "".join(_unquoted(other) for other in others)


def _unquoted(text: str) -> str:
    """``text`` up to the quote that ends a JSON text as it is, without the escapes; the rest unchanged."""
    at = 0
    while at < len(text) and text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return text[:at].replace('\\"', '"') + text[at + 1 :]


# Text


def changed_text(text: str, choose: Random, most: int = 3) -> str:
    """``text`` with up to ``most`` pieces put in, taken out or repeated; at most 20,000 characters."""
    for _ in range(choose.randint(1, most)):
        at = choose.randrange(len(text) + 1)
        kind = choose.randrange(4)
        if kind == 0:
            text = text[:at] + choose.choice(TEXTS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + choose.randint(1, 20) :]
        elif kind == 2:
            text = text[:at] + text[at : at + 30] * choose.choice((2, 20)) + text[at:]
        else:
            text = text[:at] + chr(choose.randrange(0x110000)) + text[at:]
    return text[:20_000]


def one_of(seeds: Sequence[Any], choose: Random) -> Any:
    """One seed."""
    return seeds[choose.randrange(len(seeds))]
