"""Train the nano descriptor: self-supervised copy detection on pictures that are in no few-shot set.

    python -m testbed.train_descriptor [--steps 3000] [--threads 2]

Two edited copies of a picture attract each other, every other picture of the batch repels (InfoNCE), and an
entropy term spreads the vectors evenly, as in SSCD (arXiv 2202.10261, equations 1 to 3). A third of each batch
comes in groups of one category, so that "another picture of the same kind" is seen often. Then the vectors are
whitened, as much as it takes for 0.7 to separate copies from different pictures of one kind.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
import typer
from PIL import Image

from audit.demo import ASSETS
from testbed import data
from testbed.descriptor_model import IMAGENET_MEAN, IMAGENET_STD, NanoDescriptor
from testbed.sets import SIZE
from testbed.sources import cache_dir
from testbed.training import cosine_schedule, prepare_cpu, run

TEMPERATURE = 0.07
ENTROPY_WEIGHT = 0.2
WHITENING_FLOOR = 1e-3
FALSE_MATCHES_AT_07 = 0.01
# "Different pictures of one kind" for the calibration: kinds like those of few-shot sets. Emoji of faces, persons and
# clocks are left out: many of them are the same picture but for a detail.
KINDS = ("animal", "food", "plant", "cloth", "music", "tool", "transport", "place", "household", "sport")


def normalised(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] float32 [N, 3, H, W] to ImageNet-normalised."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _recompress(image: torch.Tensor, quality: int) -> torch.Tensor:
    buffer = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0) * 255).to(torch.uint8).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1).float() / 255


def edited_copies(images: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Copies of [0, 1] float32 [N, 3, 64, 64], each cropped or padded, turned a little, recoloured, blurred,
    overlaid and recompressed at random. ``strength`` scales the geometric and colour edits.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(count, *shape).uniform_(low, high)

    scale = torch.exp(uniform(-0.45, 0.25) * strength)
    angle = uniform(-0.26, 0.26) * strength * (torch.rand(count) < 0.5)
    mirror = torch.where(torch.rand(count) < 0.25 * strength, -1.0, 1.0)
    stretch = torch.exp(uniform(-0.15, 0.15) * strength)
    shift = uniform(-0.18, 0.18, 2) * strength
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack(
        [
            torch.stack([cos * mirror * stretch, -sin, shift[:, 0]], 1),
            torch.stack([sin * mirror, cos / stretch, shift[:, 1]], 1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    out = 1 - functional.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)

    out = out * torch.exp(uniform(-0.3, 0.3, 3, 1, 1) * strength * 0.5 + uniform(-0.3, 0.3, 1, 1, 1) * strength)
    grey = out.mean(1, keepdim=True)
    out = grey + (out - grey) * (1 + uniform(-0.7, 0.4, 1, 1, 1) * strength)
    out = 0.5 + (out - 0.5) * (1 + uniform(-0.4, 0.3, 1, 1, 1) * strength)

    small = functional.avg_pool2d(out, 2)
    blurred = functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    share = torch.where(torch.rand(count) < 0.5, torch.rand(count), torch.zeros(count)).view(-1, 1, 1, 1)
    out = (1 - share) * out + share * blurred
    out = out + uniform(0, 0.05, 1, 1, 1) * strength * torch.randn_like(out)

    for index in torch.nonzero(torch.rand(count) < 0.3)[:, 0].tolist():  # a small piece of another picture on top
        side = int(torch.randint(10, 26, ()))
        x, y = (int(v) for v in torch.randint(0, SIZE - side, (2,)))
        other = functional.interpolate(images[(index + 1) % count][None], size=(side, side), mode="area")[0]
        out[index, :, y : y + side, x : x + side] = other
    out = out.clamp(0, 1)
    for index in torch.nonzero(torch.rand(count) < 0.3)[:, 0].tolist():
        out[index] = _recompress(out[index], int(torch.randint(25, 90, ())))
    return out


def info_nce(vectors: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The contrastive and the entropy loss of unit vectors [2 * pairs, D]; rows i and i + pairs are copies."""
    similarity = vectors @ vectors.T
    itself = torch.eye(2 * pairs, dtype=torch.bool)
    target = torch.cat([torch.arange(pairs) + pairs, torch.arange(pairs)])
    contrast = functional.cross_entropy(similarity.masked_fill(itself, -1e4) / TEMPERATURE, target)
    copies = torch.zeros_like(itself)
    copies[torch.arange(2 * pairs), target] = True
    nearest = similarity.masked_fill(itself | copies, -1).amax(1)
    entropy = -(2 - 2 * nearest).clamp(min=1e-6).sqrt().log().mean()
    return contrast, entropy


