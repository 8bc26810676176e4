"""Train the nano of the flow kind, and few-shot LoRAs of it: the method where flow matching is.

    python -m testbed.train_flow base --output nano-flow        # six minutes of one core
    python -m testbed.train_flow loras                          # a minute of one core each
    python -m benchmarks.flow --checkpoints nano-flow-loras

The base learns the pictures and captions of the nano base, through its codec.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from audit.demo import ASSETS, FLOW_BASE, load_set
from audit.models.families.keys import originals_of
from audit.study.adapters import half
from testbed import data, flow
from testbed.codec import encode_all
from testbed.finetune import BATCH, Recipe, Tuning, kohya_metadata
from testbed.samples import contact_sheet
from testbed.sets import few_shot_set, training_captions
from testbed.sources import cache_dir
from testbed.train_base import EMPTY_SHARE, token_ids
from testbed.training import Average, fit, prepare_cpu, shuffled

SETS = (
    "fluent-vehicles", "stamps-birds", "stamps-fruit", "photo-wildlife", "paint-vangogh", "paint-elves",
    "fluent-animals", "photo-monuments",
)  # fmt: skip
IN_BOTH_LAYOUTS = "stamps-fruit"  # the others in kohya's alone
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip
RANK = 16

app = typer.Typer(no_args_is_help=True, help=__doc__)
WORK = typer.Option(cache_dir() / "training", help="Where the resumable states are kept.")


def encoded_once(pipeline: StableDiffusion3Pipeline, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first encoder's states and pooled embeddings of int64 [N, 32]: it is not trained."""
    with torch.no_grad():
        parts = [flow.encoded(pipeline.text_encoder, some) for some in tokens.split(256)]
    return torch.cat([states for states, _ in parts]), torch.cat([pooled for _, pooled in parts])


def train(pipeline: StableDiffusion3Pipeline, steps: int, batch: int, lr: float, state_file: Path) -> None:
    """Train transformer and second encoder on all pictures and their mirror images, one cosine cycle of ``steps``.

    The moving average is what ``pipeline`` holds afterwards.
    """
    pictures = data.pretraining()
    images = torch.from_numpy(pictures.images)
    latents = torch.cat([encode_all(pipeline.vae, images), encode_all(pipeline.vae, images.flip(2))])
    print(f"{len(latents)} latents, mean {latents.mean():.3f}, deviation {latents.std():.3f}", flush=True)
    tokens = token_ids(pipeline.tokenizer, [*pictures.captions, ""])
    states, pooled = encoded_once(pipeline, tokens)
    network, second = pipeline.transformer.train(), pipeline.text_encoder_2.train()
    both = torch.nn.ModuleList([network, second])
    average = Average(both)
    order = shuffled(len(latents), batch)
    network.set_attn_processor(flow.OnceForAll(flow.ZEROS))

    def loss() -> torch.Tensor:
        chosen = next(order)
        rows = chosen % len(images)
        rows[torch.rand(batch) < EMPTY_SHARE] = len(images)  # the empty caption
        more, more_pooled = flow.encoded(second, tokens[rows])
        return flow.flow_loss(
            network, latents[chosen], torch.cat([states[rows], more], -1), torch.cat([pooled[rows], more_pooled], -1)
        )

    parts: dict[str, torch.nn.Module] = {"both": both, "average": average}
    fit(parts, list(both.parameters()), loss, steps, lr, state_file, after=lambda: average.update(both))
    average.copy_to(both)
    both.eval()


@app.command("base")
def train_base(
    steps: int = typer.Option(2400, help="Optimiser steps."),
    batch: int = typer.Option(16, help="Pictures a step."),
    lr: float = typer.Option(1.5e-3, help="Peak learning rate."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    seed: int = typer.Option(20, help="Seed of weights, order and noise."),
    output: Path = typer.Option(Path("nano-flow"), help="The diffusers folder to write."),
    work: Path = WORK,
) -> None:
    """Train the base model and save it as a half-precision diffusers folder."""
    prepare_cpu(threads, seed)
    nano = StableDiffusionPipeline.from_pretrained(ASSETS / "base", safety_checker=None, dtype=torch.float32)
    pipeline = flow.new_pipeline(nano)
    train(pipeline, steps, batch, lr, work / f"flow-{steps}.pt")
    for part in (pipeline, pipeline.transformer, pipeline.vae):
        part.register_to_config(_name_or_path="nano-flow")  # not the path of this machine
    pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)
    print(f"{output}: {sum(path.stat().st_size for path in output.rglob('*.safetensors')) / 1e6:.1f} MB")


def _loaded(base: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)


