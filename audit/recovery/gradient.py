"""The paper's own recovery: gradient ascent on the embedding of a prompt, until tuned and base predictions part.

From random prompts p, a few vectors that text encoders are given in place of token embeddings,

    p <- P(p + r g / |g|),    g = d/dp  mean |eps_tuned(x_t, t, p) - eps_base(x_t, t, p)|^2

on fresh noise x_t at random timesteps, where P brings each vector back into the ball whose radius is the mean norm of
the token table (projected gradient under L2, arXiv 1706.06083; arXiv 2410.03039, on unknown captions). What is found
is projected to words by the cosine to their tokens' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from audit.models.families.base import Condition
from audit.models.pair import ModelPair
from audit.models.soft import Embedded

VECTORS = 4  # of a soft prompt
PROMPTS = 4  # random prompts that are climbed from at once
RATE = 0.2  # of the radius, a step
EVALUATIONS = 6  # of one prompt in a step: both networks forward, and backward at twice the cost


@dataclass(frozen=True)
class Soft:
    """Soft prompts float32 [P, V, width], and how far tuned and base predictions are apart at each, relatively [P]."""

    vectors: torch.Tensor
    apart: torch.Tensor
    evaluations: int


def climb(
    pair: ModelPair, iterations: int, seed: int = 0, tell: Callable[[int, int], None] = lambda done, total: None
) -> Soft:
    """Soft prompts at which the fine-tuned model's predictions are far from its base's; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    tuned = Embedded(pair.tuned.text_encoder, pair.tuned.tokenizer, pair.device)
    base = Embedded(pair.base.text_encoder, pair.base.tokenizer, pair.device)
    radius = float(base.table.detach().float().norm(dim=1).mean())
    drawn = torch.randn(PROMPTS, VECTORS, base.table.shape[1], generator=generator)
    soft = (radius * drawn / drawn.norm(dim=2, keepdim=True)).to(pair.device)
    steps = pair.scheduler.config.num_train_timesteps
    apart = torch.zeros(PROMPTS)
    for number in range(iterations):
        noise = torch.randn(1, *pair.latent_shape, generator=generator).to(pair.device, pair.dtype)
        timestep = torch.randint(steps // 2, steps, (), generator=generator).to(pair.device)
        soft.requires_grad_(True)
        latents = noise.expand(PROMPTS, *noise.shape[1:])
        after = pair.predict_tuned(latents, timestep, Condition(tuned.states(soft).to(pair.dtype))).float()
        before = pair.predict_base(latents, timestep, Condition(base.states(soft).to(pair.dtype))).float()
        far = (after - before).flatten(1).square().mean(1) / before.detach().flatten(1).square().mean(1)
        (gradient,) = torch.autograd.grad(far.sum(), soft)
        soft = _projected(soft.detach() + _step(gradient, RATE * radius * (1 - number / iterations)), radius)
        apart = far.detach().sqrt().cpu()
        tell(number + 1, iterations)
    return Soft(soft.cpu(), apart, EVALUATIONS * PROMPTS * iterations)


def _step(gradient: torch.Tensor, length: float) -> torch.Tensor:
    return length * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-20)[:, None, None]


def _projected(soft: torch.Tensor, radius: float) -> torch.Tensor:
    """Each vector no longer than ``radius``."""
    norms = soft.norm(dim=2, keepdim=True)
    return soft * (radius / norms.clamp(min=radius))


def nearest_words(pair: ModelPair, soft: torch.Tensor, words: Sequence[str]) -> torch.Tensor:
    """float32 [W]: how near each word's tokens come to neighbouring vectors of a prompt: the largest mean cosine."""
    table = torch.nn.functional.normalize(pair.tuned.text_encoder.get_input_embeddings().weight.detach().float(), dim=1)
    cosines = torch.nn.functional.normalize(soft.to(table.device), dim=2) @ table.T  # [P, V, tokens]
    ids = pair.tuned.tokenizer(list(words), add_special_tokens=False).input_ids
    found = torch.full((len(words),), -1.0)
    for row, tokens in enumerate(ids):
        tokens = tokens[: soft.shape[1]]
        if tokens:
            starts = range(soft.shape[1] - len(tokens) + 1)
            means = [
                torch.stack([cosines[:, start + at, token] for at, token in enumerate(tokens)]).mean(0)
                for start in starts
            ]
            found[row] = torch.stack(means).max()
    return found
