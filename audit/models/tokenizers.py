"""Tokenizers of a stranger's base model: loaded once in a child process before transformers loads them in this one."""

from __future__ import annotations

from pathlib import Path

from audit.errors import CheckpointError
from audit.untrusted.pool import RefusedError, pool

MAX_TOKENIZER_BYTES = 64 * 1024**2  # of a file; the largest of published models have 17
_KINDS = {
    "tokenizer.json": "whole", "vocab.json": "vocabulary", "merges.txt": "merges", "tokenizer_config.json": "object",
    "special_tokens_map.json": "object", "added_tokens.json": "object", "spiece.model": "pieces",
    "sentencepiece.bpe.model": "pieces", "tokenizer.model": "pieces",
}  # fmt: skip
_Identity = tuple[str, int, int, int, int]
_good: set[_Identity] = set()  # files that were loaded, by what shows that they have not changed since


def check_tokenizers(folder: Path) -> None:
    """Raise CheckpointError where a tokenizer's file of the pipeline in ``folder`` does not load within the limits."""
    for path in sorted(path for part in folder.glob("*tokenizer*") for path in part.glob("*") if path.name in _KINDS):
        try:
            identity = _identity(path)
            if identity in _good:
                continue
            if identity[1] > MAX_TOKENIZER_BYTES:
                raise CheckpointError(
                    f"{path} is refused: it has {identity[1]} bytes, at most {MAX_TOKENIZER_BYTES} are read"
                )
            raw = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        try:
            pool().ask("tokenizer", {"kind": _KINDS[path.name]}, raw)
        except RefusedError as error:
            raise CheckpointError(f"{path} is {'damaged: ' if error.by_child else ''}{error}") from error
        _good.add(identity)


def _identity(path: Path) -> _Identity:
    """Path, bytes, time of writing, and which file it is on its disk."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
