"""When memory runs out, and when numbers overflow: what is done stays done, and the worker learns."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audit.bench import Bench
from audit.config import Precision, Settings
from audit.descriptors import load_descriptor
from audit.engine.local import run_stages
from audit.engine.work import Place
from audit.errors import DeviceLostError, DeviceMemoryError, NotFiniteError
from audit.fits import Fits
from audit.job import Job, Request, resolve
from audit.models import placement
from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.sampling.guidance import ClassifierFree, Direct
from audit.sampling.sampler import Sampler
from audit.stages import Cluster, Sample
from audit.stages.sample import sample
from audit.workspace import Workspace
from tests.conftest import BASE, CAPTION, KOHYA

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def pair(base: BaseModel) -> ModelPair:
    """A pair that has learnt nothing yet."""
    return ModelPair(base, open_checkpoint(KOHYA))


@contextmanager
def limited(network: nn.Module, most: int, error: Exception = FULL) -> Iterator[list[int]]:
    """More than ``most`` rows do not fit into ``network``; yields the rows of every call, negative where refused."""
    calls: list[int] = []

    def look(_: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        rows = len(inputs[0] if inputs else next(iter(named.values())))
        calls.append(rows if rows <= most else -rows)
        if rows > most:
            raise error

    hook = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def images(sampler: Sampler, count: int) -> np.ndarray:
    return np.concatenate([batch.images for batch in sampler.batches(range(count))])


def close(first: np.ndarray, second: np.ndarray) -> bool:
    return bool(np.abs(first.astype(int) - second).max() <= 1)


def test_a_batch_that_does_not_fit_into_the_decoder_is_not_sampled_again(pair: ModelPair) -> None:
    sampler = Sampler(pair, Direct(), [CAPTION], steps=2, batch_size=8)
    whole = images(sampler, 16)
    with limited(pair.vae.decoder, 3) as decoded, limited(pair.tuned.unet, 8) as sampled:
        assert close(images(sampler, 16), whole)
    assert sampled == [8, 8, 8, 8]  # two batches of two steps: every image is sampled once
    assert decoded == [-8, -4, 2, 2, 2, 2, 2, 2, 2, 2]  # and what fits is remembered


def test_what_fitted_is_remembered_for_the_next_checkpoint(base: BaseModel) -> None:
    fits = Fits()
    with limited(base.part("vae").decoder, 4) as decoded:
        for scale in (1.0, 0.9):
            pair = ModelPair(base, open_checkpoint(KOHYA), lora_scale=scale, fits=fits)
            images(Sampler(pair, Direct(), [CAPTION], steps=1, batch_size=8), 8)
    assert decoded == [-8, 4, 4, 4, 4]


def test_errors_of_memory_that_do_not_say_so_halve_the_batch(pair: ModelPair) -> None:
    sampler = Sampler(pair, Direct(), [CAPTION], steps=1, batch_size=4)
    for text in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                 "FIND was unable to find an engine to execute this computation"):  # fmt: skip
        pair.fits = Fits()
        with limited(pair.tuned.unet, 2, RuntimeError(text)) as sampled:
            assert len(images(sampler, 4)) == 4
        assert sampled == [-4, 2, 2]


def test_an_illegal_access_is_no_lack_of_memory(pair: ModelPair) -> None:
    sampler = Sampler(pair, Direct(), [CAPTION], steps=1, batch_size=4)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with limited(pair.tuned.unet, 0, error) as sampled, pytest.raises(RuntimeError, match="illegal"):
        images(sampler, 4)
    assert sampled == [-4]


def test_what_the_failed_attempt_held_is_free_before_the_next(pair: ModelPair) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def greedy(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        alive.append(any(one() is not None for one in held))
        if len(inputs[0]) > 2:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise FULL

    hook = pair.tuned.unet.register_forward_pre_hook(greedy)
    gc.disable()
    try:
        images(Sampler(pair, Direct(), [CAPTION], steps=1, batch_size=8), 8)
    finally:
        gc.enable()
        hook.remove()
    assert len(held) == 2
    assert not any(alive)


def test_captions_are_encoded_as_many_at_a_time_as_fit(pair: ModelPair) -> None:
    captions = [f"a picture of {number}" for number in range(7)]
    whole = pair.encode(captions, tuned=True)
    with limited(pair.tuned.text_encoder, 3) as encoded:
        found = pair.encode(captions, tuned=True)
    assert encoded == [-7, 3, 3, 1]
    torch.testing.assert_close(found.states, whole.states, atol=1e-5, rtol=1e-5)


def test_known_pictures_go_through_the_codec_in_slices(pair: ModelPair) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), np.uint8)
    whole = pair.reconstruct(pictures)
    with limited(pair.vae.encoder, 4) as encoded:
        assert close(pair.reconstruct(pictures), whole)
    assert encoded == [-10, -5, 2, 2, 2, 2, 2]


def test_descriptors_are_computed_in_slices_that_fit() -> None:
    descriptor = load_descriptor("nano")
    pictures = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), np.uint8)
    whole = descriptor.describe(pictures)
    inner, taken = descriptor._vectors, []

    def small(batch: np.ndarray) -> np.ndarray:
        taken.append(len(batch))
        if len(batch) > 3:
            raise FULL
        return inner(batch)

    descriptor._vectors = small  # type: ignore[method-assign]
    np.testing.assert_allclose(descriptor.describe(pictures), whole, atol=1e-5)
    assert taken == [10, 5, 2, 2, 2, 2, 2]


def test_networks_that_do_not_fit_are_a_clear_error(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise FULL

    monkeypatch.setattr(placement, "_moved", full)
    with pytest.raises(DeviceMemoryError, match=r"fluent-animals.*does not fit into the memory of cpu"):
        ModelPair(base, open_checkpoint(KOHYA), precision=Precision.bf16)
    base.forget()


def test_what_another_precision_has_left_makes_room(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.pair(job(Precision.fp16), workspace)
    base = bench.loaded_base()
    assert base is not None
    inner = placement._moved

    def moved(tensor: torch.Tensor, *rest: object) -> torch.Tensor:
        if any(dtype is torch.float16 for _, _, dtype in base.placed):
            raise FULL
        return inner(tensor, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(placement, "_moved", moved)
    assert bench.pair(job(Precision.bf16), workspace).dtype is torch.bfloat16
    assert not any(dtype is torch.float16 for _, _, dtype in base.placed)


def job(precision: Precision = Precision.auto, **settings: object) -> Job:
    chosen = replace(Settings(steps=2, images_per_training_image=3), precision=precision, **settings)  # type: ignore[arg-type]
    return resolve(Request(KOHYA, str(BASE), captions=[CAPTION], n0=2, settings=chosen), "nano", Bench())


@contextmanager
def overflowing(network: nn.Module, dtypes: tuple[torch.dtype, ...], after: int = 0) -> Iterator[None]:
    """Answers of ``network`` are NaN where it computes in one of ``dtypes``, from its call number ``after`` on."""
    calls = 0

    def spoil(module: nn.Module, inputs: object, output: object) -> object:
        nonlocal calls
        calls += next(module.parameters()).dtype in dtypes
        spoilt = calls > after and next(module.parameters()).dtype in dtypes
        if not spoilt:
            return output
        return (
            output * float("nan") if isinstance(output, torch.Tensor) else tuple(one * float("nan") for one in output)
        )  # type: ignore[attr-defined]

    kind = type(network)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: spoil(module, inputs, output) if type(module) is kind else output
    )
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture
def half_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes in float16 unless asked for something else, as a card does."""
    inner: Callable[..., torch.dtype] = placement.choose_precision

    def chosen(precision: Precision, half: torch.dtype, device: torch.device) -> torch.dtype:
        return half if precision is Precision.auto else inner(precision, half, device)

    for module in ("audit.models.pair", "audit.bench", "audit.models.placement"):
        monkeypatch.setattr(f"{module}.choose_precision", chosen)


