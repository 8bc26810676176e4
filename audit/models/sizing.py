"""What auditing a published base model takes: operations, and memory of the host and of the device.

Where the networks are, and in what precision:

* host: the base as its files store it (bfloat16 and float16 take 2 bytes a weight, float32 takes 4), the changed
  weights in half precision, and one tensor in float32, since the fine-tuned side is merged tensor by tensor;
* device: the base in half precision, copied tensor by tensor without another copy on the host; the changed weights in
  half precision; activations. A VAE that would overflow in float16 (all published ones say so) is in bfloat16.

Evaluations and decoding alternate, so activations are the larger of the two. All figures are counts on the meta device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from audit.errors import CheckpointError, ConfigError
from audit.models.cost import Cost, SamplingCost, decoding_cost, evaluation_cost, weight_bytes
from audit.models.families.base import ModelFamily
from audit.models.families.registry import of_pipeline
from audit.models.placement import decoder_precision, place
from audit.models.published import PublishedModel, build, published

HALF, EXACT = 2, 4  # bytes a weight
CONTEXT_BYTES = 1 << 30  # of a card: the CUDA context, the libraries' kernels and the descriptor (an assumption)
VAE_SCALE = 8
_ATTENTION = re.compile(r"(?:^|\.)(?:self_|cross_)?att(?:n\d?|ention)\.")


@dataclass(frozen=True)
class Footprint:
    """The weights of a base model, and of a LoRA's fine-tuned side: numbers, and bytes of the base on a device.

    ``everything``: a LoRA on all linear layers and convolutions of denoiser and text encoders; ``attention``: one on
    the denoiser's attention. ``largest``: the largest weight that a LoRA changes.
    """

    weights: int
    device_base_bytes: int
    everything: int
    attention: int
    largest: int

    def host_bytes(self, changed: int, stored_bytes: int) -> int:
        """Memory of the host with ``changed`` weights changed, of a base stored in ``stored_bytes`` a weight."""
        return self.weights * stored_bytes + changed * HALF + self.largest * EXACT

    def resident_bytes(self, changed: int) -> int:
        """Memory of the device without activations."""
        return self.device_base_bytes + changed * HALF


@dataclass(frozen=True)
class Sizing:
    """A published model at a resolution: its weights, and what an image costs: ``sampling``, of a few frames where they
    were asked for, and ``single``, of one, as membership takes it.
    """

    name: str
    model: PublishedModel
    resolution: int
    footprint: Footprint
    sampling: SamplingCost
    single: SamplingCost

    def device_bytes(self, changed: int, batch: int = 1, rows: int = 1) -> int:
        """Memory of the device while ``batch`` images are sampled, ``rows`` rows of the denoiser's batch an image."""
        passes = (self.sampling.evaluation.peak_bytes(batch * rows), self.sampling.decoding.peak_bytes(1))
        return self.footprint.resident_bytes(changed) + max(passes)

    def batch(self, changed: int, device_bytes: int, ceiling: int, rows: int = 1) -> int:
        """Images in a batch that fit on a device of ``device_bytes``; 0 where none does."""
        free = device_bytes - CONTEXT_BYTES - self.footprint.resident_bytes(changed)
        return self.sampling.images_that_fit(free, ceiling, rows)


def size(name: str, resolution: int | None = None, frames: int = 1) -> Sizing:
    """The sizing of a published model at ``resolution`` pixels, by default its own. Takes about two seconds.

    Raises ConfigError for a name that is not known, and a side or ``frames`` that the model does not sample.
    """
    model = published(name)
    side = model.resolution if resolution is None else resolution
    unit = 2 * int(model.networks["vae"].configuration.get("scale_factor_spatial", VAE_SCALE))
    if side % unit or not unit <= side <= 4096:
        raise ConfigError(f"a resolution of {side} pixels: give a multiple of {unit} up to 4096")
    architecture = of_pipeline(model.pipeline)
    assert architecture is not None  # all that are published here are of a family of ours
    networks = build_all(model, architecture)
    one = latent_shape(architecture, networks["vae"], side)
    try:
        several = architecture.sampled_shape(SimpleNamespace(**networks), one, frames)
        single = _sampling(model, architecture, networks, one)
        sampling = single if several == one else _sampling(model, architecture, networks, several)
    except CheckpointError as error:
        raise ConfigError(f"{model.title}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{model.title} does not sample {side} pixels: {str(error)[:200]}") from error
    return Sizing(name, model, side, footprint(networks, architecture), sampling, single)


def _sampling(
    model: PublishedModel, architecture: ModelFamily, networks: dict[str, Any], shape: tuple[int, ...]
) -> SamplingCost:
    return SamplingCost(
        published_evaluation(model, architecture, networks, shape),
        decoding_cost(architecture, networks["vae"], shape),
    )


def build_all(model: PublishedModel, architecture: ModelFamily) -> dict[str, Any]:
    """All networks of a model on the meta device, in the precision that they have on a GPU."""
    networks = {name: build(one, architecture.half) for name, one in model.networks.items()}
    vae, meta = networks["vae"], torch.device("meta")
    networks["vae"] = place(vae, meta, decoder_precision(vae, architecture.half, meta))
    return networks


def scale_of(vae: Any) -> int:
    """Pixels along a side of one latent."""
    found: int = vae.config.get("scale_factor_spatial", VAE_SCALE)
    return found


def latent_shape(architecture: ModelFamily, vae: Any, side: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of ``side`` pixels."""
    return architecture.latent_channels(vae), side // scale_of(vae), side // scale_of(vae)


def published_evaluation(
    model: PublishedModel, architecture: ModelFamily, networks: dict[str, Any], shape: tuple[int, ...]
) -> Cost:
    """One evaluation of the denoiser on latents of ``shape``; of two experts, of one."""
    asked = {name: one for name, one in networks.items() if name not in architecture.further_denoisers}
    return evaluation_cost(
        architecture,
        SimpleNamespace(**asked, vae_scale_factor=VAE_SCALE),
        shape,
        architecture.half,
        architecture.text_shape(networks[architecture.denoiser].config, model.text_tokens),
    )


def footprint(networks: dict[str, Any], architecture: ModelFamily) -> Footprint:
    """The weights of ``networks``, and of them what the two LoRAs change."""
    adapted = {
        name: [(key, one.weight.numel()) for key, one in network.named_modules() if _adaptable(one)]
        for name, network in networks.items()
        if name != "vae"
    }
    sizes = [size for found in adapted.values() for _, size in found]
    denoiser = [one for name in architecture.denoisers for one in adapted.get(name, [])]
    return Footprint(
        weights=sum(weight_bytes(one) // one.dtype.itemsize for one in networks.values()),
        device_base_bytes=sum(weight_bytes(one) for one in networks.values()),
        everything=sum(sizes),
        attention=sum(size for key, size in denoiser if _ATTENTION.search(key)),
        largest=max(sizes),
    )


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))
