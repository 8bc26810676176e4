"""What runs in the child: each parser takes an item and answers in plain values. Nothing heavy is imported here."""

from audit.untrusted.parsers import archives, documents, headers, pictures, tokenizers

PARSERS = {
    **archives.PARSERS, **documents.PARSERS, **headers.PARSERS, **pictures.PARSERS, **tokenizers.PARSERS,
}  # fmt: skip
