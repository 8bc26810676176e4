"""What sets are made of: pictures, or what others have described, one by one and never all in memory."""

from audit.references.inputs.given import Given, Pictures

__all__ = ["Given", "Pictures"]