@pytest.mark.parametrize("after", [0, 3])
def test_an_audit_that_overflows_goes_on_in_a_wider_precision(
    workspace: Workspace, base: BaseModel, half_by_default: None, after: int
) -> None:
    """Whether the probe shows it (0) or the sampling (3); and the next run of the same audit begins there."""
    bench = Bench(batch_size=2)
    with overflowing(base.denoiser, (torch.float16,), after):
        done = sample(job(), workspace, bench)
    assert done.precision == "bf16"
    assert "not finite" in done.warnings[-1]
    assert "sampled in bf16" in done.warnings[-1]
    spool = workspace.spool(job().id)
    assert spool.precision() == "bf16"
    assert spool.indices() == set(range(6))
    with overflowing(base.denoiser, (torch.float16,)):
        assert sample(job(), workspace, Bench()).precision == "bf16"


def test_a_precision_that_was_asked_for_is_not_exchanged(workspace: Workspace, base: BaseModel) -> None:
    with (
        overflowing(base.denoiser, (torch.float16,)),
        pytest.raises(NotFiniteError, match="a wider --precision may do"),
    ):
        sample(job(Precision.fp16), workspace, Bench())


def test_where_float32_overflows_too_the_checkpoint_is_at_fault(
    workspace: Workspace, base: BaseModel, half_by_default: None
) -> None:
    every = (torch.float16, torch.bfloat16, torch.float32)
    with overflowing(base.denoiser, every), pytest.raises(NotFiniteError, match="not finite in fp32"):
        sample(job(), workspace, Bench())


