"""How sampling takes errors of the device that are none of memory: ``python -m benchmarks.gpu.sticky DEVICE``.

Prints one line of JSON. A device-side assert is real on a GPU (on a CPU the same code is a plain error); an illegal
access is only named as the driver names it, its text having the word "memory" in it. Neither may halve a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from benchmarks.gpu import subject

BATCH = 4


def raised_by(sampler: subject.Sampler, fault: Callable[[], None]) -> tuple[str, bool]:
    """The class of the error that leaves the sampler, and whether it was taken for one of memory."""
    with subject.refusing(sampler, "vae", 0, fault):
        try:
            subject.images_of(sampler, BATCH)
        except Exception as error:
            return type(error).__name__, sampler.batch_size < BATCH
    return "nothing", sampler.batch_size < BATCH


def is_usable(device: str) -> bool:
    """Whether the device still answers."""
    try:
        return bool(torch.zeros(1, device=device).cpu() == 0)
    except Exception:
        return False


def main(device: Annotated[str, typer.Argument(help="cpu, cuda or cuda:N.")]) -> None:
    """Raise errors that are none of memory while sampling, and print what became of them."""

    def named() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def asserted() -> None:
        torch.zeros(4, device=device)[torch.tensor([9], device=device)].cpu()

    pair = subject.nano_pair(device)
    # the illegal access first: after the assert nothing can be asked of a GPU
    access, access_as_memory = raised_by(subject.sampler_of(pair, BATCH, 1), named)
    error, error_as_memory = raised_by(subject.sampler_of(pair, BATCH, 1), asserted)
    figures = {
        "assert": error,
        "assert_taken_for_memory": error_as_memory,
        "illegal_access": access,
        "illegal_access_taken_for_memory": access_as_memory,
        "usable_after": is_usable(device),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    typer.run(main)
