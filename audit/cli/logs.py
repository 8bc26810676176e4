"""What commands tell on stderr, by Python's logging: lines for people, or with --log-format json an object a line."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from audit.locations import without_credentials
from audit.tokens import TOKENS

OURS = ("audit", "crawlers")  # the packages whose loggers follow --verbose and --quiet
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")  # beside the tokens of sources
SHORTEST_SECRET = 8  # characters: what is shorter would be taken out of ordinary words
GLOBAL_FLAGS = ("--verbose", "--quiet")
GLOBAL_OPTION = "--log-format"


class LogFormat(StrEnum):
    """How lines on stderr look."""

    text = "text"
    json = "json"


def without_secrets(text: str) -> str:
    """``text`` without the secrets of this process's environment, and without the credentials of URLs.

    What is told on purpose has none in the first place; errors of libraries say what they like.
    """
    for name in (*TOKENS, *SECRETS):
        secret = os.environ.get(name, "")
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, f"<{name}>")
    return without_credentials(text)


class _People(logging.Handler):
    """A line a message. Rich colours it where stderr is a terminal, and keeps progress bars below it."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.markup import escape

        from audit.cli.common import console

        text = escape(
            without_secrets(record.getMessage()).replace("\n", "\n  ")
        )  # no line of a message looks like another message
        if record.levelno >= logging.ERROR:
            text = f"lora-audit: {text}"
        elif record.levelno >= logging.WARNING:
            text = f"[yellow]warning[/yellow] {text}"
        console().print(text, highlight=False, soft_wrap=True)
        wanted = record.levelno >= logging.CRITICAL or logging.getLogger(OURS[0]).isEnabledFor(logging.DEBUG)
        if record.exc_info and wanted:
            trace = without_secrets("".join(traceback.format_exception(*record.exc_info)))
            console().print(escape(trace), highlight=False)


class _Lines(logging.Handler):
    """A JSON object a line: time, level, logger, message, and the record's fields."""

    def emit(self, record: logging.LogRecord) -> None:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["exception"] = "".join(traceback.format_exception(*record.exc_info))
        said = {name: without_secrets(one) if isinstance(one, str) else one for name, one in said.items()}
        print(json.dumps(said, default=str), file=sys.stderr, flush=True)


def configure(verbose: bool = False, quiet: bool = False, form: LogFormat = LogFormat.text) -> None:
    """Send the log to stderr: from INFO on, with ``verbose`` from DEBUG, with ``quiet`` from WARNING.

    Other libraries are heard from WARNING on. urllib3's warnings are left out: they hold whole URLs, and presigned
    ones are secret.
    """
    root = logging.getLogger()
    root.handlers = [one for one in root.handlers if not isinstance(one, _People | _Lines)]
    root.addHandler(_Lines() if form is LogFormat.json else _People())
    logging.captureWarnings(form is LogFormat.json)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else (logging.WARNING if quiet else logging.INFO))
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def is_structured() -> bool:
    """Whether every line on stderr has to be a JSON object."""
    return any(isinstance(one, _Lines) for one in logging.getLogger().handlers)


def is_quiet() -> bool:
    """Whether only warnings and results are wanted."""
    return logging.getLogger(OURS[0]).level >= logging.WARNING


def tell(logger: logging.Logger, message: str, *values: object, level: int = logging.INFO, **fields: object) -> None:
    """Log ``message`` with ``fields``, which JSON lines have as keys of their own."""
    logger.log(level, message, *values, extra={"fields": fields})


def hoisted(arguments: list[str]) -> list[str]:
    """``arguments`` with --verbose, --quiet and --log-format in front, where they may also stand behind a command."""
    front: list[str] = []
    rest: list[str] = []
    left = iter(arguments)
    for one in left:
        if one == "--":
            rest += [one, *left]
        elif one in GLOBAL_FLAGS or one.startswith(f"{GLOBAL_OPTION}="):
            front.append(one)
        elif one == GLOBAL_OPTION:
            front += [one, *([value] if (value := next(left, None)) is not None else [])]
        else:
            rest.append(one)
    return front + rest


class Seldom:
    """Says when another line is due: at most one in ``seconds`` of a kind."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._told: dict[str, float] = {}

    def due(self, kind: str = "") -> bool:
        """Whether a line of ``kind`` is due now; it counts as told then."""
        now = time.monotonic()
        if now - self._told.get(kind, -1e9) < self.seconds:
            return False
        self._told[kind] = now
        return True