class Batches:
    """Pictures of the training part; a third of each batch in groups of eight of one category."""

    def __init__(self, batch: int) -> None:
        pictures = data.pretraining()
        held_out = np.arange(len(pictures.images)) % 12 == 0
        self.batch = batch
        self.images = np.concatenate([pictures.images[~held_out], data.textures()])
        self.groups = self._groups([c for c, held in zip(pictures.captions, held_out, strict=True) if not held])
        self.held_images = pictures.images[held_out]
        # pairs of the calibration: a held-out picture and any other of its kind and style
        kinds = [self._kind(caption) for caption in pictures.captions]
        chosen = [i for i, (_, kind) in enumerate(kinds) if kind.startswith(KINDS)]
        self.kind_images = pictures.images[chosen]
        rows = np.flatnonzero(held_out)
        self.same_kind = np.array([[kinds[row] == kinds[i] and row != i for i in chosen] for row in rows])

    @staticmethod
    def _kind(caption: str) -> tuple[str, str]:
        return caption.split(" of ")[0], caption.rsplit(", ", 1)[-1]

    @classmethod
    def _groups(cls, captions: list[str], least: int = 8) -> list[np.ndarray]:
        members = defaultdict(list)
        for index, caption in enumerate(captions):
            members[cls._kind(caption)].append(index)
        return [np.array(found) for found in members.values() if len(found) >= least]

    def draw(self) -> torch.Tensor:
        """[0, 1] float32 [batch, 3, 64, 64], no picture twice."""
        chosen: dict[int, None] = {}
        while len(chosen) < self.batch // 3:
            group = self.groups[int(torch.randint(len(self.groups), ()))]
            for index in torch.randperm(len(group))[:8].tolist():
                chosen[int(group[index])] = None
        while len(chosen) < self.batch:
            chosen[int(torch.randint(len(self.images), ()))] = None
        rows = self.images[list(chosen)[: self.batch]]
        return torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def describe(embed: Callable[[torch.Tensor], torch.Tensor], images: np.ndarray) -> torch.Tensor:
    """What ``embed`` (a model or a method of it) makes of uint8 [N, 64, 64, 3]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return torch.cat([embed(normalised(part)) for part in pixels.split(256)])


@torch.no_grad()
def calibrate(model: NanoDescriptor, batches: Batches) -> float:
    """Whiten just enough that at most FALSE_MATCHES_AT_07 of the pairs of one kind reach 0.7; the exponent.

    Principal directions are divided by their variance to the power p: 0 only centres, 0.5 whitens fully, as SSCD
    does (arXiv 2202.10261, section 4.4), and pulls heavily edited copies apart more than needed.
    """
    vectors = describe(model.embed, batches.images)
    model.mean.copy_(vectors.mean(0))
    values, directions = torch.linalg.eigh(torch.cov(vectors.T))
    for exponent in np.arange(0, 0.51, 0.05):
        model.whitening.copy_(directions * (values + WHITENING_FLOOR).pow(-float(exponent)))
        if (distributions(model, batches)["same kind"] >= 0.7).mean() <= FALSE_MATCHES_AT_07:
            break
    return round(float(exponent), 2)


@torch.no_grad()
def distributions(model: NanoDescriptor, batches: Batches) -> dict[str, np.ndarray]:
    """Cosines of held-out pictures with edited copies of themselves (full and half strength), and with other pictures
    of the same kind and style, held out or not.
    """
    torch.manual_seed(7)
    originals = describe(model, batches.held_images)
    pixels = torch.from_numpy(batches.held_images).permute(0, 3, 1, 2).float() / 255
    found = {}
    for name, strength in (("copy", 1.0), ("light copy", 0.5)):
        copies = torch.cat([model(normalised(edited_copies(part, strength))) for part in pixels.split(256)])
        found[name] = (originals * copies).sum(1).numpy()
    others = describe(model, batches.kind_images)
    cosines = (originals @ others.T).numpy()
    found["same kind"] = cosines[batches.same_kind]
    return found


def drop_debug_records(path: Path) -> None:
    """Write a TorchScript archive again without its debug records, which hold paths of the machine it was made on."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def main(
    steps: int = typer.Option(3000, help="Training steps of 64 picture pairs."),
    threads: int = typer.Option(0, help="torch threads; 0: one a core."),
    seed: int = typer.Option(0, help="Seed of weights, batches and edits."),
    output: Path = typer.Option(
        ASSETS / "descriptor", help="Where the TorchScript file goes; the figures are printed."
    ),
    work: Path = typer.Option(cache_dir() / "training", help="Where the resumable state is kept."),
) -> None:
    """Train, calibrate and export the nano descriptor."""
    prepare_cpu(threads, seed)
    batches = Batches(64)
    model = NanoDescriptor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = cosine_schedule(optimizer, steps)

    def step(index: int) -> dict[str, float]:
        pictures = batches.draw()
        views = torch.cat([edited_copies(pictures), edited_copies(pictures)])
        vectors = model.embed(normalised(views))
        contrast, entropy = info_nce(vectors, len(pictures))
        optimizer.zero_grad(set_to_none=True)
        (contrast + ENTROPY_WEIGHT * entropy).backward()
        optimizer.step()
        schedule.step()
        return {"contrast": contrast.item(), "entropy": entropy.item()}

    run(steps, step, {"model": model, "optimizer": optimizer, "schedule": schedule}, work / "descriptor.pt")
    model.eval()
    exponent = calibrate(model, batches)
    found = distributions(model, batches)
    figures = {
        "whitening_exponent": exponent,
        **{
            name: {
                "pairs": len(values),
                "share_at_0.7": round(float((values >= 0.7).mean()), 4),
                "quantiles_5_25_50_75_95": [
                    round(float(q), 3) for q in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
                ],
            }
            for name, values in found.items()
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    script = torch.jit.freeze(torch.jit.script(model))
    torch.jit.save(script, output / "nano_descriptor.torchscript.pt")
    drop_debug_records(output / "nano_descriptor.torchscript.pt")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