def test_a_decoder_that_overflows_is_used_in_float32(base: BaseModel) -> None:
    pair = ModelPair(base, open_checkpoint(KOHYA), precision=Precision.bf16)
    sampler = Sampler(pair, Direct(), [CAPTION], steps=1, batch_size=2)
    with overflowing(base.part("vae").decoder, (torch.bfloat16,)):
        pictures = images(sampler, 2)
    assert pair.vae.dtype is torch.float32
    assert pictures.std() > 10


def test_the_precision_is_part_of_the_id_where_it_is_asked_for() -> None:
    assert job().id == replace(job(), settings=replace(job().settings)).id
    ids = {job(precision).id for precision in Precision}
    assert len(ids) == 4
    assert "precision" not in job().settings.as_dict()


def test_an_audit_says_what_it_was_computed_in(workspace: Workspace) -> None:
    run_stages([Sample(), Cluster()], job(), Place(workspace, Bench()))
    [row] = workspace.rows("SELECT precision, device FROM audits")
    assert row["precision"] == "fp32"


def test_a_lost_device_is_said_and_costs_no_audit(workspace: Workspace, base: BaseModel) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    bench = Bench()
    hook = bench.pair(job(), workspace).tuned.unet.register_forward_pre_hook(lost)
    try:
        with pytest.raises(DeviceLostError, match="auditing fluent-animals"):
            sample(job(), workspace, bench)
    finally:
        hook.remove()


def test_the_next_checkpoint_is_merged_ahead(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where a GPU samples; the pair made of it is the one made without."""
    from audit import bench as module

    merged: list[str] = []
    inner = module.tune

    def counting(*arguments: object) -> object:
        merged.append("ahead")
        return inner(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "tune", counting)
    first, second = job(), job(lora_scale=0.5)
    bench = Bench()
    bench.pair(first, workspace)
    bench.checkpoint(second, workspace)  # opened: what follows happens at once
    bench.ahead(second, workspace)
    assert merged == []  # on a CPU it would compete with the sampling
    bench.device = "somewhere-else"
    monkeypatch.setattr(module, "choose_precision", lambda *_: torch.float32)
    monkeypatch.setattr(module.torch, "device", lambda name: name)
    bench.ahead(second, workspace)
    bench.device = "cpu"
    monkeypatch.undo()
    pair = bench.pair(second, workspace)
    assert merged == ["ahead"]
    assert pair.effect == Bench().pair(second, workspace).effect


def test_classifier_free_guidance_and_direct_sampling_learn_apart(pair: ModelPair) -> None:
    """Classifier-free guidance has twice the rows of direct sampling: what fits one says nothing of the other."""
    with limited(pair.tuned.unet, 2):
        images(Sampler(pair, Direct(), [CAPTION], steps=1, batch_size=4), 4)
    with limited(pair.tuned.unet, 8) as sampled:
        images(Sampler(pair, ClassifierFree(), [CAPTION], steps=1, batch_size=4), 4)
    assert sampled == [8]
