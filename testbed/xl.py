"""A nano of the Stable Diffusion XL family, and few-shot LoRAs of it: the method beyond Stable Diffusion 1.x.

    python -m testbed.xl base --output nano-xl              # about 20 minutes on two cores
    python -m testbed.xl lora fluent-animals --base nano-xl # two minutes each
    python -m benchmarks.extraction --base nano-xl --checkpoints nano-xl-loras

The XL architecture proper: two text encoders whose penultimate states stand side by side, the second one's pooled
embedding and the six size and crop numbers added to the time embedding, linear projections, zeros for the empty
caption. Codec, tokenizer and what fits of the UNet and the first encoder come from the shipped nano base.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from audit.demo import ASSETS, load_set
from audit.study.adapters import half
from testbed import data
from testbed.codec import encode_all
from testbed.finetune import BATCH, LORA_TARGETS, RANK, Recipe, Tuning, kohya_metadata
from testbed.sets import few_shot_set, training_captions
from testbed.sources import cache_dir
from testbed.train_base import EMPTY_SHARE, new_scheduler, new_text_encoder, new_unet, token_ids
from testbed.training import Average, fit, prepare_cpu, shuffled

WIDTH_2 = 64  # of the second encoder
LAYERS = 3  # of both; the states used are those before the last
TIME_IDS = (64, 64, 0, 0, 64, 64)  # original height and width, crop top and left, target height and width
TIME_WIDTH = 8

app = typer.Typer(no_args_is_help=True, help=__doc__)


def new_xl_pipeline(nano: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    """An XL pipeline that starts from nano's weights wherever the shapes allow."""
    config = {name: value for name, value in new_unet().config.items() if not name.startswith("_")}
    width = nano.unet.config.cross_attention_dim + WIDTH_2
    config.update(
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=len(TIME_IDS) * TIME_WIDTH + WIDTH_2,
    )
    unet = UNet2DConditionModel(**config)
    state = unet.state_dict()
    for name, tensor in nano.unet.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
        elif "proj_" in name:  # a 1x1 convolution becomes a linear layer
            state[name] = tensor[:, :, 0, 0]
        else:  # keys and values of the cross attention: the second encoder's part starts at zero
            state[name] = torch.zeros_like(state[name])
            state[name][:, : tensor.shape[1]] = tensor
    state["add_embedding.linear_2.weight"] = torch.zeros_like(state["add_embedding.linear_2.weight"])
    unet.load_state_dict(state)
    first = new_text_encoder(nano.tokenizer, CLIPTextModel, nano.unet.config.cross_attention_dim, LAYERS)
    first.load_state_dict(nano.text_encoder.state_dict(), strict=False)
    second = new_text_encoder(nano.tokenizer, CLIPTextModelWithProjection, WIDTH_2, LAYERS)
    return StableDiffusionXLPipeline(
        vae=nano.vae, text_encoder=first, text_encoder_2=second, tokenizer=nano.tokenizer, tokenizer_2=nano.tokenizer,
        unet=unet, scheduler=new_scheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def conditions(pipeline: StableDiffusionXLPipeline, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states [N, tokens, width of both] and pooled embeddings [N, 64] of int64 [N, tokens]."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


def xl_loss(
    pipeline: StableDiffusionXLPipeline, latents: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """The v-prediction loss at uniformly drawn timesteps."""
    scheduler = pipeline.scheduler
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (len(latents),))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([TIME_IDS], dtype=torch.float32).expand(len(latents), -1)}
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = pipeline.unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample
    return torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(latents, noise, timesteps))


