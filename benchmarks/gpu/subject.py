"""The one place where the GPU benchmark touches lora-audit's own classes: pairs, samplers, extraction, audits.

Everything else of the benchmark works with what is defined here, so that a change of those classes is followed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audit.bench import Bench
from audit.config import Precision, Settings, Solver
from audit.demo import ASSETS
from audit.descriptors import load_descriptor, pdq_hash
from audit.descriptors.base import to_png
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.job import ALGORITHM_VERSION, Job, Request, resolve
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.families.registry import of_pipeline
from audit.models.pair import ModelPair
from audit.models.placement import NAMES
from audit.references.sets import ReferenceSets
from audit.sampling.collect import Collector
from audit.sampling.guidance import Conditioning, Guidance, ModelGuidance, make_guidance
from audit.sampling.sampler import Sampler
from audit.stages import Cluster, Match, Sample
from audit.workspace import Workspace
from benchmarks.gpu.measure import Clock, replaced

BASE, SET = ASSETS / "base", ASSETS / "sets/fluent-animals"
LORA = ASSETS / "checkpoints/fluent-animals-lora-kohya/fluent-animals.safetensors"
CAPTION = "sks 3d render of an animal"
TRAINING_IMAGES = 10
W = 2.0
STEPS = 15
VERSION = ALGORITHM_VERSION  # of the facts that an audit answers

__all__ = ["Sampler", "pdq_hash", "to_png"]


@dataclass(frozen=True)
class NanoAudit:
    """What an audit of the embedded model finds.

    ``vectors`` are the descriptors float32 [images, D] in order, ``matches`` the reference pictures that matched,
    ``change`` the relative change of the prediction.
    """

    vectors: np.ndarray
    matches: list[str]
    change: float
    seconds: float


def nano_audit(device: str, folder: Path, images_each: int) -> NanoAudit:
    """Audit the embedded LoRA against its training set, ``images_each`` images a training image."""
    settings = Settings(images_per_training_image=images_each)
    request = Request(LORA, str(BASE), captions=[CAPTION], n0=TRAINING_IMAGES, settings=settings)
    place = Place(Workspace(folder), Bench(device))
    job = resolve(request, "nano", place.bench)
    ReferenceSets(place.workspace).add("set", SET, place.bench.descriptor(job), False, lambda *_: None)
    started = time.perf_counter()
    run_stages([Sample(), Cluster()], job, place)
    seconds = time.perf_counter() - started
    run_stages([Match(["set"])], job, place)
    return _found(place.workspace, job, seconds)


def _found(workspace: Workspace, job: Job, seconds: float) -> NanoAudit:
    rows = workspace.rows('SELECT descriptor FROM generations ORDER BY "index"')
    matches = workspace.rows("SELECT DISTINCT reference_id FROM matches WHERE is_match ORDER BY 1")
    (audit,) = workspace.rows("SELECT prediction_change FROM audits WHERE audit_id = ?", [job.id])
    return NanoAudit(
        np.array([row["descriptor"] for row in rows], np.float32),
        [row["reference_id"] for row in matches],
        audit["prediction_change"],
        seconds,
    )


def nano_pair(device: str) -> ModelPair:
    """The embedded base and LoRA."""
    return ModelPair(load_base(locate_base(str(BASE))), open_checkpoint(LORA), device)


def family_pair(base: BaseModel, checkpoint: Path, device: str, half: bool) -> ModelPair:
    """A pair of any family, at 64 pixels; in half precision or float32, whatever the device's own choice is."""
    precision = NAMES[base.architecture.half] if half else Precision.fp32
    return ModelPair(base, open_checkpoint(checkpoint), device, resolution=64, precision=precision)


@dataclass(frozen=True)
class RealPair:
    """A pair of random networks of real size, the LoRA's file, and how long each checkpoint took to put in effect."""

    pair: ModelPair
    lora: Path
    first_seconds: float
    second_seconds: float


def real_pair(pipeline: Any, lora: Path, device: str, synchronise: Callable[[], None]) -> RealPair:
    """Put ``lora`` into effect on ``pipeline``, and once more as the next checkpoint of the same base."""
    family = of_pipeline(type(pipeline).__name__)
    assert family is not None
    for part in family.networks:
        getattr(pipeline, part).to(memory_format=torch.channels_last)
    base = BaseModel("random", "0", family, pipeline)
    found: list[float] = []
    pair = None
    for _ in range(2):
        pair = None  # as an engine's worker: the old fine-tuned side goes before the new one comes
        started = time.perf_counter()
        pair = ModelPair(base, open_checkpoint(lora), device)
        synchronise()
        found.append(time.perf_counter() - started)
    assert pair is not None
    return RealPair(pair, lora, *found)


def sampler_of(
    pair: ModelPair, batch: int = 0, steps: int = STEPS, captions: Sequence[str] = (CAPTION,), seed: int = 0
) -> Sampler:
    """A sampler as an audit has it, with a fixed weight; the batch is the device's own where it is 0."""
    guidance = make_guidance(Settings())
    return Sampler(pair, guidance, captions, Solver.dpmpp, steps, seed=seed, batch_size=batch, w=W)


