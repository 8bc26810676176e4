"""SSCD (arXiv 2202.10261): Meta's self-supervised descriptor for copy detection, downloaded once and pinned."""

from __future__ import annotations

from pathlib import Path

from audit.descriptors.facts import Spec
from audit.descriptors.kinds import NetworkKind

# github.com/facebookresearch/sscd-copy-detection (MIT): sscd_disc_mixup, ResNet-50, 512 dimensions
URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
SHA256 = "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"
BYTES = 98_791_638
SIZE = 320
THRESHOLD = 0.75  # about 90 % precision on DISC


class Sscd(NetworkKind):
    """sscd_disc_mixup in TorchScript."""

    name = "sscd"
    spec = Spec("sscd_disc_mixup", SIZE, THRESHOLD, SHA256)

    def path(self) -> Path:
        """In the user's cache. Raises DescriptorError where it cannot be downloaded."""
        from audit.descriptors.registry import download

        return download(URL, SHA256, BYTES)


DESCRIPTOR = Sscd()
