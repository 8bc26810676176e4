"""Networks on devices: which precision, what is shared, what stays exact. Half precision runs on the CPU here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from audit.config import Precision, Solver
from audit.errors import NotFiniteError
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.families.registry import FAMILIES
from audit.models.pair import ModelPair
from audit.models.placement import choose_precision, decoder_precision, is_placed, next_precision, place
from audit.models.tuning import tune
from audit.sampling.guidance import ModelGuidance
from audit.sampling.sampler import Sampler
from tests.models import nano
from tests.models.files import full_change

CPU = torch.device("cpu")
CAPTIONS = ["a photo of sks dog", "painting of the red cat"]
# Relative error of latents after 4 steps in half against float32; several times what was measured.
BOUNDS = {
    "sd1": 0.01, "sd2": 0.01, "sdxl": 0.01, "alt": 0.01, "sd3": 0.05, "flux": 0.1, "chroma": 0.15, "klein": 0.15,
    "z-image": 0.15, "qwen": 0.15, "ernie": 0.15, "krea2": 0.15, "wan": 0.05, "anima": 0.05,
    "hidream": 0.15, "kolors": 0.01,
    "wan22": 0.05, "wan-5b": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("placement")


@pytest.fixture
def bf16_card(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A card of compute capability 8.0, as far as it is asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return torch.device("cuda")


def test_the_precision_follows_family_and_device(bf16_card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision(Precision.auto, torch.float16, CPU) is torch.float32
    assert choose_precision(Precision.auto, torch.float16, bf16_card) is torch.float16
    assert choose_precision(Precision.auto, torch.bfloat16, bf16_card) is torch.bfloat16
    assert choose_precision(Precision.fp32, torch.float16, bf16_card) is torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_precision(Precision.auto, torch.bfloat16, bf16_card) is torch.float32  # not float16: T5 overflows
    with pytest.raises(Exception, match="does not compute in bfloat16"):
        choose_precision(Precision.bf16, torch.float16, bf16_card)
    assert next_precision(torch.float16, bf16_card) is torch.float32


def test_after_float16_comes_bfloat16_then_float32(bf16_card: torch.device) -> None:
    assert next_precision(torch.float16, bf16_card) is torch.bfloat16
    assert next_precision(torch.bfloat16, bf16_card) is torch.float32
    assert next_precision(torch.float32, bf16_card) is None


def test_families_with_t5_run_in_bfloat16() -> None:
    halves = {name: family.half for name, family in FAMILIES.items()}
    assert halves["sd3"] is halves["flux"] is halves["chroma"] is torch.bfloat16
    assert halves["sd1"] is halves["sdxl"] is torch.float16


def test_a_vae_that_overflows_in_float16_runs_in_bfloat16(folder: Path, bf16_card: torch.device) -> None:
    xl, plain = nano.make("sdxl", folder).part("vae"), nano.make("sd1", folder).part("vae")
    xl.register_to_config(force_upcast=True)
    plain.register_to_config(force_upcast=False)
    assert decoder_precision(xl, torch.float16, bf16_card) is torch.bfloat16
    assert decoder_precision(plain, torch.float16, bf16_card) is torch.float16
    assert decoder_precision(xl, torch.float32, bf16_card) is torch.float32


def test_what_transformers_keeps_in_float32_stays_so(folder: Path) -> None:
    """T5's ``wo`` overflows in float16; in bfloat16 it need not."""
    encoder = nano.make("sd3", folder).part("text_encoder_3")
    half = place(encoder, CPU, torch.float16)
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".wo." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".wo." not in name} == {torch.float16}
    assert is_placed(half, CPU, torch.float16)
    assert not is_placed(half, CPU, torch.bfloat16)
    brain = place(encoder, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in brain.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}  # the base's own is left alone
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(half(ids)[0].float(), encoder(ids)[0], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", [*nano.FAMILIES, "kolors"])
def test_half_precision_samples_nearly_what_float32_does(folder: Path, family: str) -> None:
    base = nano.make(family, folder)
    checkpoint = open_checkpoint(full_change(base, folder / f"{family}-tuned"))
    half = {torch.float16: Precision.fp16, torch.bfloat16: Precision.bf16}[base.architecture.half]
    latents = {}
    for precision in (Precision.fp32, half):
        pair = ModelPair(base, checkpoint, resolution=64, precision=precision)
        sampler = Sampler(pair, ModelGuidance(), CAPTIONS, Solver.dpmpp, 4, seed=3, w=2.0)
        latents[precision] = sampler.latents([0, 1]).float()
        assert pair.decode(latents[precision].to(pair.dtype)).shape == (2, 64, 64, 3)
    error = (latents[half] - latents[Precision.fp32]).norm() / latents[Precision.fp32].norm()
    assert 0 < float(error) < BOUNDS[family]


def test_on_a_device_too_only_what_differs_is_held_twice(folder: Path) -> None:
    base = nano.make("sdxl", folder)
    checkpoint = open_checkpoint(full_change(base, folder / "keys", only="attn2.to_k"))
    pair = ModelPair(base, checkpoint, precision=Precision.bf16)
    there = dict(pair.base.unet.named_parameters())
    own = {name for name, parameter in pair.tuned.unet.named_parameters() if parameter is not there[name]}
    assert own == {name for name in there if "attn2.to_k" in name}
    assert {parameter.dtype for parameter in pair.tuned.unet.parameters()} == {torch.bfloat16}
    assert pair.tuned.text_encoder is pair.base.text_encoder
    assert {parameter.dtype for parameter in base.part("unet").parameters()} == {torch.float32}


def test_a_merge_is_kept_in_half_as_it_would_be_rounded_from_float32(base: BaseModel, folder: Path) -> None:
    from tests.conftest import DREAMBOOTH, KOHYA

    for path in (KOHYA, DREAMBOOTH):
        whole = tune(base, open_checkpoint(path)).networks["unet"]
        kept = tune(base, open_checkpoint(path), dtype=torch.float16).networks["unet"]
        there = dict(base.part("unet").named_parameters())
        exact = dict(whole.named_parameters())
        for name, parameter in kept.named_parameters():
            if exact[name] is there[name]:
                assert parameter is there[name]
            else:
                assert parameter.dtype is torch.float16
                torch.testing.assert_close(parameter, exact[name].half(), rtol=0, atol=0)


def test_a_base_as_stored_holds_the_same_numbers(folder: Path) -> None:
    nano.sd1().to(torch.float16).save_pretrained(folder / "stored-half")
    location = locate_base(str(folder / "stored-half"))
    exact, stored = load_base(location), load_base(location, as_stored=True)
    for part in ("unet", "text_encoder", "vae"):
        ours = dict(stored.part(part).named_parameters())
        assert {parameter.dtype for parameter in ours.values()} == {torch.float16}
        for name, parameter in exact.part(part).named_parameters():
            assert parameter.dtype is torch.float32
            assert torch.equal(parameter, ours[name].float())
    assert stored.weight_norm == pytest.approx(exact.weight_norm, rel=1e-12)
    checkpoint = open_checkpoint(full_change(exact, folder / "stored-tuned"))
    first, second = ModelPair(exact, checkpoint), ModelPair(stored, checkpoint)
    assert first.effect == second.effect
    latents = [Sampler(one, ModelGuidance(), CAPTIONS, steps=2).latents([0]) for one in (first, second)]
    torch.testing.assert_close(*latents, rtol=0, atol=0)


def test_predictions_that_overflow_are_not_taken_for_no_effect(folder: Path) -> None:
    """Numbers that are not finite compare as false with everything: an overflow looked like a clean model."""
    base = nano.make("sd1", folder)
    pair = overflowing(base, folder, Precision.fp32)
    assert pair.effect.prediction > 0
    with pytest.raises(NotFiniteError, match="not finite in fp16; a wider --precision may do"):
        overflowing(base, folder, Precision.fp16)
    assert overflowing(base, folder, Precision.bf16).effect.prediction > 0


def overflowing(base: BaseModel, folder: Path, precision: Precision) -> ModelPair:
    """Fine-tuned weights of which two are large and undo each other: no number in between fits into float16."""
    from safetensors.torch import load_file, save_file

    path = full_change(base, folder / "overflow")
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if float(state["time_embedding.linear_2.weight"].abs().max()) < 1e3:
        state["time_embedding.linear_2.weight"] *= 1e7
        state["time_embedding.linear_2.bias"] *= 1e7
        for name in [name for name in state if name.endswith("time_emb_proj.weight")]:
            state[name] *= 1e-7
        save_file(state, file)
    return ModelPair(base, open_checkpoint(path), precision=precision)
