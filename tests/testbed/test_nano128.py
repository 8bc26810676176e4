"""nano-128: its pictures travel in one file, its codec starts as a linear one, trains and goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

from audit.demo import load_set
from testbed import nano128
from testbed.codec128 import new_codec, reconstructed, train_codec
from testbed.data import Pictures
from testbed.held import Held
from testbed.linear_start import start_linear
from testbed.packed import LOSSLESS, read_packed, write_packed
from testbed.training import to_model_range


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Few-shot pictures twice as large as they are shipped: uint8 [11, 128, 128, 3]."""
    shipped = np.concatenate([load_set(name, "train") for name in ("cartoon-animals", "photo-monuments")])[::2]
    return np.stack([np.asarray(Image.fromarray(one).resize((128, 128))) for one in shipped])


@pytest.fixture(scope="module")
def started(pictures: np.ndarray) -> tuple[AutoencoderKL, Held]:
    """A codec with its linear start."""
    torch.manual_seed(0)
    codec = new_codec().eval()
    return codec, start_linear(codec, to_model_range(torch.from_numpy(pictures)))


def test_pictures_come_out_of_the_packed_file_as_they_went_in(tmp_path: Path, pictures: np.ndarray) -> None:
    captions, sources = [f"picture {row}" for row in range(3)], ["here"] * 3
    groups = {name: Pictures(pictures[:3], captions, sources) for name in ("exact", "near")}
    write_packed(tmp_path / "packed.safetensors", groups, {"exact": LOSSLESS, "near": 92})
    exact, near = (read_packed(tmp_path / "packed.safetensors", name) for name in ("exact", "near"))
    assert np.array_equal(exact.images, pictures[:3])
    assert (exact.captions, exact.sources) == (captions, sources)
    assert 0 < np.abs(near.images.astype(int) - pictures[:3]).mean() < 4


def test_a_packed_file_that_is_damaged_or_lacks_a_group_is_named(tmp_path: Path, pictures: np.ndarray) -> None:
    path = tmp_path / "packed.safetensors"
    write_packed(path, {"some": Pictures(pictures[:2], ["", ""], ["", ""])}, {"some": LOSSLESS})
    with pytest.raises(ValueError, match=r"packed\.safetensors has no readable pictures 'other'"):
        read_packed(path, "other")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"packed\.safetensors has no readable pictures 'some'"):
        read_packed(path, "some")


def test_before_any_training_the_codec_keeps_what_a_linear_one_can(
    pictures: np.ndarray, started: tuple[AutoencoderKL, Held]
) -> None:
    codec, _ = started
    difference = (reconstructed(codec, torch.from_numpy(pictures[::5])).astype(np.float32) - pictures[::5]) / 127.5
    assert np.square(difference).mean() < 0.02
    flat = np.full((1, 128, 128, 3), 200, np.uint8)
    assert np.abs(reconstructed(codec, torch.from_numpy(flat))[:, 16:-16, 16:-16].astype(int) - 200).max() <= 12


def test_the_decoder_tells_the_pixels_of_a_cell_apart(started: tuple[AutoencoderKL, Held]) -> None:
    codec, _ = started
    stripes = np.where(np.arange(128) % 8 < 4, 40, 210).astype(np.uint8)
    picture = np.broadcast_to(stripes[None, None, :, None], (1, 128, 128, 3)).copy()
    again = reconstructed(codec, torch.from_numpy(picture)).astype(np.float32)[0, 32:96, 32:96].mean((0, 2))
    wanted = stripes[32:96]
    assert again[wanted == 210].mean() - again[wanted == 40].mean() > 100  # all cells are alike: one flat colour else


def test_weights_in_half_precision_are_the_same_codec(
    pictures: np.ndarray, started: tuple[AutoencoderKL, Held]
) -> None:
    rounded = new_codec().eval()
    rounded.load_state_dict({name: one.half().float() for name, one in started[0].state_dict().items()})
    full, half = (reconstructed(one, torch.from_numpy(pictures[:4])).astype(float) for one in (started[0], rounded))
    assert np.square((full - half) / 127.5).mean() < 0.004


def test_training_holds_what_the_start_needs(started: tuple[AutoencoderKL, Held], pictures: np.ndarray) -> None:
    torch.manual_seed(1)
    codec = new_codec().eval()
    codec.load_state_dict(started[0].state_dict())
    held = Held.of(codec, started[1].state_dict())
    before = {name: one.detach().clone() for name, one in codec.named_parameters()}
    optimizer = torch.optim.SGD(codec.parameters(), lr=1e-3)
    target = to_model_range(torch.from_numpy(pictures[:2]))
    (codec.decode(codec.encode(target).latent_dist.mean).sample - target).square().mean().backward()
    held.step(optimizer)
    after = dict(codec.named_parameters())
    assert any(not torch.equal(after[name], one) for name, one in before.items())
    balances = {name: [channels[-1] for other, channels in held.rows if other == name] for name, _ in held.rows}
    for name, mask in held.still.items():
        still = mask.clone()
        still[balances.get(name, [])] = False
        assert torch.equal(after[name][still], before[name][still]), name
    for axis, ties in ((1, held.columns), (0, held.rows)):
        for name, channels in ties:
            sums = [one[name].index_select(axis, torch.tensor(channels)).sum(axis) for one in (after, before)]
            torch.testing.assert_close(*sums, atol=1e-3, rtol=0)


def _stops_at(last: int) -> Callable[[Held, torch.optim.Optimizer], None]:
    step, calls = Held.step, iter(range(1, last + 1))

    def counted(held: Held, optimizer: torch.optim.Optimizer) -> None:
        if next(calls) == last:
            raise KeyboardInterrupt
        step(held, optimizer)

    return counted


def test_an_interrupted_run_ends_with_the_same_codec(
    tmp_path: Path, pictures: np.ndarray, started: tuple[AutoencoderKL, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.from_numpy(pictures)
    start = {"codec": started[0].state_dict(), "held": started[1].state_dict()}
    for name in ("whole", "broken"):
        torch.save(start, tmp_path / f"{name}.start.pt")
    torch.manual_seed(2)
    whole = train_codec(new_codec(), images, 4, tmp_path / "whole.pt", batch=2, every=2)
    torch.manual_seed(2)
    with monkeypatch.context() as patched:
        patched.setattr(Held, "step", _stops_at(4))
        with pytest.raises(KeyboardInterrupt):
            train_codec(new_codec(), images, 4, tmp_path / "broken.pt", batch=2, every=2)
    torch.manual_seed(99)
    broken = train_codec(new_codec(), images, 4, tmp_path / "broken.pt", batch=2, every=2)
    for one, other in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_weights_are_written_in_parts_that_make_the_codec_again(tmp_path: Path) -> None:
    codec = new_codec(width=2)
    nano128.save(codec, tmp_path)
    parts = list(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) <= 16 * 2**20
    again = AutoencoderKL.from_pretrained(tmp_path)
    for name, one in codec.state_dict().items():
        assert torch.equal(again.state_dict()[name], one), name


def test_the_commands_explain_themselves() -> None:
    for name in ("pack", "train", "judge"):
        said = CliRunner().invoke(nano128.app, [name, "--help"])
        assert said.exit_code == 0
        assert "--pictures" in said.output
