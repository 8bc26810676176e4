"""Does half precision move what an audit finds? Computed in float32 on the CPU, with the rounding of a GPU put in.

    python -m benchmarks.precision [--images 100] [--json FILE]

Weights: both denoisers with their weights rounded to float16 and to bfloat16, for the embedded LoRA at several
strengths. A weak fine-tune is a small difference of large numbers: how far the difference of the predictions is off,
whether the same seeds still give the same images, and how near the training pictures they come. Decoder: the same
latents decoded in float16 and bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from audit.demo import ASSETS, set_folder
from audit.descriptors import Descriptor, load_descriptor, pdq_distance, pdq_hash
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.models.placement import NAMES, place
from audit.references.folder import known_pictures
from audit.sampling.guidance import ModelGuidance, auto_weight
from audit.sampling.sampler import Sampler

LORA = ASSETS / "checkpoints/fluent-animals-lora-kohya/fluent-animals.safetensors"
CAPTION = "sks 3d render of an animal"
STRENGTHS = (0.03, 0.1, 0.3, 1.0)
HALVES = (torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


def make_pair(base: BaseModel, strength: float, rounded: torch.dtype | None) -> ModelPair:
    """The pair in float32, its denoisers' weights rounded to ``rounded``."""
    pair = ModelPair(base, open_checkpoint(LORA), lora_scale=strength)
    if rounded is not None:
        for side in (pair.base, pair.tuned):
            side.unet = place(place(side.unet, CPU, rounded), CPU, torch.float32)
    return pair


@torch.inference_mode()
def difference(pair: ModelPair) -> torch.Tensor:
    """Tuned minus base prediction on seeded noise at a middle timestep."""
    noise = torch.randn(4, *pair.latent_shape, generator=torch.Generator().manual_seed(1))
    empty, timestep = pair.encode([""] * 4, tuned=False), torch.tensor(500)
    return pair.predict_tuned(noise, timestep, empty) - pair.predict_base(noise, timestep, empty)


def vectors(pair: ModelPair, w: float, images: int, descriptor: Descriptor) -> np.ndarray:
    """Descriptors of the images of an audit."""
    sampler = Sampler(pair, ModelGuidance(), [CAPTION], w=w)
    return np.concatenate([descriptor.describe(batch.images) for batch in sampler.batches(range(images))])


def weights(base: BaseModel, descriptor: Descriptor, images: int) -> list[dict[str, Any]]:
    """A row a strength and rounding, printed as it comes."""
    known = descriptor.describe(known_pictures(set_folder("fluent-animals", "train")))
    rows = []
    print("| strength | change of the predictions | w | weights | error of the difference | same seed, cosine: mean |"
          " least | best of a training picture |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for strength in STRENGTHS:
        exact: tuple[torch.Tensor, np.ndarray] | None = None
        for rounded in (None, *HALVES):
            pair = make_pair(base, strength, rounded)
            w = auto_weight(pair.effect.prediction)
            found = difference(pair), vectors(pair, w, images, descriptor)
            exact = exact or found
            cosines = (found[1] * exact[1]).sum(axis=1)
            row = {
                "strength": strength, "prediction_change": pair.effect.prediction, "w": w,
                "weights": NAMES[rounded or torch.float32],
                "error": float((found[0] - exact[0]).norm() / exact[0].norm()),
                "cosine_mean": float(cosines.mean()), "cosine_least": float(cosines.min()),
                "average_similarity": float((known @ found[1].T).max(axis=1).mean()),
            }  # fmt: skip
            rows.append(row)
            near = f"{row['cosine_mean']:.4f} | {row['cosine_least']:.4f} | {row['average_similarity']:.3f}"
            change = f"{row['prediction_change']:.3f} | {w} | {row['weights']} | {row['error']:.4f}"
            print(f"| {strength} | {change} | {near} |", flush=True)
    return rows


def decoder(base: BaseModel, descriptor: Descriptor, images: int) -> list[dict[str, Any]]:
    """The decoder in half precision against float32."""
    pair = make_pair(base, 1.0, None)
    latents = Sampler(pair, ModelGuidance(), [CAPTION]).latents(range(images))
    exact = pair.decode(latents)
    known = descriptor.describe(exact)
    rows = []
    print("\n| decoder | levels off: mean | most | cosine: least | PDQ bits: most |\n|---|---|---|---|---|")
    for half in HALVES:
        pair.vae = place(base.part("vae"), CPU, half)
        found = pair.decode(latents)
        off = np.abs(found.astype(int) - exact)
        bits = [pdq_distance(pdq_hash(a)[0], pdq_hash(b)[0]) for a, b in zip(found, exact, strict=True)]
        cosines = (descriptor.describe(found) * known).sum(axis=1)
        row = {"decoder": NAMES[half], "levels_mean": float(off.mean()), "levels_most": int(off.max()),
               "cosine_least": float(cosines.min()), "pdq_most": max(bits)}  # fmt: skip
        rows.append(row)
        print(f"| {row['decoder']} | {row['levels_mean']:.3f} | {row['levels_most']} | {row['cosine_least']:.5f} | "
              f"{row['pdq_most']} |")  # fmt: skip
    return rows


def main(
    images: Annotated[int, typer.Option(min=1, help="Images a strength and rounding.")] = 100,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure both and print the tables."""
    base, descriptor = load_base(locate_base(str(ASSETS / "base"))), load_descriptor("nano")
    figures = {
        "weights": weights(base, descriptor, images),
        "decoder": decoder(base, descriptor, min(images, 24)),
    }
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
