"""Parsers that do what a parser does that a stranger's file has taken over. They run in a child, never in a test."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import time
from typing import Any

from audit.untrusted.child import Item

CHANNEL = json.loads(sys.argv[1])["channel"] if len(sys.argv) > 2 else -1


def echo(item: Item) -> Any:
    item.write(item.data)
    return item.said


def allocate(item: Item) -> int:
    return len(bytearray(10 << 30))


def map_shared(item: Item) -> int:
    import mmap

    return len(mmap.mmap(-1, 10 << 30))


def spin(item: Item) -> None:
    while True:
        pass


def sleep(item: Item) -> None:
    time.sleep(60)


def open_files(item: Item) -> int:
    return len([os.dup(0) for _ in range(10_000)])


def leak_files(item: Item) -> int:
    """All but the last few of the open files that a child may have, kept for good."""
    return len([os.dup(0) for _ in range(56)])


def open_some(item: Item) -> int:
    handles = [os.dup(0) for _ in range(20)]
    for one in handles:
        os.close(one)
    return len(handles)


def crash(item: Item) -> int:
    return ctypes.string_at(0)[0]


def leave(item: Item) -> None:
    os._exit(3)


def abort(item: Item) -> None:
    os.abort()


def crash_once(item: Item) -> int:
    """Crashes where an item came before: the mark of that is kept in the process."""
    if getattr(sys, "served", False):
        ctypes.string_at(0)
    return 1


def serve(item: Item) -> None:
    sys.served = True  # type: ignore[attr-defined]


def garbage(item: Item) -> None:
    os.write(CHANNEL, b"\x10\0\0\0" + b"\xff no answer \xff!!" * 2)


def deep(item: Item) -> None:
    body = b"[" * 100_000
    os.write(CHANNEL, struct.pack("<I", len(body)) + body)


def promise(item: Item) -> None:
    os.write(CHANNEL, b"\xff\xff\xff\xff")


def flood(item: Item) -> None:
    """An answer that is small as bytes and large as objects."""
    body = b"[" + b"[]," * 5_000_000 + b"0]"
    os.write(CHANNEL, struct.pack("<I", len(body)))
    while body:
        body = body[os.write(CHANNEL, body) :]


def boast(item: Item) -> None:
    body = b'{"answer": 1, "bytes": 4611686018427387904}'
    os.write(CHANNEL, struct.pack("<I", len(body)) + body)


def no_object(item: Item) -> None:
    os.write(CHANNEL, struct.pack("<I", 2) + b"[]")


def _error(what: Any) -> str:
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return "done"


def connect(item: Item) -> str:
    return _error(lambda: socket.create_connection(("127.0.0.1", item.said["port"]), 5))


def read_file(item: Item) -> str:
    return _error(lambda: open(item.said["path"], "rb").read())


def write_file(item: Item) -> str:
    return _error(lambda: open(item.said["path"], "wb").write(b"x"))


def start(item: Item) -> str:
    return _error(lambda: os.execv("/bin/true", ["true"]))


def fork(item: Item) -> str:
    return _error(os.fork)


def signal_parent(item: Item) -> str:
    return _error(lambda: os.kill(os.getppid(), 0))


def read_parent(item: Item) -> int:
    """process_vm_readv of the parent's memory: what it returns, -1 where it may not."""
    library = ctypes.CDLL(None)
    here = ctypes.create_string_buffer(8)
    local = struct.pack("<QQ", ctypes.addressof(here), 8)
    remote = struct.pack("<QQ", item.said["address"], 8)
    return int(library.process_vm_readv(os.getppid(), local, 1, remote, 1, 0))


def surroundings(item: Item) -> dict[str, Any]:
    return {"environment": dict(os.environ), "folder": os.getcwd(), "pid": os.getpid()}


def handles(item: Item) -> list[int]:
    found = []
    for number in range(4096):  # whoever starts it may have many open
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(number)
    return found


PARSERS = {
    one.__name__: one
    for one in (
        echo, allocate, map_shared, spin, sleep, open_files, leak_files, open_some, crash, leave, abort,
        crash_once, serve, garbage, deep, promise,
        flood, boast, no_object, connect, read_file, write_file, start, fork, signal_parent, read_parent,
        surroundings, handles,
    )
}  # fmt: skip
