"""Nearest references: exact searches by vectors and by PDQ hashes, over sets of any size.

An index is a cache of what the table of references holds; the table stays the truth.
"""

from audit.references.index.bank import Bank, Near
from audit.references.index.store import forget, open_bank

__all__ = ["Bank", "Near", "forget", "open_bank"]
