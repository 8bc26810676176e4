"""A base model's folder that lacks weights, which the libraries would make up at random, is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from audit.errors import CheckpointError
from audit.models.base import load_base, load_vae, locate_base
from audit.models.stored import files_of
from tests.models import nano


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    nano.make("sd1", folder)
    return folder / "sd1"


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_network_that_lacks_weights_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    copied = tmp_path / "m"
    shutil.copytree(folder, copied)
    [file] = files_of(copied, part)
    state = load_file(file)
    lost = state.pop(next(name for name in sorted(state) if name.endswith("norm1.bias") or "k_proj.bias" in name))
    save_file(state, file, {"format": "pt"})
    wanted = sum(value.numel() for value in state.values()) + lost.numel()
    said = rf"{part} holds {wanted - lost.numel()} numbers of the {wanted} that its configuration asks for"
    with pytest.raises(CheckpointError, match=said):
        load_base(locate_base(str(copied)))
    if part == "vae":
        with pytest.raises(CheckpointError, match=said):
            load_vae(locate_base(str(copied)))
