"""Files of other families are left by their header, before their bytes are spent; what cannot be told is taken."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from audit.errors import CrawlError
from audit.workspace import Workspace
from crawlers import http
from crawlers.catalog import Catalog
from crawlers.crawl import Crawl
from crawlers.http import Token
from crawlers.sources.civitai import Civitai, CivitaiQuery
from crawlers.sources.huggingface import HuggingFace, HuggingFaceQuery
from tests.simulators.civitai import Civitai as Site
from tests.simulators.civitai import Fault, SimFile, SimModel, SimVersion
from tests.simulators.hub import Hub

STEM = "lora_unet_{}_transformer_blocks_0_attn2_to_k"
BLOCKS = {768: "down_blocks_0_attentions_0", 2048: "input_blocks_4_1"}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.PatientRetry, "unit", 0.01)


def lora(width: int) -> bytes:
    """An adapter whose shapes show what text its UNet reads; half a megabyte of padding that only a download takes."""
    stem = STEM.format(BLOCKS[width])
    state = {
        f"{stem}.lora_down.weight": np.ones((4, width)), f"{stem}.lora_up.weight": np.ones((640, 4)),
        f"{stem}.alpha": np.array([4.0]), "lora_unet_conv_in.diff": np.zeros((512, 512)),
    }  # fmt: skip
    return save({name: values.astype(np.float16) for name, values in state.items()})


def site() -> Site:
    files = [SimFile(31, "xl.safetensors", lora(2048)), SimFile(32, "sd.safetensors", lora(768), primary=False),
             SimFile(33, "bad.safetensors", lora(2048), primary=False, fault=Fault.not_found)]  # fmt: skip
    return Site([SimModel(11, "One", versions=[SimVersion(21, "v1", "SDXL 1.0", ["sks"], files)])])


def crawl(running: Site, workspace: Workspace, *families: str) -> dict[str, str]:
    catalog = Catalog(workspace)
    token = Token("secret-token")
    source = Civitai(catalog, CivitaiQuery(families=families), running.url, token, requests_per_second=0)
    Crawl(source, catalog).run()
    return {row["name"]: row["state"] for row in catalog.find().to_pylist()}


def test_what_the_site_says_of_tensors_saves_the_download(workspace: Workspace) -> None:
    with site() as running:
        found = crawl(running, workspace, "sd1")
        assert found == {"xl.safetensors": "listed", "sd.safetensors": "stored", "bad.safetensors": "listed"}
        assert running.counts["tensor-metadata"] == 3
        assert running.counts["download"] == 1
        [row] = workspace.rows("SELECT reason FROM checkpoints WHERE name = 'xl.safetensors'")
        assert row["reason"].startswith("its header has the tensors of family sdxl, not of sd1")
        rows = len(workspace.rows("SELECT * FROM checkpoints"))
        crawl(running, workspace, "sd1")  # again: nothing is written anew
        assert len(workspace.rows("SELECT * FROM checkpoints")) == rows
        assert crawl(running, workspace)["xl.safetensors"] == "stored"  # another query takes it


def test_without_that_answer_the_first_bytes_are_asked_for(workspace: Workspace) -> None:
    with site() as running:
        running.tensor_metadata = False
        found = crawl(running, workspace, "sd1")
        # of what answers 404 nothing can be told: it is tried as ever
        assert (found["xl.safetensors"], found["sd.safetensors"]) == ("listed", "stored")
        assert found["bad.safetensors"] != "listed"
        ranges = [seen.headers.get("Range") for seen in running.requests if "/store/31" in seen.path]
        assert len(ranges) == 2
        assert all(one and one.startswith("bytes=") for one in ranges)


def test_a_quota_pauses_here_too(workspace: Workspace) -> None:
    with site() as running:
        running.tensor_metadata, running.quota = False, 0
        with pytest.raises(CrawlError, match="quota"):
            crawl(running, workspace, "sd1")
        assert Catalog(workspace).find().to_pylist() == []


def test_headers_on_hugging_face(workspace: Workspace) -> None:
    with Hub.serve() as hub:
        hub.publish("a/b", "1" * 40, {"xl.safetensors": lora(2048), "sd.safetensors": lora(768)}, tags=["lora"])
        catalog = Catalog(workspace)
        query = HuggingFaceQuery(families=("sdxl",))
        Crawl(HuggingFace(catalog, query, hub.url, requests_per_second=0), catalog).run()
        found = {row["name"]: row["state"] for row in catalog.find().to_pylist()}
    assert found == {"xl.safetensors": "stored", "sd.safetensors": "listed"}
