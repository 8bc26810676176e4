"""nano: the embedded model's own descriptor, for pictures of 64 pixels."""

from __future__ import annotations

from pathlib import Path

from audit.demo import DESCRIPTOR as FILE
from audit.descriptors.facts import Spec
from audit.descriptors.kinds import NetworkKind


class Nano(NetworkKind):
    """It comes with this package."""

    name = "nano"
    spec = Spec("nano", 64, 0.7)

    def path(self) -> Path:
        """In the wheel."""
        return FILE


DESCRIPTOR = Nano()
