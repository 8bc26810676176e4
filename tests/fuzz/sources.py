"""Answers of Civitai and of the hub, model cards, and sidecars, read by the crawlers' own sources.

Only the connection is ours: an adapter of requests gives the changed answer in place of a server, so that headers,
statuses and bodies go the whole way that those of a server go.
"""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import requests
import yaml
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict

from audit.files import Files
from audit.workspace import Workspace
from crawlers.catalog import Catalog, Outcome
from crawlers.crawl import Crawl
from crawlers.items import Item, conclude
from crawlers.sources.civitai import Civitai
from crawlers.sources.folder import Folder
from crawlers.sources.huggingface import HuggingFace
from tests.fuzz.kind import Kind, no_surprise
from tests.fuzz.mutate import as_bytes, chance, changed_bytes, changed_json, changed_text, one_of
from tests.simulators.civitai import Civitai as Site
from tests.simulators.civitai import make_models, tiny_lora

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECORDED_ONE_IN = 100  # inputs whose items are also written to tables: that takes longer than all else
KEPT = 200  # inputs recorded in one workspace
STATUSES = (200,) * 40 + (204, 206, 400, 401, 403, 404, 410, 429, 500, 503)
HEADERS = (
    {}, {}, {}, {"Link": '<https://other.example/api/models?cursor=x>; rel="next"'}, {"Link": "<"},
    {"Link": '<https://api.example/api/models?cursor=2>; rel="next"'}, {"Content-Type": "text/html"},
    {"X-Error-Code": "GatedRepo"}, {"X-Error-Message": "Access to this resource is disabled."},
    {"Link": '<https://[>; rel="next"'}, {"Content-Encoding": "gzip"}, {"Content-Type": "application/json"},
)  # fmt: skip


class Canned(BaseAdapter):
    """Answers every request with ``answer``: a line of JSON (status, headers), and the body behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = b"{}\n"

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        first, _, body = self.answer.partition(b"\n")
        said = json.loads(first)
        response = requests.Response()
        response.status_code, response.url, response.request = said["status"], str(request.url), request
        response.headers = CaseInsensitiveDict(said["headers"])
        response.raw = io.BytesIO(body)
        return response

    def close(self) -> None:
        """Nothing is open."""


def answer_of(body: bytes, choose: Random) -> bytes:
    """An answer with ``body``, most often of status 200."""
    said = {"status": choose.choice(STATUSES), "headers": choose.choice(HEADERS)}
    return json.dumps(said).encode() + b"\n" + body


class _Source(Kind):
    """A source of the crawlers with canned answers, a catalog of its own, and a new one after KEPT inputs."""

    memory = 384

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.canned = Canned()
        self._recorded = 0
        self._renew()

    def _source(self, catalog: Catalog) -> Any:
        raise NotImplementedError

    def _renew(self) -> None:
        Files(self.place).remove_folder("workspace")
        self.catalog = Catalog(Workspace(self.place / "workspace"))
        self.source = self._source(self.catalog)
        for scheme in ("https://", "http://"):
            self.source.session._session.mount(scheme, self.canned)

    def check(self, data: bytes) -> None:
        self.canned.answer = data
        items: list[Item] = []
        for page in islice(self.source.pages({}), 3):
            no_surprise(page.passed_over)
            items += page.items
        for item in items[:20]:
            conclude(item, None)
            _ = item.fingerprint
        if items and sum(data) % RECORDED_ONE_IN == 0:
            self._record(items[:20])

    def _record(self, items: list[Item]) -> None:
        self._recorded += 1
        if self._recorded % KEPT == 0:
            self._renew()
        outcomes = self.catalog.record([(item, Outcome("listed")) for item in items], {})
        no_surprise(outcome.reason for outcome in outcomes)
        crawl = Crawl(self.source, self.catalog, download=False)
        no_surprise(crawl.take(items).reasons)


class CivitaiAnswers(_Source):
    """Listings of models."""

    name, share = "civitai", 30_000

    def __init__(self, place: Path) -> None:
        models = make_models(40, seed=1, files=False)
        with Site(models, repeat_at_border=False) as site:
            listed = requests.get(
                f"{site.url}/models?limit=40&nsfw=true", headers={"User-Agent": "x"}, timeout=10
            ).json()
            images = requests.get(f"{site.url}/images?withMeta=true", headers={"User-Agent": "x"}, timeout=10).json()
        self.models = [json.dumps(model) for model in listed["items"]]
        self.images = json.dumps({**images, "items": images["items"][:4]})
        super().__init__(place)

    def _source(self, catalog: Catalog) -> Civitai:
        return Civitai(catalog, endpoint="https://api.example/api/v1", requests_per_second=0, ground_truth=True)

    def make(self, choose: Random) -> bytes:
        if chance(choose, 0.1):
            return answer_of(as_bytes(changed_json(json.loads(self.images), choose), choose), choose)
        models = [json.loads(one_of(self.models, choose)) for _ in range(choose.choice((1, 1, 2)))]
        listed = {"items": models, "metadata": {"nextCursor": choose.choice((None, None, "2", "x" * 300))}}
        return answer_of(as_bytes(changed_json(listed, choose), choose), choose)

    def check(self, data: bytes) -> None:
        self.source._prompts = "", []
        if b'"meta"' in data:
            item = Item("civitai:1:2:3", "civitai", "1", "2", "a.safetensors", "")
            self.canned.answer = data
            conclude(self.source.enrich(item), None)
        super().check(data)


class HubAnswers(_Source):
    """Listings of the hub, and its answers about one file."""

    name, share = "huggingface", 30_000

    def _source(self, catalog: Catalog) -> HuggingFace:
        return HuggingFace(catalog, endpoint="https://api.example", requests_per_second=0)

    @staticmethod
    def model(card: Any = None) -> dict[str, Any]:
        """An entry of a listing."""
        said = {
            "base_model": ["runwayml/stable-diffusion-v1-5"],
            "instance_prompt": "a photo of sks dog",
            "license": "mit",
            "widget": [{"text": "a sks dog in a bucket"}],
            "tags": ["lora"],
            "description": "trained on 12 images",
        }
        return {
            "id": "jane/lora", "sha": COMMIT, "author": "jane", "lastModified": "2026-05-01T00:00:00.000Z",
            "tags": ["lora", "base_model:adapter:runwayml/stable-diffusion-v1-5", "not-for-all-audiences"],
            "siblings": [{"rfilename": "README.md"}, {"rfilename": "pytorch_lora_weights.safetensors"}],
            "cardData": said if card is None else card,
        }  # fmt: skip

    def make(self, choose: Random) -> bytes:
        if chance(choose, 0.15):
            oid = {"oid": "a" * 64, "size": 3}
            told = [
                {
                    "path": "pytorch_lora_weights.safetensors",
                    "size": 3,
                    "lfs": oid,
                    "securityFileStatus": {"status": "safe"},
                }
            ]
            return answer_of(as_bytes(changed_json(told, choose), choose), choose)
        listed = [self.model() for _ in range(choose.choice((1, 1, 3)))]
        return answer_of(as_bytes(changed_json(listed, choose), choose), choose)

    def check(self, data: bytes) -> None:
        if b"securityFileStatus" in data:
            self.canned.answer = data
            path = "pytorch_lora_weights.safetensors"
            self.source.enrich(Item(f"huggingface:jane/lora:{path}", "huggingface", "jane/lora", COMMIT, path, ""))
        super().check(data)


CARD = """---
base_model: runwayml/stable-diffusion-v1-5
instance_prompt: a photo of sks dog
license: creativeml-openrail-m
tags: [lora, "text-to-image", diffusers]
widget:
- text: a sks dog in a bucket
  output: {url: image_0.png}
