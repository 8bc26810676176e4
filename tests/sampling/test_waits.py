"""Nothing in the sampling loop waits for a GPU. On the CPU it is seen by what the operations would ask of one.

A tensor of the networks, of the latents or made of one counts as the device's. To read one on the host waits for it
(``item``, ``nonzero``, comparisons in an ``if``), and so does filling one with numbers of the host (``torch.tensor``
with a device, ``to`` of a table).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from audit.config import Solver
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.sampling.guidance import ClassifierFree, Direct, Guidance, ModelGuidance
from audit.sampling.sampler import Sampler, make_schedule
from tests.models import nano
from tests.models.files import full_change

READS = {
    "aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select",
    "aten._unique2", "aten.bincount",
}  # fmt: skip


EXPERTS = {"hidream": {"aten.bincount"}}  # diffusers' own mixture of experts counts the tokens of each on the host
MADE_THERE = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange}  # with a device: nothing is copied


class Device:
    """Which tensors would be on the device."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.kept = list(tensors)  # alive, so that no other tensor comes to lie where they are
        self.storages = {tensor.untyped_storage()._cdata for tensor in tensors}

    def has(self, tensor: object) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self.storages

    def add(self, tensor: torch.Tensor) -> None:
        self.kept.append(tensor)
        self.storages.add(tensor.untyped_storage()._cdata)


class Reads(TorchDispatchMode):
    """Notes every read of the device, and every tensor made of numbers of the host that meets it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.waits, self.fresh = device, [], Device([])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        name = str(func).rpartition(".")[0]
        if any(map(self.device.has, given)):
            if name in READS:
                self.waits.append(name)
            self.waits += [
                f"torch.tensor of {one.ndim} dimensions" for one in given if self.fresh.has(one) and one.ndim
            ]
            for one in made:
                self.device.add(one)
        elif name == "aten.lift_fresh" or any(map(self.fresh.has, given)):
            for one in made:
                self.fresh.add(one)
        return found


class Moves(TorchFunctionMode):
    """Notes every move of a table of the host to a device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.waits = device, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and not self.device.has(args[0]):
            where = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, (torch.device, str))]
            if where and args[0].ndim:
                self.waits.append(f"to({where[0]}) of {tuple(args[0].shape)}")
        found = func(*args, **kwargs)
        if func in MADE_THERE and kwargs.get("device") is not None:
            self.device.add(found)
        return found


@pytest.fixture(scope="module", params=list(nano.FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return pair_of(request.param, tmp_path_factory.mktemp("waits"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return pair_of("sd1", tmp_path_factory.mktemp("waits"))


def pair_of(family: str, folder: Path) -> ModelPair:
    base = nano.make(family, folder)
    return ModelPair(base, open_checkpoint(full_change(base, folder / "tuned")), resolution=64)


def waits(pair: ModelPair, guidance: Guidance, solver: Solver) -> list[str]:
    sampler = Sampler(pair, guidance, ["a photo of sks dog", "a cat"], solver, steps=4, w=2.0)
    conditioning = sampler.conditioning.select(torch.tensor([0, 1, 0]))
    conditions = (
        conditioning.tuned_caption,
        conditioning.tuned_empty,
        conditioning.base_caption,
        conditioning.base_empty,
    )
    x = torch.randn(3, *pair.latent_shape)
    parts = [part for part in pair.architecture.denoisers if getattr(pair.base, part) is not None]
    networks = [getattr(side, part) for side in (pair.base, pair.tuned) for part in parts]
    device = Device([
        x, *(tensor for network in networks for tensor in (*network.parameters(), *network.buffers())),
        *(tensor for condition in conditions for tensor in condition._parts() if tensor is not None),
    ])  # fmt: skip
    schedule = make_schedule(pair, solver, 4)
    on_device = schedule.timesteps.clone()
    if pair.boundary is None:  # which of two experts is asked is decided on the host
        device.add(on_device)
    with torch.no_grad(), Moves(device) as moves, Reads(device) as reads, pair.text_once():
        sampler._denoise(schedule, on_device, x, conditioning)
    return reads.waits + moves.waits


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize(
    "guidance", [Direct(), ClassifierFree(), ModelGuidance(k=-0.02)], ids=["direct", "cfg", "model"]
)
def test_no_step_waits_for_the_device(pair: ModelPair, guidance: Guidance, solver: Solver) -> None:
    assert set(waits(pair, guidance, solver)) == EXPERTS.get(pair.architecture.name, set())


@pytest.mark.parametrize("kind", ["read", "made", "moved"])
def test_a_wait_would_be_seen(seen: ModelPair, kind: str) -> None:
    class Waiting(Direct):
        def predict(self, pair: ModelPair, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            if kind == "read":
                assert float(x.mean()) < 1e9
            elif kind == "made":
                x = x + torch.tensor([1.0], device=x.device)
            else:
                x = x + torch.ones(1).to(x.device)
            return super().predict(pair, x, *rest)

    assert len(waits(seen, Waiting(), Solver.ddim)) == 4
