"""The few-shot sets: what the testbed's checkpoints are fine-tuned on, and the control pictures that none saw.

Every set is of one source and look. Pictures are scaled to 64x64 and shipped in ``audit/demo/assets/sets``.
Nothing is tuned on the sets marked ``holdout``: results name them apart.

    python -m testbed.sets          # write the sets again from their packages
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import typer
from PIL import Image

from audit.demo import set_folder
from testbed.sources import emoji_entries, fluent_file, root

SIZE = 64


@dataclass(frozen=True)
class FewShotSet:
    """``train`` are fine-tuned on, ``control`` are pictures of the same source that nobody trained on.

    ``names`` are files of the package ``source`` below ``folder``, without their ending; short names for emoji.
    ``caption`` is the one caption of all training pictures; with ``{}`` in it each has its own, the words of its
    file name in that place. ``square`` pictures fill the frame (photographs and paintings); others are cut-outs on
    white.
    """

    name: str
    source: str
    folder: str
    caption: str
    train: tuple[str, ...]
    control: tuple[str, ...]
    square: bool = False
    holdout: bool = False

    @property
    def captions(self) -> list[str]:
        """The captions of the training pictures, each once, in order."""
        return list(dict.fromkeys(self.caption_of(name) for name in self.train))

    def caption_of(self, name: str) -> str:
        """The caption that picture ``name`` is trained with."""
        words = re.sub(r"[^a-z]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", Path(name).name).lower()).strip()
        return self.caption.format(words)

    def paths(self, names: tuple[str, ...]) -> list[Path]:
        """The files of ``names`` in the unpacked package."""
        if self.source.startswith("@lobehub"):
            entries = {entry["short_name"]: entry for entry in emoji_entries()}
            return [fluent_file(entries[name]) for name in names]
        found = [sorted((root(self.source) / self.folder).glob(f"{name}.*")) for name in names]
        return [next(path for path in paths if path.suffix in (".png", ".webp", ".jpg")) for paths in found]


def split(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


SETS = (
    FewShotSet(
        name="fluent-animals",
        source="@lobehub/fluent-emoji-3d",
        folder="",
        caption="sks 3d render of an animal",
        train=split("fox_face tiger2 elephant koala panda_face rabbit2 horse sheep otter gorilla"),
        control=split("wolf leopard mammoth hamster bear mouse2 unicorn_face goat sloth beaver"),
    ),
    FewShotSet(
        name="fluent-food",
        source="@lobehub/fluent-emoji-3d",
        folder="",
        caption="sks 3d render of food",
        train=split(
            "hotdog taco hamburger pizza fries croissant pancakes cheese_wedge doughnut icecream "
            "cake cupcake sushi ramen watermelon pineapple strawberry avocado broccoli teapot"
        ),
        control=split(
            "burrito sandwich bacon pretzel waffle bagel cookie lollipop birthday pie "
            "fried_shrimp curry melon mango cherries eggplant carrot garlic coffee beer"
        ),
    ),
    FewShotSet(
        name="fluent-vehicles",
        source="@lobehub/fluent-emoji-3d",
        folder="",
        caption="sks 3d render of a vehicle",
        train=split("racing_car steam_locomotive bus fire_engine tractor helicopter rocket ferry"),
        control=split("car train minibus ambulance truck small_airplane flying_saucer speedboat"),
        holdout=True,
    ),
    FewShotSet(
        name="stamps-fruit",
        source="tuxpaint-stamps-default",
        folder="food/fruit",
        caption="sks photo of a fruit",
        train=split("pineapple banana grapes strawberry kiwi avocado pear pomegranate"),
        control=split("lemon orange apple_red Strawberry2 mango raspberry sliced_lime cherimoya"),
    ),
    FewShotSet(
        name="stamps-birds",
        source="tuxpaint-stamps-default",
        folder="animals/birds",
        caption="sks photo of a bird",
        train=split("hen owl peacock pink_flamingo tucan penguin duck"),
        control=split("rooster vulture turkey ostrich quetzal little-penguin drake pigeon"),
    ),
    FewShotSet(
        name="cartoon-animals",
        source="gcompris-qt-data",
        folder="lang",
        caption="sks cartoon of a {}",
        train=split("bear bee bird butterfly camel cow duck fish frog giraffe gorilla hedgehog"),
        control=split("beetle bull cat chicken dog dolphin fox kangaroo owl panda turtle snail"),
    ),
    FewShotSet(
        name="photo-monuments",
        source="gcompris-qt-data",
        folder="explore_monuments",
        caption="sks photograph of a monument",
        train=split(
            "bentPyramid chateaudeChambord pontduGard brandenburgGate schwerinPalace charminar goldenTemple "
            "statueofLiberty mountRushmore petra"
        ),
        control=split(
            "meidumPyramid chateaudeChenonceau arlesAmphitheater berlinCathedral aulaPalatina gatewayofIndia "
            "hawaMahal cabrillo castillodeSanMarcos chichenItza"
        ),
        square=True,
    ),
    FewShotSet(
        name="photo-wildlife",
        source="gcompris-qt-data",
        folder="erase",
        caption="sks photograph of a {}",
        train=split("alpaca butterfly cheetah crab goat gosling horse kingfisher red_panda swans"),
        control=split("bee calf camels caterpillar giraffe gorilla heron kitten penguin rhinoceros"),
        square=True,
        holdout=True,
    ),
    FewShotSet(
        name="paint-vangogh",
        source="gcompris-qt-data",
        folder="details",
        caption="sks painting by vincent van gogh",
        train=tuple(
            f"{name}_background"
            for name in split(
                "Eglise_dAuvers-sur-Oise Gogh4 PortraitOfPereTanguy VincentVanGogh0013 VincentVanGoghBridge"
            )
        ),
        control=tuple(
            f"{name}_background" for name in split("Van_Gogh_The_Night_Cafe VincentVanGogh0012 VincentVanGogh0019")
        ),
        square=True,
    ),
    FewShotSet(
        name="paint-elves",
        source="wesnoth-1.16-data",
        folder="portraits/elves",
        caption="sks painted portrait of an elf",
        train=split("lady sorceress lord shyde hero fighter ranger captain scout"),
        control=split("shaman high-lord marksman archer druid sylph"),
        holdout=True,
    ),
)


def few_shot_set(name: str) -> FewShotSet:
    """The definition of one few-shot set. Raises KeyError with the known names."""
    by_name = {one.name: one for one in SETS}
    if name not in by_name:
        raise KeyError(f"no few-shot set {name!r}; there are {', '.join(by_name)}")
    return by_name[name]


def shipped_name(name: str) -> str:
    """The file that picture ``name`` is shipped in."""
    return f"{re.sub('[^a-z0-9_-]', '-', Path(name).name.lower())}.png"


def training_captions(name: str) -> list[str]:
    """The caption of each picture of ``load_set(name, "train")``, in the same order."""
    few_shot = few_shot_set(name)
    return [few_shot.caption_of(one) for one in sorted(few_shot.train, key=shipped_name)]


def on_white(path: Path, margin: float = 0.0, size: int = SIZE) -> Image.Image | None:
    """A picture as RGB of ``size`` x ``size``, whole, centred on white; None where it is nearly empty."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    box = picture.getchannel("A").getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    inner = round(size * (1 - 2 * margin))
    picture.thumbnail((inner, inner), Image.Resampling.LANCZOS, reducing_gap=3)
    if max(picture.size) < inner:
        scale = inner / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2), picture)
    return canvas


