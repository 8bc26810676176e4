"""Frames of videos as references: one every few seconds, as it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from audit.references.inputs.given import Given, Pictures
from audit.storable import path_as_text
from audit.untrusted.pool import RefusedError, pool

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
EVERY = 2.0  # s
AT_ONCE = 16  # frames
MOST_FRAMES = 5000  # of a video
MOST_PIXELS = 4096 * 2304  # of a frame


def is_video(path: Path) -> bool:
    """Whether ``path`` is a video by its ending."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def video_pictures(path: Path, every: float = EVERY) -> Pictures:
    """A frame of the video every so many seconds."""
    return Pictures(str(path), given_in(path, every))


def given_in(path: Path, every: float = EVERY, prefix: str = "") -> Iterator[Given]:
    """The frames of a video; what cannot be read of it is one that is refused."""
    label, start, number = f"{prefix}{path_as_text(path.name)}", 0.0, 0
    while True:
        try:
            with path.open("rb") as file:
                said = {"start": start, "every": every, "count": AT_ONCE, "pixels": MOST_PIXELS}
                reply = pool().ask("video", said, b"", [file], most=AT_ONCE * (3 * MOST_PIXELS + (1 << 16)))
            shown = [(float(second), int(size)) for second, size in
                     zip(reply.answer["seconds"], reply.answer["sizes"], strict=True)]  # fmt: skip
        except OSError as error:
            yield Given(label, refused=f"it cannot be read: {error.strerror}")
            return
        except (RefusedError, KeyError, TypeError, ValueError) as error:
            yield Given(f"{label}, from {start:g} s on" if number else label, refused=str(error)[:300])
            return
        place = 0
        for second, size in shown:
            about = json.dumps({"seconds": second, "video": label})
            yield Given(f"{label} at {second:.2f} s", bytes(reply.data[place : place + size]), about)
            place += size
        number += len(shown)
        if not reply.answer.get("more") or not shown:
            return
        if number >= MOST_FRAMES:
            told = f"a frame every {every:g} s are more than {MOST_FRAMES}"
            yield Given(f"{label}, after {shown[-1][0]:g} s", refused=f"{told}: take fewer (--every)")
            return
        start = max(start + AT_ONCE * every, shown[-1][0] + every / 2)
