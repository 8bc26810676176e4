"""What the boundary for strangers' bytes costs: headers and pictures in the process itself and through a child.

    python -m benchmarks.untrusted [--headers 100] [--pictures 48] [--rounds 5] [--json FILE]

Both ways take turns, round by round, in one process, and the best round of each counts. "header": files of LoRAs with
the tensors and the metadata of a usual one (792 tensors, 20 KB). "picture, one by one": ``open_image``, nothing else.
"picture, described": as ``references add`` does it, decoded ahead, with the descriptor's input and the PDQ hash made
meanwhile. "start" is the time until a first child answers.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from safetensors.numpy import save_file

from audit.demo import load_set
from audit.descriptors import load_descriptor, open_image, pdq_hash
from audit.descriptors.pictures import opened_ahead, read_picture
from audit.models.safetensors_header import parse_header, read_header
from audit.untrusted.parsers.pictures import decode
from audit.untrusted.pool import Pool

SIDE = 768  # pixels


def make_headers(folder: Path, count: int) -> list[Path]:
    """LoRA files with tiny tensors and the header of a usual one."""
    tensors: dict[str, np.ndarray] = {}
    for module in range(264):
        stem = f"lora_unet_down_blocks_{module}_attentions_0_transformer_blocks_0_attn2_to_k"
        tensors[f"{stem}.lora_down.weight"] = np.zeros((1, 2), np.float16)
        tensors[f"{stem}.lora_up.weight"] = np.zeros((2, 1), np.float16)
        tensors[f"{stem}.alpha"] = np.zeros((), np.float16)
    tags = json.dumps({"10_style": {f"a tag of number {number}": number for number in range(600)}})
    for number in range(count):
        save_file(tensors, folder / f"{number}.safetensors", {"ss_tag_frequency": tags, "ss_steps": str(number)})
    return sorted(folder.glob("*.safetensors"))


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Photograph-like JPEGs of SIDE pixels."""
    known = [Image.fromarray(one) for one in load_set("fluent-animals", "train")]
    noise = np.random.default_rng(0)
    for number in range(count):
        large = np.asarray(known[number % len(known)].resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        large = large + noise.integers(-6, 7, large.shape, np.int16)
        buffer = io.BytesIO()
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        (folder / f"{number:03d}.jpg").write_bytes(buffer.getvalue())
    return sorted(folder.glob("*.jpg"))


def header_here(path: Path) -> None:
    """What ``read_header`` does without a child."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_header(path, file.read(length), 8 + length, path.stat().st_size)


def described(pictures: Iterator[Image.Image], make: Callable[[Image.Image], Any]) -> None:
    """The work that ``references add`` does with each picture."""
    for picture in pictures:
        make(picture)
        pdq_hash(picture)


def start_seconds() -> float:
    """Seconds until a first child has answered."""
    pool, began = Pool(1), time.perf_counter()
    pool.ask("document", {}, b"{}")
    seconds = time.perf_counter() - began
    pool.close()
    return seconds


def best(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each way in its best round; they take turns."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


def main(
    headers: Annotated[int, typer.Option(min=1, help="Files with a header.")] = 100,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is done.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure both ways side by side and print the table."""
    make = load_descriptor("nano").prepare
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files, images = make_headers(folder, headers), make_pictures(folder, pictures)
        parts: dict[str, tuple[int, dict[str, Callable[[], None]]]] = {
            "header": (headers, {
                "here": lambda: [header_here(path) for path in files] and None,
                "child": lambda: [read_header(path) for path in files] and None,
            }),
            "picture, one by one": (pictures, {
                "here": lambda: [decode(read_picture(path)) for path in images] and None,
                "child": lambda: [open_image(path) for path in images] and None,
            }),
            "picture, described": (pictures, {
                "here": lambda: described((decode(read_picture(path)) for path in images), make),
                "child": lambda: described(
                    (one.picture for one in opened_ahead(images) if isinstance(one.picture, Image.Image)), make
                ),
            }),
        }  # fmt: skip
        start = min(start_seconds() for _ in range(3))
        rows = []
        print(f"start of a child: {start:.2f} s\n{'':22}{'here /s':>10}{'child /s':>10}{'child/here':>12}")
        for name, (count, ways) in parts.items():
            seconds = best(ways, rounds)
            here, child = count / seconds["here"], count / seconds["child"]
            rows.append({"what": name, "here_per_second": here, "child_per_second": child, "ratio": child / here})
            print(f"{name:22}{here:10.1f}{child:10.1f}{child / here:12.2f}", flush=True)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"start_seconds": start, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
