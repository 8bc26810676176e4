"""How a file was trained: claims within bounds, and the rank of its tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from audit.models.base import BaseModel
from audit.models.checkpoint import open_checkpoint
from audit.models.formats.names import rank_of, read_names
from audit.models.safetensors_header import TensorInfo, read_header
from audit.models.trained import Training, tensor_rank, training_of
from tests.conftest import DREAMBOOTH, KOHYA, PEFT
from tests.models.test_formats import LYCORIS, lycoris_network


@pytest.mark.parametrize(("file", "rank"), [(KOHYA, 24), (PEFT, 24), (DREAMBOOTH, None)])
def test_the_rank_of_a_file(file: Path, rank: int | None) -> None:
    headers = [header for _, header in open_checkpoint(file).files.values()]
    assert tensor_rank({name: one for header in headers for name, one in header.tensors.items()}) == rank


@pytest.mark.parametrize("name", ["locon", "locon-cp", "loha", "loha-cp", "lokr", "lokr-cp", "full", "glora"])
def test_ranks_are_those_by_which_weights_are_changed(base: BaseModel, tmp_path: Path, name: str) -> None:
    network = lycoris_network(copy.deepcopy(base.denoiser), dict(LYCORIS[name]))
    save_file({key: one.contiguous() for key, one in network.state_dict().items()}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors").tensors
    ranks = [
        rank_of(group.algorithm, {role: tensors[one].shape for role, one in group.tensors.items()})
        for group in read_names(tensors).groups
    ]
    known = [rank for rank in ranks if rank is not None]
    found = tensor_rank(tensors)
    assert found == (max(known, key=lambda rank: (known.count(rank), rank)) if known else None)


@pytest.mark.parametrize(
    ("metadata", "rank", "steps", "rate"),
    [
        ({"ss_network_dim": "16", "ss_steps": "2000", "ss_learning_rate": "0.0001"}, 16, 2000, 1e-4),
        ({"ss_network_dim": " 32.0 ", "ss_unet_lr": "1e-05", "ss_learning_rate": "0.5"}, 32, None, 1e-5),
        ({"ss_network_dim": "None", "ss_unet_lr": "None", "ss_learning_rate": "1.0"}, None, None, 1.0),
        ({"ss_network_dim": "9" * 12, "ss_steps": "9" * 12, "ss_learning_rate": "1e300"}, None, None, None),
        ({"ss_network_dim": "-4", "ss_steps": "0", "ss_learning_rate": "nan"}, None, None, None),
        ({"ss_network_dim": "\uff11\uff16", "ss_steps": "1e3", "ss_learning_rate": "1" * 10_000}, None, None, None),
        ({"ss_learning_rate": "1.2.3"}, None, None, None),
        ({}, None, None, None),
    ],
)
def test_claims_are_typed_and_bounded(
    metadata: dict[str, str], rank: int | None, steps: int | None, rate: float | None
) -> None:
    assert training_of(metadata, {}) == Training(rank, steps, rate, None)


@given(text=st.text() | st.text("0123456789.eE+-nai ", max_size=20))
def test_any_claim_is_read_without_a_crash(text: str) -> None:
    found = training_of(dict.fromkeys(("ss_network_dim", "ss_steps", "ss_unet_lr", "ss_learning_rate"), text), {})
    assert found.claimed_rank is None or 1 <= found.claimed_rank <= 65536
    assert found.claimed_steps is None or 1 <= found.claimed_steps <= 10**9
    assert found.claimed_learning_rate is None or 0 < found.claimed_learning_rate <= 1000


def test_odd_shapes_have_no_rank() -> None:
    def info(*shape: int) -> Any:
        return TensorInfo("F16", shape, 0, 0)

    for shape in ((), (0, 4), (1 << 40, 1)):
        names = {"lora_unet_a.lora_down.weight": info(*shape), "lora_unet_a.lora_up.weight": info(*shape)}
        assert tensor_rank(names) is None
