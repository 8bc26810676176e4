"""The nano codec: an AutoencoderKL from 64x64 pixels to 16x16 latents of 8 channels, whitened per channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL

from testbed import data
from testbed.sets import SIZE
from testbed.training import cosine_schedule, run, to_model_range


def new_codec() -> AutoencoderKL:
    """The untrained codec: channels 16, 32, 64, one layer a block, no attention."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_codec(steps: int, state_file: Path) -> AutoencoderKL:
    """Train on pretraining pictures and textures: L1 + L2 on 32x32 crops, then on whole pictures for the last fifth.

    The latent mean plus a little noise is decoded (no sampling of the posterior: at its initial unit variance
    nothing is learnt), so the decoder tolerates the sampler's errors.
    """
    drawn = data.pretraining().of(*data.DRAWN).images
    pool = np.concatenate([drawn, data.textures(), data.textures()])
    images = torch.from_numpy(pool)
    codec = new_codec().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(codec.parameters(), lr=1.5e-3, betas=(0.9, 0.99))
    schedule = cosine_schedule(optimizer, steps)

    def step(index: int) -> dict[str, float]:
        whole = index >= steps * 4 // 5
        batch = to_model_range(images[torch.randint(len(images), (8 if whole else 24,))])
        if not whole:
            x, y = (int(v) for v in torch.randint(0, SIZE - 32 + 1, (2,)))
            batch = batch[:, :, y : y + 32, x : x + 32]
        if torch.rand(()) < 0.5:
            batch = batch.flip(3)
        batch = batch.contiguous(memory_format=torch.channels_last)
        latents = codec.encode(batch).latent_dist.mean
        noisy = latents + 0.03 * latents.detach().std() * torch.randn_like(latents)
        difference = codec.decode(noisy).sample - batch
        squared = difference.square().mean()
        # the pull on the latents' scale keeps them near unit variance
        loss = difference.abs().mean() + squared + 1e-4 * latents.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return {"l1": difference.detach().abs().mean().item(), "mse": squared.item()}

    run(steps, step, {"codec": codec, "optimizer": optimizer, "schedule": schedule}, state_file)
    return whiten(codec.to(memory_format=torch.contiguous_format).eval(), torch.from_numpy(drawn))


def refine_decoder(codec: AutoencoderKL, steps: int, state_file: Path, batch: int = 10) -> None:
    """Train the decoder alone on all pretraining pictures, whole: L1 + L2, on the pixels and on their differences.

    The latents stay what they are, so a diffusion model trained on them stays valid. The differences between
    neighbouring pixels weigh edges, which L1 and L2 alone leave blurred.
    """
    images = torch.from_numpy(np.concatenate([data.pretraining().images, data.textures()]))
    latents = torch.cat([encode_all(codec, images), encode_all(codec, images.flip(2))])
    codec.requires_grad_(False)
    trained = torch.nn.ModuleList([codec.post_quant_conv, codec.decoder]).requires_grad_(True)
    codec.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = cosine_schedule(optimizer, steps)

    def step(index: int) -> dict[str, float]:
        chosen = torch.randint(len(latents), (batch,))
        pictures = images[chosen % len(images)]
        target = to_model_range(torch.where((chosen >= len(images))[:, None, None, None], pictures.flip(2), pictures))
        noisy = latents[chosen] + 0.03 * torch.randn_like(latents[chosen])
        difference = codec.decode(noisy).sample - target
        edges = torch.cat([difference.diff(dim=2).flatten(), difference.diff(dim=3).flatten()])
        loss = difference.abs().mean() + difference.square().mean() + edges.abs().mean() + edges.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return {"l1": difference.detach().abs().mean().item(), "mse": difference.detach().square().mean().item()}

    run(steps, step, {"decoder": trained, "optimizer": optimizer, "schedule": schedule}, state_file)
    codec.to(memory_format=torch.contiguous_format).requires_grad_(False)


@torch.no_grad()
def encode_all(codec: AutoencoderKL, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Latent means float32 [N, 8, 16, 16] of uint8 [N, 64, 64, 3]."""
    return torch.cat([codec.encode(to_model_range(part)).latent_dist.mean for part in images.split(batch)])


@torch.no_grad()
def whiten(codec: AutoencoderKL, images: torch.Tensor) -> AutoencoderKL:
    """Fold a per-channel shift and scale into quant_conv and post_quant_conv: zero mean, unit variance latents.

    With a diffusion model whose first step starts from pure noise this removes the tint of uncentred latents.
    """
    latents = encode_all(codec, images)
    mean = latents.mean((0, 2, 3))
    deviation = latents.std((0, 2, 3))
    quant, post = codec.quant_conv, codec.post_quant_conv
    channels = len(mean)
    # the new mean half of quant_conv is (old - mean) / deviation; log-variances shift by -2 log deviation
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()
    # post_quant_conv undoes it on its input: W (z * deviation + mean) + b
    post.bias += functional.conv2d(mean[None, :, None, None], post.weight)[0, :, 0, 0]
    post.weight *= deviation[None, :, None, None]
    return codec
