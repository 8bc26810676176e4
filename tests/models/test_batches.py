"""The batch to begin with: from what an image costs and what is free, before memory has ever run out."""

from __future__ import annotations

from pathlib import Path

import pytest

from audit.models import batches
from audit.models.batches import CPU_BATCH, DECODED, GPU_BATCH, batch_to_decode, batch_to_sample
from audit.models.checkpoint import open_checkpoint
from audit.models.cost import cost_of_pair
from audit.models.pair import ModelPair
from audit.sampling.guidance import ClassifierFree, Direct
from audit.sampling.sampler import Sampler
from tests.models import nano
from tests.models.files import full_change


@pytest.fixture
def pair(tmp_path: Path) -> ModelPair:
    base = nano.make("sd1", tmp_path)
    return ModelPair(base, open_checkpoint(full_change(base, tmp_path / "tuned")), resolution=64)


def test_on_a_cpu_the_batch_is_fixed(pair: ModelPair) -> None:
    assert batch_to_sample(pair, 1) == CPU_BATCH
    assert batch_to_decode(pair) == DECODED


def test_on_a_gpu_it_is_what_fits(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = cost_of_pair(pair)
    room = cost.evaluation.constant_bytes + 10.5 * cost.evaluation.activation_bytes_per_image
    monkeypatch.setattr(batches, "free_memory", lambda device: int(room / 0.85))
    assert Sampler(pair, Direct(), ["a photo"]).batch_size == 10
    assert Sampler(pair, ClassifierFree(), ["a photo"]).batch_size == 5  # both halves are in the network's batch
    assert Sampler(pair, Direct(), ["a photo"], batch_size=33).batch_size == 33  # who asks, gets it
    room = cost.decoding.constant_bytes + 3.5 * cost.decoding.activation_bytes_per_image
    assert batch_to_decode(pair) == 3
    monkeypatch.setattr(batches, "free_memory", lambda device: 1)
    assert batch_to_sample(pair, 1) == batch_to_decode(pair) == 1  # one is tried: the count leaves a margin
    monkeypatch.setattr(batches, "free_memory", lambda device: 1 << 40)
    assert batch_to_sample(pair, 1) == GPU_BATCH


def test_a_batch_is_no_larger_than_keeps_a_card_busy(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: 1 << 40)
    flops = cost_of_pair(pair).evaluation.flops
    monkeypatch.setattr(batches, "FULL", 12 * flops)
    assert batch_to_sample(pair, 1) == 12
    assert batch_to_sample(pair, 2) == 6
    monkeypatch.setattr(batches, "FULL", flops / 10)
    assert batch_to_sample(pair, 1) == 2


def test_the_cost_is_counted_once_for_all_checkpoints(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: 1 << 40)
    counted = []
    monkeypatch.setattr(batches, "cost_of_pair", lambda one: counted.append(one) or cost_of_pair(one))
    for _ in range(3):
        batch_to_sample(pair, 1)
        batch_to_decode(pair)
    assert len(counted) == 1
