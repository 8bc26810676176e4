"""The parent's side: a few children, started when there is something to parse, replaced when one dies or overruns.

A child's death, overrun or nonsense is a refusal of the one item it was given, in words. One that dies on an item
after others is given the benefit of the doubt: the item is tried once more by a fresh child.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from audit.errors import BoundaryError
from audit.untrusted import confine
from audit.untrusted.child import BUILT_IN
from audit.untrusted.limits import MAX_CHILDREN, ChildLimits
from audit.untrusted.wire import EndedError, WireError, receive, send

log = logging.getLogger(__name__)
START_SECONDS = 60.0
_KEPT_BYTES = 16 << 20  # of shared memory between items
_PATIENCE = 0.02  # s that an item waits for a child at work before another is started, which takes far longer
_LIBRARIES = ("site-packages", "dist-packages")
_CHECKED_EVERY = 16  # items: the look at a child's memory
_ENVIRONMENT = {  # nothing of the parent's; a child has one thread, and a thread's memory is that of a child
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[2]); from audit.untrusted.child import main; main()"


class RefusedError(ValueError):
    """An item that is not read, and why. ``by_child`` where the child itself says so, False where it failed."""

    def __init__(self, message: str, by_child: bool) -> None:
        super().__init__(message)
        self.by_child = by_child


@dataclass(frozen=True)
class Reply:
    """What a child has made of an item: plain values, bytes beside them, and the seconds it took."""

    answer: Any
    data: bytearray
    seconds: float


class _OverrunError(Exception):
    """What has become of a child, in words; ``again`` where the item may be innocent of it."""

    def __init__(self, words: str, again: bool) -> None:
        super().__init__(words)
        self.again = again


class Pool:
    """Children that parse what strangers made. Threads may ask at the same time.

    ``modules`` name further parsers beside the built-in ones.
    """

    def __init__(self, size: int | None = None, limits: ChildLimits | None = None, modules: Sequence[str] = ()) -> None:
        self.size = size or max(1, min(MAX_CHILDREN, os.cpu_count() or 1))
        self.limits = limits or ChildLimits()
        self.modules = [BUILT_IN, *modules]
        self._places = threading.BoundedSemaphore(self.size)
        self._changed = threading.Condition()
        self._idle: list[Child] = []
        self._working: set[Child] = set()
        self._starting = 0

    def ask(
        self, parser: str, said: dict[str, Any], data: bytes | bytearray = b"", files: Sequence[IO[bytes]] = (),
        most: int = 0,
    ) -> Reply:  # fmt: skip
        """What ``parser`` makes of ``data`` and the open ``files``, with at most ``most`` bytes beside its answer.

        Raises RefusedError where it is not read, BoundaryError where no child starts.
        """
        with self._places:
            for last in (False, True):
                child = self._take(fresh=last)
                try:
                    return child.ask(parser, said, data, files, most)
                except _OverrunError as error:
                    if last or not error.again:
                        raise RefusedError(str(error), by_child=False) from None
                finally:
                    self._give(child)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End all children that are idle; those at work answer first and are kept."""
        with self._changed:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def pids(self) -> list[int]:
        """The process ids of the children."""
        with self._changed:
            return [child.process.pid for child in (*self._idle, *self._working)]

    def _take(self, fresh: bool) -> Child:
        """An idle child, or a new one where ``fresh`` is wanted or those at work do not become idle soon."""
        with self._changed:
            waited = False
            while not fresh and not self._idle and (self._starting or (self._working and not waited)):
                waited = not self._changed.wait(_PATIENCE)
            if self._idle and not fresh:
                child = self._idle.pop()
                self._working.add(child)
                return child
            self._starting += 1
        try:
            child = Child(self.limits, self.modules)
            with self._changed:
                self._working.add(child)
            return child
        finally:
            with self._changed:
                self._starting -= 1
                self._changed.notify_all()

    def _give(self, child: Child) -> None:
        usable = child.usable()
        if not usable:
            child.end()
        with self._changed:
            self._working.discard(child)
            if usable:
                self._idle.append(child)
            self._changed.notify_all()


