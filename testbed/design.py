"""Which realistic fine-tunes there are: 80 recipes, a balanced study of nine things that people do differently.

Not the full product (20,480): five blocks of 16 recipes, one a duration of training, each an orthogonal array. In a
block, the set and N0 are the two coordinates (x, y) over the field of four elements GF(4), and the other factors of
four levels are x + y (captions), x + 2y (rank) and x + 3y, whose two bits say what is adapted and whether the text
encoder is trained and whose parity says whether there are regularisation pictures (Rao 1947; Hedayat, Sloane and
Stufken, "Orthogonal Arrays", 1999, chapter 3). What a block adds to these sums is another in every block, so that no
recipe comes twice and interactions are mixed differently.

So every level of a factor occurs equally often, and every pair of levels of two factors too: the difference of two
levels' means over the 80 recipes has nothing of any other factor in it (interactions stay mixed, as in any such
fraction). One exception: mirroring has no place of its own in 16 recipes. It is balanced against all factors but the
rank, with which it occurs 8 or 12 times instead of 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from testbed.more_sets import MORE_SETS


class Targets(StrEnum):
    """Which modules of the UNet are adapted, in kohya's words: its default, and with ``conv_dim``."""

    attention = "attention"
    convolutions = "convolutions"


class Captions(StrEnum):
    """How training pictures are captioned."""

    trigger = "trigger"  # one for all: the name of kohya's folder
    sentence = "sentence"  # a sentence a picture, as BLIP writes them
    tags = "tags"  # a list of tags a picture, always the same
    shuffled = "shuffled"  # the tags shuffled, some left out, the trigger first (shuffle_caption, keep_tokens 1)


TRAINING_IMAGES = (5, 10, 20, 50)
RANKS = (8, 16, 32, 64)
EXPOSURES = (10, 20, 40, 80, 320)  # how often each picture is seen, from undertrained to overtrained
BATCH = 4


@dataclass(frozen=True)
class Recipe:
    """One realistic fine-tune: everything that makes it, but base and seed."""

    few_shot: str
    training_images: int
    captions: Captions
    rank: int
    targets: Targets
    text_encoder: bool
    regularised: bool
    mirrored: bool
    exposures: int

    @property
    def name(self) -> str:
        """The folder and file it is published in."""
        parts = [self.few_shot, f"{self.training_images}", f"r{self.rank}", self.targets[:4]]
        parts += ["te"] if self.text_encoder else []
        parts += [self.captions]
        parts += ["reg"] if self.regularised else []
        parts += ["flip"] if self.mirrored else []
        return "-".join([*parts, f"x{self.exposures}"])

    @property
    def steps(self) -> int:
        """Optimiser steps of BATCH training pictures."""
        return round(self.exposures * self.training_images / BATCH)

    @property
    def holdout(self) -> bool:
        """Whether its set is one that nothing is tuned on."""
        return next(one.holdout for one in MORE_SETS if one.name == self.few_shot)

    def file(self, folder: Path) -> Path:
        """What an audit opens, where ``folder`` holds the checkpoints."""
        return folder / self.name / f"{self.name}.safetensors"


_DOUBLED = (0, 2, 3, 1)  # 2y of GF(4)
_TRIPLED = (0, 3, 1, 2)  # 3y
_ADDED = ((0, 0, 0, 0), (1, 2, 3, 1), (2, 3, 1, 0), (3, 1, 2, 1), (1, 1, 2, 0))  # to the sums and the parity, a block


def design() -> Iterator[Recipe]:
    """The 80 recipes, block by block."""
    for block, exposures in enumerate(EXPOSURES):
        captions_more, rank_more, rest_more, parity_more = _ADDED[block]
        for x in range(4):
            for y in range(4):
                rank = x ^ _DOUBLED[y] ^ rank_more
                rest = x ^ _TRIPLED[y] ^ rest_more
                bits = rank & 1, rank >> 1, rank & 1 ^ rank >> 1
                yield Recipe(
                    few_shot=MORE_SETS[x].name,
                    training_images=TRAINING_IMAGES[y],
                    captions=list(Captions)[x ^ y ^ captions_more],
                    rank=RANKS[rank],
                    targets=list(Targets)[rest & 1],
                    text_encoder=bool(rest >> 1),
                    regularised=bool(rest & 1 ^ rest >> 1 ^ parity_more),
                    mirrored=bool(bits[block % 3] ^ block & 1),
                    exposures=exposures,
                )


REALISTIC = tuple(design())
