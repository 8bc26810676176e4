"""Messages between the parent and a child: 4 bytes of length, then JSON. Open files travel beside a request.

JSON because the parent decodes what a child says that may have been taken over: it holds plain values only, and its
bytes and values are counted before any of them is made.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

MAX_REQUEST_BYTES = 1 << 24
MOST_FILES = 4  # that travel with one request
_LENGTH = struct.Struct("<I")


class WireError(Exception):
    """The other side has said something that is no message."""


class EndedError(WireError):
    """The other side has gone."""


def send(channel: socket.socket, message: Any, files: tuple[int, ...] = ()) -> None:
    """Send ``message`` and the open ``files``. Raises OSError where the other side has gone or does not take it."""
    # a lone surrogate, which JSON of a stranger may hold, is kept
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    whole = _LENGTH.pack(len(body)) + body
    sent = socket.send_fds(channel, [whole], list(files)) if files else 0
    channel.sendall(memoryview(whole)[sent:])


def receive(channel: socket.socket, most_bytes: int, most_values: int, deadline: float | None = None) -> Any:
    """The next message. Raises WireError where it is larger than that or none, TimeoutError after ``deadline``."""
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size, deadline))
    if length > most_bytes:
        raise WireError(f"an answer of {length} bytes, at most {most_bytes} are read")
    return decoded(_exactly(channel, length, deadline), most_values)


def receive_request(channel: socket.socket) -> tuple[Any, list[int]]:
    """A child's side: the next request and the files with it. Raises EOFError where the parent has gone."""
    start, files, _, _ = socket.recv_fds(channel, _LENGTH.size, MOST_FILES)
    if not start:
        raise EOFError
    start += bytes(_exactly(channel, _LENGTH.size - len(start), None)) if len(start) < _LENGTH.size else b""
    (length,) = _LENGTH.unpack(start)
    if length > MAX_REQUEST_BYTES:
        raise WireError(f"a request of {length} bytes")
    return decoded(_exactly(channel, length, None), MAX_REQUEST_BYTES), list(files)


def decoded(body: bytes | bytearray, most_values: int) -> Any:
    """The plain value of a message's JSON. Raises WireError."""
    try:
        check_values(body, most_values)
    except ValueError as error:
        raise WireError(f"an answer of {error}") from None
    try:
        return json.loads(body.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"an answer that is none ({type(error).__name__})") from None


def check_values(body: bytes | bytearray, most_values: int) -> None:
    """Raise ValueError where JSON may hold more values than that: objects take far more memory than their text."""
    values = sum(body.count(mark) for mark in (b",", b"[", b"{", b":"))
    if values > most_values:
        raise ValueError(f"{values} values, at most {most_values} are read")


def _exactly(channel: socket.socket, length: int, deadline: float | None) -> bytearray:
    found = bytearray()
    while len(found) < length:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            channel.settimeout(left)
        piece = channel.recv(min(length - len(found), 1 << 20))
        if not piece:
            raise EndedError("it has ended")
        found += piece
    return found