class Child:
    """One child process, its channel, and the memory that is shared with it. Raises BoundaryError."""

    def __init__(self, limits: ChildLimits, modules: Sequence[str]) -> None:
        self.limits, self.items, self.worked, self.alive = limits, 0, 0.0, True
        self.busy = False  # an item's answer is still to come, perhaps for ever where its asker was interrupted
        with ExitStack() as given_away:
            try:
                self._open()
                self._start(modules, given_away)
            except OSError as error:
                self._close()
                raise BoundaryError(f"no process can be started to read strangers' files in: {error}") from error
        self._greet()
        self._resident = resident_bytes(self.process.pid)

    def _open(self) -> None:
        self._held = ExitStack()
        memories = [self._held.enter_context(_memory(name)) for name in ("given", "answered", "errors")]
        self.given, self.answered, self._errors = memories

    def _start(self, modules: Sequence[str], given_away: ExitStack) -> None:
        self.channel, theirs = map(self._held.enter_context, socket.socketpair())
        given_away.enter_context(theirs)
        watched, life = os.pipe()  # no other process holds the writing end: closing on exec is Python's default
        self._held.callback(os.close, life)
        given_away.callback(os.close, watched)
        shared = {"in": self.given.fileno(), "out": self.answered.fileno()}
        numbers = {"channel": theirs.fileno(), "life": watched, **shared}
        said = json.dumps({**numbers, "limits": asdict(self.limits), "modules": list(modules), "readable": _readable()})
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, said, json.dumps(_paths())], env=_ENVIRONMENT, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
            pass_fds=list(numbers.values()), start_new_session=True,
        )  # fmt: skip

    def _greet(self) -> None:
        try:
            said = receive(self.channel, 1 << 16, 1000, time.monotonic() + START_SECONDS)
            _tell_missing([str(one) for one in said["missing"]])
        except (WireError, OSError, KeyError, TypeError) as error:
            words = self._errors_said() or str(error) or type(error).__name__
            self.end()
            raise BoundaryError(f"the process that is to read strangers' files does not start: {words}") from None

    def _errors_said(self) -> str:
        return os.pread(self._errors.fileno(), 1 << 16, 0).decode("utf-8", "replace").strip().rpartition("\n")[2][:600]

    def ask(
        self, parser: str, said: dict[str, Any], data: bytes | bytearray, files: Sequence[IO[bytes]], most: int
    ) -> Reply:
        """One item's reply. Raises RefusedError, and _OverrunError after which the child is of no use."""
        first, began = self.items == 0, time.monotonic()
        self.items, self.busy = self.items + 1, True
        deadline = began + self.limits.wall
        try:
            _write(self.given.fileno(), data)
            self.channel.settimeout(self.limits.wall)
            numbers = tuple(file.fileno() for file in files)
            send(self.channel, {"parser": parser, "said": said, "bytes": len(data), "cpu": self.limits.cpu}, numbers)
            reply = receive(self.channel, self.limits.answer, self.limits.values, deadline)
            if not isinstance(reply, dict):
                raise WireError("an answer that is none")
        except TimeoutError:
            self._fail(f"it takes more than {self.limits.wall:g} s", again=False)
        except (EndedError, ConnectionError):
            words, blamed = self._end_of_it()
            self._fail(words, again=not (first or blamed))
        except WireError as error:
            self._fail(f"what parses it gives {error}", again=False)
        except OSError as error:
            self.end()
            raise BoundaryError(f"a process that reads strangers' files cannot be given more: {error}") from error
        seconds = time.monotonic() - began
        self.worked += seconds
        return self._reply(reply, len(data), most, seconds, first)

    def _reply(self, said: dict[str, Any], given: int, most: int, seconds: float, first: bool) -> Reply:
        if said.get("memory"):
            self._fail(f"it needs more than {self.limits.memory >> 20} MiB of memory", again=not first)
        if isinstance(said.get("failed"), str):
            self._fail(f"what parses it fails ({said['failed'][:500]})", again=not first)
        if isinstance(said.get("refused"), str):
            self._settle(given, 0)
            raise RefusedError(said["refused"][:4000], by_child=True)
        size = said.get("bytes")
        if "answer" not in said or type(size) is not int or not 0 <= size <= most:
            self._fail("what parses it gives an answer that is none", again=False)
        data = _read(self.answered.fileno(), size)
        if len(data) != size:
            self._fail("what parses it gives fewer bytes than it says", again=False)
        self._settle(given, size)
        return Reply(said["answer"], data, seconds)

    def _settle(self, given: int, answered: int) -> None:
        """Make it ready for the next item; large memory is not kept for it."""
        for memory, held in ((self.given, given), (self.answered, answered)):
            if held > _KEPT_BYTES:
                os.ftruncate(memory.fileno(), 0)
        self.busy = False

    def _fail(self, words: str, again: bool) -> NoReturn:
        self.end()
        raise _OverrunError(f"refused: {words}", again)

    def _end_of_it(self) -> tuple[str, bool]:
        """What ended the child, and whether that is the item's doing for sure."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "what parses it has closed its channel", True
        if code == -signal.SIGXCPU:
            return f"it takes more than {self.limits.cpu} s of computing", True
        if code < 0:
            with suppress(ValueError):
                return f"what parses it has crashed ({signal.Signals(-code).name})", False
        return f"what parses it has ended with code {code}", False

    def usable(self) -> bool:
        """Whether it can be given another item: it lives, and has neither served long nor grown much."""
        if not self.alive or self.busy or self.process.poll() is not None or self.items >= self.limits.items:
            return False
        if self.worked + self.limits.cpu > self.limits.life_cpu:
            return False
        if self.items % _CHECKED_EVERY:
            return True
        return resident_bytes(self.process.pid) - self._resident <= self.limits.growth

    def end(self) -> None:
        """Kill it and let go of what is shared with it."""
        if self.alive:
            self.alive = False
            self.process.kill()
            self.process.wait()
            self._close()

    def _close(self) -> None:
        self._held.close()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _paths() -> list[str]:
    """Where the child finds modules: as this process does, but never in whatever its working folder is."""
    own = str(Path(__file__).resolve().parents[2])
    return list(dict.fromkeys([own, *(path for path in sys.path if path and os.path.isabs(path))]))


def _readable() -> list[str]:
    """Where a child may still read: the folders of libraries, none that holds more (a checkout, the working folder)."""
    package = Path(__file__).resolve().parents[1]
    mixed = {str(package.parent), os.getcwd(), "/"} if package.parent.name not in _LIBRARIES else {os.getcwd(), "/"}
    return [str(package), *(path for path in _paths() if path not in mixed)]


def _memory(name: str) -> IO[bytes]:
    """Memory that is passed on by its descriptor; a file without a name where the system has none."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _write(handle: int, data: bytes | bytearray) -> None:
    view, place = memoryview(data), 0
    while place < len(view):
        place += os.pwrite(handle, view[place : place + (1 << 28)], place)


