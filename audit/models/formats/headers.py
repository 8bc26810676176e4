"""Headers of safetensors and GGUF files. Crawlers need no more of a file, so nothing heavy is imported here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from audit.errors import CheckpointError
from audit.models.formats.gguf_header import GGUF_MAGIC, MAX_GGUF_FIELDS, MAX_GGUF_VALUES
from audit.models.safetensors_header import Header, read_header

__all__ = ["MAX_GGUF_FIELDS", "MAX_GGUF_VALUES", "is_gguf", "read_any_header"]


def is_gguf(path: Path) -> bool:
    """Whether ``path`` begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(4) == GGUF_MAGIC


def read_any_header(path: Path) -> Header:
    """The header of a safetensors or GGUF file, parsed in a child process.

    Raises CheckpointError for anything damaged or unknown.
    """
    from audit.untrusted.headers import checked_header

    try:
        if not is_gguf(path):
            return read_header(path)
        if find_spec("gguf") is None:
            raise CheckpointError(f"{path} is a GGUF file: install lora-audit[gguf] to read it")
        size = path.stat().st_size
        with path.open("rb") as file:
            return checked_header(path, "gguf", b"", size, [file])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
