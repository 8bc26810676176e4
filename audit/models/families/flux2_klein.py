"""FLUX.2 klein."""

from __future__ import annotations

from typing import Any

from audit.models.families.flux2 import KLEIN, Flux2Like
from audit.models.families.identify import Family


class Flux2Klein(Flux2Like):
    """FLUX.2 klein 4B and 9B: Qwen3's states. Base is sampled with CFG, the distilled ones without any guidance."""

    name = Family.flux2_klein
    precedence = 25
    called = KLEIN
    pipeline = "Flux2KleinPipeline"

    def warnings(self, pipeline: Any) -> list[str]:
        """Of the distilled ones."""
        if not pipeline.config.is_distilled:
            return []
        return [
            "the base is FLUX.2 klein distilled to few steps: its predictions are not those of a flow, on which "
            "guidance rests. Adapters are mostly trained on klein base: audit against that where it was used"
        ]


FAMILY = Flux2Klein()
