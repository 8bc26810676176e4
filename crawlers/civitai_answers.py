"""What people paste to name a model of Civitai, and the prompts in its answers."""

from __future__ import annotations

import re
from typing import Any

from crawlers.items import dict_of

PROMPT_IMAGES = 20


def prompts_of(images: list[Any]) -> list[str]:
    """The prompts of the images of one answer; ``meta`` can be null, free-form, or nested once more."""
    found = []
    for image in images[:PROMPT_IMAGES]:
        meta = dict_of(dict_of(image).get("meta"))
        inner = meta if isinstance(meta.get("prompt"), str) else dict_of(meta.get("meta"))
        prompt = inner.get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            found.append(prompt)
    return list(dict.fromkeys(found))


def reference_of(text: str) -> dict[str, str] | None:
    """What a Civitai page URL, AIR urn, model id or hash names, as arguments of ``Civitai.one``; None for others.

    AIR: urn:air:sd1:lora:civitai:MODEL@VERSION (https://github.com/civitai/civitai/wiki/AIR).
    """
    air = re.fullmatch(r"(?:urn:)?air:[\w-]+:[\w-]+:civitai:(\d{1,18})(?:@(\d{1,18}))?(?:\.\w+)?", text, re.IGNORECASE)
    page = re.fullmatch(r"https://(?:www\.)?civitai\.(?:com|green|red)/models/(\d{1,18})(?:[/?#].*)?", text)
    item = re.fullmatch(r"civitai:(\d{1,18})(?::(\d{1,18}))?(?::\d{1,18})?", text)
    if page:
        version = re.search(r"[?&]modelVersionId=(\d{1,18})", text)
        return {"model_id": page.group(1), **({"version_id": version.group(1)} if version else {})}
    for match in (air, item):
        if match:
            return {"model_id": match.group(1), **({"version_id": match.group(2)} if match.group(2) else {})}
    if re.fullmatch(r"\d{1,9}", text):
        return {"model_id": text}
    if re.fullmatch(r"[0-9a-fA-F]{8}|[0-9a-fA-F]{10}|[0-9a-fA-F]{12}|[0-9a-fA-F]{64}", text):
        return {"digest": text}
    return None