description: >-
  trained on 12 images
model-index: [{name: x, results: [{metrics: [{value: 1.5e3}]}]}]
---
# A card
"""


class Cards(HubAnswers):
    """Model cards: their YAML front matter as the hub reads it and gives it on, as ``cardData``."""

    name, share = "cards", 20_000

    def make(self, choose: Random) -> bytes:
        text = changed_text(CARD, choose)
        card: Any = text
        if chance(choose, 0.9):
            try:
                card = yaml.load(text.split("---")[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                json.dumps(card, default=str)
            except Exception:  # what the hub could not read it gives on as it is here
                card = text
        if isinstance(card, dict):
            card = {str(name): value for name, value in card.items()}
        return answer_of(as_bytes([self.model(card if card is not None else {})]), choose)


class Sidecars(Kind):
    """JSON beside an upload, with names of files that are no text."""

    name, share = "sidecars", 1_000

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.uploads = place / "uploads"
        self.uploads.mkdir()
        (self.uploads / "a.safetensors").write_bytes(tiny_lora(1, width=8))
        self._recorded = 0
        self._renew()
        self.text = json.dumps({
            "uploader": "jane", "caption": "a sks dog", "captions": ["sks dog", "a dog"], "base_model": "sd15",
            "training_images": 12, "title": "Dogs", "url": "https://example.org/1", "license": "CC0", "tags": ["dog"],
            "nsfw": False,
        })  # fmt: skip

    def _renew(self) -> None:
        Files(self.place).remove_folder("workspace")
        self.catalog = Catalog(Workspace(self.place / "workspace"))

    def make(self, choose: Random) -> bytes:
        if chance(choose, 0.1):
            return changed_bytes(self.text.encode(), choose)
        return as_bytes(changed_json(json.loads(self.text), choose), choose)

    def check(self, data: bytes) -> None:
        (self.uploads / "a.safetensors.json").write_bytes(data)
        source = Folder(self.catalog, str(self.uploads), settle=0)
        for page in source.pages({}):
            no_surprise(page.passed_over)
            for item in page.items:
                conclude(item, None)
                if sum(data) % RECORDED_ONE_IN == 0:
                    self._record(source, item)

    def _record(self, source: Folder, item: Item) -> None:
        self._recorded += 1
        if self._recorded % KEPT == 0:
            self._renew()
        crawl = Crawl(source, self.catalog, download=False)
        no_surprise(crawl.take([item]).reasons)
