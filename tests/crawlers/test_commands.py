"""crawl and catalog as a user runs them, against the simulators: kills, faults, and the way to a report."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from audit.demo import set_folder
from audit.workspace import Workspace
from benchmarks.crawl import CAPTIONS, COMPARED, killed
from benchmarks.crawl import crawl as crawl_process
from tests import warm
from tests.conftest import BASE, KOHYA
from tests.simulators.civitai import Civitai, Fault, SimFile, SimModel, SimVersion, make_models, served
from tests.simulators.hub import Hub


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
    return warm.run(*arguments, env=kept | environment)


def answer(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def nano_model() -> SimModel:
    file = SimFile(301, "fluent-animals.safetensors", KOHYA.read_bytes())
    version = SimVersion(201, "v1", "Other", ["sks 3d render of an animal"], [file], [], "2026-05-01T00:00:00.000Z")
    return SimModel(101, "Animals", creator="jane", versions=[version])


def test_from_a_crawl_to_a_report(tmp_path: Path) -> None:
    where = ("--workspace", tmp_path / "w")
    with Civitai([nano_model()]) as site:
        crawl = ("crawl", "civitai", "--endpoint", site.url, "--rate", "0", *where)
        planned = answer(run(*crawl, "--dry-run", "--json"))
        assert (planned["to_download"], planned["bytes"]) == (1, KOHYA.stat().st_size)
        assert not list((tmp_path / "w").glob("tables/*"))
        done = answer(run(*crawl, "--json", CIVITAI_TOKEN="secret-token"))
        assert done["states"] == {"stored": 1}
        assert "nothing new" in run(*crawl, CIVITAI_TOKEN="secret-token").stderr
    [row] = answer(run("catalog", "--where", "training_images = 10", "--json", *where))
    assert (row["item_id"], row["uploader"]) == ("civitai:101:201:301", "jane")
    scanned = answer(
        run("scan", row["item_id"], "--base", BASE, "--descriptor", "nano", "--images-per-training-image", 10,
            "--references", set_folder("fluent-animals", "train"), "--rule", "fixed", "--json", *where),
        code=10,
    )  # fmt: skip
    assert scanned["audit"]["checkpoint_name"] == "fluent-animals.safetensors"
    assert scanned["audit"]["training_images"] == 10
    assert [one["caption"] for one in scanned["captions"]] == ["sks 3d render of an animal"]
    assert scanned["checkpoint"]["item_id"] == row["item_id"]
    assert scanned["matched_references"]


def test_two_hundred_files_with_faults_of_every_kind(tmp_path: Path) -> None:
    models = make_models(200, seed=3)
    faults = [fault for fault in Fault if fault is not Fault.none]
    for number, model in enumerate(models[::10]):
        model.versions[0].files[0].fault = faults[number % len(faults)]
    with Civitai(models, burst_429_every=40, empty_page_every=3) as site:
        crawl_process(site, tmp_path / "w", "--nsfw", "--prompts", "never", "--retries", "2", "--downloads", "8")
    workspace = Workspace(tmp_path / "w")
    rows = {row["item_id"]: row for row in workspace.rows("SELECT * FROM checkpoints")}
    files = {
        f"civitai:{model.id}:{version.id}:{file.id}": file
        for model in models for version in model.versions for file in version.files if file.type == "Model"
    }  # fmt: skip
    assert set(rows) == set(files)
    bad = {Fault.pickle, Fault.disguised_pickle, Fault.bad_header, Fault.huge_header, Fault.truncated, Fault.html,
           Fault.not_found, Fault.server_error, Fault.too_big}  # fmt: skip
    stored = set()
    for item_id, file in files.items():
        row = rows[item_id]
        if file.fault in bad:
            assert row["state"] in ("refused", "failed", "gone"), (file.fault, row["state"])
            assert row["reason"]
            continue
        content = served(file)
        assert isinstance(content, bytes)
        assert row["state"] == "stored", (file.fault, row["reason"])
        assert row["checkpoint_sha256"] == hashlib.sha256(content).hexdigest()
        path = workspace.root / "checkpoints" / f"{row['identity']}.safetensors"
        assert path.read_bytes() == content
        stored.add(path)
    assert set((workspace.root / "checkpoints").glob("*.safetensors")) == stored
    assert {file.fault for file in files.values()} == set(Fault)


def test_a_crawl_killed_at_random_ends_with_the_same_tables(tmp_path: Path) -> None:
    with Civitai(make_models(120, seed=5), empty_page_every=4, latency=0.01) as site:
        options = ("--nsfw", "--prompts", "missing")
        crawl_process(site, tmp_path / "whole", *options)
        requests = sum(site.counts.values())
        kills = sum(killed(site, tmp_path / "killed", after, *options) for after in (0.2, 0.5, 0.9))
        assert kills == 3
        crawl_process(site, tmp_path / "killed", *options)
        assert sum(site.counts.values()) < 3 * requests
    whole, resumed = Workspace(tmp_path / "whole"), Workspace(tmp_path / "killed")
    for sql in (COMPARED, CAPTIONS):
        assert whole.rows(sql) == resumed.rows(sql)
    files = [sorted(path.name for path in (w.root / "checkpoints").glob("*")) for w in (whole, resumed)]
    assert files[0] == files[1]
    assert not list((resumed.root / "checkpoints/parts").iterdir())


def test_single_models_are_added_fetched_and_asked_again(tmp_path: Path) -> None:
    where = ("--workspace", tmp_path / "w", "--json")
    with Civitai([nano_model()], token=None) as site, Hub.serve() as hub:
        hub.publish("me/mine", "a" * 40, {"x.safetensors": KOHYA.read_bytes()}, tags=["lora"])
        ends = ("--civitai-endpoint", site.url, "--hub-endpoint", hub.url, "--rate", "0", *where)
        for what in ("101", "urn:air:sd1:lora:civitai:101@201", hashlib.sha256(KOHYA.read_bytes()).hexdigest()):
            added = answer(run("catalog", "add", what, *ends))
            assert [one["item_id"] for one in added["items"]] == ["civitai:101:201:301"]
        assert answer(run("catalog", "add", "me/mine", *ends))["states"] == {"stored": 1}
        assert answer(run("catalog", "add", KOHYA, "--caption", "mine", *ends))["items"][0]["state"] == "stored"
        assert len(list((tmp_path / "w/checkpoints").glob("*.safetensors"))) == 1
        site.remove(101)
        asked = answer(run("catalog", "refresh", *ends))
        assert asked["civitai"]["states"] == {"gone": 1}
        [gone] = answer(run("catalog", "--state", "gone", *where))
        assert gone["reason"] == "deleted at the source"
        listed = run("crawl", "huggingface", "--endpoint", hub.url, "--metadata-only", "--workspace", tmp_path / "v")
        assert listed.returncode == 0, listed.stderr
        fetched = run("catalog", "fetch", *ends[:-3], "--workspace", tmp_path / "v", "--json")
        assert answer(fetched)["states"] == {"stored": 1}
    for what, words in (("https://evil.example/x", "no Civitai or Hugging Face page"), ("", "no file here")):
        failed = run("catalog", "add", what, *where)
        assert (failed.returncode, words in failed.stderr) == (2, True), failed.stderr
    failed = run("catalog", "--where", "no_such_column = 1", *where)
    assert (failed.returncode, "no_such_column" in failed.stderr) == (2, True)


def test_a_watched_folder_takes_new_files_until_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    command = [sys.executable, "-c", "from audit.cli import main; main()", "crawl", "folder", str(tmp_path / "up"),
               "--watch", "--every", "0.2", "--settle", "0.1", "--workspace", str(tmp_path / "w")]  # fmt: skip
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "w/crawls").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        (tmp_path / "up/a.safetensors").write_bytes(KOHYA.read_bytes())
        while not list((tmp_path / "w").glob("tables/checkpoints/*/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=30)
    assert watching.returncode == 130, errors
    [row] = Workspace(tmp_path / "w").rows("SELECT name, state FROM checkpoints")
    assert row == {"name": "a.safetensors", "state": "stored"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["civitai", "--sort", "Best"], "is not one of"),
        (["civitai", "--max-file", "big"], "no size"),
        (["civitai", "--endpoint", "http://civitai.example/api"], "only https"),
        (["civitai", "--token-file", "/no/such/token"], "cannot be read"),
        (["huggingface", "--endpoint", "nowhere"], "not the URL"),
        (["folder", "/no/such/folder"], "not a folder"),
        (["folder", ".", "--opt-out", "/no/such/list"], "cannot be read"),
    ],
)
def test_bad_input_is_said_in_one_message(tmp_path: Path, arguments: list[str], words: str) -> None:
    failed = run("crawl", *arguments, "--workspace", tmp_path / "w")
    assert failed.returncode == 2, failed.stderr
    assert words in " ".join(failed.stderr.replace("│", " ").split())
    assert "Traceback" not in failed.stderr
