"""What a pass costs: published operations of real-size networks, memory by hand, and pairs of every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from audit.models import cost
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.cost import Cost, SamplingCost, TextShape, cost_of_pair, images_that_fit, measure
from audit.models.families.registry import FAMILIES
from audit.models.pair import ModelPair
from audit.models.published import PUBLISHED, build
from audit.models.sizing import Sizing, build_all, size
from tests.models import nano
from tests.models.files import full_change

SIDE = 1000  # numbers of an image in the hand-made networks; 4 bytes each


# TFLOP of one evaluation of one image at the model's own resolution, its text tokens counted
EVALUATIONS = {"sd15": 0.80, "sdxl": 6.8, "sd3.5-medium": 11.3, "flux-dev": 74.0, "flux2-klein-4b": 34.8}


@pytest.fixture(scope="module")
def sizings() -> dict[str, Sizing]:
    return {name: size(name) for name in (*EVALUATIONS, "sd2", "chroma")}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_every_published_network_has_the_parameters_that_were_published(name: str) -> None:
    for part, network in PUBLISHED[name].networks.items():
        made = build(network)
        millions = sum(parameter.numel() for parameter in made.parameters()) / 1e6
        assert millions == pytest.approx(network.millions, rel=2e-4), part
        assert all(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()]), part


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_an_evaluation_takes_the_known_operations(sizings: dict[str, Sizing], name: str) -> None:
    assert sizings[name].sampling.evaluation.flops / 1e12 == pytest.approx(EVALUATIONS[name], rel=0.01)


def test_decoding_takes_the_known_operations(sizings: dict[str, Sizing]) -> None:
    assert sizings["sd15"].sampling.decoding.flops / 1e12 == pytest.approx(2.515, rel=1e-3)
    assert sizings["sdxl"].sampling.decoding.flops / 1e12 == pytest.approx(10.47, rel=1e-3)


def test_the_weights_are_those_of_the_published_files(sizings: dict[str, Sizing]) -> None:
    """Files of diffusion_pytorch_model.safetensors in half precision, GB; buffers are in them."""
    for name, gigabytes in {"sd15": 1.72, "sdxl": 5.14, "sd3.5-medium": 4.94, "flux-dev": 23.80}.items():
        assert sizings[name].sampling.evaluation.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=2e-3), name


def test_a_larger_picture_and_a_larger_lora_cost_more(sizings: dict[str, Sizing]) -> None:
    small, large = sizings["sd15"], size("sd15", 768)
    assert large.sampling.evaluation.flops > 2.25 * small.sampling.evaluation.flops  # attention grows by the square
    assert large.sampling.decoding.activation_bytes_per_image == pytest.approx(
        2.25 * small.sampling.decoding.activation_bytes_per_image, rel=0.01
    )
    for one in sizings.values():
        weights = one.footprint
        assert 0 < weights.attention < weights.everything < weights.weights
        assert weights.host_bytes(weights.everything, 4) - weights.host_bytes(weights.everything, 2) == (
            2 * weights.weights
        )
        assert one.device_bytes(weights.attention, batch=2) < one.device_bytes(weights.everything, batch=2)


def test_a_vae_that_overflows_in_float16_is_counted_in_bfloat16() -> None:
    networks = build_all(PUBLISHED["sdxl"], FAMILIES["sdxl"])
    assert networks["vae"].dtype is torch.bfloat16
    assert networks["unet"].dtype is torch.float16


class Chain(nn.Module):
    """y = f(f(f(x))) with a weight: by hand, the input and two results are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIDE, device="meta"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.weight
        y = y.view(-1).view(x.shape)  # the same memory; its first tensor is gone
        y = torch.relu(y)
        return torch.relu(y)


def inputs(batch: int, *shape: int) -> torch.Tensor:
    return torch.empty(batch, *shape, device="meta")


