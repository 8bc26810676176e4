"""What a child does that has been taken over costs its item, and nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import audit
from audit.errors import BoundaryError
from audit.untrusted import confine
from audit.untrusted import pool as pools
from audit.untrusted.limits import ChildLimits
from audit.untrusted.pool import Pool, RefusedError, resident_bytes

HOSTILE = "tests.untrusted.hostile"
LIMITS = ChildLimits(memory=512 << 20, address=1 << 30, cpu=1, wall=20)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool(1, LIMITS, [HOSTILE])
    yield found
    found.close()


def answers(pool: Pool) -> bool:
    """Whether the next item works."""
    reply = pool.ask("echo", {"a": [1, "b", None]}, b"data", most=4)
    return reply.answer == {"a": [1, "b", None]} and bytes(reply.data) == b"data"


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        ("allocate", "refused: it needs more than 512 MiB of memory"),
        ("spin", "refused: it takes more than 1 s of computing"),
        ("crash", r"refused: what parses it has crashed \(SIGSEGV\)"),
        ("abort", r"refused: what parses it has crashed \(SIG(ABRT|SEGV)\)"),
        ("open_files", r"refused: what parses it fails \(.*Too many open files"),
        ("map_shared", r"refused: what parses it fails \(.*Cannot allocate memory"),
        ("unknown", r"refused: what parses it fails \(KeyError"),
        ("leave", "refused: what parses it has ended with code 3"),
        ("garbage", "refused: what parses it gives an answer that is none"),
        ("deep", "refused: what parses it gives an answer that is none"),
        ("promise", r"refused: what parses it gives an answer of 4294967295 bytes"),
        ("flood", r"refused: what parses it gives an answer of \d+ values"),
        ("boast", "refused: what parses it gives an answer that is none"),
        ("no_object", "refused: what parses it gives an answer that is none"),
    ],
)
def test_what_becomes_of_a_child_is_a_refusal_of_its_item(pool: Pool, parser: str, words: str) -> None:
    assert answers(pool)
    before = resident_bytes(os.getpid())
    with pytest.raises(RefusedError, match=words) as caught:
        pool.ask(parser, {})
    assert not caught.value.by_child
    assert resident_bytes(os.getpid()) - before < 200 << 20
    assert answers(pool)


def test_files_that_an_item_left_open_cost_no_other_item(pool: Pool) -> None:
    assert pool.ask("leak_files", {}).answer == 56
    assert answers(pool)
    assert pool.ask("open_some", {}).answer == 20


def test_an_item_that_takes_too_long_by_the_clock_is_refused() -> None:
    pool = Pool(1, ChildLimits(wall=0.3), [HOSTILE])
    with pytest.raises(RefusedError, match=r"refused: it takes more than 0\.3 s$"):
        pool.ask("sleep", {})
    assert answers(pool)
    pool.close()


@contextmanager
def killing(pool: Pool, every: float) -> Iterator[list[int]]:
    """Kill the pool's children at work again and again; which were killed."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(every):
            for pid in set(pool.pids()) - set(killed):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_a_child_that_is_killed_in_the_middle_costs_its_item_at_most(pool: Pool) -> None:
    assert answers(pool)
    (pid,) = pool.pids()
    with killing(pool, 0.1) as killed, pytest.raises(RefusedError, match=r"refused: .* has crashed \(SIGKILL\)"):
        pool.ask("sleep", {})  # once more by a fresh child, which is killed as well
    assert killed[0] == pid
    assert len(killed) == 2
    assert answers(pool)


def test_an_idle_child_that_was_killed_costs_no_item(pool: Pool) -> None:
    assert answers(pool)
    os.kill(pool.pids()[0], signal.SIGKILL)
    time.sleep(0.05)
    assert answers(pool)


def test_an_item_does_not_pay_for_the_one_before(pool: Pool) -> None:
    pool.ask("serve", {})
    assert pool.ask("crash_once", {}).answer == 1


def test_an_asker_who_is_interrupted_leaves_no_answer_for_the_next(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pools, "receive", interrupted)
        assert pool.pids()
        with pytest.raises(KeyboardInterrupt):
            pool.ask("echo", {"answer of": "the interrupted"})
    assert answers(pool)


