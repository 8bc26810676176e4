"""What a pass through a network costs: operations and memory, counted on the meta device without weights.

A forward pass on the meta device runs the very operations of a GPU's, on tensors that have shapes and no memory. A
dispatch mode sees each of them: it adds up the multiply-adds (two operations each, as torch's own FlopCounterMode) and
follows every storage from its making to its end, so that the most that is alive at once is known. Attention is taken
as the fused kernel that a GPU has: it reads queries, keys and values and makes its output alone.

What is not seen is what lies within kernels: the workspaces of cuDNN and cuBLAS, and how an allocator rounds and
fragments. ``images_that_fit`` leaves a margin for it. All is computed, nothing of it measured on a card.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from audit.models.families.base import Condition, ModelFamily, TextShape
from audit.models.formats.parts import layout_of

if TYPE_CHECKING:
    from audit.models.pair import ModelPair

MARGIN = 0.15  # of the free memory, left to workspaces of kernels and to the allocator
META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """One forward pass.

    ``flops``: operations for one image. ``weight_bytes``: parameters and buffers. ``constant_bytes`` and
    ``activation_bytes_per_image``: the most memory alive at once beside the weights is the first plus the second times
    the images in the batch; inputs and outputs are among it.
    """

    flops: int
    weight_bytes: int
    activation_bytes_per_image: int
    constant_bytes: int

    def peak_bytes(self, batch: int) -> int:
        """The most memory alive at once beside the weights, for a batch of ``batch`` images."""
        return self.constant_bytes + batch * self.activation_bytes_per_image


@dataclass(frozen=True)
class SamplingCost:
    """What sampling alternates between: evaluations of the denoiser, and decoding of the finished latents in slices."""

    evaluation: Cost
    decoding: Cost

    def images_that_fit(self, free_bytes: int, ceiling: int, rows: int = 1) -> int:
        """Images in a batch of the denoiser, where at least one can be decoded; ``rows`` as in the function below."""
        if not images_that_fit(self.decoding, free_bytes, 1):
            return 0
        return images_that_fit(self.evaluation, free_bytes, ceiling, rows)


def images_that_fit(cost: Cost, free_bytes: int, ceiling: int, rows: int = 1) -> int:
    """Images in a batch, ``ceiling`` at most, whose pass takes no more than 85 % of ``free_bytes``; 0 where none fits.

    ``rows`` is how many rows of the batch an image takes: two in classifier-free guidance. The 15 % left over are for
    what the count does not see. ``free_bytes`` is what is free once all weights are resident.
    """
    room = int(free_bytes * (1 - MARGIN)) - cost.constant_bytes
    return max(0, min(ceiling, room // max(1, rows * cost.activation_bytes_per_image)))


def cost_of_pair(pair: ModelPair, condition: Condition | None = None) -> SamplingCost:
    """What sampling from a loaded pair costs, at its resolution and in its precision; no weights are copied.

    ``condition`` is one that the pair has encoded, of any captions; without it the empty one is encoded to see its
    shape. Of two experts an evaluation asks one: they cost the same. Takes as long as four forward passes without
    arithmetic: a few seconds at most.
    """
    text = TextShape.of(pair.encode([""], tuned=False) if condition is None else condition)
    networks = copy.copy(pair.base)
    name = pair.architecture.denoiser
    setattr(networks, name, on_meta(getattr(pair.base, name)))
    for other in pair.architecture.further_denoisers:
        setattr(networks, other, None)
    return SamplingCost(
        evaluation_cost(pair.architecture, networks, pair.sampled_shape, pair.dtype, text),
        decoding_cost(pair.architecture, on_meta(pair.vae), pair.sampled_shape),
    )


def evaluation_cost(
    architecture: ModelFamily, networks: Any, latent_shape: Sequence[int], dtype: torch.dtype, text: TextShape
) -> Cost:
    """One evaluation of the denoiser of ``networks``, a pipeline or what has its parts, on the meta device."""

    def evaluate(batch: int) -> Any:
        latents = torch.empty(batch, *latent_shape, dtype=dtype, device=META)
        latents = latents.to(memory_format=layout_of(latents.ndim))
        timestep = torch.empty((), dtype=torch.float32, device=META)
        return architecture.predict(networks, latents, timestep, text.condition(batch, dtype), 3.5)

    return measure(evaluate, getattr(networks, architecture.denoiser))


def decoding_cost(architecture: ModelFamily, vae: Any, latent_shape: Sequence[int]) -> Cost:
    """Pixels from latents by a VAE on the meta device."""
    return measure(lambda batch: architecture.to_pixels(vae, _empty(vae, batch, latent_shape)), vae)


def encoding_cost(vae: Any, side: int) -> Cost:
    """Latents from pictures of ``side`` pixels by a VAE on the meta device."""
    return measure(lambda batch: vae.encode(_empty(vae, batch, (3, side, side))).latent_dist.mean, vae)


def encoder_cost(encoder: Any, tokens: int) -> Cost:
    """Text states of ``tokens`` tokens by a text encoder on the meta device; an image here is a caption."""

    def encode(batch: int) -> Any:
        numbers = torch.empty(batch, tokens, dtype=torch.long, device=META)
        return encoder(numbers, output_hidden_states=True)

    return measure(encode, encoder)


def _empty(network: Any, batch: int, shape: Sequence[int]) -> torch.Tensor:
    made = torch.empty(batch, *shape, dtype=network.dtype, device=META)
    return made.to(memory_format=layout_of(made.ndim))


def measure(forward: Callable[[int], Any], network: nn.Module) -> Cost:
    """The cost of ``forward``, a function of the batch's size, through ``network``: counted at one and at two images.

    Raises RuntimeError where the pass needs a value that the meta device has not.
    """
    with torch.no_grad():
        forward(1)  # some networks keep tables from their first pass on, which are no pass' own
    one, two = (_count(forward, batch, network) for batch in (1, 2))
    slope = two.peak - one.peak
    return Cost(one.flops, weight_bytes(network), slope, max(0, one.peak - slope))


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers; tensors that share memory count once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _tensors(network)}
    return sum(storages.values())


def on_meta(network: Any) -> Any:
    """A copy of a network on the meta device, without copying a weight; its layout and precision are kept."""
    tensors: dict[int, Any] = {}
    for tensor in _tensors(network):
        empty = tensor.detach().to(META)
        tensors[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, tensors)


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def _count(forward: Callable[[int], Any], batch: int, network: nn.Module) -> _Counter:
    counter = _Counter(_tensors(network))
    with torch.no_grad(), counter, _FusedAttention(counter):
        forward(batch)
    return counter


class _Counter(TorchDispatchMode):
    """Adds up operations, and follows storages: ``live`` bytes now, ``peak`` at most."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._followed: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        operations = flop_registry.get(func.overloadpacket)
        if operations is not None:
            self.flops += operations(*args, **(kwargs or {}), out_val=made)
        copied = 0
        if func is torch.ops.aten.convolution.default:
            made, copied = _as_cudnn(made, *args[:2])
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.live + copied)
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._followed:
            return
        self._followed[key] = weakref.ref(storage, lambda _: self._end(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _end(self, key: int, size: int) -> None:
        del self._followed[key]
        self.live -= size


def _as_cudnn(made: torch.Tensor, given: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A convolution's output in the layout that cuDNN gives it, and the bytes that it copies within.

    Where input or weight is channels-last, the output is, and an input that is not is converted first. The meta
    device's own convolution looks at the input alone.
    """
    if given.ndim != 4 or torch.channels_last not in (suggest_memory_format(given), suggest_memory_format(weight)):
        return made, 0
    copied = 0 if given.is_contiguous(memory_format=torch.channels_last) else given.numel() * given.element_size()
    return made.to(memory_format=torch.channels_last), copied


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU's fused kernels do it: two matrix products, and no matrix of queries by keys in memory."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = named["query"], named["key"], named["value"]
        *batch, heads, queries, width = query.shape
        rows = heads * queries
        for size in batch:
            rows *= size
        self.counter.flops += 2 * rows * key.shape[-2] * (width + value.shape[-1])
        # the kernels write heads side by side, so that joining them is a view
        joined = torch.empty(*batch, queries, heads, value.shape[-1], dtype=query.dtype, device=query.device)
        return joined.transpose(-3, -2)
