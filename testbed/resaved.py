"""One LoRA saved again as people do: other precision, alpha, spelling, rank, or a little of another merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_kohya(path: Path) -> Factors:
    """(up, down) in float32 of every module of a kohya file, alpha taken into the up factor."""
    state, found = load_file(path), {}
    for name in state:
        if name.endswith(".lora_down.weight"):
            stem = name.removesuffix(".lora_down.weight")
            down, up = state[name].float(), state[f"{stem}.lora_up.weight"].float()
            alpha = float(state.get(f"{stem}.alpha", torch.tensor(len(down))))
            found[stem] = up * alpha / len(down), down
    return found


def write_kohya(factors: Factors, path: Path, dtype: torch.dtype = torch.float16, alpha: float | None = None) -> Path:
    """A kohya file; with ``alpha`` other than the rank the up factors are scaled so that the change stays the same."""
    state = {}
    for stem, (up, down) in factors.items():
        rank = len(down)
        told = float(rank) if alpha is None else alpha
        state[f"{stem}.lora_up.weight"] = (up * rank / told).to(dtype).contiguous()
        state[f"{stem}.lora_down.weight"] = down.to(dtype).contiguous()
        state[f"{stem}.alpha"] = torch.tensor(told)
    save_file(state, path)
    return path


def write_peft(factors: Factors, path: Path) -> Path:
    """diffusers' names in kohya's spelling of them, with dots and lora_A, lora_B; the strength is in the factors."""
    state = {}
    for stem, (up, down) in factors.items():
        module = stem.removeprefix("lora_unet_")
        state[f"unet.{module}.lora_B.weight"] = up.contiguous()
        state[f"unet.{module}.lora_A.weight"] = down.contiguous()
    save_file(state, path)
    return path


def write_whole(factors: Factors, path: Path) -> Path:
    """The changes themselves, as LyCORIS' full differences."""
    state = {
        f"{stem}.diff": (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        for stem, (up, down) in factors.items()
    }
    save_file(state, path)
    return path


def write_small(factors: Factors, path: Path, dtype: torch.dtype, scaled_by: bool = True) -> Path:
    """8 bits a number, with a scale a factor (as ComfyUI writes them) or as they are."""
    most = 127.0 if dtype is torch.int8 else float(torch.finfo(dtype).max)
    state = {}
    for stem, pair in factors.items():
        for side, value in zip(("lora_up", "lora_down"), pair, strict=True):
            scale = value.abs().max() / most if scaled_by else torch.tensor(1.0)
            small = value / scale
            state[f"{stem}.{side}.weight"] = (small.round() if dtype is torch.int8 else small).to(dtype).contiguous()
            if scaled_by:
                state[f"{stem}.{side}.scale_weight"] = scale
    save_file(state, path)
    return path


def write_gguf(factors: Factors, path: Path, kind: str) -> Path:
    """A GGUF file; what does not fill its blocks is in float16, as converters leave it."""
    import gguf

    writer = gguf.GGUFWriter(path, "lora")
    wanted = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    for stem, pair in factors.items():
        for side, value in zip(("lora_up", "lora_down"), pair, strict=True):
            use = wanted if value.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16
            packed = gguf.quants.quantize(value.contiguous().numpy(), use)
            writer.add_tensor(f"{stem}.{side}.weight", packed, raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scaled(factors: Factors, by: float) -> Factors:
    """The change times ``by``, as another strength."""
    return {stem: (up * by, down) for stem, (up, down) in factors.items()}


def pruned(factors: Factors, rank: int) -> Factors:
    """The best approximation of every module's change of a lower rank (singular value decomposition)."""
    found = {}
    for stem, (up, down) in factors.items():
        whole = up.flatten(1) @ down.flatten(1)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        shape = (kept, *down.shape[1:])
        found[stem] = (
            (u[:, :kept] * root).reshape(len(up), kept, *up.shape[2:]),
            (root[:, None] * v[:kept]).reshape(shape),
        )
    return found


def mixed(factors: Factors, other: Factors, share: float) -> Factors:
    """(1 - share) of one and ``share`` of another, by joined ranks."""
    found = dict(scaled(factors, 1 - share))
    for stem, (up, down) in other.items():
        if stem in found:
            mine = found[stem]
            found[stem] = torch.cat([mine[0], up * share], 1), torch.cat([mine[1], down])
    return found


def without(factors: Factors, blocks: tuple[str, ...]) -> Factors:
    """Those modules alone whose names hold none of ``blocks``."""
    return {stem: pair for stem, pair in factors.items() if not any(block in stem for block in blocks)}


def weighted(factors: Factors, weights: Mapping[str, float]) -> Factors:
    """The modules whose names hold a key of ``weights`` at that strength: a merge by blocks."""
    return {
        stem: (up * next((by for key, by in weights.items() if key in stem), 1.0), down)
        for stem, (up, down) in factors.items()
    }