def images_of(sampler: Sampler, count: int) -> np.ndarray:
    """The images uint8 [count, H, W, 3] of numbers 0 to ``count``."""
    return np.concatenate([batch.images for batch in sampler.batches(range(count))])


def evaluation(pair: ModelPair, batch: int) -> Callable[[], torch.Tensor]:
    """One evaluation of the fine-tuned denoiser on ``batch`` images, ready to be called."""
    rows = torch.zeros(batch, dtype=torch.long, device=pair.device)
    condition = pair.encode([CAPTION], tuned=True).select(rows)
    x = torch.randn(batch, *pair.latent_shape, device=pair.device).to(pair.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    timestep = torch.tensor(500, device=pair.device)
    return lambda: pair.predict_tuned(x, timestep, condition)


def random_latents(pair: ModelPair, batch: int) -> torch.Tensor:
    """Latents [batch, C, H, W] of the size that decoding is given."""
    return torch.randn(batch, *pair.latent_shape, device=pair.device).to(pair.dtype)


def decoding(pair: ModelPair, batch: int) -> Callable[[], np.ndarray]:
    """Decoding of ``batch`` latents, ready to be called."""
    latents = random_latents(pair, batch)
    return lambda: pair.decode(latents)


class Watched:
    """Guidance that calls ``begin`` before its first prediction: the loop, without what comes before it."""

    def __init__(self, guidance: Guidance, begin: Callable[[], None]) -> None:
        self.guidance, self.begin, self.begun = guidance, begin, False
        self.evaluations, self.rows = guidance.evaluations, guidance.rows

    def predict(
        self, pair: ModelPair, x: torch.Tensor, t: torch.Tensor, alpha: float, conditioning: Conditioning, w: float
    ) -> torch.Tensor:
        """As the guidance it watches."""
        if not self.begun:
            self.begun = True
            self.begin()
        return self.guidance.predict(pair, x, t, alpha, conditioning, w)


def watch_loop(sampler: Sampler, images: int, begin: Callable[[], None]) -> torch.Tensor:
    """The latents of ``images`` images; ``begin`` is called where the loop over the steps begins."""
    with replaced(sampler, "guidance", Watched(ModelGuidance(), begin)):
        return sampler.latents(range(images))


@contextmanager
def counting_samplings(sampler: Sampler) -> Iterator[list[int]]:
    """Within, the list grows by the size of every batch that is sampled to its end."""
    sampled: list[int] = []
    inner = sampler.latents

    def counted(indices: Sequence[int]) -> torch.Tensor:
        latents = inner(indices)
        sampled.append(len(indices))
        return latents

    with replaced(sampler, "latents", counted):
        yield sampled


@contextmanager
def refusing(sampler: Sampler, where: str, most: int, fault: Callable[[], None]) -> Iterator[None]:
    """Within, ``fault`` is called where more than ``most`` images are to be sampled ("latents") or decoded ("vae")."""
    owner, name = (sampler, "latents") if where == "latents" else (sampler.pair.vae, "decode")
    inner = getattr(owner, name)

    def refused(batch: Any, *arguments: Any, **named: Any) -> Any:
        if len(batch) > most:
            fault()
        return inner(batch, *arguments, **named)

    with replaced(owner, name, refused):
        yield


@dataclass(frozen=True)
class Extraction:
    """An extraction as an audit runs it; shares are of its wall time."""

    images: int
    seconds: float
    evaluation_share: float
    decoding_share: float
    samplings: int
    batch: int


def extract(pair: ModelPair, device: str, folder: Path, images: int) -> Extraction:
    """Sample, decode, describe, hash and keep ``images`` images, at the default batch."""
    sampler, clock = sampler_of(pair), Clock(device)
    spool = Workspace(folder).spool("0" * 32)
    stage = Collector(sampler, load_descriptor("nano", device), spool, "0" * 32, images, True)
    with ExitStack() as watching:
        for owner, name, part in (
            (pair, "predict_base", "evaluation"),
            (pair, "predict_tuned", "evaluation"),
            (pair.vae, "decode", "decoding"),
        ):
            watching.enter_context(clock.watching(owner, name, part))
        sampled = watching.enter_context(counting_samplings(sampler))
        started = time.perf_counter()
        stage.run()
        seconds = time.perf_counter() - started
    evaluating, decoding = (clock.seconds(part) / seconds for part in ("evaluation", "decoding"))
    return Extraction(images, seconds, evaluating, decoding, sum(sampled), sampler.batch_size)


def describe_and_keep(pictures: Sequence[Any], device: str, folder: Path) -> None:
    """What a plain script does with its pictures: a PNG file each, then the descriptor of one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = load_descriptor("nano", device)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
        descriptor.describe([picture])
