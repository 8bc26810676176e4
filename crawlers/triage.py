"""What a file is by its header alone, before it is downloaded: so that bytes go to the families that were asked for.

Civitai answers with a file's tensors (GET /model-files/ID/tensor-metadata: format, tensors of name, shape, dtype and
sizeBytes; without the header's metadata). Where that is not served, the first bytes of the download are asked for: of a
GGUF file, whose header does not say how long it is, as many as most have, and once more of them.
What cannot be told is downloaded: nothing is left out for want of an answer.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audit.errors import CheckpointError, FetchError, PausedError
from audit.models.families.identify import agree, family_of_shapes
from audit.models.formats.gguf_header import GGUF_MAGIC
from audit.models.safetensors_header import MAX_HEADER_BYTES, MAX_NAME, MAX_RANK, MAX_TENSORS, TensorInfo
from audit.untrusted.documents import parse_json
from audit.untrusted.headers import checked_header
from crawlers.http import Session, check_status
from crawlers.items import dict_of, list_of

log = logging.getLogger(__name__)
MAX_SIDE = 2**40
START = 8  # bytes that say how long a safetensors header is
GGUF_STARTS = (1 << 20, 8 << 20)  # bytes; a denoiser's header has some 200 KB


def tensors_of(session: Session, metadata_url: str | None, download_url: str) -> dict[str, TensorInfo] | None:
    """Names, types and shapes of a file's tensors, without its data; None where they cannot be had.

    Raises PausedError where the source wants none of our requests.
    """
    for ask, url in ((_asked, metadata_url), (_begun, download_url)):
        if not url:
            continue
        try:
            found = ask(session, url)
        except PausedError:
            raise
        except (FetchError, CheckpointError, ValueError, TypeError, RecursionError, OSError) as error:
            log.debug("no header of %s: %s", url.partition("?")[0], str(error)[:200])
            continue
        if found:
            return found
    return None


def left_out(tensors: dict[str, TensorInfo] | None, families: Sequence[str]) -> str | None:
    """Why a file of such tensors is not downloaded where only ``families`` are wanted; None where it is."""
    shapes = family_of_shapes(tensors) if tensors else None
    if shapes is None or any(agree(shapes, wanted) for wanted in families):
        return None
    return f"its header has the tensors of family {shapes}, not of {', '.join(families)}: it was not downloaded"


def _asked(session: Session, url: str) -> dict[str, TensorInfo]:
    """By Civitai's answer. Raises FetchError."""
    answer = dict_of(session.get_json(url))
    return _checked((one.get("name"), one) for one in map(dict_of, list_of(answer.get("tensors"), MAX_TENSORS)))


def _begun(session: Session, url: str) -> dict[str, TensorInfo]:
    """By ranges of the file itself. Raises FetchError, and ValueError or CheckpointError where it is not read."""
    start, total = _range(session, url, 0, START)
    if start.startswith(GGUF_MAGIC):
        return _begun_gguf(session, url, total)
    length = int.from_bytes(start, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("it does not begin with the length of a header")
    header = parse_json(_range(session, url, START, length)[0])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return _checked((name, dict_of(one)) for name, one in header.items() if name != "__metadata__")


def _begun_gguf(session: Session, url: str, total: int) -> dict[str, TensorInfo]:
    """By the start of a GGUF file of ``total`` bytes, parsed in a child, from a file with a hole behind it."""
    for most in GGUF_STARTS:
        count = min(most, total)
        begun, _ = _range(session, url, 0, count)
        with tempfile.TemporaryFile() as file:
            file.write(begun)
            file.truncate(total)
            try:
                header = checked_header(Path("a GGUF file"), "gguf", b"", total, [file])
            except CheckpointError:
                if count == total:
                    raise
                continue  # perhaps its header is longer
        if header.data_start <= count:
            return header.tensors
    raise ValueError("its header is longer than is asked for")


def _range(session: Session, url: str, start: int, count: int) -> tuple[bytes, int]:
    """``count`` bytes from ``start`` on, and how many the file has. Raises FetchError."""
    headers = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    with session.open(url, headers=headers) as response:
        check_status(response)
        said = re.match(r"bytes (\d{1,15})-(?:\d{1,15}/(\d{1,13}))?", response.headers.get("Content-Range", ""))
        if response.status_code != 206 or not said or int(said[1]) != start:
            raise FetchError("it gives no part of the file")
        body = bytearray()
        for chunk in response.iter_content(1 << 16):
            body += chunk
            if len(body) > count:
                raise FetchError("it gives more than was asked for")
    if len(body) != count:
        raise FetchError("it gives less than was asked for")
    return bytes(body), int(said[2] or start + count)


def _checked(pairs: Any) -> dict[str, TensorInfo]:
    """Those of a stranger's tensors that are some: a name, a type and sides within bounds."""
    found: dict[str, TensorInfo] = {}
    for name, one in pairs:
        shape, dtype = list_of(one.get("shape"), MAX_RANK + 1), one.get("dtype")
        fits = isinstance(name, str) and 0 < len(name) <= MAX_NAME and isinstance(dtype, str) and len(dtype) <= 20
        sides = len(shape) <= MAX_RANK and all(type(side) is int and 0 <= side < MAX_SIDE for side in shape)
        if fits and sides and len(found) < MAX_TENSORS:
            found[name] = TensorInfo(dtype, tuple(shape), 0, 0)
    return found
