"""The items of a model version in Civitai's answers: one a weight file, with what is claimed of it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from audit.claims.captions import Caption
from crawlers.items import (
    Claim,
    Item,
    clean_name,
    count_in_prose,
    dict_of,
    gguf_refusal,
    hex_of,
    list_of,
    text_of,
    time_of,
)

SOURCE = "civitai"
# One site under several names: the same models by the same numbers, of which each name shows a part.
TWINS = frozenset({"civitai.com", "civitai.green", "civitai.red"})
WEIGHTS = ("Model", "Pruned Model")


def hosts_of(host: str) -> list[str]:
    """``host``, and the other names of the site that it is one of."""
    return [host, *sorted(TWINS - {host})] if host in TWINS else [host]


def items_of(
    model_id: str, model: dict[str, Any], version: dict[str, Any], site: str, ground_truth: bool
) -> list[Item]:
    """One item a weight file of a version; ``site`` is where its page is, ``ground_truth`` asks for training sets."""
    version_id = text_of(version.get("id"), 40)
    files = [file for file in list_of(version.get("files"), 100) if isinstance(file, dict)]
    weights = [file for file in files if file.get("type") in WEIGHTS]
    if not re.fullmatch(r"\d{1,18}", version_id) or not weights:
        return []
    words = [word for word in list_of(version.get("trainedWords"), 50) if isinstance(word, str)]
    captions = [Caption(word, "trainedWords", 0.8 if number == 0 else 0.6) for number, word in enumerate(words)]
    counts = count_in_prose(model.get("description")), count_in_prose(version.get("description"))
    training = next((file for file in files if file.get("type") == "Training Data"), None)
    base = text_of(version.get("baseModel"), 100)
    users = [text_of(word, 100) for word in list_of(model.get("allowCommercialUse"), 20)]
    if isinstance(model.get("allowCommercialUse"), str):
        users = [text_of(model["allowCommercialUse"], 100)]
    shared: dict[str, Any] = {
        "source": SOURCE,
        "model_id": model_id,
        "version_id": version_id,
        "title": " - ".join(filter(None, (text_of(model.get("name"), 300), text_of(version.get("name"), 100)))),
        "page_url": f"{site}/models/{model_id}?modelVersionId={version_id}",
        "uploader": text_of(dict_of(model.get("creator")).get("username"), 100),
        "tags": tuple(filter(None, (text_of(tag, 100) for tag in list_of(model.get("tags"), 100)))),
        "license": "commercial use: " + (", ".join(sorted(filter(None, users))) or "not stated"),
        "nsfw": model.get("nsfw") is True,
        "real_person": model.get("poi") is True,
        "minor": model.get("minor") is True,
        "published_at": time_of(version.get("publishedAt")) or time_of(version.get("createdAt")),
        "available_at": time_of(version.get("earlyAccessEndsAt")) or time_of(version.get("earlyAccessDeadline")),
        "base_models": (Claim(base, "baseModel"),) if base else (),
        "n0": tuple(dict.fromkeys(count for count in counts if count)),
        "captions": tuple(captions),
        "ground_truth_url": _url(training) if training and ground_truth and _may_use(model) else None,
    }
    return [_file(shared, file) for file in weights if re.fullmatch(r"\d{1,18}", text_of(file.get("id"), 40))]


def _may_use(model: dict[str, Any]) -> bool:
    """Training data is taken where some use beyond looking is allowed (allowCommercialUse), and the model depicts no
    real person and no minor.
    """
    allowed = model.get("allowCommercialUse")
    allowed = [allowed] if isinstance(allowed, str) else list_of(allowed)
    permitted = any(isinstance(use, str) and use not in ("", "None") for use in allowed)
    return permitted and model.get("poi") is not True and model.get("minor") is not True


def _url(file: dict[str, Any]) -> str:
    return file["downloadUrl"] if isinstance(file.get("downloadUrl"), str) else ""


def _file(shared: dict[str, Any], file: dict[str, Any]) -> Item:
    hashes = dict_of(file.get("hashes"))
    kilobytes = file.get("sizeKB")
    kilobytes = kilobytes if isinstance(kilobytes, int | float) and 0 < kilobytes < 1e12 else None
    form = text_of(dict_of(file.get("metadata")).get("format"), 40)
    name = clean_name(file.get("name"))
    refusal = None
    if form == "PickleTensor" or re.search(r"\.(ckpt|pt|pth|bin|pickle|pkl|zip)$", name, re.IGNORECASE):
        refusal = f"a pickle ({form or name.rpartition('.')[2]}): only safetensors is read, pickles can run code"
    elif form == "GGUF" and (said := gguf_refusal(".gguf")):
        refusal = said
    elif text_of(file.get("virusScanResult"), 40) == "Danger" or text_of(file.get("pickleScanResult"), 40) == "Danger":
        refusal = "the source's scan calls it dangerous"
    else:
        refusal = gguf_refusal(name)
    item = Item(
        item_id=f"civitai:{shared['model_id']}:{shared['version_id']}:{text_of(file['id'], 40)}",
        name=name,
        download_url=_url(file),
        claimed_bytes=round(kilobytes * 1024) if kilobytes else None,
        claimed_sha256=hex_of(hashes.get("SHA256"), 64),
        claimed_autov3=hex_of(hashes.get("AutoV3"), 12),
        refusal=refusal,
        **shared,
    )
    return _of_any_host(item)


def _of_any_host(item: Item) -> Item:
    """``item`` with the fingerprint that it has under every name of the site."""
    urls = {name: _first_twin(getattr(item, name)) for name in ("page_url", "download_url", "ground_truth_url")}
    same = replace(item, **urls)  # type: ignore[arg-type]
    return item if same == item else replace(item, known_fingerprint=same.fingerprint)


def _first_twin(url: str | None) -> str | None:
    try:
        parts = urlsplit(url or "")
    except ValueError:  # no URL: it is refused where it is asked for
        return url
    return parts._replace(netloc=min(TWINS)).geturl() if parts.netloc in TWINS else url