@app.command("base")
def train_base(
    steps: int = typer.Option(2500, help="Optimiser steps."),
    batch: int = typer.Option(24, help="Pictures a step."),
    lr: float = typer.Option(6e-4, help="Peak learning rate."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    output: Path = typer.Option(Path("nano-xl"), help="The diffusers folder to write."),
    work: Path = typer.Option(cache_dir() / "training", help="Where the resumable state is kept."),
) -> None:
    """Train the base model, starting from the shipped nano base."""
    prepare_cpu(threads, 10)
    nano = StableDiffusionPipeline.from_pretrained(ASSETS / "base", safety_checker=None, dtype=torch.float32)
    pipeline = new_xl_pipeline(nano)
    pictures = data.pretraining()
    images = torch.from_numpy(pictures.images)
    latents = torch.cat([encode_all(pipeline.vae, images), encode_all(pipeline.vae, images.flip(2))])
    tokens = token_ids(pipeline.tokenizer, pictures.captions).repeat(2, 1)
    parts = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]).train()
    pipeline.unet.to(memory_format=torch.channels_last)
    average = Average(parts)
    order = shuffled(len(latents), batch)

    def loss() -> torch.Tensor:
        chosen = next(order)
        states, pooled = conditions(pipeline, tokens[chosen])
        kept = (torch.rand(batch) >= EMPTY_SHARE).float()  # zeros stand for the empty caption
        return xl_loss(pipeline, latents[chosen], states * kept[:, None, None], pooled * kept[:, None])

    state: dict[str, torch.nn.Module] = {"parts": parts, "average": average}
    fit(state, list(parts.parameters()), loss, steps, lr, work / f"xl-{steps}.pt", after=lambda: average.update(parts))
    average.copy_to(parts)
    parts.eval()
    pipeline.unet.to(memory_format=torch.contiguous_format)
    for part in (pipeline, pipeline.unet, pipeline.vae):
        part.register_to_config(_name_or_path="nano-xl")  # not the path of this machine
    pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)
    print(f"{output}: {sum(path.stat().st_size for path in output.rglob('*.safetensors')) / 1e6:.1f} MB")


@app.command("lora")
def train_lora(
    name: str = typer.Argument(metavar="SET", help="A few-shot set, for instance fluent-animals."),
    base: Path = typer.Option(Path("nano-xl"), help="The base model's diffusers folder."),
    steps_a_picture: int = typer.Option(160, help="Optimiser steps for every training picture."),
    lr: float = typer.Option(3e-3, help="Peak learning rate."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    output: Path = typer.Option(Path("nano-xl-loras"), help="Where the file goes."),
    work: Path = typer.Option(cache_dir() / "training", help="Where the resumable state is kept."),
) -> None:
    """Fine-tune a LoRA on one few-shot set and save it as sd-scripts does for XL: kohya names, original blocks."""
    from audit.models.families.unet import original_unet_names

    prepare_cpu(threads, 0)
    few_shot = few_shot_set(name)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32)
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    latents = encode_all(pipeline.vae, torch.from_numpy(load_set(name, "train")))
    with torch.no_grad():
        states, pooled = conditions(pipeline, token_ids(pipeline.tokenizer, training_captions(name)))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    steps = steps_a_picture * len(latents)
    order = shuffled(len(latents), BATCH)

    def loss() -> torch.Tensor:
        chosen = next(order)
        return xl_loss(pipeline, latents[chosen], states[chosen], pooled[chosen])

    fit({"unet": unet}, parameters, loss, steps, lr, work / f"xl-{name}-{steps}.pt", every=100)
    names = original_unet_names(unet)
    found = {}
    for key, tensor in half(get_peft_model_state_dict(unet)).items():
        module, _, kind = key.removesuffix(".weight").rpartition(".lora_")
        stem = f"lora_unet_{names[module].replace('.', '_')}"
        found[f"{stem}.lora_{'down' if kind == 'A' else 'up'}.weight"] = tensor
        found[f"{stem}.alpha"] = torch.tensor(float(RANK))
    metadata = kohya_metadata(few_shot, RANK, steps, BATCH, lr, 0)
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "nano-xl"}
    metadata |= {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    file = Recipe(name, Tuning.lora_kohya).file(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, file, metadata=metadata)
    card = {"set": name, "tuning": Tuning.lora_kohya, "steps": steps, "batch": BATCH, "lr": lr, "rank": RANK}
    (file.parent / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(file)


if __name__ == "__main__":
    app()
