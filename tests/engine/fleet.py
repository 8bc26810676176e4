"""Many small checkpoints in a catalog, and what a run over them leaves, for tests and the chaos benchmark."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from audit.demo import ASSETS, set_folder
from audit.workspace import Workspace
from crawlers.catalog import Catalog
from crawlers.crawl import Crawl
from crawlers.sources.folder import Folder
from tests.warm import Command

KOHYA = ASSETS / "checkpoints/fluent-animals-lora-kohya/fluent-animals.safetensors"
SMALL = ("settings.steps=2", "settings.images_per_training_image=4")
COMPARED = {
    "audits": "SELECT * EXCLUDE (seconds_sampling, seconds_total, finished_at, device) FROM audits ORDER BY audit_id",
    "generations": 'SELECT * FROM generations ORDER BY audit_id, "index"',
    "control_generations": 'SELECT * FROM control_generations ORDER BY audit_id, "index"',
    "extractions": "SELECT * FROM extractions ORDER BY audit_id, rank",
    "matches": "SELECT * FROM matches ORDER BY ALL",
}


def make_uploads(folder: Path, count: int, broken: int = 0) -> None:
    """``count`` LoRAs that differ in strength, and ``broken`` ones that fit no base."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(KOHYA)
    said = {"ss_dataset_dirs": '{"1_sks 3d render of an animal": {"n_repeats": 1, "img_count": 3}}'}
    for number in range(count):
        scaled = {
            name: tensor * (1 + 0.01 * number) if name.endswith("lora_up.weight") else tensor
            for name, tensor in tensors.items()
        }
        save_file(scaled, folder / f"lora-{number:03d}.safetensors", said | {"ss_base_model_version": "sd_v1"})
    for number in range(broken):
        wrong = {name.replace("lora_unet", "lora_unet_none"): tensor * (number + 2) for name, tensor in tensors.items()}
        save_file(wrong, folder / f"broken-{number:03d}.safetensors", {"ss_base_model_version": "sd_v1"})


def make_workspace(location: Path | str, uploads: Path) -> Workspace:
    """A workspace with the uploads in its catalog and a reference set "animals"."""
    from audit.descriptors import load_descriptor
    from audit.references import ReferenceSets

    workspace = Workspace(location)
    catalog = Catalog(workspace)
    Crawl(Folder(catalog, str(uploads), settle=0), catalog).run()
    ReferenceSets(workspace).add("animals", set_folder("fluent-animals", "train"), load_descriptor("nano"))
    return workspace


def environment() -> dict[str, str]:
    """One thread a process, so that results compare bit by bit."""
    return os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}


def start(workspace: Path | str, *options: object, settings: tuple[str, ...] = SMALL) -> Command:
    """Start `lora-audit run` over the workspace, with a small budget, as a process."""
    sets = [part for one in settings for part in ("--set", one)]
    return Command("run", "--workspace", workspace, "--base", f"sd1={ASSETS / 'base'}", "--descriptor", "nano",
                   "--references", "animals", "--rule", "fixed", *sets, *options, env=environment())  # fmt: skip


def tables(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    """What has to be equal however often a run was disturbed."""
    return {name: workspace.rows(sql) for name, sql in COMPARED.items()}
