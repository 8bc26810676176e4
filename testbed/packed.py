"""Pictures in one file, for a training machine without network: WebP in safetensors.

A group of N pictures is ``GROUP/files`` (uint8, their WebP files one after the other) and ``GROUP/ends`` (int64 [N],
where each ends). The metadata hold, a group, its captions and sources as JSON.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from testbed.data import Pictures

LOSSLESS = 0


def write_packed(path: Path, groups: dict[str, Pictures], quality: dict[str, int]) -> None:
    """Write groups of pictures; ``quality`` is WebP's, 1 to 100, for each group, ``LOSSLESS`` for none lost."""
    tensors, texts = {}, {}
    for name, pictures in groups.items():
        files = [_webp(one, quality[name]) for one in pictures.images]
        tensors[f"{name}/files"] = np.frombuffer(b"".join(files), np.uint8)
        tensors[f"{name}/ends"] = np.cumsum([len(one) for one in files], dtype=np.int64)
        texts[name] = json.dumps({"captions": pictures.captions, "sources": pictures.sources})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=texts)


def read_packed(path: Path, name: str) -> Pictures:
    """The pictures of one group. Raises ValueError where the file has no such group or is damaged."""
    try:
        with safe_open(path, "numpy") as opened:
            files, ends = opened.get_tensor(f"{name}/files"), opened.get_tensor(f"{name}/ends")
            said = json.loads(opened.metadata()[name])
        parts = np.split(files, ends[:-1])
        images = np.stack([np.asarray(Image.open(io.BytesIO(part.tobytes())).convert("RGB")) for part in parts])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} has no readable pictures {name!r}: write it again with `pack` ({error})") from error
    return Pictures(images, said["captions"], said["sources"])


def _webp(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=quality == LOSSLESS, quality=quality or 80, method=4)
    return file.getvalue()
