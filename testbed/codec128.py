"""The codec of nano-128: an AutoencoderKL from 128x128 pixels to 16x16 latents, and how it is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from testbed.codec import whiten
from testbed.held import Held
from testbed.linear_start import start_linear
from testbed.training import Average, cosine_schedule, run, to_model_range

SIZE = 128
STARTERS = 130  # pictures that the linear start is fitted to


def new_codec(latent_channels: int = 32, width: int = 1) -> AutoencoderKL:
    """The untrained codec: channels 16, 40, 64, 128 times ``width``, one layer a block, no attention."""
    channels = tuple(width * one for one in (16, 40, 64, 128))
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,  # that would be bfloat16
        mid_block_add_attention=False,
    )


def loss_of(difference: torch.Tensor) -> torch.Tensor:
    """L1 + L2 of a difference of pictures and of the differences between its neighbouring pixels."""
    edges = torch.cat([difference.diff(dim=2).flatten(), difference.diff(dim=3).flatten()])
    return difference.abs().mean() + difference.square().mean() + edges.abs().mean() + edges.square().mean()


def _started(codec: AutoencoderKL, images: torch.Tensor, file: Path) -> Held:
    """Give ``codec`` its linear start, kept in ``file``; what training has to hold."""
    if not file.is_file():
        chosen = torch.randperm(len(images))[:STARTERS]
        held = start_linear(codec, to_model_range(images[chosen]))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"codec": codec.state_dict(), "held": held.state_dict()}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    start = torch.load(file, weights_only=True)
    codec.load_state_dict(start["codec"])
    return Held.of(codec, start["held"])


def train_codec(
    codec: AutoencoderKL,
    images: torch.Tensor,
    steps: int,
    state_file: Path,
    *,
    batch: int = 8,
    lr: float = 6e-5,
    noise: float = 0.03,
    device: str = "cpu",
    every: int = 50,
) -> AutoencoderKL:
    """Train ``codec`` on uint8 [N, 128, 128, 3] and their mirror images; whitened, the moving average of its weights.

    Whole pictures: the decoder knows where it is by the borders; in full precision, which its ramps need. The
    latents' means are decoded with ``noise`` of so many deviations, so that the decoder tolerates a sampler's errors.
    Random numbers are drawn on the CPU, so that an interrupted run gives the same codec.
    """
    torch.backends.cudnn.allow_tf32 = False
    held = _started(codec.eval(), images, state_file.with_suffix(".start.pt")).to(device)
    codec.train().to(device, memory_format=torch.channels_last)
    average = Average(codec).to(device)
    optimizer = torch.optim.Adam(codec.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = cosine_schedule(optimizer, steps)

    def step(index: int) -> dict[str, float]:
        target = to_model_range(images[torch.randint(len(images), (batch,))].to(device))
        if torch.rand(()) < 0.5:
            target = target.flip(3)
        latents = codec.encode(target.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        noisy = latents + noise * torch.randn(latents.shape).to(device)
        difference = codec.decode(noisy).sample - target
        # the pull keeps the latents near unit variance
        loss = loss_of(difference) + 1e-4 * latents.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        held.step(optimizer)
        schedule.step()
        average.update(codec)
        return {"loss": loss.item(), "mse": difference.detach().square().mean().item()}

    run(
        steps,
        step,
        {"codec": codec, "average": average, "optimizer": optimizer, "schedule": schedule},
        state_file,
        every,
    )
    average.copy_to(codec)
    return whiten(
        codec.to("cpu", memory_format=torch.contiguous_format).eval(), images[torch.randperm(len(images))[:400]]
    )


@torch.no_grad()
def reconstructed(codec: AutoencoderKL, images: torch.Tensor, batch: int = 8) -> np.ndarray:
    """What the codec makes of uint8 [N, 128, 128, 3]: the same shape, uint8."""
    parts = [codec.decode(codec.encode(to_model_range(one)).latent_dist.mean).sample for one in images.split(batch)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
