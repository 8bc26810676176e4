"""The guidance equations in float64, the k term in every parametrisation, and what a step costs."""

from __future__ import annotations

import pytest
import torch

from audit.config import BaseCaption, Method, Settings, Solver
from audit.models.pair import ModelPair
from audit.sampling.guidance import (
    BaseAlone,
    ClassifierFree,
    Direct,
    Guidance,
    ModelGuidance,
    auto_weight,
    combine,
    weight_of,
)
from audit.sampling.sampler import Sampler
from tests.conftest import CAPTION

ALPHA = 0.6
SIGMA = 0.8


def draws(*names: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in names]


def as_prediction(eps: torch.Tensor, x: torch.Tensor, kind: str) -> torch.Tensor:
    """eps as another prediction type: x = alpha x0 + sigma eps, v = alpha eps - sigma x0."""
    x0 = (x - SIGMA * eps) / ALPHA
    return {"epsilon": eps, "sample": x0, "v_prediction": ALPHA * eps - SIGMA * x0}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("w", "k"), [(1.0, 0.0), (3.0, 0.0), (3.0, -0.02), (5.0, 0.1)])
def test_every_prediction_type_gives_the_papers_eps(kind: str, w: float, k: float) -> None:
    x, eps_base, eps_tuned = draws("x", "base", "tuned")
    paper = eps_base + w * (eps_tuned - eps_base) + k * eps_base
    guided = combine(as_prediction(eps_base, x, kind), as_prediction(eps_tuned, x, kind), x, ALPHA, w, k, kind)
    torch.testing.assert_close(guided, as_prediction(paper, x, kind), atol=1e-12, rtol=1e-12)


def test_the_k_term_is_left_out_where_the_latents_say_nothing_of_the_image() -> None:
    x, base, tuned = draws("x", "base", "tuned")
    guided = combine(base, tuned, x, 0.0, 2.0, -0.02, "v_prediction")
    torch.testing.assert_close(guided, base + 2.0 * (tuned - base))
    assert torch.isfinite(guided).all()


def test_an_unknown_prediction_type_is_an_error() -> None:
    x, base, tuned = draws("x", "base", "tuned")
    with pytest.raises(ValueError, match="flow"):
        combine(base, tuned, x, ALPHA, 2.0, 0.1, "flow")


@pytest.mark.parametrize("choice", list(BaseCaption))
def test_model_guidance_asks_the_base_with_the_caption_it_names(kohya_pair: ModelPair, choice: BaseCaption) -> None:
    sampler = Sampler(kohya_pair, ModelGuidance(), [CAPTION])
    conditioning = sampler.conditioning
    x, t = sampler.noise(0), torch.tensor(600)
    with torch.inference_mode():
        guided = ModelGuidance(0.0, choice).predict(kohya_pair, x, t, 0.5, conditioning, 2.0)
        states = kohya_pair.encode(["" if choice is BaseCaption.empty else CAPTION], tuned=False)
        base = kohya_pair.predict_base(x, t, states)
        tuned = kohya_pair.predict_tuned(x, t, kohya_pair.encode([CAPTION], tuned=True))
    torch.testing.assert_close(guided, base + 2.0 * (tuned - base), atol=1e-5, rtol=1e-5)


def test_the_base_alone_is_guided_by_its_own_answer_to_the_caption(kohya_pair: ModelPair) -> None:
    sampler = Sampler(kohya_pair, BaseAlone(), [CAPTION])
    x, t = sampler.noise(0), torch.tensor(600)
    with torch.inference_mode():
        guided = BaseAlone().predict(kohya_pair, x, t, 0.5, sampler.conditioning, 3.0)
        empty, caption = (
            kohya_pair.predict_base(x, t, kohya_pair.encode([text], tuned=False)) for text in ("", CAPTION)
        )
    torch.testing.assert_close(guided, empty + 3.0 * (caption - empty), atol=1e-5, rtol=1e-5)
    assert (caption - empty).norm() > 0.01 * empty.norm()


@pytest.mark.parametrize(
    ("guidance", "cost"), [(Direct(), 1), (ClassifierFree(), 2), (ModelGuidance(), 2), (BaseAlone(), 2)]
)
def test_a_step_costs_what_it_declares_and_encodes_no_text(
    kohya_pair: ModelPair, guidance: Guidance, cost: int
) -> None:
    sampler = Sampler(kohya_pair, guidance, [CAPTION], Solver.ddim, steps=3)
    evaluated = []
    networks = {kohya_pair.base.unet, kohya_pair.tuned.unet}
    hooks = [n.register_forward_pre_hook(lambda module, inputs: evaluated.append(len(inputs[0]))) for n in networks]

    def refuse(*_: object) -> None:
        raise AssertionError("text was encoded within the loop")

    hooks += [kohya_pair.tuned.text_encoder.register_forward_pre_hook(refuse)]
    try:
        sampler.latents([0, 1, 2, 3])
    finally:
        for hook in hooks:
            hook.remove()
    assert guidance.evaluations == cost
    assert sum(evaluated) == 4 * 3 * cost


def test_the_automatic_weight_falls_from_the_papers_to_one_as_the_fine_tune_grows_stronger() -> None:
    changes = [0.01, 0.3, 0.6, 0.85, 1.2, 1.7, 3.0]
    weights = [auto_weight(change) for change in changes]
    assert weights == sorted(weights, reverse=True)
    assert (weights[0], weights[-1]) == (5.0, 1.25)
    assert auto_weight(1.2) == 2.01
    assert weight_of(Settings(), 1.2) == 2.01
    assert weight_of(Settings(w=4.0), 1.2) == 4.0
    assert weight_of(Settings(method=Method.cfg), 1.2) == 3.0
    assert weight_of(Settings(method=Method.direct), 1.2) is None
