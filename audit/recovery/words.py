"""The words that a caption may be made of: the tokenizer's own, identifiers that trainers use, words of the metadata.

A trigger is found where it is among these. It need not be a single token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from audit.claims.captions import captions_from_metadata, clean_text
from audit.untrusted.documents import parse_json

MOST_WORDS = 60_000  # CLIP's tokenizer has 49,408 tokens
MOST_CHARACTERS = 40
# Rare strings that guides of DreamBooth and LoRA trainers name as triggers.
IDENTIFIERS = (
    "sks", "ohwx", "zwx", "zwz", "txcl", "tok", "hta", "kvn", "shs", "rwb", "szn", "xjy", "bnha", "xyz", "phol",
    "rimm", "kprc", "shld", "wjb", "xxy", "ukj", "lnx", "nvinkpunk", "olis", "sst", "cjw", "ohw", "pxl", "ggn", "skw",
)  # fmt: skip
# What a picture is and shows, in most captions: a trigger stands before such words, and they are tried behind it.
EVERYDAY = frozenset(
    {"photo", "photograph", "picture", "image", "painting", "portrait", "drawing", "illustration", "cartoon", "render",
     "sketch", "style", "art", "3d", "person", "man", "woman", "girl", "boy", "face", "character", "animal", "animals",
     "food", "toy", "vehicle", "building", "house", "landscape", "logo", "icon", "object", "photos", "pictures"}
)  # fmt: skip
STOP = frozenset(
    {"a", "an", "and", "as", "at", "by", "for", "from", "in", "into", "is", "it", "of", "on", "or", "over", "the", "to",
     "with"}
)  # fmt: skip
_WORD = re.compile(r"(?<![^\W_])[^\W_]{2,40}(?![^\W_])")
_ENDS = "</w>"  # how CLIP's tokenizer marks a token that ends a word
_BEGINS = ("▁", "Ġ")  # how SentencePiece and byte-level tokenizers mark one that begins a word


def words_of(text: str) -> list[str]:
    """The words of a caption, each once, in order, in lower case."""
    return list(dict.fromkeys(_WORD.findall(text.casefold())))


def tokenizer_words(tokenizer: Any) -> list[str]:
    """The whole words among a tokenizer's tokens, in the order of its vocabulary."""
    found = []
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])[:MOST_WORDS]:
        if token.endswith(_ENDS):
            word = token.removesuffix(_ENDS)
        elif token.startswith(_BEGINS):
            word = token[1:]
        else:
            continue
        if _WORD.fullmatch(word) and not word.isdigit():
            found.append(word.casefold())
    return list(dict.fromkeys(found))


def metadata_words(metadata: Mapping[str, str]) -> list[str]:
    """Words of the captions, the tags and the title that a file's metadata claims."""
    texts = [one.text for one in captions_from_metadata(dict(metadata))]
    texts += [metadata.get(name, "")[:1000] for name in ("modelspec.title", "ss_output_name")]
    try:
        folders = parse_json(metadata.get("ss_tag_frequency", "{}"))
    except ValueError:
        folders = {}
    for tags in list(folders.values())[:100] if isinstance(folders, dict) else ():
        texts += [tag for tag in list(tags)[:1000] if isinstance(tag, str)] if isinstance(tags, dict) else []
    return list(dict.fromkeys(word for text in texts for word in words_of(clean_text(text))))


def vocabulary(tokenizers: Iterable[Any], metadata: Mapping[str, str], more: Iterable[str] = ()) -> list[str]:
    """The candidates, each once: what is given, the metadata's words, identifiers, then the tokenizers' words.

    Everyday words are none, unless they are given.
    """
    given = [word for text in more for word in words_of(text)]
    found = [*metadata_words(metadata), *IDENTIFIERS]
    for tokenizer in tokenizers:
        found += tokenizer_words(tokenizer)
    return list(dict.fromkeys([*given, *(word for word in found if word not in STOP | EVERYDAY)]))[:MOST_WORDS]
