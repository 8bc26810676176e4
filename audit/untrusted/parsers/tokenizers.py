"""Files of a tokenizer, loaded once here before they are loaded where everything else is."""

from __future__ import annotations

import json
from typing import Any

from audit.untrusted.child import Item, RefusedError

_PROBES = ("a photo of a cat, oil on canvas", "a" * 1000, "a1 " * 300, "\u00e9\u4e2d!?" * 200)


def tokenizer(item: Item) -> int:
    """Load a tokenizer's file of the kind ``item.said["kind"]`` and use it once; how many words it has."""
    try:
        return _KINDS[item.said["kind"]](item.data)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(str(error)[:200]) from error


def _whole(data: bytes) -> int:
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_buffer(data)
        for text in _PROBES:
            found.encode(text)
    except MemoryError:
        raise
    except BaseException as error:  # the library panics on what it did not expect
        raise ValueError(str(error)) from error
    return int(found.get_vocab_size())


def _vocabulary(data: bytes) -> int:
    words: Any = json.loads(data)
    if not isinstance(words, dict) or not all(type(number) is int for number in words.values()):
        raise ValueError("it is no table of words and numbers")
    return len(words)


def _merges(data: bytes) -> int:
    lines = data.decode("utf-8").splitlines()
    if any(len(line.split(" ")) != 2 for line in lines if line.strip() and not line.startswith("#version")):
        raise ValueError("a line is no pair of words")
    return len(lines)


def _object(data: bytes) -> int:
    found = json.loads(data)
    if not isinstance(found, dict | list):
        raise ValueError("it is no object")
    return len(found)


def _pieces(data: bytes) -> int:
    """SentencePiece's model: by its own library where that is installed; transformers needs it as well."""
    try:
        import sentencepiece
    except ImportError:
        return 0
    found = sentencepiece.SentencePieceProcessor()
    try:
        found.LoadFromSerializedProto(data)
        for text in _PROBES:
            found.EncodeAsIds(text)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return int(found.GetPieceSize())


_KINDS = {"whole": _whole, "vocabulary": _vocabulary, "merges": _merges, "object": _object, "pieces": _pieces}
PARSERS = {"tokenizer": tokenizer}
