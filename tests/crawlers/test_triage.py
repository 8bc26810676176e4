"""Files of other families are left by their header, before their bytes are spent; what cannot be told is taken."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import gguf
import numpy as np
import pytest
from safetensors.numpy import load, save

from audit.errors import CrawlError
from audit.models.checkpoint import open_checkpoint
from audit.similar import kept
from audit.upkeep.damage import verify
from audit.workspace import Workspace
from crawlers import http, triage
from crawlers.catalog import Catalog
from crawlers.crawl import Crawl
from crawlers.http import Session, Token
from crawlers.sources.civitai import Civitai, CivitaiQuery
from crawlers.sources.folder import Folder
from crawlers.sources.huggingface import HuggingFace, HuggingFaceQuery
from crawlers.store import Store
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


def as_gguf(content: bytes, path: Path, kind: str = "F16") -> bytes:
    """The same tensors as a GGUF file, as stable-diffusion.cpp converts adapters: under their own names."""
    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "lora")
    for name, value in load(content).items():
        fits = value.ndim > 1 and value.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        use = wanted if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(np.atleast_1d(value.astype(np.float32)), use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


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


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_gguf_adapters_are_triaged_by_their_start_stored_and_sketched(
    workspace: Workspace, tmp_path: Path, kind: str
) -> None:
    sd, xl = lora(768), lora(2048)
    files = [SimFile(31, "sd.safetensors", sd),
             SimFile(32, "xl.gguf", as_gguf(xl, tmp_path / "a", kind), primary=False),
             SimFile(33, "sd.gguf", as_gguf(sd, tmp_path / "b", kind), primary=False)]  # fmt: skip
    with Site([SimModel(11, "One", versions=[SimVersion(21, "v1", "SD 1.5", ["sks"], files)])]) as running:
        running.tensor_metadata = False
        found = crawl(running, workspace, "sd1")
        assert found == {"sd.safetensors": "stored", "xl.gguf": "listed", "sd.gguf": "stored"}
        downloads = [seen for seen in running.requests if "/store/32" in seen.path]
        assert all(seen.headers.get("Range", "").startswith("bytes=0-") for seen in downloads)
    rows = {row["name"]: row for row in workspace.rows("SELECT * FROM checkpoints WHERE state = 'stored'")}
    assert {row["format"] for row in rows.values()} == {"lycoris"}
    assert rows["sd.gguf"]["family"] == "sd1"
    path = Store(workspace).fetch(rows["sd.gguf"]["identity"])
    assert path is not None
    checkpoint = open_checkpoint(path)
    assert (checkpoint.identity, checkpoint.sha256) == (
        rows["sd.gguf"]["identity"], rows["sd.gguf"]["checkpoint_sha256"],
    )  # fmt: skip
    vectors = kept(workspace, [row["identity"] for row in rows.values()])
    one, other = (np.array(vectors[rows[name]["identity"]]) for name in ("sd.safetensors", "sd.gguf"))
    assert one @ other > 0.9999
    assert verify(workspace) == []


def test_gguf_on_hugging_face_and_in_a_folder(workspace: Workspace, tmp_path: Path) -> None:
    content = as_gguf(lora(768), tmp_path / "a")
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "b.gguf").write_bytes(content)
    (uploads / "damaged.gguf").write_bytes(content[:3000])
    catalog = Catalog(workspace)
    with Hub.serve() as hub:
        hub.publish("a/b", "1" * 40, {"a.gguf": content}, tags=["lora"])
        Crawl(HuggingFace(catalog, HuggingFaceQuery(), hub.url, requests_per_second=0), catalog).run()
    Crawl(Folder(catalog, str(uploads), settle=0), catalog).run()
    found = {row["name"]: row for row in catalog.find().to_pylist()}
    assert {name: row["state"] for name, row in found.items()} == {
        "a.gguf": "stored", "b.gguf": "stored", "damaged.gguf": "refused",
    }  # fmt: skip
    assert found["a.gguf"]["identity"] == found["b.gguf"]["identity"]
    assert "damaged GGUF file" in found["damaged.gguf"]["reason"]


def test_gguf_without_its_package_is_refused_until_it_is_there(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "b.gguf").write_bytes(as_gguf(lora(768), tmp_path / "a"))
    catalog = Catalog(workspace)

    def look() -> dict[str, str]:
        Crawl(Folder(catalog, str(uploads), settle=0), catalog).run()
        return {row["state"]: row["reason"] for row in catalog.find().to_pylist()}

    with monkeypatch.context() as patch:
        patch.setattr("crawlers.items.find_spec", lambda name: None)
        said = "a GGUF file, which is read where its package is installed: pip install lora-audit[gguf]"
        assert look() == {"refused": said}
        assert list(look()) == ["refused"]
    assert list(look()) == ["stored"]


def test_the_start_of_a_gguf_file_is_asked_for_twice_at_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = as_gguf(lora(768), tmp_path / "a")
    [(_, header)] = open_checkpoint(tmp_path / "a").files.values()
    monkeypatch.setattr(triage, "GGUF_STARTS", (200, header.data_start))
    with Hub.serve() as hub:
        hub.publish("a/b", "1" * 40, {"a.gguf": content}, tags=["lora"])
        session = Session([urlsplit(hub.url).netloc], requests_per_second=0)
        url = f"{hub.url}/a/b/resolve/{'1' * 40}/a.gguf"
        found = triage.tensors_of(session, None, url)
        assert found is not None
        assert {name: one.shape for name, one in found.items()} == {n: i.shape for n, i in header.tensors.items()}
        monkeypatch.setattr(triage, "GGUF_STARTS", (200, 300))
        assert triage.tensors_of(session, None, url) is None
