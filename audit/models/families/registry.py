"""All families that can be audited, ours and those that other packages add."""

from __future__ import annotations

from audit.models.families.base import ModelFamily
from audit.registry import Registry

FAMILIES: Registry[ModelFamily] = Registry(ModelFamily, __package__, "FAMILY", "lora_audit.families")


def in_turn() -> list[ModelFamily]:
    """The families in the order in which they are asked whether a file is theirs."""
    return sorted(FAMILIES.values(), key=lambda one: one.precedence)


def of_pipeline(pipeline: str) -> ModelFamily | None:
    """The family whose base models are of this diffusers pipeline class, None where there is none."""
    return next((one for one in FAMILIES.values() if one.pipeline == pipeline), None)
