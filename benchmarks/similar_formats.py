"""Sketches of adapters of random numbers: one of every format, and one change in two layouts of a published model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from audit.models.checkpoint import open_checkpoint
from audit.models.families.keys import Target, originals_of
from audit.models.published import PUBLISHED, build
from audit.models.sketches.sketch import Sketch, sketch_of

State = dict[str, torch.Tensor]
RANK = 8
SEEDS = 4
Noise = Callable[..., torch.Tensor]
# Formats of which the tests compare the sketch with that of the change in effect, and those with a space of their own
FORMATS: Mapping[str, Callable[[Noise, int, int], State]] = {
    "LoRA": lambda n, o, i: {"lora_up.weight": n(o, RANK), "lora_down.weight": n(RANK, i)},
    "LoHa": lambda n, o, i: {"hada_w1_a": n(o, 4), "hada_w1_b": n(4, i), "hada_w2_a": n(o, 4), "hada_w2_b": n(4, i)},
    "LoKr": lambda n, o, i: {"lokr_w1": n(8, 8), "lokr_w2_a": n(o // 8, RANK), "lokr_w2_b": n(RANK, i // 8)},
    "CP decomposition": lambda n, o, i: {
        "lora_up.weight": n(o, RANK, 1, 1), "lora_mid.weight": n(RANK, RANK, 3, 3),
        "lora_down.weight": n(RANK, i, 1, 1),
    },
    "T-LoRA with its beginning": lambda n, o, i: {
        "q_layer.weight": n(RANK, i), "p_layer.weight": n(o, RANK), "lambda_layer": n(1, RANK), "base_q": n(RANK, i),
        "base_p": n(o, RANK), "base_lambda": n(1, RANK),
    },
    "GLoRA": lambda n, o, i: {
        "a1.weight": n(i, RANK), "a2.weight": n(RANK, i), "b1.weight": n(o, RANK), "b2.weight": n(RANK, i),
    },
    "OFT": lambda n, o, i: {"oft_blocks": n(o // 8, 8, 8) / 10},
    "BOFT": lambda n, o, i: {"oft_blocks": n(3, o // 8, 8, 8) / 10},
    "IA3": lambda n, o, i: {"weight": n(o, 1) / 10, "on_input": torch.tensor(False)},
    "PEFT OFT": lambda n, o, i: {"oft_R.weight": n(i // 8, 28) / 10},
    "PEFT BOFT": lambda n, o, i: {"boft_R": n(2, i // 8, 8, 8) / 10, "boft_s": 1 + n(o, 1) / 10},
    "PEFT IA3": lambda n, o, i: {"ia3_l": 1 + n(o, 1) / 10},
}  # fmt: skip
# of these the layers of both layouts, as many as make up a good part of a network
LAYOUTS = {"sd15": "unet", "sdxl": "unet", "flux-dev": "transformer", "sd3.5-medium": "transformer",
           "z-image": "transformer", "wan2.1-1.3b": "transformer", "krea-2": "transformer"}  # fmt: skip


def sketched(path: Path) -> Sketch:
    """The sketch of a file."""
    found = sketch_of(open_checkpoint(path).files.values())
    assert found is not None
    return found


def by_format() -> dict[str, dict[str, Any]]:
    """By format: the cosine of a re-save in bfloat16, and the least and greatest between four of other numbers."""
    layers = {
        name: tuple(module.weight.shape)
        for name, module in build(PUBLISHED["sd15"].networks["unet"]).named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name and module.weight.shape[1] != 768
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix="lora-audit-similar-") as folder:
        path = Path(folder) / "f.safetensors"
        for name in FORMATS:
            originals = [_saved(_state(name, layers, seed), path) for seed in range(SEEDS)]
            again = _saved(_state(name, layers, 0, torch.bfloat16), path)
            others = [float(a.vector @ b.vector) for n, a in enumerate(originals) for b in originals[n + 1 :]]
            found[name] = {"again": round(float(originals[0].vector @ again.vector), 5),
                           "others": [round(min(others), 4), round(max(others), 4)]}  # fmt: skip
    return found


def _state(name: str, layers: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    prefix = "unet." if name.startswith("PEFT") else "lora_unet_"
    return {
        f"{prefix}{layer if prefix == 'unet.' else layer.replace('.', '_')}.{key}":
        value if value.dtype is torch.bool else value.to(dtype)
        for layer, (outputs, inputs) in layers.items()
        for key, value in FORMATS[name](lambda *shape: torch.randn(shape, generator=generator), outputs, inputs).items()
    }  # fmt: skip


def by_layout() -> dict[str, float]:
    """By model: the cosine of one random LoRA in diffusers' names, and in kohya's spelling of the original's."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="lora-audit-similar-") as folder:
        for name, part in LAYOUTS.items():
            network = build(PUBLISHED[name].networks[part])
            ours, theirs = {}, {}
            for original, target in _some(dict(originals_of(network)), network):
                one, other = _both(original, target, network)
                ours |= one
                theirs |= other
            first, second = (_saved(state, Path(folder) / "f.safetensors") for state in (ours, theirs))
            found[name] = round(float(first.vector @ second.vector), 6)
    return found


def _some(originals: Mapping[str, Target], network: Any) -> list[tuple[str, Target]]:
    """Linear layers and convolutions that have another name in the original, every third beyond the first 40."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    fitting = [
        (theirs, target) for theirs, target in originals.items()
        if theirs not in target.modules and all(isinstance(network.get_submodule(one), kinds) for one in target.modules)
        and ".processor." not in theirs and not (target.swapped and ".context_block." in theirs)
    ]  # fmt: skip
    return fitting[:40] + fitting[40::3]


def _both(original: str, target: Target, network: Any) -> tuple[State, State]:
    """A random LoRA of one module of the original: of each of its parts, and of the whole."""
    generator = torch.Generator().manual_seed(sum(map(ord, original)))
    ours, ups, downs = {}, [], []
    for module in target.modules:
        outputs, inputs, *sides = network.get_submodule(module).weight.shape
        up, down = (torch.randn(shape, generator=generator) for shape in ((outputs, 4), (4, inputs, *sides)))
        ours |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up.reshape(*up.shape, *[1] * len(sides))}
        ups.append(up)
        downs.append(down)
    up, down = torch.block_diag(*ups), torch.cat(downs)
    if target.swapped:
        up = torch.cat(list(reversed(up.chunk(2))))
    stem = f"lora_unet_{original.replace('.', '_')}"
    whole = up.reshape(*up.shape, *[1] * (down.ndim - 2))
    return ours, {f"{stem}.lora_up.weight": whole, f"{stem}.lora_down.weight": down}


def _saved(state: State, path: Path) -> Sketch:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return sketched(path)
