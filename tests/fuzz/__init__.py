"""What strangers send, changed in every way that can be thought of: ``python -m tests.fuzz``."""
