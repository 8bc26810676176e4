"""A base's codec is had without its denoiser and text encoders, and does what it does beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from audit.errors import CheckpointError
from audit.models.base import BaseModel, load_base, load_vae, locate_base
from audit.models.codec import Codec
from tests.conftest import BASE
from tests.models import nano
from tests.models.ldm import to_ldm

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codecs")


@pytest.mark.parametrize("family", list(nano.FAMILIES))
def test_a_vae_loaded_alone_is_that_of_the_whole_model(folder: Path, family: str) -> None:
    nano.make(family, folder)
    location = locate_base(str(folder / family))
    whole, alone = load_base(location), load_vae(location)
    assert all(one.device.type == "meta" for one in alone.denoiser.parameters())
    assert not any(alone.part(name) for name in alone.architecture.encoders)
    for resolution in (None, 64):
        expected, found = Codec(whole, resolution=resolution), Codec(alone, resolution=resolution)
        assert found.latent_shape == expected.latent_shape
        assert found.picture_size == expected.picture_size
    np.testing.assert_array_equal(found.reconstruct(PICTURES), expected.reconstruct(PICTURES))


def test_a_vae_in_a_single_file_is_had_alone_too(base: BaseModel, tmp_path: Path) -> None:
    save_file(to_ldm(base), tmp_path / "nano.safetensors")
    location = locate_base(str(tmp_path / "nano.safetensors"), str(BASE))
    found, expected = Codec(load_vae(location)), Codec(load_base(location))
    np.testing.assert_array_equal(found.reconstruct(PICTURES), expected.reconstruct(PICTURES))


def test_what_cannot_be_had_apart_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    location = locate_base(str(tmp_path / "base"))
    weights = next((tmp_path / "base/vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="does not load alone"):
        load_vae(location)
