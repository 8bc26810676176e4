"""Decoys of another look than the references' say nothing of chance, and are told apart from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit.demo import ASSETS, set_folder
from audit.evidence.chance import FEWEST
from audit.evidence.kind import FEATURES, FEWEST_REFERENCES, MOST, kind_problem, look_of, of_their_kind, same_kind_p

SETS = sorted(one.name for one in (ASSETS / "sets").iterdir())
CONTROLS = Path(__file__).parents[2] / "testbed/controls"


def looks(*folders: Path) -> np.ndarray:
    return np.stack([look_of(Image.open(file)) for folder in folders for file in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("name", SETS)
def test_pictures_of_other_sets_are_of_another_kind(name: str) -> None:
    others = looks(*(set_folder(one, "train") for one in SETS if one != name))
    assert "not of their kind" in (kind_problem(looks(set_folder(name, "train")), others) or "")


def test_unseen_pictures_of_a_set_are_of_its_kind_but_for_few() -> None:
    told = [
        kind_problem(looks(set_folder(name, "train")), looks(set_folder(name, "control"), CONTROLS / name / "control"))
        for name in SETS
    ]
    assert sum(one is None for one in told) >= len(SETS) - 2


def test_two_samples_of_one_kind_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(0)
    p = np.array([same_kind_p(rng.normal(size=(10, 5)), rng.normal(size=(30, 5)), seed) for seed in range(60)])
    assert 0.3 < p.mean() < 0.75
    assert (p <= 0.05).mean() <= 0.15
    apart = [same_kind_p(rng.normal(1.5, 1, (10, 5)), rng.normal(size=(30, 5)), seed) for seed in range(20)]
    assert np.mean(np.array(apart) <= 0.05) > 0.8


def test_too_few_of_either_are_no_proof() -> None:
    rng = np.random.default_rng(0)
    many = rng.normal(size=(50, FEATURES))
    assert f"{FEWEST} is the least" in (kind_problem(many, many[: FEWEST - 1]) or "")
    assert "cannot be seen" in (kind_problem(many[: FEWEST_REFERENCES - 1], many) or "")


def test_large_sets_are_looked_at_in_part() -> None:
    rng = np.random.default_rng(0)
    assert kind_problem(rng.normal(size=(3 * MOST, 4)), rng.normal(size=(50 * MOST, 4))) is None


def test_a_look_is_finite_whatever_the_picture() -> None:
    for mode, size in (("1", (1, 1)), ("RGBA", (3, 900)), ("CMYK", (64, 64)), ("L", (500, 2))):
        look = look_of(Image.new(mode, size))
        assert look.shape == (FEATURES,)
        assert np.isfinite(look).all()


def test_of_several_backgrounds_those_of_the_references_kind_are_taken() -> None:
    rng = np.random.default_rng(3)
    references, own = rng.normal(size=(10, 6)), [rng.normal(size=(40, 6)) for _ in range(2)]
    other = rng.normal(2, 1, size=(40, 6))
    assert of_their_kind(references, [other, own[0]]) == [False, True]
    assert of_their_kind(references, [*own, other]) == [True, True, False]
    apart = [rng.normal(shift, 1, size=(60, 6)) for shift in (-0.4, 0.4)]
    assert of_their_kind(references, apart) is None  # both pass, and are told from each other


def test_with_many_on_offer_one_of_another_look_passes_no_more_often_than_alone() -> None:
    rng = np.random.default_rng(4)

    def taken(count: int) -> bool:
        references = rng.normal(size=(6, 4))
        backgrounds = [rng.normal(rng.choice([-1, 1], 4) * 0.8, 1, size=(40, 4)) for _ in range(count)]
        return any(of_their_kind(references, backgrounds) or [])

    alone, among = (np.mean([taken(count) for _ in range(60)]) for count in (1, 6))
    assert among <= alone + 0.1
