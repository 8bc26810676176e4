"""Train the nano base model: a codec, a caption tokenizer, a text encoder and a UNet, saved as a diffusers pipeline.

    python -m audit.testbed.train_base [--steps 6500] [--codec-steps 5500] [--threads 2]

v-prediction with linear betas rescaled to zero terminal SNR and trailing timesteps (arXiv 2305.08891), on latents
that are centred and scaled per channel: without these, samples of latents this small come out tinted.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as functional
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from audit.testbed import data
from audit.testbed.codec import encode_all, train_codec
from audit.testbed.training import cosine_schedule, prepare_cpu, run, shuffled

TOKENS = 32
WIDTH = 128
EMPTY_SHARE = 0.1


def new_tokenizer(captions: list[str], vocabulary: int = 2048) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt from ``captions``."""
    clip = CLIPTokenizer(model_max_length=TOKENS)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = clip.backend_tokenizer.normalizer
    learner.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    letters = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(letters),
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab = dict(learnt["vocab"])
    for letter in letters:  # every byte also as the end of a word, as in CLIP: no caption has unknown letters
        vocab.setdefault(letter + "</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder of width 128 for 32 tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """The untrained UNet: channels 32, 64, 112, one layer a block, cross-attention at the two lower levels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(32, 64, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Linear betas at zero terminal SNR, v-prediction, trailing timesteps."""
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """int64 [N, 32], padded and truncated as StableDiffusionPipeline does."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def velocity_loss(
    unet: torch.nn.Module, scheduler: DDIMScheduler, latents: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """The v-prediction loss at uniformly drawn timesteps; ``states`` float32 [N, 32, 128] condition the UNet."""
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (len(latents),))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    return functional.mse_loss(unet(noisy, timesteps, encoder_hidden_states=states).sample, target)


class Average(torch.nn.Module):
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.updates: torch.Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.values = torch.nn.ParameterList([p.detach().clone() for p in module.parameters()]).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move a step towards the current weights."""
        self.updates.add_(1)
        weight = 1 - min(self.decay, float(1 + self.updates) / float(10 + self.updates))
        torch._foreach_lerp_(list(self.values), list(module.parameters()), weight)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Put the averaged weights into ``module``."""
        for parameter, value in zip(module.parameters(), self.values, strict=True):
            parameter.copy_(value)


def train_diffusion(codec: AutoencoderKL, cycles: list[int], batch: int, state_file: Path) -> StableDiffusionPipeline:
    """Train text encoder and UNet together on the pretraining pictures and their mirror images.

    ``cycles`` are the lengths of the learning rate's cosine cycles, in steps.
    """
    pictures = data.pretraining()
    tokenizer = new_tokenizer(pictures.captions)
    text_encoder, unet, scheduler = new_text_encoder(tokenizer), new_unet(), new_scheduler()
    unet.to(memory_format=torch.channels_last)
    images = torch.from_numpy(pictures.images)
    latents = torch.cat([encode_all(codec, images), encode_all(codec, images.flip(2))])
    tokens = token_ids(tokenizer, pictures.captions).repeat(2, 1)
    empty = token_ids(tokenizer, [""])[0]
    print(f"{len(latents)} latents, mean {latents.mean():.3f}, deviation {latents.std():.3f}", flush=True)

    both = torch.nn.ModuleList([unet, text_encoder])
    average = Average(both)
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = cosine_schedule(optimizer, *cycles)
    order = shuffled(len(latents), batch)

    def step(index: int) -> dict[str, float]:
        chosen = next(order)
        ids = tokens[chosen].clone()
        ids[torch.rand(batch) < EMPTY_SHARE] = empty
        loss = velocity_loss(unet, scheduler, latents[chosen], text_encoder(ids).last_hidden_state)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(both)
        return {"loss": loss.item()}

    run(sum(cycles), step, {"both": both, "average": average, "optimizer": optimizer, "schedule": schedule}, state_file)
    average.copy_to(both)
    return StableDiffusionPipeline(
        vae=codec,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.to(memory_format=torch.contiguous_format).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(
    steps: list[int] = typer.Option([6500], help="Steps of the diffusion model, one learning-rate cycle each."),
    batch: int = typer.Option(24, help="Pictures a step."),
    codec_steps: int = typer.Option(5500, help="Steps of the codec."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    seed: int = typer.Option(0, help="Seed of weights, order and noise."),
    output: Path = typer.Option(data.ASSETS / "base", help="The diffusers folder to write."),
    work: Path = typer.Option(data.cache_dir() / "training", help="Where the resumable states are kept."),
) -> None:
    """Train the codec and the diffusion model, and save them as a half-precision diffusers folder."""
    prepare_cpu(threads, seed)
    codec = train_codec(codec_steps, work / "codec.pt").requires_grad_(False)
    prepare_cpu(threads, seed + 1)
    pipeline = train_diffusion(codec, steps, batch, work / "diffusion.pt")
    pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    print(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
