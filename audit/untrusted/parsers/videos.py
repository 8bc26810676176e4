"""Frames of videos of strangers, decoded by PyAV (ffmpeg): one every few seconds, bounded in number and pixels."""

from __future__ import annotations

import io
import os
from typing import Any

from audit.untrusted.child import Item, RefusedError


def frames(item: Item) -> dict[str, Any]:
    """Frames of the open file from second ``start`` on, one every ``every`` seconds, at most ``count``: the second that
    each is shown at, and its size as a BMP file, these one behind the other beside the answer.

    ``more``: whether the video goes on behind them. Raises RefusedError for what is none, and for frames of more than
    ``pixels``.
    """
    try:
        import av
    except ImportError as error:
        raise RefusedError("videos are read by PyAV: pip install 'lora-audit[videos]'") from error
    said = item.said
    with os.fdopen(os.dup(item.files[0].fileno()), "rb") as file:
        try:
            with av.open(file, mode="r", options={"protocol_whitelist": "", "enable_drefs": "0"}) as opened:
                return _frames(opened, said, item)
        except (RefusedError, MemoryError):
            raise
        except Exception as error:
            raise RefusedError(f"not a readable video ({type(error).__name__}: {str(error)[:140]})") from error


def _frames(opened: Any, said: Any, item: Item) -> dict[str, Any]:
    if not opened.streams.video:
        raise RefusedError("it has no pictures")
    stream = opened.streams.video[0]
    stream.codec_context.thread_count = 1  # a child may have no others
    if stream.codec_context.width * stream.codec_context.height > said["pixels"]:
        raise RefusedError(f"{stream.codec_context.width} x {stream.codec_context.height} pixels a frame are too many")
    if said["start"] > 0:
        opened.seek(int(said["start"] / stream.time_base), stream=stream, backward=True)
    seconds: list[float] = []
    sizes: list[int] = []
    due = said["start"]
    for frame in opened.decode(stream):
        shown = float(frame.time) if frame.time is not None else due
        if shown + 1e-6 < due:
            continue
        if len(seconds) == said["count"]:
            return {"seconds": seconds, "sizes": sizes, "more": True}
        if frame.width * frame.height > said["pixels"]:
            raise RefusedError(f"{frame.width} x {frame.height} pixels a frame are too many")
        file = io.BytesIO()
        frame.to_image().convert("RGB").save(file, "BMP")
        item.write(file.getbuffer())
        seconds.append(round(shown, 3))
        sizes.append(len(file.getbuffer()))
        due = max(due, shown) + said["every"] if shown > due + said["every"] else due + said["every"]
    return {"seconds": seconds, "sizes": sizes, "more": False}


PARSERS = {"video": frames}
