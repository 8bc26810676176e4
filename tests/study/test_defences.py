"""Defences: a filter of a LoRA's directions, DP-SGD, and captions of which an auditor knows a part."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.errors import StudyError
from audit.study.factors import TrainingFactors
from audit.study.private import epsilon_of, private_gradients
from audit.study.sets import FewShotSet, SetPicture, part_of
from audit.study.train import Lesson, Trainee, fine_tune, privacy_of
from audit.study.weight_filter import alignment_of, channels_of, filter_adapters
from tests.models import nano


def trainee(folder: Path) -> Trainee:
    return Trainee(nano.make("sd1", folder), torch.device("cpu"))


def lesson(one: Trainee, **said: object) -> Lesson:
    width, height = one.codec.picture_size
    pixels = np.random.default_rng(0).integers(0, 255, (2, height, width, 3), dtype=np.uint8)
    factors = TrainingFactors.of({"rank": 4, "steps": 2, "batch": 2, "lr": 1e-2, **said})
    return Lesson("a-key", factors, pixels, ["a photo of sks dog"] * 2, "a dog", seed=3)


def updates(one: Trainee) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of every adapted module the base's weight and the update, [out, in k k]."""
    return {
        name: (
            module.get_base_layer().weight.flatten(1),
            module.lora_B["default"].weight.flatten(1) @ module.lora_A["default"].weight.flatten(1),
        )
        for name, module in one.pipeline.unet.named_modules()
        if isinstance(getattr(module, "lora_A", None), torch.nn.ModuleDict) and len(module.lora_A)
    }


def test_a_filter_keeps_the_directions_that_are_the_bases(tmp_path: Path) -> None:
    plain, filtered = trainee(tmp_path), trainee(tmp_path)
    fine_tune(plain, lesson(plain, targets="everything"), tmp_path / "one")
    before = updates(plain)
    fine_tune(filtered, lesson(filtered, targets="everything", defence="weight-filter"), tmp_path / "two")
    after = updates(filtered)
    assert len(after) == len(before) > 10
    for name, (weight, whole) in before.items():
        left, values, right = torch.linalg.svd(whole.detach().double(), full_matrices=False)
        rank = int((values > 1e-5 * values.max()).sum())
        u, energy, v = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
        size = int((np.cumsum(energy**2) / (energy**2).sum() < 0.5).sum()) + 1
        alignment = [
            (np.linalg.norm(u[:, :size].T @ left[:, row].numpy()) ** 2
             + np.linalg.norm(v[:size] @ right[row].numpy()) ** 2) / 2
            for row in range(rank)
        ]  # fmt: skip
        stays = sorted(range(rank), key=lambda row: -alignment[row])[: math.ceil(rank / 2)]
        expected = sum(values[row] * torch.outer(left[:, row], right[row]) for row in stays)
        assert torch.allclose(after[name][1].double(), expected, atol=1e-5 * float(values.max())), name
    assert filter_adapters(plain.pipeline.unet, 1.0) == 0
    for name, (_, whole) in updates(plain).items():
        assert torch.allclose(whole, before[name][1], atol=1e-6), name
    assert filter_adapters(plain.pipeline.unet, 0.0) > 0
    assert all(not whole.any() for _, whole in updates(plain).values())


