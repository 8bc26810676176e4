"""Whole files on a disk and on S3-compatible storage through the same code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from audit.conditional import ConditionalObjects
from audit.errors import WorkspaceError
from audit.files import Files, shown
from audit.workspace import Workspace
from crawlers.places import open_location
from tests.engine.fleet import make_uploads, make_workspace, start, tables


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The options of a local S3 with a bucket "bucket", and an own cache."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
                   "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}  # fmt: skip
    options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    Files(f"s3://bucket?{options}&allow_bucket_creation=true").system.create_dir("bucket")
    yield options
    os.environ.clear()
    os.environ |= before
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "disk":
        return Files(tmp_path / "place")
    options = request.getfixturevalue("s3")
    return Files(f"s3://bucket/{tmp_path.name}?{options}")


def test_files_are_written_read_listed_and_removed(files: Files) -> None:
    assert files.read("a/x") is None
    assert files.list("a") == []
    files.write("a/x", b"one")
    files.write("a/x", b"two")
    files.write("a/b/y", b"y" * 3_000_000)
    assert files.read("a/x") == b"two"
    assert files.exists("a/x")
    assert not files.exists("a")
    assert [(entry.key, entry.size) for entry in files.list("a")] == [("a/x", 3)]
    assert [entry.key for entry in files.list("a", recursive=True)] == ["a/b/y", "a/x"]
    assert files.fetch("a/b/y").read_bytes() == b"y" * 3_000_000
    files.remove("a/x")
    files.remove("a/x")
    assert not files.exists("a/x")
    files.remove_folder("a")
    files.remove_folder("a")
    assert files.list("", recursive=True) == []
    with pytest.raises(FileNotFoundError):
        files.fetch("a/none")


def test_a_file_that_breaks_off_is_not_there(files: Files) -> None:
    class Broken(Exception):
        pass

    def write() -> None:
        with files.writing("a/x") as file:
            file.write(b"half")
            raise Broken

    with pytest.raises(Broken):
        write()
    assert files.list("a", recursive=True) == []


def test_a_local_file_is_moved_in(files: Files, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"content")
    files.adopt(tmp_path / "part", "checkpoints/c")
    assert files.read("checkpoints/c") == b"content"
    assert not (tmp_path / "part").exists()


def test_storage_that_fails_in_passing_is_tried_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(f"s3://bucket/flaky?{s3}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    real, calls = files._send, []

    def flaky(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError("AWS Error SLOW_DOWN")
        real(*arguments)

    monkeypatch.setattr(files, "_send", flaky)
    files.write("x", b"there")
    assert files.read("x") == b"there"
    monkeypatch.setattr(files, "_send", lambda *arguments: (_ for _ in ()).throw(OSError("AWS Error INTERNAL")))
    with pytest.raises(WorkspaceError, match="cannot be reached"):
        files.write("y", b"not there")


def test_locations_are_shown_without_secrets() -> None:
    location = "s3://KEY:SECRET@bucket/prefix?endpoint_override=host:1"
    assert shown(location) == "s3://bucket/prefix"
    with pytest.raises(WorkspaceError) as caught:
        Files(location + "&nonsense=1")
    assert "SECRET" not in str(caught.value)
    assert "nonsense" in str(caught.value)


def test_a_run_on_s3_gives_the_tables_of_one_on_a_disk(s3: str, tmp_path: Path) -> None:
    make_uploads(tmp_path / "uploads", 2)
    disk = make_workspace(tmp_path / "disk", tmp_path / "uploads")
    bucket = make_workspace(f"s3://bucket/run?{s3}", tmp_path / "uploads")
    for location in (disk.root, f"s3://bucket/run?{s3}"):
        running = start(location)
        _, errors = running.communicate(timeout=200)
        assert running.returncode in (0, 10), errors
    assert len(tables(bucket)["audits"]) == 2
    assert tables(bucket) == tables(disk)
    assert sum(entry.key.endswith(".html") for entry in bucket.files.list("reports")) == 2
    assert len(Workspace(f"s3://bucket/run?{s3}").keys("audits")) == 1  # merged at the end of the run


SECRET = "wJalr/UtnFEMI/K7MDENG+bPxRfi"


def test_a_secret_with_slashes_is_used_whole_and_never_shown(s3: str) -> None:
    location = f"S3://AKIA:{SECRET}@bucket/secret?{s3}"
    workspace, files = Workspace(location), Files(location)
    assert str(files) == "s3://bucket/secret"
    assert files.path("a") == "bucket/secret/a"
    assert files.create("a", b"1")
    assert files.read("a") == b"1"
    for entry in files.list("", recursive=True):
        assert SECRET.encode() not in (files.read(entry.key) or b"")
    assert SECRET not in str(workspace.files)
    assert ConditionalObjects(location, "us-east-1").create("b", b"2")
    assert open_location(location).root == "bucket/secret"