def tune(pipeline: StableDiffusion3Pipeline, name: str, steps: int, lr: float, state_file: Path) -> None:
    """Add a LoRA to the transformer, on attention and MLPs of both streams, and train it on a few-shot set."""
    network = pipeline.transformer.requires_grad_(False)
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    network.set_attn_processor(flow.OnceForAll(flow.ZEROS))
    latents = encode_all(pipeline.vae, torch.from_numpy(load_set(name, "train")))
    tokens = token_ids(pipeline.tokenizer, training_captions(name))
    with torch.no_grad():
        both = [flow.encoded(one, tokens) for one in (pipeline.text_encoder, pipeline.text_encoder_2)]
    states, pooled = (torch.cat(parts, -1) for parts in zip(*both, strict=True))
    order = shuffled(len(latents), BATCH)

    def loss() -> torch.Tensor:
        chosen = next(order)
        return flow.flow_loss(network, latents[chosen], states[chosen], pooled[chosen])

    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    fit({"transformer": network}, parameters, loss, steps, lr, state_file, every=100)


def kohya_tensors(network: torch.nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """The adapter under sd-scripts' names of Stable Diffusion 3, float16: its blocks have q, k and v in one matrix.

    Three adapters of ``rank`` are one of three times the rank there, whose upper matrix has them on its diagonal.
    """
    state, found = half(get_peft_model_state_dict(network)), {}
    for theirs, target in originals_of(network):
        if any(f"{one}.lora_A.weight" not in state for one in target.modules):
            continue
        downs, ups = ([state[f"{one}.lora_{side}.weight"] for one in target.modules] for side in "AB")
        stem = f"lora_unet_{theirs.replace('.', '_')}"
        found[f"{stem}.lora_down.weight"] = torch.cat(downs)
        found[f"{stem}.lora_up.weight"] = torch.block_diag(*ups)
        found[f"{stem}.alpha"] = torch.tensor(float(rank * len(downs)))
    return found


def publish(network: torch.nn.Module, name: str, output: Path, steps: int, lr: float) -> list[Path]:
    """Write the adapter as sd-scripts does, one also as diffusers' trainers do; the files."""
    recipe = Recipe(name, Tuning.lora_kohya)
    file = recipe.file(output)
    metadata = kohya_metadata(few_shot_set(name), RANK, steps, BATCH, lr, 0)
    del metadata["ss_network_args"]  # of convolutions
    metadata |= {"ss_network_module": "networks.lora_sd3", "ss_base_model_version": "sd3_m"}
    metadata |= {"ss_sd_model_name": "nano-flow", "modelspec.architecture": "stable-diffusion-3-medium/lora"}
    file.parent.mkdir(parents=True, exist_ok=True)
    files = [file]
    if name == IN_BOTH_LAYOUTS:
        files.append(Recipe(name, Tuning.lora_peft).file(output))
        layers = half(get_peft_model_state_dict(network))
        StableDiffusion3Pipeline.save_lora_weights(files[1].parent, transformer_lora_layers=layers)
    about = {"set": name, "tuning": "lora", "steps": steps, "batch": BATCH, "lr": lr, "rank": RANK, "seed": 0}
    for one in files:
        (one.parent / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    save_file(kohya_tensors(network, RANK), file, metadata=metadata)  # the last: where it is, the set is done
    return files


def make(name: str, base: Path, output: Path, work: Path, steps_a_picture: int, lr: float) -> list[Path]:
    """Fine-tune a LoRA on one few-shot set and publish it; the files."""
    pipeline = _loaded(base)
    steps = steps_a_picture * len(few_shot_set(name).train)
    tune(pipeline, name, steps, lr, work / f"flow-{name}-{steps}.pt")
    return publish(pipeline.transformer, name, output, steps, lr)


@app.command("loras")
def train_loras(
    only: list[str] | None = typer.Option(None, metavar="SET", help="Only these few-shot sets."),
    base: Path = typer.Option(FLOW_BASE, help="The base model's diffusers folder."),
    steps_a_picture: int = typer.Option(80, help="Optimiser steps for every training picture."),
    lr: float = typer.Option(3e-3, help="Peak learning rate."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    output: Path = typer.Option(Path("nano-flow-loras"), help="Where the files go; finished ones are kept."),
    work: Path = WORK,
) -> None:
    """Fine-tune the few-shot LoRAs of benchmarks/flow.py, each seeded alike, and save them as they are published."""
    unknown = sorted(set(only or ()) - set(SETS))
    if unknown:
        raise typer.BadParameter(f"no such set: {', '.join(unknown)}; there are {', '.join(SETS)}")
    for name in only or SETS:
        if not Recipe(name, Tuning.lora_kohya).file(output).is_file():
            prepare_cpu(threads, 0)
            print(*make(name, base, output, work, steps_a_picture, lr), flush=True)


@app.command("samples")
@torch.inference_mode()
def draw_samples(
    base: Path = typer.Option(FLOW_BASE, help="The base model's diffusers folder."),
    columns: int = typer.Option(2, help="Samples a caption."),
    steps: int = typer.Option(12, help="Euler's steps."),
    guidance: float = typer.Option(3.0, help="Classifier-free guidance."),
    output: Path = typer.Option(Path("docs/nano-flow-samples.png"), help="The sheet."),
) -> None:
    """Write a contact sheet of the base model's samples."""
    contact_sheet(_loaded(base), columns, steps, guidance).save(output, optimize=True)


if __name__ == "__main__":
    app()