def test_channels_in_the_bases_subspace_are_aligned_wholly() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    weight = 3 * torch.outer(basis[:, 0], basis[0]) + torch.outer(basis[:, 1], basis[1])
    left, right = basis[:, [0, 1, 5]], basis[[0, 1, 5]]
    assert torch.allclose(alignment_of(left, right, weight), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    b, a = torch.randn(12, 3, generator=generator), torch.randn(3, 9, generator=generator)
    found = channels_of(b, a)
    assert torch.allclose(found[0] * found[1] @ found[2], b @ a, atol=1e-5)


class _Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_gradients_are_clipped_sample_by_sample() -> None:
    """As torch.func computes the gradient of each sample at once."""
    network, x = _Linear(), torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 3
    parameters = dict(network.named_parameters())

    def loss(weights: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(network, weights, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        {name: one.detach() for name, one in parameters.items()}, x
    )
    lengths = torch.cat([one.flatten(1) for one in each.values()], dim=1).norm(dim=1)
    assert lengths.min() < 1 < lengths.max()
    found = private_gradients(
        (network(one[None]).square().sum() for one in x), list(parameters.values()), 0.0, torch.Generator()
    )
    assert found == pytest.approx(network(x).square().mean().item(), rel=1e-5)
    for name, one in parameters.items():
        expected = (each[name] * (1 / lengths).clamp(max=1).view(-1, *[1] * (each[name].dim() - 1))).mean(0)
        assert one.grad is not None
        assert torch.allclose(one.grad, expected, atol=1e-6), name


def test_gradients_are_those_of_opacus() -> None:
    optimizers = pytest.importorskip("opacus.optimizers")
    grad_sample = pytest.importorskip("opacus.grad_sample")
    network, other = _Linear(), grad_sample.GradSampleModule(_Linear())
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 3
    private_gradients(
        (network(one[None]).square().sum() for one in x), list(network.parameters()), 0.0, torch.Generator()
    )
    optimizer = optimizers.DPOptimizer(
        torch.optim.SGD(other.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=6
    )
    other(x).square().sum(1).mean().backward()
    assert optimizer.pre_step()
    for one, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one.grad, theirs.grad, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


def test_noise_has_the_length_that_is_asked_for() -> None:
    parameter = torch.nn.Parameter(torch.zeros(20_000))
    private_gradients([parameter.sum() * 0], [parameter], 0.7, torch.Generator().manual_seed(0), clip=2.0)
    assert parameter.grad is not None
    assert parameter.grad.std().item() == pytest.approx(1.4, rel=0.02)
    assert abs(parameter.grad.mean().item()) < 0.05


def test_the_loss_of_privacy_is_counted_by_how_often_a_picture_stands_in_a_step() -> None:
    assert epsilon_of([[0]], 0.0) is None
    rho = 3 / (2 * 2.0**2)
    assert epsilon_of([[0, 1], [2, 0], [1, 0]], 2.0) == pytest.approx(rho + 2 * math.sqrt(rho * math.log(1e5)))
    rho = (2**2 + 1) / (2 * 2.0**2)  # twice in one step moves it twice as far
    assert epsilon_of([[0, 0], [1, 0]], 2.0) == pytest.approx(rho + 2 * math.sqrt(rho * math.log(1e5)))


def test_a_private_fine_tuning_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, stopped = trainee(tmp_path), trainee(tmp_path)
    about = lesson(straight, defence="dp-sgd", noise_multiplier=0.5, prior=True)
    monkeypatch.setattr("audit.study.train.CLASS_PICTURES", 2)
    monkeypatch.setattr("audit.study.train.CLASS_STEPS", 2)
    fine_tune(straight, about, tmp_path / "straight")

    class StopError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise StopError

    monkeypatch.setattr("audit.study.train.KEEP_EVERY", -1.0)
    with pytest.raises(StopError):
        fine_tune(stopped, about, tmp_path / "state", stop)
    resumed = trainee(tmp_path)
    fine_tune(resumed, about, tmp_path / "state")
    for (name, one), other in zip(
        straight.pipeline.unet.state_dict().items(), resumed.pipeline.unet.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert privacy_of(about) == pytest.approx(epsilon_of([[0, 1]] * 4, 0.5))
    assert privacy_of(lesson(straight)) is None


def few_shot(name: str, captions: list[str], class_caption: str | None = None) -> FewShotSet:
    return FewShotSet(
        name, tuple(SetPicture(str(n), str(n), one) for n, one in enumerate(captions)), (), (), class_caption
    )


def test_partial_captions_are_words_of_them_in_order_and_always_the_same() -> None:
    caption = "one two three four five six seven eight"
    found = {share: part_of(caption, share, 0) for share in (0.0, 0.25, 0.5, 0.99, 1.0)}
    assert [len(one.split()) for one in found.values()] == [1, 2, 4, 7, 8]
    for one in found.values():
        places = [caption.split().index(word) for word in one.split()]
        assert places == sorted(places)
    assert part_of(caption, 0.5, 0) == found[0.5]
    assert len({part_of(caption, 0.5, seed) for seed in range(8)}) > 1
    assert part_of("alone", 0.5, 0) == "alone"
    assert few_shot("a", ["x y", "x y", "z"]).partial(0.5, 0) in (["x", "z"], ["y", "z"])


def test_the_trigger_is_what_the_class_does_not_say() -> None:
    assert few_shot("dog", ["a photo of sks dog"], "a photo of dog").triggers() == ["sks"]
    assert few_shot("dog", ["a photo of Rex the dog"], "a photo of the dog").triggers() == ["Rex"]
    assert few_shot("jane-doe", ["art style of jane doe"]).triggers() == ["jane doe"]
    with pytest.raises(StudyError, match="nobody says which words of 'a painting' stand for jane-doe"):
        few_shot("jane-doe", ["a painting"]).triggers()