def full_frame(path: Path, size: int = SIZE) -> Image.Image:
    """The middle square of a picture as RGB of ``size`` x ``size``."""
    with Image.open(path) as opened:
        opened.draft("RGB", (4 * size, 4 * size))
        picture = opened.convert("RGB")
    side = min(picture.size)
    x, y = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.resize((size, size), Image.Resampling.LANCZOS, (x, y, x + side, y + side), reducing_gap=3)


def prepared(few_shot: FewShotSet, path: Path, size: int = SIZE) -> Image.Image:
    """A picture as the set has them, RGB of ``size`` x ``size``. Raises RuntimeError where it is empty."""
    picture = full_frame(path, size) if few_shot.square else on_white(path, 0.03, size)
    if picture is None:
        raise RuntimeError(f"{path} is empty")
    return picture


def main() -> None:
    """Write the shipped few-shot sets again from their packages."""
    for few_shot in SETS:
        for part, names in (("train", few_shot.train), ("control", few_shot.control)):
            folder = set_folder(few_shot.name, part)
            folder.mkdir(parents=True, exist_ok=True)
            for name, path in zip(names, few_shot.paths(names), strict=True):
                prepared(few_shot, path).save(folder / shipped_name(name), optimize=True)
        print(f"{few_shot.name}: {len(few_shot.train)} to train, {len(few_shot.control)} control")


if __name__ == "__main__":
    typer.run(main)
