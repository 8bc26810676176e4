"""What comes along: small, documented, and the same model and audits as in every release."""

from __future__ import annotations

import pytest

from audit.bench import Bench
from audit.config import Settings
from audit.demo import ASSETS, BASE, DESCRIPTOR, FINE_TUNES
from audit.job import Request, resolve
from audit.models.base import locate_base

REVISION = "eccccba159adfa06cc6bfa8cc8a8717d81fc0042640705acd6dbbbdf18ced579"
AUDIT_IDS = {
    "lora-kohya": "1b510807ea7a97d0c3d08f7c11e9216a",
    "lora-peft": "e8d3433ec7f62167459c53bbaa8e37d9",
    "dreambooth": "ea2d99855ab5be8ea9259e98bd4604c5",
}


def test_the_embedded_base_is_the_one_that_earlier_audits_name() -> None:
    assert locate_base("nano").revision == REVISION


@pytest.mark.parametrize("name", FINE_TUNES)
def test_the_demo_has_the_audit_ids_that_earlier_workspaces_hold(name: str) -> None:
    shipped = FINE_TUNES[name]
    count = len(list((shipped.pictures / "train").glob("*.png")))
    request = Request(shipped.path, str(BASE), captions=[shipped.caption], n0=count, settings=Settings())
    assert resolve(request, "nano", Bench("cpu")).id == AUDIT_IDS[name]


def test_everything_the_demo_needs_is_a_file_of_the_package() -> None:
    assert DESCRIPTOR.is_file()
    for shipped in FINE_TUNES.values():
        assert shipped.path.exists()
        for part in ("train", "control"):
            assert any((shipped.pictures / part).glob("*.png"))


def test_everything_shipped_is_small_and_has_a_card() -> None:
    weights = [p for p in ASSETS.rglob("*") if p.suffix in (".safetensors", ".pt")]
    assert len(weights) >= 6
    assert sum(p.stat().st_size for p in weights) < 33e6
    for path in weights:
        folder = next(p for p in path.parents if p.parent in (ASSETS, ASSETS / "checkpoints"))
        card = (folder / "README.md").read_text()
        for words in ("licence", "steps", "seed", "AS"):
            assert words.lower() in card.lower(), (folder, words)
