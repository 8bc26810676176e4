"""What audits cost on a device, before one is rented: seconds, memory and the images that fit into a batch.

    seconds an image = (steps x evaluations x operations of one + operations of decoding) / (peak x utilisation)

Membership takes the evaluations of its budget, and of its pictures, at most: they are less where there are few
references and decoys, and where the base's losses are kept; without references with latents there is none.

Operations and memory are counted (audit/models/cost.py), the peak is the maker's, and the utilisation is an assumption:
40 to 60 % of the peak. Encoding of captions, once an audit, loading, merging and control generations are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from audit.config import Evidence, Method, Settings
from audit.evidence.effort import BASE_PICTURES, DECODED, TUNED_PICTURES, references_shown

if TYPE_CHECKING:
    from audit.models.sizing import Sizing
    from audit.workspace import Workspace

UTILISATION = (0.4, 0.6)  # of the peak, an assumption
EVALUATIONS = {Method.direct: 1, Method.cfg: 2, Method.model_guidance: 2}
CEILING = 64  # images in a batch, as in sampling


@dataclass(frozen=True)
class Device:
    """A card: memory in GiB as CUDA reports it (less than the name says), and its peak in TFLOP/s."""

    title: str
    gib: float
    teraflops: float


# Peak of dense half-precision matrix products that accumulate in float32, as PyTorch's do. Where a data sheet gives
# the figure with sparsity, half of it is taken.
DEVICES: dict[str, Device] = {
    # NVIDIA, product page of the RTX 3060: 102 "AI TOPS", with sparsity and accumulation in float16; GeForce cards
    # accumulate in float32 at half that rate (NVIDIA, "Ampere GA102 GPU Architecture", appendix A)
    "rtx3060": Device("RTX 3060 12 GB", 11.8, 25.5),
    # NVIDIA, "Ada GPU Architecture", appendix A: FP16 tensor with FP32 accumulate, dense
    "rtx4090": Device("RTX 4090 24 GB", 23.6, 165.2),
    # NVIDIA, "L4 Tensor Core GPU" data sheet: 242 with sparsity
    "l4": Device("L4 24 GB", 22.0, 121.0),
    # NVIDIA, "A10G Tensor Core GPU" data sheet (the card of AWS' G5): 70 dense, 140 with sparsity
    "a10g": Device("A10G 24 GB", 22.0, 70.0),
    # NVIDIA, "A100 Tensor Core GPU" data sheet: 312 dense
    "a100-40": Device("A100 40 GB", 39.4, 312.0),
    "a100-80": Device("A100 80 GB", 79.3, 312.0),
    # NVIDIA, "H100 Tensor Core GPU" data sheet: 1,513 (PCIe) and 1,979 (SXM) with sparsity
    "h100-pcie": Device("H100 80 GB PCIe", 79.2, 756.5),
    "h100": Device("H100 80 GB SXM", 79.2, 989.5),
    # NVIDIA, "H200 Tensor Core GPU" data sheet (SXM): 1,979 with sparsity
    "h200": Device("H200 141 GB", 139.8, 989.5),
}


@dataclass(frozen=True)
class Work:
    """How an audit samples and measures: what ``Settings`` say, and N0."""

    method: Method = Settings.method
    steps: int = Settings.steps
    images_per_training_image: int = Settings.images_per_training_image
    n0: int = 10
    evidence: Evidence = Settings.evidence
    membership_evaluations: int = Settings.membership_evaluations

    @property
    def images(self) -> int:
        """Images of an audit; none where membership alone is asked for."""
        return self.images_of(self.n0)

    def images_of(self, training_images: int) -> int:
        """Images that are sampled for so many training images."""
        return 0 if self.evidence is Evidence.membership else training_images * self.images_per_training_image

    @property
    def shown(self) -> int:
        """References of which membership makes pictures."""
        return 0 if self.evidence is Evidence.extraction else references_shown(self.membership_evaluations)

    @property
    def membership(self) -> int:
        """Evaluations that membership takes at most, of both models, its pictures among them."""
        if self.evidence is Evidence.extraction:
            return 0
        return self.membership_evaluations + self.shown * (BASE_PICTURES + TUNED_PICTURES)

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser for an image."""
        return self.steps * EVALUATIONS[self.method]

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch an image takes: classifier-free guidance asks for both halves at once."""
        return 2 if self.method is Method.cfg else 1


@dataclass(frozen=True)
class Span:
    """A figure at the best and at the worst utilisation."""

    low: float
    high: float

    def times(self, factor: float) -> Span:
        """Both ends times ``factor``."""
        return Span(self.low * factor, self.high * factor)

    def plus(self, other: Span) -> Span:
        """Both ends added."""
        return Span(self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Estimate:
    """One model on one device. The seconds of membership are among those of an audit.

    Bytes are those of the device with one image in the batch, of which ``batch`` ones fit (64 at most, 0: it does not
    fit): for a LoRA on everything, and for one on the denoiser's attention alone.
    """

    family: str
    device: str
    seconds_an_image: Span
    seconds_of_membership: Span
    seconds_an_audit: Span
    bytes_everything: int
    bytes_attention: int
    batch_everything: int
    batch_attention: int

    @property
    def hours_an_audit(self) -> Span:
        """GPU hours."""
        return self.seconds_an_audit.times(1 / 3600)


def seconds_an_image(
    evaluation: float,
    evaluations: int,
    decoding: float,
    teraflops: float,
    utilisation: tuple[float, float] = UTILISATION,
) -> Span:
    """Seconds for an image: ``evaluations`` of ``evaluation`` operations, and one decoding of ``decoding``."""
    return _seconds(evaluations * evaluation + decoding, teraflops, utilisation)


def _seconds(operations: float, teraflops: float, utilisation: tuple[float, float] = UTILISATION) -> Span:
    worst, best = (teraflops * 1e12 * share for share in utilisation)
    return Span(operations / best, operations / worst)


def estimate(sizing: Sizing, name: str, work: Work) -> Estimate:
    """What audits of a model take on the device ``name``. Raises ConfigError where there is no such device."""
    device = device_named(name)
    sampling, weights = sizing.sampling, sizing.footprint
    image = seconds_an_image(sampling.evaluation.flops, work.evaluations, sampling.decoding.flops, device.teraflops)
    single = sizing.single
    measured = work.membership * single.evaluation.flops + work.shown * DECODED * single.decoding.flops
    membership = _seconds(measured, device.teraflops)
    memory = int(device.gib * 2**30)
    changes = weights.everything, weights.attention
    return Estimate(
        sizing.name,
        name,
        image,
        membership,
        image.times(work.images).plus(membership),
        *(sizing.device_bytes(changed, rows=work.rows) for changed in changes),
        *(sizing.batch(changed, memory, CEILING, work.rows) for changed in changes),
    )


def device_named(name: str) -> Device:
    """A device of the table. Raises ConfigError."""
    from audit.errors import ConfigError

    if name not in DEVICES:
        raise ConfigError(f"there is no device {name!r} in the table: choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


@dataclass(frozen=True)
class Backlog:
    """Networks of a catalog without an audit: of one published model, or of a family that is not estimated (None).

    ``training_images`` is the sum of their N0; ``note`` says what a reader must know.
    """

    family: str
    model: str | None
    networks: int
    training_images: int
    note: str = ""


_BY_FAMILY = {
    "sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl", "flux": "flux-dev", "chroma": "chroma", "flux2": "flux2-dev",
    "z-image": "z-image", "qwen-image": "qwen-image", "ernie-image": "ernie-image",
    "krea-2": "krea-2", "anima": "anima", "hidream": "hidream-i1", "kolors": "kolors",
}  # fmt: skip
_SD3_UNSAID = "the size is not said: counted as large"
_KLEIN_UNSAID = "the size is not said: counted as 9B"
_WAN_UNSAID = "the size is not said: counted as 14B"
_ALT = "its UNet is that of Stable Diffusion 1"


def model_of(family: str | None, base_model: str | None) -> tuple[str | None, str]:
    """The published model whose cost a network of the catalog has, and a note; None where it is not known."""
    if family == "sd3":
        claim = (base_model or "").lower()
        if "medium" in claim or claim in ("sd 3", "sd3"):
            return "sd3.5-medium", ""
        return "sd3.5-large", "" if "large" in claim else _SD3_UNSAID
    if family == "flux2-klein":
        claim = (base_model or "").lower()
        small = "4b" in claim
        return ("flux2-klein-4b", "") if small else ("flux2-klein-9b", "" if "9b" in claim else _KLEIN_UNSAID)
    if family == "wan-5b":
        return "wan2.2-5b", ""
    if family == "wan":
        claim = (base_model or "").lower()
        if re.search(r"wan\D{0,9}2[._]?2", claim):
            return "wan2.2-a14b", ""
        small = "1.3b" in claim
        return ("wan2.1-1.3b", "") if small else ("wan2.1-14b", "" if "14b" in claim else _WAN_UNSAID)
    if family == "altdiffusion":
        return "sd15", _ALT
    return _BY_FAMILY.get(family or ""), ""


def backlog_of(workspace: Workspace, n0: int | None, default_n0: int) -> list[Backlog]:
    """What the catalog holds and no audit has been made of, the most networks first.

    N0 is ``n0`` for all where it is given, else what the catalog claims of each, else ``default_n0``. The same tensors
    in several places are one network. An audit under any settings counts.
    """
    rows = workspace.rows(
        "SELECT identity, family, base_model, training_images FROM checkpoints WHERE identity IS NOT NULL "
        "AND format IS NOT NULL AND state <> 'opted-out' AND identity NOT IN (SELECT identity FROM checkpoints "
        "WHERE identity IS NOT NULL AND checkpoint_sha256 IN (SELECT checkpoint_sha256 FROM audits)) ORDER BY item_id"
    )
    places: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault(row["identity"], []).append(row)
    groups: dict[tuple[str, str | None, str], list[int]] = {}
    for seen in places.values():
        named = next((row for row in seen if row["family"]), seen[0])
        images = n0 or next((row["training_images"] for row in seen if row["training_images"]), default_n0)
        model, note = model_of(named["family"], named["base_model"])
        groups.setdefault((named["family"] or "unknown", model, note), []).append(images)
    found = [Backlog(family, model, len(n), sum(n), note) for (family, model, note), n in groups.items()]
    return sorted(found, key=lambda one: (-one.networks, one.family, one.note))


def unseen_items(workspace: Workspace) -> int:
    """Items of the catalog that are listed and not downloaded: nobody knows yet what is in them."""
    found = workspace.rows("SELECT count(*) AS n FROM checkpoints WHERE identity IS NULL AND state = 'listed'")
    return int(found[0]["n"])


def hours(backlog: Iterable[Backlog], estimates: dict[str, Estimate], work: Work) -> dict[str, Span]:
    """GPU hours of a backlog by published model, for the ``estimates`` of one device."""
    total: dict[str, Span] = {}
    for one in backlog:
        if one.model is None or one.model not in estimates:
            continue
        found = estimates[one.model]
        seconds = found.seconds_an_image.times(work.images_of(one.training_images))
        span = seconds.plus(found.seconds_of_membership.times(one.networks)).times(1 / 3600)
        total[one.model] = total.get(one.model, Span(0.0, 0.0)).plus(span)
    return total
