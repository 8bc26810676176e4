"""`lora-audit` in processes of its own that need not import torch again, which costs more than most of what is tested.

A server imports the libraries, nothing of ours, and forks for every command. The command imports our code, has its own
descriptors, folder, environment and mask, can be killed, and ends as an interpreter ends. What a library reads from
the environment while it is imported (HF_HOME) is the server's: a test that changes it starts an interpreter, and so
does one that measures memory or looks at what is imported.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
_LIBRARIES = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip",
    "diffusers.schedulers.scheduling_ddim", "peft", "scipy.stats", "networkx", "pyarrow.dataset", "pyarrow.parquet",
    "duckdb", "pydantic.fields", "pydantic.type_adapter", "typer", "rich.console", "requests", "jinja2", "PIL.Image",
)  # fmt: skip
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
_MOST = 1 << 20  # bytes of a message


def run(*arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """What the command prints and returns; the options are those of Command. Raises subprocess.TimeoutExpired."""
    command = Command(*arguments, **options)
    try:
        out, errors = command.communicate(timeout)
    finally:
        if command.poll() is None:
            command.kill()
    return subprocess.CompletedProcess(command.args, command.wait(), out, errors)


class Command:
    """A command at work, with what tests use of subprocess.Popen."""

    def __init__(
        self, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, umask: int = -1
    ) -> None:
        self.args = ["lora-audit", *map(str, arguments)]
        self.returncode: int | None = None
        wanted = {
            "argv": self.args, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env),
            "umask": umask,
        }  # fmt: skip
        self._news, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (out, out_end), (errors, errors_end) = os.pipe(), os.pipe()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(errors)
        with theirs:
            ends = [out_end, errors_end, theirs.fileno()]
            socket.send_fds(_server(), [json.dumps(wanted).encode()], ends)
        os.close(out_end)
        os.close(errors_end)
        self._news.settimeout(120)  # the server may have to start
        self.pid = int(self._news.recv(_MOST))

    def poll(self) -> int | None:
        """The exit code, None while it is at work."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.001)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for the signal that has ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._news.settimeout(timeout)
            try:
                self.returncode = int(self._news.recv(_MOST))
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that is still to come of stdout and stderr, once it has ended. Raises subprocess.TimeoutExpired."""
        with ThreadPoolExecutor(2) as readers:
            read = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return read[0].result(), read[1].result()

    def send_signal(self, number: int) -> None:
        """Send it where the command is at work."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """The connection to this process's server, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-c", f"from tests import warm; warm.serve({theirs.fileno()})"]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=ROOT, env=os.environ | _ENVIRONMENT
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # which is called first
    return ours


def serve(descriptor: int) -> None:
    """Fork for every command that is asked for over this socket, until it is closed. What is forked returns."""
    connection = socket.socket(fileno=descriptor)
    for library in _LIBRARIES:
        importlib.import_module(library)
    while True:
        said, descriptors, _, _ = socket.recv_fds(connection, _MOST, 3)
        if not said:
            os._exit(0)
        keeper = os.fork()
        if keeper == 0:
            connection.close()
            _keep(*descriptors)
            _become(json.loads(said))
            return
        for descriptor in descriptors:
            os.close(descriptor)
        _reap()


def _reap() -> None:
    """Take leave of the keepers that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(out: int, errors: int, news: int) -> None:
    """Return in a child; stay behind to tell its id, and its exit code in the end."""
    pid = os.fork()
    if pid == 0:
        os.close(news)
        os.dup2(out, 1)
        os.dup2(errors, 2)
        os.close(out)
        os.close(errors)
        return
    for descriptor in (0, 1, 2, out, errors):
        os.close(descriptor)
    with socket.socket(fileno=news) as told:
        told.send(str(pid).encode())
        told.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _become(wanted: dict[str, Any]) -> None:
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    if wanted["umask"] != -1:
        os.umask(wanted["umask"])
    sys.argv[:] = wanted["argv"]
    from audit.cli import main

    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, int | None):
            _leave(stop.code or 0)
        raise


def _leave(code: int) -> NoReturn:
    """End as an interpreter does, but for taking all its modules to pieces, which takes longer than most commands."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
