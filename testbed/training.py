"""What the training scripts share: seeds, learning rate, resumable state and a progress line.

The schedule, the versions of pictures under a defence and the names in a file are those of studies (``audit/study``).
The loop is not: what comes along was trained with one generator for order, levels and noise, and with AdamW's second
beta at 0.99, and would be other weights by ``audit/study/train.py``, where a step draws by its number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from audit.processes import spread, threads_each
from audit.study.train import cosine_factor


def prepare_cpu(threads: int, seed: int) -> None:
    """Seed torch and set its threads (several processes at full threads each are ten times slower)."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads or (os.cpu_count() or 1))


def cosine_schedule(
    optimizer: torch.optim.Optimizer, *cycles: int, warmup: int = 100, floor: float = 0.02
) -> torch.optim.lr_scheduler.LRScheduler:
    """Cosine decay to ``floor`` times the peak over each cycle of so many steps, every one with a linear warm-up."""

    def factor(step: int) -> float:
        for cycle in cycles:
            if step < cycle:
                break
            step -= cycle
        return cosine_factor(step, cycle, warmup, floor)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def print_each(work: Callable[[Any, int], Path], recipes: Sequence[Any], workers: int, threads: int) -> None:
    """Make every recipe by ``work(recipe, threads)``, in several processes, and print what each has become."""
    for number, done in enumerate(spread(work, recipes, workers, threads_each(workers, threads)), start=1):
        print(f"{number}/{len(recipes)}", done, flush=True)


def run(
    steps: int,
    step: Callable[[int], dict[str, float]],
    parts: dict[str, Any],
    state_file: Path,
    every: int = 250,
) -> None:
    """Call ``step(i)`` for every step not yet done; save ``parts`` (things with a state_dict) every ``every`` steps.

    An interrupted run goes on from the last saved state. ``step`` returns the figures to print.
    """
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
        torch.set_rng_state(state["rng"])
        print(f"continuing {state_file} at step {first}", flush=True)
    started = time.monotonic()
    sums: dict[str, float] = {}
    for index in range(first, steps):
        for name, value in step(index).items():
            sums[name] = sums.get(name, 0.0) + value / every
        if (index + 1) % every == 0 or index + 1 == steps:
            pace = (time.monotonic() - started) / (index + 1 - first)
            figures = "  ".join(f"{name} {value:.4f}" for name, value in sums.items())
            left = pace * (steps - index - 1) / 60
            print(f"step {index + 1}/{steps}  {figures}  {pace:.3f} s/step, {left:.0f} min left", flush=True)
            sums = {}
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": index + 1, "rng": torch.get_rng_state()}
            state_file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)


def fit(
    parts: dict[str, torch.nn.Module],
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[], torch.Tensor],
    steps: int,
    lr: float,
    state_file: Path,
    every: int = 250,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Minimise ``loss_of()`` over ``parameters``: AdamW, clipped gradients, one cosine cycle; ``after`` every step.

    ``parts`` are kept in ``state_file`` with the optimizer, so that an interrupted run goes on.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = cosine_schedule(optimizer, steps)

    def step(index: int) -> dict[str, float]:
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        after()
        return {"loss": loss.item()}

    run(steps, step, {**parts, "optimizer": optimizer, "schedule": schedule}, state_file, every)


class Average(torch.nn.Module):
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.updates: torch.Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.values = torch.nn.ParameterList([p.detach().clone() for p in module.parameters()]).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move a step towards the current weights."""
        self.updates.add_(1)
        weight = 1 - min(self.decay, float(1 + self.updates) / float(10 + self.updates))
        torch._foreach_lerp_(list(self.values), list(module.parameters()), weight)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Put the averaged weights into ``module``."""
        for parameter, value in zip(module.parameters(), self.values, strict=True):
            parameter.copy_(value)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1)


def shuffled(count: int, batch: int) -> Iterator[torch.Tensor]:
    """Index batches without end, every index once an epoch."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count)])
        yield order[:batch]
        order = order[batch:]
