"""Model families: which one a file belongs to, and how each encodes, predicts and decodes."""

from audit.models.families.identify import Family, family_of_name, family_of_shapes

__all__ = ["Family", "family_of_name", "family_of_shapes"]