def test_children_are_replaced_after_their_items() -> None:
    pool = Pool(1, ChildLimits(items=3), [HOSTILE])
    seen = [pool.ask("surroundings", {}).answer["pid"] for _ in range(7)]
    assert [seen.count(pid) for pid in dict.fromkeys(seen)] == [3, 3, 1]
    pool.close()


def test_threads_ask_at_the_same_time_and_get_their_own_answers() -> None:
    pool = Pool(2, LIMITS, [HOSTILE])
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: pool.ask("echo", {"n": n}, b"x" * n, most=n).answer["n"], range(200)))
    assert found == list(range(200))
    assert 1 <= len(pool.pids()) <= 2
    pool.close()
    assert pool.pids() == []


def test_a_child_gets_nothing_of_its_parents_surroundings(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pool.close()
    found = pool.ask("surroundings", {}).answer
    assert "hf_secret" not in str(found)
    # what Python sets, and what our own package does
    assert set(found["environment"]) <= {*pools._ENVIRONMENT, "LC_CTYPE", *audit._SILENT}
    assert found["folder"] == "/"


def test_a_child_inherits_no_open_file(pool: Pool, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        pool.close()
        found = pool.ask("handles", {}).answer
    assert len(found) == 7, "three standard ones, the channel, two memories, the life line"


linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces, Landlock and seccomp are Linux's")


@linux
def test_a_child_has_no_network(pool: Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), 5).close()  # it is there
        if confine.NETWORK in pools.told():
            pytest.skip("neither a network namespace nor a filter of system calls is allowed here")
        assert pool.ask("connect", {"port": server.getsockname()[1]}).answer != "done"


@linux
def test_a_child_reaches_no_files_and_no_other_process(pool: Pool, tmp_path: Path) -> None:
    pool.ask("echo", {})
    if pools.told():
        pytest.skip(f"this system has {', '.join(sorted(pools.told()))}")
    (tmp_path / "secret").write_bytes(b"secret")
    path = {"path": str(tmp_path / "secret")}
    assert pool.ask("read_file", path).answer == "PermissionError"
    assert pool.ask("write_file", path).answer == "PermissionError"
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert pool.ask("read_file", {"path": f"/proc/{os.getpid()}/environ"}).answer == "PermissionError"
    for parser in ("start", "fork", "signal_parent"):
        assert pool.ask(parser, {}).answer == "PermissionError", parser
    held = ctypes.create_string_buffer(b"secret!")
    assert pool.ask("read_parent", {"address": ctypes.addressof(held)}).answer == -1


PARENT = """
import os, sys, threading, time
from audit.untrusted.limits import ChildLimits
from audit.untrusted.pool import Pool
pool = Pool(1, ChildLimits(cpu=600), ["tests.untrusted.hostile"])
print(pool.ask("surroundings", {}).answer["pid"], flush=True)
threading.Thread(target=pool.ask, args=(sys.argv[1], {}), daemon=True).start() if sys.argv[1] else None
time.sleep(60)
"""


@linux
@pytest.mark.parametrize("work", ["", "spin"], ids=["idle", "at work"])
def test_children_end_with_their_parent(work: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, work], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    time.sleep(0.2 if work else 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def test_a_process_that_was_forked_has_children_of_its_own() -> None:
    mine = pools.pool()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        same = pools.pool() is mine
        os.write(writing, b"same" if same else b"own")
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    assert os.read(reading, 10) == b"own"
    os.close(reading)
    assert pools.pool() is mine


def test_a_child_that_does_not_start_is_nobodys_fault_and_says_why() -> None:
    pool = Pool(1, LIMITS, ["tests.untrusted.there_is_none"])
    with pytest.raises(BoundaryError, match=r"does not start: .*there_is_none"):
        pool.ask("echo", {})


def test_a_child_starts_quickly() -> None:
    seconds = []
    for _ in range(3):
        pool = Pool(1)
        began = time.process_time() + _children_seconds()
        pool.ask("document", {}, b"{}")
        pool.close()
        seconds.append(time.process_time() + _children_seconds() - began)
    assert min(seconds) < 0.3


def _children_seconds() -> float:
    found = os.times()
    return found.children_user + found.children_system