def _read(handle: int, size: int) -> bytearray:
    """Up to ``size`` bytes, copied: what a child writes later does not change them."""
    found = bytearray(size)
    view, place = memoryview(found), 0
    while place < size:
        got = os.preadv(handle, [view[place:]], place)
        if got == 0:
            return found[:0]
        place += got
    return found


_told: set[str] = set()
_pools: dict[int, Pool] = {}
_lock = threading.Lock()


def told() -> frozenset[str]:
    """What this system does not take from the children, as far as it is known."""
    return frozenset(_told)


def _tell_missing(missing: list[str]) -> None:
    """Say once what this system does not take from the children."""
    new = [one for one in missing if one not in _told]
    _told.update(new)
    if new:
        level = logging.WARNING if {confine.NETWORK, confine.FILES} & set(new) else logging.INFO
        log.log(level, "strangers' files are parsed in processes of their own, on this system with %s", ", ".join(new))


def pool() -> Pool:
    """The pool of this process. One that was forked from a process with a pool has its own."""
    with _lock:
        return _pools.setdefault(os.getpid(), _pools.get(os.getpid()) or Pool())


def _close_pool() -> None:
    found = _pools.get(os.getpid())
    if found is not None:
        found.close()


def _forget() -> None:
    """In a process that was forked: its parent's children are not its own, and a lock may have been held."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


atexit.register(_close_pool)
os.register_at_fork(after_in_child=_forget)
