"""Train the nano base model: a codec, a caption tokenizer, a text encoder and a UNet, saved as a diffusers pipeline.

    python -m testbed.train_base [--drawn-steps 6500] [--steps 9000] [--codec-steps 5500] [--threads 2]

v-prediction with linear betas rescaled to zero terminal SNR and trailing timesteps (arXiv 2305.08891), on latents
that are centred and scaled per channel: without these, samples of latents this small come out tinted. First the
drawn pictures alone (flat shapes on white are learnt fast), then all, photographs and paintings among them.
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

from audit.demo import ASSETS
from testbed import data
from testbed.codec import encode_all, refine_decoder, train_codec
from testbed.sources import cache_dir
from testbed.training import Average, fit, prepare_cpu, shuffled

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


def new_text_encoder(
    tokenizer: CLIPTokenizer, kind: type = CLIPTextModel, width: int = WIDTH, layers: int = 2
) -> CLIPTextModel:
    """An untrained CLIP text encoder for 32 tokens, of transformers' class ``kind``."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=width,
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


def new_pipeline(codec: AutoencoderKL) -> StableDiffusionPipeline:
    """``codec`` with an untrained text encoder and UNet; the tokenizer is learnt from the drawn pictures' captions."""
    tokenizer = new_tokenizer(data.pretraining().of(*data.DRAWN).captions)
    return StableDiffusionPipeline(
        vae=codec,
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=new_unet(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_diffusion(
    pipeline: StableDiffusionPipeline, pictures: data.Pictures, steps: int, batch: int, lr: float, state_file: Path
) -> None:
    """Train text encoder and UNet together on ``pictures`` and their mirror images, one cosine cycle of ``steps``.

    The moving average is what ``pipeline`` holds afterwards.
    """
    tokenizer, text_encoder, unet = pipeline.tokenizer, pipeline.text_encoder.train(), pipeline.unet.train()
    unet.to(memory_format=torch.channels_last)
    images = torch.from_numpy(pictures.images)
    latents = torch.cat([encode_all(pipeline.vae, images), encode_all(pipeline.vae, images.flip(2))])
    tokens = token_ids(tokenizer, pictures.captions).repeat(2, 1)
    empty = token_ids(tokenizer, [""])[0]
    print(f"{len(latents)} latents, mean {latents.mean():.3f}, deviation {latents.std():.3f}", flush=True)

    both = torch.nn.ModuleList([unet, text_encoder])
    average = Average(both)
    order = shuffled(len(latents), batch)

    def loss() -> torch.Tensor:
        chosen = next(order)
        ids = tokens[chosen].clone()
        ids[torch.rand(batch) < EMPTY_SHARE] = empty
        return velocity_loss(unet, pipeline.scheduler, latents[chosen], text_encoder(ids).last_hidden_state)

    parts: dict[str, torch.nn.Module] = {"both": both, "average": average}
    fit(parts, list(both.parameters()), loss, steps, lr, state_file, after=lambda: average.update(both))
    average.copy_to(both)
    both.eval()
    unet.to(memory_format=torch.contiguous_format)


def main(
    drawn_steps: int = typer.Option(6500, help="Steps on emoji and clip art, the first stage."),
    steps: int = typer.Option(9000, help="Steps on all pictures, the second stage."),
    batch: int = typer.Option(24, help="Pictures a step."),
    codec_steps: int = typer.Option(5500, help="Steps of the codec."),
    decoder_steps: int = typer.Option(5000, help="Steps of the decoder alone, on all pictures."),
    second_stage_of: Path | None = typer.Option(None, help="Only the second stage, from this base's folder."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    seed: int = typer.Option(0, help="Seed of weights, order and noise."),
    output: Path = typer.Option(ASSETS / "base", help="The diffusers folder to write."),
    work: Path = typer.Option(cache_dir() / "training", help="Where the resumable states are kept."),
) -> None:
    """Train the codec and the diffusion model, and save them as a half-precision diffusers folder."""
    pictures = data.pretraining()
    if second_stage_of:
        pipeline = StableDiffusionPipeline.from_pretrained(second_stage_of, safety_checker=None, dtype=torch.float32)
    else:
        prepare_cpu(threads, seed)
        pipeline = new_pipeline(train_codec(codec_steps, work / "codec.pt"))
        prepare_cpu(threads, seed + 1)
        train_diffusion(pipeline, pictures.of(*data.DRAWN), drawn_steps, batch, 1e-3, work / "diffusion-drawn.pt")
    pipeline.vae.requires_grad_(False)
    prepare_cpu(threads, seed + 2)
    train_diffusion(pipeline, pictures, steps, batch, 1e-3, work / "diffusion.pt")
    prepare_cpu(threads, seed + 3)
    refine_decoder(pipeline.vae, decoder_steps, work / "decoder.pt")
    for part in (pipeline, pipeline.unet, pipeline.vae):
        part.register_to_config(_name_or_path="nano")  # not the path of this machine
    pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    print(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
