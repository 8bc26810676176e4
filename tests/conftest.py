"""Shared real parts: the shipped nano base, its checkpoints, the nano descriptor."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings
from pytest_httpserver import HTTPServer

from audit.demo import ASSETS, set_folder
from audit.descriptors import Descriptor, load_descriptor
from audit.models.base import BaseModel, load_base, locate_base
from audit.models.checkpoint import open_checkpoint
from audit.models.pair import ModelPair
from audit.workspace import Workspace
from tests.simulators.hub import Hub

# `make test-fast` leaves these out: whole files, or tests of a file. They start processes, clusters or S3 servers,
# train, compile, or sample whole audits. A test can also carry the marker itself.
SLOW = (
    "benchmarks/",
    "crawlers/test_civitai.py",
    "crawlers/test_commands.py",
    "custody/test_again.py",
    "demo/test_flow.py",
    "deploy/test_dashboards.py",
    "engine/test_auditor.py",
    "engine/test_bases.py::test_full_weights_that_claim_nothing_go_to_the_nearest_base",
    "engine/test_bases.py::test_full_weights_that_no_base_is_nearest_to_are_not_audited",
    "engine/test_chaos.py",
    "engine/test_control.py",
    "engine/test_done.py",
    "engine/test_engines.py",
    "engine/test_experts.py",
    "engine/test_full.py",
    "engine/test_membership.py",
    "engine/test_run.py",
    "engine/test_stages.py",
    "engine/test_tokens.py",
    "recovery/test_auto.py",
    "recovery/test_recover.py",
    "references/test_denoised.py",
    "sampling/test_compile.py",
    "sampling/test_memory.py",
    "sampling/test_waits.py",
    "study/test_results.py::test_a_study_from_file_to_page",
    "study/test_results.py::test_no_page_shows_pictures_where_none_are_kept",
    "study/test_defences.py",
    "study/test_ray.py",
    "study/test_train.py",
    "fuzz/",
    "models/test_anima.py",
    "models/test_choose.py",
    "models/test_cost.py",
    "models/test_denoiser_file.py",
    "models/test_families.py",
    "models/test_formats.py",
    "models/test_hidream.py",
    "models/test_hostile.py",
    "models/test_kolors.py",
    "models/test_hostile_layouts.py",
    "models/test_peft_config.py",
    "models/test_placement.py",
    "models/test_stored.py",
    "models/test_sketch.py::test_the_look_up_from_crawl_to_command",
    "test_api.py",
    "test_canary.py",
    "test_chances.py",
    "test_cli.py",
    "test_estimate.py",
    "test_examples.py",
    "test_logs.py",
    "test_plugins.py",
    "test_private.py",
    "test_programs.py::test_a_program_explains_itself",
    "test_public.py::test_commands_print_the_keys_that_are_promised",
    "test_query.py",
    "test_questions.py",
    "test_release.py::test_the_wheel_has_what_users_need_and_nothing_else",
    "test_storage.py",
    "testbed/",
    "untrusted/test_pool.py",
    "workspace/test_leases.py",
    "workspace/test_object_storage.py",
    "workspace/test_torture.py",
)
# These run after all others, one at a time: they kill processes by the clock, or need free cores.
ALONE = (
    "engine/test_chaos.py",
    "engine/test_full.py",
    "engine/test_membership.py::test_both_engines_measure_the_same",
    "engine/test_run.py",
    "workspace/test_torture.py",
)

if "PYTEST_XDIST_WORKER" in os.environ:  # its workers ignore SIGINT, and so would every process that a test starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("fuzz", max_examples=20_000, deadline=None)  # pytest --hypothesis-profile fuzz

BASE = ASSETS / "base"
KOHYA = ASSETS / "checkpoints/fluent-animals-lora-kohya/fluent-animals.safetensors"
PEFT = ASSETS / "checkpoints/stamps-fruit-lora-peft/pytorch_lora_weights.safetensors"
DREAMBOOTH = ASSETS / "checkpoints/stamps-birds-dreambooth"
CAPTION = "sks 3d render of an animal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what SLOW and ALONE name, and what needs an S3 server."""
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        for marker, places in ((pytest.mark.slow, SLOW), (pytest.mark.alone, ALONE)):
            if name.startswith(places):
                item.add_marker(marker)
        if "s3" in item.fixturenames or _is_on_s3(item):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Libraries and tests stay: collections in tests need not go through them, which costs a tenth of a second each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At the end all is collected, as without."""
    gc.unfreeze()


def _is_on_s3(item: pytest.Item) -> bool:
    """Whether a test is the case of a fixture that starts an S3 server."""
    parameters = getattr(item, "callspec", None)
    return parameters is not None and any(value == "s3" for value in parameters.params.values() if type(value) is str)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


_SHARED: list[tuple[BaseModel, dict[str, int]]] = []


def _versions(model: BaseModel) -> dict[str, int]:
    """How often each weight was written to."""
    parts = [(name, model.part(name)) for name in model.architecture.networks]
    return {f"{part}.{name}": t._version for part, network in parts for name, t in network.state_dict().items()}


@pytest.fixture(scope="session")
def base() -> BaseModel:
    """The nano base, which all tests share: one that changes it makes a copy."""
    found = load_base(locate_base(str(BASE)))
    _SHARED.append((found, _versions(found)))
    return found


@pytest.fixture(scope="module", autouse=True)
def _shared_is_left_alone() -> Iterator[None]:
    yield
    for model, before in _SHARED:
        assert _versions(model) == before, "a test here has changed the base that all share: copy it first"


@pytest.fixture(scope="session")
def kohya_pair(base: BaseModel) -> ModelPair:
    return ModelPair(base, open_checkpoint(KOHYA))


@pytest.fixture(scope="session")
def animal_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: in ``train`` the ten pictures that KOHYA was trained on, in ``control`` ten others of their kind."""
    place = tmp_path_factory.mktemp("animals")
    for part in ("train", "control"):
        shutil.copytree(set_folder("fluent-animals", part), place / part)
    return place


@pytest.fixture(scope="session")
def nano() -> Descriptor:
    return load_descriptor("nano")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def hub(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A local hub that the real huggingface_hub client is pointed at, with an empty cache."""
    simulator = Hub(httpserver)
    endpoint = simulator.url.rstrip("/")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    return simulator


def stored_bytes(workspace: Workspace, identity: str) -> bytes:
    """The content of a stored checkpoint."""
    content = workspace.files.read(f"checkpoints/{identity}.safetensors")
    assert content is not None
    return content
