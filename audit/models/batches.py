"""How many images to take at once: on a GPU what their cost and its free memory say, before memory has ever run out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from audit.devices import free_memory
from audit.models.cost import SamplingCost, cost_of_pair, images_that_fit

if TYPE_CHECKING:
    from audit.models.pair import ModelPair

CPU_BATCH = 32
GPU_BATCH = 64  # at most
FULL = 150e12  # operations of one evaluation of a batch at which any card is busy: more images are not faster
DECODED = 32  # images that are decoded at once, at most


def batch_to_sample(pair: ModelPair, rows: int) -> int:
    """Images in a batch of the denoiser, ``rows`` rows of it an image; at least 1.

    As many as fit, but no more than it takes to keep a card busy: a smaller batch is kept sooner, and leaves more
    memory.
    """
    free = free_memory(pair.device)
    if free is None:
        return max(1, CPU_BATCH // _frames(pair))
    cost = _cost(pair).evaluation
    enough = max(2, round(FULL / (rows * max(1, cost.flops))))
    return max(1, images_that_fit(cost, free, min(GPU_BATCH, enough), rows))


def batch_to_decode(pair: ModelPair) -> int:
    """Images that are decoded at once; at least 1."""
    free = free_memory(pair.device)
    return (
        max(1, DECODED // _frames(pair))
        if free is None
        else max(1, images_that_fit(_cost(pair).decoding, free, DECODED))
    )


def _frames(pair: ModelPair) -> int:
    """Latents along the time of what is sampled for a picture."""
    return pair.sampled_shape[1] if len(pair.sampled_shape) == 4 else 1


def _cost(pair: ModelPair) -> SamplingCost:
    """Counted once a family, size and precision: it takes a few forward passes without arithmetic."""
    kind = "cost", pair.model.revision, pair.sampled_shape, pair.dtype, pair.vae.dtype
    return pair.fits.remember(kind, lambda: cost_of_pair(pair))
