"""A platform's uploads: complete files, sidecars, faults, and S3-compatible storage."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs
from safetensors.numpy import save, save_file

from audit.errors import CrawlError, FetchError
from audit.workspace import Workspace
from crawlers.catalog import Catalog, OptOuts
from crawlers.crawl import Counts, Crawl
from crawlers.inside import open_inside
from crawlers.sources.folder import Folder
from tests.conftest import KOHYA, stored_bytes

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def lora(seed: int, **metadata: str) -> bytes:
    random = np.random.default_rng(seed)
    tensors = {
        f"{KEY}.lora_down.weight": random.normal(size=(2, 768)).astype(np.float16),
        f"{KEY}.lora_up.weight": random.normal(size=(32, 2)).astype(np.float16),
    }
    return bytes(save(tensors, metadata or None))


def look(workspace: Workspace, location: object, **options: Any) -> Counts:
    settle = options.pop("settle", 0)
    catalog = Catalog(workspace, options.pop("opt_outs", None))
    return Crawl(Folder(catalog, str(location), settle), catalog, **options).run()


def rows(workspace: Workspace) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in workspace.rows("SELECT * FROM checkpoints")}


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(lora(1))
    return folder


def test_a_file_is_taken_in_with_what_its_sidecar_says(workspace: Workspace, uploads: Path) -> None:
    said = {"uploader": "jane", "caption": "a sks cat", "base_model": "SD 1.5", "training_images": 7, "tags": ["x"],
            "nsfw": True, "url": "https://example.org/1"}  # fmt: skip
    (uploads / "a.safetensors.json").write_text(json.dumps(said))
    assert look(workspace, uploads).states == {"stored": 1}
    row = rows(workspace)["a.safetensors"]
    assert (row["uploader"], row["family"], row["training_images"], row["tags"], row["nsfw"], row["page_url"]) == (
        "jane", "sd1", 7, ["x"], True, "https://example.org/1",
    )  # fmt: skip
    assert stored_bytes(workspace, row["identity"]) == lora(1)
    [caption] = workspace.rows("SELECT caption, source, confidence FROM captions")
    assert caption == {"caption": "a sks cat", "source": "sidecar", "confidence": 0.95}


def test_a_second_look_takes_only_what_is_new_or_changed(workspace: Workspace, uploads: Path) -> None:
    look(workspace, uploads)
    assert look(workspace, uploads).new == 0
    (uploads / "b.safetensors").write_bytes(lora(2))
    assert look(workspace, uploads).states == {"stored": 1}
    (uploads / "a.json").write_text('{"caption": "late"}')
    assert look(workspace, uploads).new == 1
    assert [row["caption"] for row in workspace.rows("SELECT * FROM captions")] == ["late"]
    (uploads / "b.safetensors").write_bytes(lora(3))
    assert look(workspace, uploads).new == 1
    assert stored_bytes(workspace, rows(workspace)["b.safetensors"]["identity"]) == lora(3)


def test_the_same_tensors_are_stored_once_with_every_place(workspace: Workspace, uploads: Path) -> None:
    (uploads / "sub").mkdir()
    (uploads / "sub/copy.safetensors").write_bytes(lora(1, ss_sd_model_name="other header"))
    assert look(workspace, uploads).states == {"stored": 2}
    [row] = workspace.rows(
        "SELECT identity, count(*) AS n, count(DISTINCT checkpoint_sha256) AS files FROM checkpoints GROUP BY 1"
    )
    assert (row["n"], row["files"]) == (2, 2)
    assert len(list((workspace.root / "checkpoints").glob("*.safetensors"))) == 1
    assert not list((workspace.root / "checkpoints/parts").iterdir())


def test_equal_bytes_under_other_names_are_another_network(workspace: Workspace, uploads: Path) -> None:
    tensor = np.ones((2, 768), np.float16)
    save_file({f"{KEY}.lora_down.weight": tensor}, uploads / "a.safetensors")
    save_file({f"{KEY.replace('down', 'up')}.lora_down.weight": tensor}, uploads / "b.safetensors")
    look(workspace, uploads)
    found = rows(workspace)
    assert found["a.safetensors"]["tensors_sha256"] == found["b.safetensors"]["tensors_sha256"]
    assert found["a.safetensors"]["identity"] != found["b.safetensors"]["identity"]


def test_bad_files_are_recorded_with_the_reason_and_kept_apart(workspace: Workspace, uploads: Path) -> None:
    good = lora(5)
    faults = {
        "pickle.ckpt": b"\x80\x04", "zip.safetensors": b"PK\x03\x04" + b"\0" * 100, "cut.safetensors": good[:-10],
        "empty.safetensors": b"", "huge.safetensors": (2**40).to_bytes(8, "little") + b"x" * 100,
        "page.safetensors": b"<!DOCTYPE html>" + b" " * 100, "sidecar.safetensors": good,
    }  # fmt: skip
    for name, content in faults.items():
        (uploads / name).write_bytes(content)
    (uploads / "sidecar.json").write_text("{broken")
    assert look(workspace, uploads).states == {"stored": 1, "refused": len(faults)}
    found = rows(workspace)
    reasons = {name: found[name]["reason"] for name in faults}
    for name, words in {
        "pickle.ckpt": "pickle", "zip.safetensors": "zip archive", "cut.safetensors": "truncated",
        "empty.safetensors": "empty", "huge.safetensors": "header of", "page.safetensors": "web page",
        "sidecar.safetensors": "sidecar",
    }.items():  # fmt: skip
        assert words in reasons[name], reasons[name]
        assert str(workspace.root) not in reasons[name]
    apart = workspace.root / "checkpoints/quarantined"
    assert json.loads((apart / f"{_sha(good[:-10])}.json").read_text())["name"] == "cut.safetensors"
    assert (apart / f"{_sha(good[:-10])}.bin").read_bytes() == good[:-10]
    assert len(list((workspace.root / "checkpoints").glob("*.safetensors"))) == 1
    assert look(workspace, uploads).new == 0


def _sha(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_a_file_that_is_still_being_written_waits(workspace: Workspace, uploads: Path) -> None:
    path, content = uploads / "slow.safetensors", lora(9)
    path.write_bytes(content[:100])
    catalog = Catalog(workspace)
    source = Folder(catalog, str(uploads), settle=0.5)

    def finish() -> None:
        time.sleep(0.2)
        path.write_bytes(content)

    writer = threading.Thread(target=finish)
    writer.start()
    assert Crawl(source, catalog).run().states == {"stored": 1}
    writer.join()
    assert source.unfinished == ["slow.safetensors"]
    assert Crawl(source, catalog).run().states == {"stored": 1}
    assert rows(workspace)["slow.safetensors"]["state"] == "stored"


def test_hidden_files_and_other_files_are_passed_over(workspace: Workspace, uploads: Path) -> None:
    (uploads / ".upload.safetensors").write_bytes(lora(2))
    (uploads / ".hidden").mkdir()
    (uploads / ".hidden/x.safetensors").write_bytes(lora(3))
    (uploads / "readme.txt").write_text("hello")
    assert look(workspace, uploads).new == 1


def test_links_are_named_and_not_followed(workspace: Workspace, uploads: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.safetensors").write_bytes(lora(7))
    (outside / "b.json").write_text('{"caption": "a secret"}')
    (uploads / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (uploads / "folder").symlink_to(outside)
    (uploads / "deep").mkdir()
    (uploads / "deep" / "loop").symlink_to(uploads)
    (uploads / "dangling.safetensors").symlink_to("nowhere")
    os.mkfifo(uploads / "pipe.safetensors")
    (uploads / "b.safetensors").write_bytes(lora(2))
    (uploads / "b.json").symlink_to(outside / "b.json")
    counts = look(workspace, uploads)
    found = rows(workspace)
    assert set(found) == {"a.safetensors", "b.safetensors"}
    assert found["a.safetensors"]["state"] == "stored"
    assert "is a link" in found["b.safetensors"]["reason"], "it may be who opted out: nothing is taken without it"
    links = ["link.safetensors", "folder", "deep/loop", "dangling.safetensors", "b.json"]
    assert counts.passed_over == len(links)
    assert {f"{one}: a link, which is not followed" for one in links} <= set(counts.reasons)


def test_a_link_that_takes_a_files_place_is_not_read(workspace: Workspace, uploads: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.safetensors").write_bytes(lora(7))
    (uploads / "deep").mkdir()
    for place in (uploads, uploads / "deep"):
        (place / "b.safetensors").write_bytes(lora(2))
    catalog = Catalog(workspace)
    source = Folder(catalog, str(uploads), 0)
    items = {item.item_id.split(":", 2)[2]: item for page in source.pages({}) for item in page.items}
    (uploads / "b.safetensors").unlink()
    (uploads / "b.safetensors").symlink_to(outside / "b.safetensors")
    shutil.rmtree(uploads / "deep")
    (uploads / "deep").symlink_to(outside)
    for path in ("b.safetensors", "deep/b.safetensors"):
        with pytest.raises(FetchError, match="cannot be copied"):
            source.fetch(items[path], lambda count: None)
    assert not list((workspace.root / "checkpoints").glob("*.safetensors"))


def test_a_path_does_not_climb_out(uploads: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    for path in ("../x", "./a.safetensors", "/etc/passwd", "a.safetensors/x", "", "deep/../../x"):
        with pytest.raises(OSError, match=r"."):
            open_inside(uploads, path)
    with open_inside(uploads, "a.safetensors") as file:
        assert file.read() == lora(1)


def test_the_limit_and_the_size_cap(workspace: Workspace, uploads: Path) -> None:
    for number in range(4):
        (uploads / f"{number}.safetensors").write_bytes(lora(10 + number))
    assert look(workspace, uploads, limit=2).new == 2
    assert look(workspace, uploads, limit=2).new == 2
    assert look(workspace, uploads).new == 1
    (uploads / "big.safetensors").write_bytes(lora(1) + b"\0" * 5000)
    catalog = Catalog(workspace)
    catalog.store.max_bytes = 5000
    Crawl(Folder(catalog, str(uploads), 0), catalog).run()
    assert "more than the limit" in rows(workspace)["big.safetensors"]["reason"]


def test_opt_outs_hold_for_new_and_for_known_items(workspace: Workspace, uploads: Path, tmp_path: Path) -> None:
    (uploads / "b.safetensors").write_bytes(lora(2))
    (uploads / "a.json").write_text('{"uploader": "Jane", "caption": "secret"}')
    look(workspace, uploads)
    opted = tmp_path / "opt-out.txt"
    opted.write_text("# people who asked\nfolder:user:jane\n")
    look(workspace, uploads, opt_outs=OptOuts.read(workspace, opted))
    found = {row["item_id"].rpartition(":")[2]: row for row in workspace.rows("SELECT * FROM checkpoints")}
    assert (found["a.safetensors"]["state"], found["a.safetensors"]["uploader"]) == ("opted-out", None)
    assert found["b.safetensors"]["state"] == "stored"
    assert workspace.rows("SELECT * FROM captions") == []
    assert len(list((workspace.root / "checkpoints").glob("*.safetensors"))) == 1
    (uploads / "c.safetensors").write_bytes(lora(3))
    (uploads / "c.json").write_text('{"uploader": "JANE"}')
    assert look(workspace, uploads, opt_outs=OptOuts.read(workspace, opted)).states == {"opted-out": 1}


def test_a_broken_opt_out_list_stops_the_crawl(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "o.txt").write_text("jane\n")
    with pytest.raises(CrawlError, match="line 1"):
        OptOuts.read(workspace, tmp_path / "o.txt")


def test_places_that_are_none_are_said(workspace: Workspace, tmp_path: Path) -> None:
    for location in (tmp_path / "none", "s3x://bucket/x"):
        with pytest.raises(CrawlError):
            Folder(Catalog(workspace), str(location))


def test_entries_for_audits(workspace: Workspace, uploads: Path) -> None:
    shutil.copy(KOHYA, uploads / "animals.safetensors")
    look(workspace, uploads)
    entry = Catalog(workspace).entry(rows(workspace)["animals.safetensors"]["item_id"])
    assert entry.name == "animals.safetensors"
    assert [caption.text for caption in entry.captions] == ["sks 3d render of an animal"]
    assert entry.n0 is not None
    assert entry.n0.count == 10
    with pytest.raises(FetchError, match="not in the catalog"):
        Catalog(workspace).entry("folder:x:none")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    yield f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    server.stop()


def test_a_bucket_prefix_is_a_folder(workspace: Workspace, s3: str) -> None:
    system, _ = fs.FileSystem.from_uri(f"s3://uploads?{s3}")
    system.create_dir("uploads")
    for name, content in {"in/a.safetensors": lora(1), "in/a.json": b'{"caption": "from s3"}', "in/b.pt": b"x"}.items():
        with system.open_output_stream(f"uploads/{name}") as stream:
            stream.write(content)
    assert look(workspace, f"s3://uploads/in?{s3}").states == {"stored": 1, "refused": 1}
    assert [row["caption"] for row in workspace.rows("SELECT caption FROM captions")] == ["from s3"]
    assert look(workspace, f"s3://uploads/in?{s3}").new == 0
    assert asdict(look(workspace, f"s3://uploads/in?{s3}"))["bytes"] == 0
