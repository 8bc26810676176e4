"""The child's side: takes requests one by one, parses what it is given, and answers in plain values.

It starts with an empty environment and reads nothing of a stranger before it has given up what it can.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from audit.untrusted import confine
from audit.untrusted.limits import ChildLimits
from audit.untrusted.wire import receive_request, send

BUILT_IN = "audit.untrusted.parsers"
MOST_WORDS = 4000  # of a refusal
_PIECE = 1 << 24


@dataclass
class Item:
    """One item to parse: what the parent says of it, its bytes, and its open files."""

    said: Mapping[str, Any]
    data: bytes = b""
    files: list[IO[bytes]] = field(default_factory=list)
    answer_file: int = -1
    written: int = 0

    def write(self, piece: bytes | memoryview) -> None:
        """Append bytes to the answer: pixels and the like, that are no JSON."""
        view = memoryview(piece).cast("B")
        while view:
            done = os.pwrite(self.answer_file, view[:_PIECE], self.written)
            self.written += done
            view = view[done:]


Parser = Callable[[Item], Any]


class RefusedError(ValueError):
    """What a parser raises for an item that it does not read; its words are the parent's message."""


def main() -> None:
    """Serve the parent until it goes. The arguments, as JSON: file descriptors, limits, modules of parsers."""
    said = json.loads(sys.argv[1])
    limits = ChildLimits(**said["limits"])
    missing = [*confine.end_with(said["life"]), *confine.limit(limits)]
    parsers: dict[str, Parser] = {}
    for name in said["modules"]:
        parsers |= importlib.import_module(name).PARSERS
    missing += confine.isolate(_readable(said["readable"], said["modules"]))
    channel = socket.socket(fileno=said["channel"])
    send(channel, {"ready": True, "missing": missing})
    while True:
        try:
            request, files = receive_request(channel)
        except EOFError:
            return
        confine.limit_item(request["cpu"])
        send(channel, _answer(parsers, request, files, said))


def _readable(folders: list[str], modules: list[str]) -> list[Path]:
    """What a parser may still have to import: from ``folders``, from Python's own, and the modules of parsers."""
    python = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
    system = ["/usr/lib", "/lib", "/lib64", "/etc/ld.so.cache"]
    found = [Path(str(sys.modules[name].__file__)).parent for name in modules]
    return [*map(Path, (*folders, *python, *system)), *found]


def _answer(parsers: Mapping[str, Parser], request: Mapping[str, Any], files: list[int], said: Any) -> dict[str, Any]:
    opened = [os.fdopen(one, "rb") for one in files]
    try:
        data = os.pread(said["in"], request["bytes"], 0) if request["bytes"] else b""
        item = Item(request["said"], data, list(opened), said["out"])
        answer = parsers[request["parser"]](item)
        return {"answer": answer, "bytes": item.written}
    except RefusedError as error:
        return {"refused": str(error)[:MOST_WORDS]}
    except MemoryError:
        return {"memory": True}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:MOST_WORDS]}
    finally:
        for one in opened:
            one.close()
