"""A job is plain data with its id: small, the same as JSON and in another process, and never under a stale id."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from audit.bench import Bench
from audit.config import Method, Precision, Settings
from audit.errors import CheckpointError, ConfigError
from audit.job import Job, Request, resolve
from audit.workspace import Workspace
from tests.conftest import BASE, CAPTION, DREAMBOOTH, KOHYA, PEFT

GOLDEN = {
    "aead84710d3275a34e0dc9a61a5367d0": Request(
        KOHYA, str(BASE), captions=[CAPTION], n0=10, settings=Settings(steps=3, images_per_training_image=2)
    ),
    "1b510807ea7a97d0c3d08f7c11e9216a": Request(KOHYA, str(BASE)),
    "8701d91217d201d101033d33c0d4c531": Request(
        DREAMBOOTH, str(BASE), settings=Settings(method=Method.cfg, precision=Precision.fp32)
    ),
    "c3fbd7eb423e3395121152cb8359bd4c": Request(PEFT, str(BASE)),
}  # these change with ALGORITHM_VERSION alone


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture
def job(bench: Bench) -> Job:
    return resolve(Request(KOHYA, str(BASE), captions=[CAPTION], n0=10), "nano", bench)


@pytest.mark.parametrize("audit_id", GOLDEN)
def test_the_id_of_a_request_is_what_it_has_always_been(audit_id: str, bench: Bench) -> None:
    assert resolve(GOLDEN[audit_id], "nano", bench).id == audit_id


def test_a_job_is_the_same_as_json_and_in_a_pickle(job: Job) -> None:
    assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job
    packed = pickle.dumps(job)
    assert pickle.loads(packed) == job
    assert len(packed) < 20_000


def test_a_job_that_was_changed_by_hand_is_refused(job: Job) -> None:
    document = job.as_dict()
    document["settings"]["steps"] += 1
    with pytest.raises(ConfigError, match="make it again"):
        Job.from_dict(document)
    with pytest.raises(ConfigError, match="no job"):
        Job.from_dict({"id": job.id})


def test_a_job_with_another_setting_has_another_id(job: Job) -> None:
    assert replace(job, settings=replace(job.settings, steps=99)).id != job.id


def test_a_job_says_all_that_the_catalogs_row_needs(job: Job) -> None:
    checkpoint = job.checkpoint
    assert checkpoint.item_id == f"file:{checkpoint.sha256}"
    assert checkpoint.training.tensor_rank == 24
    assert json.loads(checkpoint.claimed_metadata)["ss_network_dim"] == "24"
    assert checkpoint.bytes > KOHYA.stat().st_size / 2


def test_a_job_is_made_without_a_network_of_the_model() -> None:
    probe = f"""
import torch, audit.models.base as base
from audit.bench import Bench
from audit.job import Request, resolve
from pathlib import Path
bench = Bench()
resolve(Request(Path({str(KOHYA)!r}), {str(BASE)!r}), "nano", bench)
print(bench.loaded_base())
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None"]


def test_a_file_that_changed_since_is_not_audited_under_the_old_id(
    tmp_path: Path, workspace: Workspace, bench: Bench
) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(KOHYA.read_bytes())
    job = resolve(Request(path, str(BASE)), "nano", bench)
    path.write_bytes(PEFT.read_bytes())
    with pytest.raises(CheckpointError, match="has changed since"):
        Bench().checkpoint(job, workspace)


def test_a_bench_with_another_base_or_descriptor_is_refused(job: Job, bench: Bench) -> None:
    with pytest.raises(ConfigError, match="is another here"):
        bench.location(replace(job, base=replace(job.base, revision="0" * 64)))
    with pytest.raises(ConfigError, match="use the same everywhere"):
        bench.descriptor(replace(job, descriptor=replace(job.descriptor, name="nano@other")))
