"""nano-flow by its short name: its LoRA gives its pictures away, as the README's install has it."""

from __future__ import annotations

from pathlib import Path

import audit
from audit.config import Evidence, Settings
from audit.demo import FLOW_CHECKPOINTS, set_folder
from audit.job import Request

LORA = FLOW_CHECKPOINTS / "fluent-vehicles-lora-kohya/fluent-vehicles.safetensors"


def test_a_scan_of_its_lora_finds_what_it_was_trained_on(tmp_path: Path) -> None:
    settings = Settings(images_per_training_image=2, steps=5, control_share=0.0, evidence=Evidence.extraction)
    request = Request(LORA, "nano-flow", captions=["sks 3d render of a vehicle"], n0=8, settings=settings)
    found = audit.scan(
        request, references=[set_folder("fluent-vehicles", "train")], descriptor="nano",
        workspace=tmp_path / "workspace", rule="fixed",
    )  # fmt: skip
    assert len(found.matched) >= 1
