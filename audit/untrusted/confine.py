"""What a child gives up before it reads a stranger's byte. What a system does not offer is named, not passed over."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from audit.untrusted.limits import ChildLimits

_NEWNET, _NEWUSER, _NEWIPC = 0x40000000, 0x10000000, 0x08000000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _SET_DUMPABLE, _FILTER = 38, 22, 4, 2
_EPERM, _ENOSYS, _CLONE_THREAD = 1, 38, 0x10000
NETWORK, FILES, CALLS = "an open network", "no own view of the files", "no filter of system calls"
_NAMESPACE = "no network namespace"
# By name, the numbers of system calls on x86_64 and aarch64 (None: it has none): sockets, programs, other processes,
# and what would go round the filter.
_REFUSED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "execve": (59, 221),
    "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "io_uring_setup": (425, 425), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "pivot_root": (155, 41), "perf_event_open": (298, 241), "bpf": (321, 280),
    "userfaultfd": (323, 282), "memfd_create": (319, 279),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, architecture, number of clone
_CLONE3 = 435


def limit(limits: ChildLimits) -> list[str]:
    """Set the limits of this process for good; what this system cannot limit, in words."""
    wanted = {
        "RLIMIT_CORE": 0, "RLIMIT_DATA": limits.memory, "RLIMIT_AS": limits.address, "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_FSIZE": limits.written, "RLIMIT_CPU": limits.life_cpu, "RLIMIT_NPROC": 0,
    }  # fmt: skip
    missing = []
    for name, most in wanted.items():
        try:
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (most, most))
        except (AttributeError, OSError, ValueError):
            missing.append(f"no limit {name}")
    return missing


def limit_item(seconds: int) -> None:
    """Let this process end by SIGXCPU after ``seconds`` more of computing."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def end_with(life: int) -> list[str]:
    """End when the last writer of the pipe ``life`` has gone, whatever this process does then: by SIGIO.

    Not by PR_SET_PDEATHSIG, which goes by the thread that started this process. What is missing, in words.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    try:
        fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        return ["no end at once with their parent"]
    return []


def isolate(readable: Iterable[Path]) -> list[str]:
    """Give up the network, other processes and all files but those below ``readable``; what cannot be, in words.

    To be called with a single thread: the others would keep what they have.
    """
    if sys.platform != "linux":
        return [NETWORK, FILES, CALLS]
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    missing = []
    if library.unshare(_NEWUSER | _NEWNET | _NEWIPC) != 0:
        missing.append(_NAMESPACE)
    if not _landlock(library, readable):
        missing.append(FILES)
    if not _filter_calls(library):
        missing.append(CALLS)
    if _NAMESPACE in missing and CALLS in missing:
        missing.insert(0, NETWORK)
    return missing


def _landlock(library: ctypes.CDLL, readable: Iterable[Path]) -> bool:
    """Landlock (https://docs.kernel.org/userspace-api/landlock.html): reading below ``readable`` is all that is left.

    It also keeps the process from tracing its parent and from signalling it, by the kernel's version.
    """
    create, add, restrict = 444, 445, 446
    version = library.syscall(create, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    rights = {1: 13, 2: 14}.get(version, 15) if version < 5 else 16
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("<QQQ", (1 << rights) - 1, network, scoped)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = library.syscall(create, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if rules < 0:
        return False
    try:
        for folder in readable:
            try:
                handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            read_file, read_folder = 1 << 2, 1 << 3
            allowed = read_file | read_folder if folder.is_dir() else read_file
            rule = struct.pack("<Qi", allowed, handle)
            library.syscall(add, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
            os.close(handle)
        return bool(library.syscall(restrict, ctypes.c_int(rules), ctypes.c_uint32(0)) == 0)
    finally:
        os.close(rules)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter_calls(library: ctypes.CDLL) -> bool:
    """A seccomp filter that refuses sockets, programs, new processes and signals to others (EPERM)."""
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return False
    column, architecture, clone = machine
    load, equal, above, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent = 0x7FFF0000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS
    code = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, refuse),
        (load, 0, 0, 0), (above, 0, 1, 0x40000000), (answer, 0, 0, refuse),  # the x32 calls
        (equal, 0, 1, _CLONE3), (answer, 0, 0, absent),  # its flags are out of a filter's sight: clone is used instead
    ]  # fmt: skip
    for number in filter(None, (numbers[column] for numbers in _REFUSED.values())):
        code += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    code += [
        (equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, _CLONE_THREAD), (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HBBI", *one) for one in code)
    program = _Program(len(code), packed)
    return bool(library.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0)