def test_memory_is_what_is_alive_at_once() -> None:
    chain = Chain()
    found = measure(lambda batch: chain(inputs(batch, SIDE)), chain)
    assert found == Cost(0, 4 * SIDE, 3 * 4 * SIDE, 0)

    def keeping(batch: int) -> list[torch.Tensor]:
        x = inputs(batch, SIDE)
        return [torch.relu(x) for _ in range(5)]

    assert measure(keeping, chain).activation_bytes_per_image == 6 * 4 * SIDE


def test_memory_that_does_not_grow_with_the_batch_is_told_apart() -> None:
    def forward(batch: int) -> Any:
        table = torch.zeros(7 * SIDE, device="meta")
        return torch.relu(inputs(batch, SIDE)), table

    assert measure(forward, Chain()) == Cost(0, 4 * SIDE, 2 * 4 * SIDE, 7 * 4 * SIDE)


def test_attention_is_the_fused_kernel_of_a_gpu() -> None:
    """Two matrix products, and an output: no matrix of queries by keys."""
    heads, queries, keys, width = 4, 256, 77, 16

    def attend(batch: int) -> torch.Tensor:
        q, kv = inputs(batch, heads, queries, width), inputs(batch, heads, keys, width)
        return nn.functional.scaled_dot_product_attention(q, kv, value=kv).transpose(1, 2).reshape(batch, queries, -1)

    found = measure(attend, Chain())
    assert found.flops == 4 * heads * queries * keys * width
    assert found.activation_bytes_per_image == 4 * heads * width * (2 * queries + keys)


def test_a_convolution_copies_an_input_that_is_not_channels_last() -> None:
    convolution = nn.Conv2d(8, 8, 3, padding=1, device="meta").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    numbers = 8 * 16 * 16
    answers = []

    def apply(batch: int, layout: torch.memory_format) -> torch.Tensor:
        made = convolution(inputs(batch, 8, 16, 16).to(memory_format=layout))
        answers.append(made.is_contiguous(memory_format=torch.channels_last))
        return made

    plain = measure(lambda batch: apply(batch, torch.contiguous_format), convolution)
    assert plain.activation_bytes_per_image == 3 * 4 * numbers
    assert plain.flops == 2 * numbers * 8 * 9
    assert all(answers[1:])  # the first is not counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", params=list(nano.FAMILIES))
def pair(request: pytest.FixtureRequest, folder: Path) -> ModelPair:
    base = nano.make(request.param, folder)
    return ModelPair(base, open_checkpoint(full_change(base, folder / f"{request.param}-tuned")), resolution=64)


def test_a_pair_of_every_family_costs_what_it_runs(pair: ModelPair) -> None:
    """By torch's own counter over the real pass, with attention as two matrix products."""
    condition = pair.encode([""], tuned=False)
    found = cost_of_pair(pair)
    assert cost_of_pair(pair, condition) == found
    latents = torch.randn(1, *pair.latent_shape)
    counted = []
    for run in (
        lambda: pair.architecture.predict(pair.base, latents, torch.tensor(500.0), condition, 3.5),
        lambda: pair.architecture.to_pixels(pair.vae, latents),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            run()
        counted.append(counter.get_total_flops())
    assert [found.evaluation.flops, found.decoding.flops] == counted
    assert found.evaluation.weight_bytes == sum(tensor.nbytes for tensor in tensors_of(pair.base, pair))
    assert found.evaluation.activation_bytes_per_image > 2 * latents.nbytes


def tensors_of(side: Any, pair: ModelPair) -> list[torch.Tensor]:
    network = getattr(side, pair.architecture.denoiser)
    return [*network.parameters(), *network.buffers()]


def test_counting_a_pair_leaves_its_networks_where_they_are(pair: ModelPair) -> None:
    before = [(tensor.data_ptr(), tensor.device) for tensor in tensors_of(pair.base, pair)]
    cost_of_pair(pair)
    assert [(tensor.data_ptr(), tensor.device) for tensor in tensors_of(pair.base, pair)] == before


def test_memory_is_linear_in_the_batch(pair: ModelPair) -> None:
    """What is counted at one and two images holds at seven."""
    found = cost_of_pair(pair)
    vae = cost.on_meta(pair.vae)
    decoded = cost._count(lambda batch: pair.architecture.to_pixels(vae, inputs(batch, *pair.latent_shape)), 7, vae)
    assert found.decoding.peak_bytes(7) == pytest.approx(decoded.peak, rel=0.01)
    network = cost.on_meta(getattr(pair.base, pair.architecture.denoiser))
    parts = SimpleNamespace(**{pair.architecture.denoiser: network}, vae_scale_factor=pair.base.vae_scale_factor)
    text = TextShape.of(pair.encode([""], tuned=False))

    def evaluate(batch: int) -> torch.Tensor:
        latents = inputs(batch, *pair.latent_shape).to(memory_format=torch.channels_last)
        condition = text.condition(batch, torch.float32)
        return pair.architecture.predict(parts, latents, inputs(1)[0], condition, 3.5)

    assert found.evaluation.peak_bytes(7) == pytest.approx(cost._count(evaluate, 7, network).peak, rel=0.02)


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, BaseModel]:
    return {name: nano.make(name, folder) for name in ("sd1", "flux")}


