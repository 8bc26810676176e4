"""torch.compile with inductor on the CPU: the same latents, and nothing compiled again for another checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from audit.config import Compile
from audit.models.base import load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.sampling.guidance import ModelGuidance
from audit.sampling.sampler import Sampler
from tests.conftest import BASE, CAPTION, KOHYA


def latents(sampler: Sampler, count: int) -> torch.Tensor:
    return torch.cat([sampler._finite_latents(range(first, min(first + 4, count))) for first in range(0, count, 4)])


@pytest.mark.timeout(600)
def test_ten_checkpoints_are_compiled_once() -> None:
    base = load_base(locate_base(str(BASE)))  # one of its own: compiled networks would stay so for other tests
    graphs = []
    for number in range(10):
        plain = ModelPair(base, open_checkpoint(KOHYA), lora_scale=1 - number / 20)
        compiled = ModelPair(base, open_checkpoint(KOHYA), lora_scale=1 - number / 20)
        compiled.compile(Compile.blocks)
        with torch.compiler.set_stance("force_eager"):
            wanted = latents(Sampler(plain, ModelGuidance(), [CAPTION], steps=2, batch_size=4), 6)
        found = latents(Sampler(compiled, ModelGuidance(), [CAPTION], steps=2, batch_size=4), 6)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}  # though the last batch has two images only
