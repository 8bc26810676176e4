"""An audit of the embedded model on the device, against the facts of the same audit on a CPU in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.gpu import subject
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import Figures

IMAGES_EACH, TINY_IMAGES_EACH = 50, 2  # a training image
PIXELS = 16  # images of which every pixel is compared
BATCHES = (1, 7, PIXELS)


@dataclass(frozen=True)
class Golden:
    """An audit's facts on a CPU.

    ``vectors`` float16 [500, D] and ``matches`` are of the whole audit, ``tiny_matches`` of one of 20 images, whose
    vectors are the first 20: image i is the same in both. ``images`` uint8 [16, H, W, 3] have the fixed weight.
    """

    vectors: np.ndarray
    matches: list[str]
    tiny_matches: list[str]
    images: np.ndarray
    change: float


def read_golden(file: Path) -> Golden:
    """The facts in ``file``. Raises ValueError where there are none, or where they are of another algorithm."""
    mend = f"make them with: python -m benchmarks.gpu --device cpu --parts nano --make-golden --golden {file}"
    if not file.is_file():
        raise ValueError(f"{file}: there are no golden facts; {mend}")
    with np.load(file) as held:
        if int(held["version"]) != subject.VERSION:
            raise ValueError(f"{file}: facts of algorithm {held['version']}, not {subject.VERSION}; {mend}")
        matches, tiny = (held[name].tolist() for name in ("matches", "tiny_matches"))
        return Golden(held["vectors"], matches, tiny, held["images"], float(held["change"]))


def make_golden(bench: Bench) -> None:
    """Run the audits and write the facts."""
    bench.record.step("golden facts", 60, lambda: _make_golden(bench))


def _make_golden(bench: Bench) -> Figures:
    whole = subject.nano_audit(bench.device, bench.folder / "golden", IMAGES_EACH)
    tiny = subject.nano_audit(bench.device, bench.folder / "golden-tiny", TINY_IMAGES_EACH)
    images = subject.images_of(subject.sampler_of(subject.nano_pair(bench.device), PIXELS), PIXELS)
    np.savez_compressed(
        bench.golden, version=subject.VERSION, vectors=whole.vectors.astype(np.float16), matches=whole.matches,
        tiny_matches=tiny.matches, images=images, change=whole.change,
    )  # fmt: skip
    return {
        "file": str(bench.golden),
        "kib": bench.golden.stat().st_size / 1024,
        "images": len(whole.vectors),
        "matches": len(whole.matches),
    }


def measure(bench: Bench) -> None:
    """The audit, then the same images in other batches and once more."""
    golden = read_golden(bench.golden)
    bench.record.step("audit", 22, lambda: _audit(bench, golden))
    bench.record.step("batches", 8, lambda: _batches(bench, golden))


def _audit(bench: Bench, golden: Golden) -> Figures:
    each = bench.size(IMAGES_EACH, TINY_IMAGES_EACH)
    ours = subject.nano_audit(bench.device, bench.folder / "nano", each)
    theirs = golden.vectors[: len(ours.vectors)].astype(np.float32)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    cosines = (theirs * ours.vectors).sum(axis=1)
    expected = bench.size(golden.matches, golden.tiny_matches)
    bench.record.bound("same matches as on a CPU", ours.matches == expected, equal=True)
    return {
        "images": len(cosines),
        "seconds": ours.seconds,
        "images_s": len(cosines) / ours.seconds,
        "matches": len(ours.matches),
        "matches_on_cpu": len(expected),
        "cosine_least": float(cosines.min()),
        "cosine_first_percentile": float(np.quantile(cosines, 0.01)),
        "cosine_median": float(np.median(cosines)),
        "change": ours.change,
        "change_on_cpu": golden.change,
    }


def _batches(bench: Bench, golden: Golden) -> Figures:
    """Differences in levels of 255."""
    count = bench.size(PIXELS, 2)
    pair = subject.nano_pair(bench.device)
    whole = subject.images_of(subject.sampler_of(pair, count), count)
    again = subject.images_of(subject.sampler_of(pair, count), count)
    to_cpu = _levels(whole, golden.images[:count])
    figures: dict[str, float | bool] = {
        "images": count,
        "again_identical": bool((again == whole).all()),
        "to_cpu_mean": float(to_cpu.mean()),
        "to_cpu_most": int(to_cpu.max()),
    }
    for batch in BATCHES:
        if batch < count:
            other = subject.images_of(subject.sampler_of(pair, batch), count)
            figures[f"batch_{batch}_most"] = int(_levels(whole, other).max())
    return figures


def _levels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first.astype(int) - second.astype(int))