def test_a_copy_on_the_meta_device_has_layout_precision_and_shared_weights(bases: dict[str, BaseModel]) -> None:
    unet = cost.on_meta(bases["sd1"].denoiser)
    for (name, copied), original in zip(unet.named_parameters(), bases["sd1"].denoiser.parameters(), strict=True):
        assert copied.is_meta
        assert (copied.shape, copied.stride(), copied.dtype) == (original.shape, original.stride(), original.dtype), (
            name
        )
    encoder = bases["flux"].part("text_encoder_2")  # T5: one table under two names
    assert cost.weight_bytes(cost.on_meta(encoder)) == cost.weight_bytes(encoder)
    assert cost.weight_bytes(encoder) == sum(one.numel() * 4 for one in encoder.parameters())


def test_text_encoders_and_encoding_are_counted(bases: dict[str, BaseModel]) -> None:
    encoder = cost.on_meta(bases["sd1"].part("text_encoder"))
    one, two = cost.encoder_cost(encoder, 8), cost.encoder_cost(encoder, 16)
    assert two.flops > 2 * one.flops > 0
    vae = cost.on_meta(bases["sd1"].part("vae"))
    assert cost.encoding_cost(vae, 128).flops > 4 * cost.encoding_cost(vae, 64).flops * 0.99
    layer = build(PUBLISHED["sd15"].networks["text_encoder"])
    assert cost.encoder_cost(layer, 77).flops == pytest.approx(13.3e9, rel=0.01)  # 2 x 85 M x 77, and attention


def test_the_batch_that_fits_leaves_the_margin_and_no_more() -> None:
    one = Cost(1, 10, activation_bytes_per_image=100, constant_bytes=50)
    free = 10_000
    batch = images_that_fit(one, free, 1000)
    assert one.peak_bytes(batch) <= 0.85 * free < one.peak_bytes(batch + 1)
    assert images_that_fit(one, free, 16) == 16
    assert images_that_fit(one, free, 1000, rows=2) == batch // 2
    assert images_that_fit(one, 100, 16) == 0
    assert images_that_fit(one, -5, 16) == 0


def test_a_batch_is_what_can_be_evaluated_where_one_image_can_be_decoded() -> None:
    small, large, huge = Cost(1, 0, 100, 0), Cost(1, 0, 500, 0), Cost(1, 0, 9_000, 0)
    assert SamplingCost(small, large).images_that_fit(10_000, 64) == 64
    assert SamplingCost(large, small).images_that_fit(10_000, 64) == 17
    assert SamplingCost(large, small).images_that_fit(10_000, 64, rows=2) == 8
    assert SamplingCost(small, huge).images_that_fit(10_000, 64) == 0
