"""Near-identical uploads: how near the sketches of re-saves are, how far those of other adapters, and what they cost.

    python -m benchmarks.similar [--derived DIR] [--json FILE]

Every LoRA (the shipped ones, and with --derived those of testbed.derived: of one few-shot set on other bases and with
another seed, and of other sets) is saved again in the ways of testbed.resaved; every re-save is compared with its
original and with all other originals. It prints the least and greatest cosine of each way, the separation (AUC) of
re-saves against other adapters, and the error rates at the threshold that is used; then adapters of random numbers in
every format and in the layouts of published models (benchmarks/similar_formats.py); then the seconds for a LoRA of
rank 32 on all attention of SDXL (random numbers on the layers of its UNet), and of a look-up among 100,000 sketches.

Exit code 1 where a re-save whose change is mostly kept falls below the threshold, or another adapter reaches it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from audit.demo import FINE_TUNES
from audit.models.checkpoint import open_checkpoint
from audit.models.published import PUBLISHED, build
from audit.models.sketches.sketch import KIND, NEAR, SIZE, sketch_of
from audit.similar import nearest
from audit.workspace import Workspace
from benchmarks.membership import auc
from benchmarks.similar_formats import by_format, by_layout, sketched
from testbed.derived import TRAINED, Derived
from testbed.finetune import Tuning
from testbed.resaved import (
    Factors,
    mixed,
    pruned,
    read_kohya,
    scaled,
    weighted,
    without,
    write_gguf,
    write_kohya,
    write_peft,
    write_small,
    write_whole,
)

# What keeps so little of a change that it may fall below the threshold
FAR = ("half of another", "an eighth of the ranks", "without convolutions")


def ways(other: Factors) -> dict[str, Callable[[Factors, Path], Path]]:
    """How a LoRA is saved again; ``other`` is merged into it."""
    rank = max(len(down) for _, down in other.values())
    return {
        "float32": lambda f, p: write_kohya(f, p, torch.float32),
        "bfloat16": lambda f, p: write_kohya(f, p, torch.bfloat16),
        "alpha 1": lambda f, p: write_kohya(f, p, alpha=1.0),
        "strength 0.6": lambda f, p: write_kohya(scaled(f, 0.6), p),
        "PEFT's names": lambda f, p: write_peft(f, p),
        "full differences": lambda f, p: write_whole(f, p),
        "float8 (e4m3)": lambda f, p: write_small(f, p, torch.float8_e4m3fn, scaled_by=False),
        "float8 with scales": lambda f, p: write_small(f, p, torch.float8_e4m3fn),
        "int8 with scales": lambda f, p: write_small(f, p, torch.int8),
        "GGUF F16": lambda f, p: write_gguf(f, p, "F16"),
        "GGUF Q8_0": lambda f, p: write_gguf(f, p, "Q8_0"),
        "GGUF Q4_0": lambda f, p: write_gguf(f, p, "Q4_0"),
        "half of the ranks": lambda f, p: write_kohya(pruned(f, rank // 2), p),
        "a quarter of the ranks": lambda f, p: write_kohya(pruned(f, rank // 4), p),
        "an eighth of the ranks": lambda f, p: write_kohya(pruned(f, rank // 8), p),
        "a tenth of another": lambda f, p: write_kohya(mixed(f, other, 0.1), p),
        "a quarter of another": lambda f, p: write_kohya(mixed(f, other, 0.25), p),
        "half of another": lambda f, p: write_kohya(mixed(f, other, 0.5), p),
        "blocks at half strength": lambda f, p: write_kohya(weighted(f, {"down_blocks": 0.5}), p),
        "without convolutions": lambda f, p: write_kohya(without(f, ("resnets",)), p),
    }  # fmt: skip


def compared(files: dict[str, Path]) -> dict[str, Any]:
    """Cosines by way, and of originals with each other."""
    factors = {name: read_kohya(path) for name, path in files.items()}
    originals = {name: sketched(path) for name, path in files.items()}
    names = list(files)
    found: dict[str, list[float]] = {}
    others: list[float] = []
    with tempfile.TemporaryDirectory(prefix="lora-audit-similar-") as folder:
        for number, name in enumerate(names):
            other = factors[names[(number + 1) % len(names)]]
            for way, save in ways(other).items():
                again = sketched(save(factors[name], Path(folder) / "again.safetensors"))
                found.setdefault(way, []).append(float(again.vector @ originals[name].vector))
                if "another" not in way:
                    others += [float(again.vector @ one.vector) for key, one in originals.items() if key != name]
    pairs = [
        (one, two, round(float(originals[one].vector @ originals[two].vector), 4))
        for number, one in enumerate(names)
        for two in names[number + 1 :]
    ]
    same = [cosine for way, some in found.items() if way not in FAR for cosine in some]
    return {
        "threshold": NEAR, "ways": {way: [round(min(some), 4), round(max(some), 4)] for way, some in found.items()},
        "others": [round(min(others), 4), round(max(others), 4)], "pairs": pairs, "comparisons": len(others),
        "auc": auc(np.array(same), np.array(others)), "missed": float(np.mean(np.array(same) < NEAR)),
        "false": float(np.mean(np.array(others) >= NEAR)),
    }  # fmt: skip


def cost(rank: int = 32) -> dict[str, Any]:
    """Seconds to sketch a LoRA on the attention of SDXL's UNet, and to look one up among many."""
    generator = torch.Generator().manual_seed(0)
    unet = build(PUBLISHED["sdxl"].networks["unet"])
    state = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            stem = "lora_unet_" + name.replace(".", "_")
            outputs, inputs = module.weight.shape
            state[f"{stem}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator).half()
            state[f"{stem}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator).half()
            state[f"{stem}.alpha"] = torch.tensor(float(rank))
    found: dict[str, Any] = {"modules": len(state) // 3}
    with tempfile.TemporaryDirectory(prefix="lora-audit-similar-") as folder:
        path = Path(folder) / "xl.safetensors"
        save_file(state, path)
        found["megabytes"] = round(path.stat().st_size / 1e6, 1)
        files = list(open_checkpoint(path).files.values())
        for which in ("first", "next"):  # signs of each side are made once
            started = time.perf_counter()
            assert sketch_of(files) is not None
            found[f"seconds_{which}"] = round(time.perf_counter() - started, 2)
        found |= look_up(Path(folder) / "w", 100_000)
    return found


def look_up(folder: Path, many: int) -> dict[str, Any]:
    """Seconds of a look-up among ``many`` random sketches."""
    workspace = Workspace(folder)
    vectors = np.random.default_rng(0).standard_normal((many, SIZE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for start in range(0, many, 20_000):
        some = vectors[start : start + 20_000]
        rows = [
            {"identity": f"{start + i:064x}", "kind": KIND, "modules": 1, "left_out": 0, "norm": 1.0, "sketch": one}
            for i, one in enumerate(some)
        ]
        workspace.append("sketches", rows)
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    started = time.perf_counter()
    assert nearest(workspace, vectors[7].tolist()) == []  # none of them is of an item of the catalog
    seconds = round(time.perf_counter() - started, 2)
    return {"among": many, "megabytes_of_table": round(size / 1e6), "seconds_look_up": seconds}


def main(
    derived: Annotated[Path | None, typer.Option(help="The folder that testbed.derived made.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write what is printed as JSON.")] = None,
) -> None:
    """Print cosines and costs."""
    torch.set_num_threads(1)
    files = {"fluent-animals on parent": FINE_TUNES["lora-kohya"].path}
    if derived is not None:
        made = Derived(derived)
        files |= {
            one.name: made.file(one) for one in TRAINED
            if one.recipe.tuning is not Tuning.dreambooth and made.file(one).exists()
        }  # fmt: skip
    found = compared(files)
    for way, (least, most) in found["ways"].items():
        print(f"{way:26}cosine {least:.4f} to {most:.4f}{'' if way not in FAR else '  (no re-save)'}")
    least, most = found["others"]
    print(f"{'other adapters':26}cosine {least:.4f} to {most:.4f}, {found['comparisons']} pairs")
    print(f"AUC {found['auc']:.4f}; at {NEAR}: {found['missed']:.1%} missed, {found['false']:.1%} of others near")
    found["formats"], found["layouts"] = by_format(), by_layout()
    for name, row in found["formats"].items():
        print(f"{name:26}bfloat16 {row['again']:.4f}, others {row['others'][0]:.4f} to {row['others'][1]:.4f}")
    for name, cosine in found["layouts"].items():
        print(f"{name:50}cosine {cosine:.5f}")
    again = [row["again"] for row in found["formats"].values()] + list(found["layouts"].values())
    others = [one for row in found["formats"].values() for one in row["others"]]
    found["cost"] = cost()
    print(json.dumps(found["cost"]))
    if json_file:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if found["missed"] or found["false"] or min(again) < NEAR or max(others) >= NEAR:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
