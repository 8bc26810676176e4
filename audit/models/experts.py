"""The two experts of a base model whose denoiser is two networks, one for each part of the noise levels (Wan 2.2).

The first is asked at noisy timesteps, the second from the boundary on (arXiv 2503.20314 and its later releases). An
adapter of such a base is two files, one for each, or one that goes into one expert or into both. Which is which stands
in names: ai-toolkit writes ``..._high_noise`` and ``..._low_noise``, or one file with ``transformer_1.`` and
``transformer_2.`` in its tensors' names; musubi-tuner's one file for both says nothing. ``ss_sd_model_name`` is not
looked at: that trainer may name one expert's weights there while it trains both (read in public sources, not tried).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from audit.choices import Expert
from audit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from audit.models.checkpoint import Checkpoint

PAIR = (Expert.high_noise, Expert.low_noise)
MAX_NAME = 300  # characters of a name that are looked at
_CALLED = {  # in the words of a name, in lower case with blanks between
    Expert.high_noise: re.compile(r"\bhigh ?noise\b|\bhn\b|\bhigh(?: (?:v|e|step|epoch)?\d+)*$"),
    Expert.low_noise: re.compile(r"\blow ?noise\b|\bln\b|\blow(?: (?:v|e|step|epoch)?\d+)*$"),
}
_OF_BOTH = re.compile(
    r"\b(?:high ?(?:noise )?(?:and |n |or |plus )?low|low ?(?:noise )?(?:and |n |or |plus )?high) ?(?:noise)?\b"
)
_CLAIMED = ("ss_output_name", "modelspec.title", "name")
_ENDING = re.compile(r"\.(?:safetensors|gguf)$", re.IGNORECASE)
_MARKED = re.compile(r"^transformer_([12])[._]")
_MARKED_TENSOR = re.compile(
    r"^(?:base_model\.model\.)?"
    r"(?:(?:model\.)?diffusion_model[._]|transformer\.|(?:lora|lycoris)_(?:unet_|transformer_)?)?transformer_([12])[._]"
)


def told_by_name(name: str) -> Expert | None:
    """The expert that a file's name says it is of; None where it says neither, or both."""
    parted = re.sub(r"(?<=[a-z0-9])(?=(?:High|Low)Noise)", " ", _ENDING.sub("", name[-MAX_NAME:]))
    words = re.sub(r"[^a-z0-9]+", " ", parted.lower()).strip()
    found = [expert for expert, pattern in _CALLED.items() if pattern.search(words)]
    return found[0] if len(found) == 1 and not _OF_BOTH.search(words) else None


def told(name: str, metadata: Mapping[str, str]) -> tuple[Expert | None, str]:
    """The expert that a file is of by its name and what its header calls it, and which of them says so.

    None where they say nothing, or contradict each other.
    """
    said = [(name, "its name"), *((metadata[key], key) for key in _CLAIMED if key in metadata)]
    found = {by: expert for text, by in said if (expert := told_by_name(text)) is not None}
    if len(set(found.values())) != 1:
        return None, ""
    by = next(iter(found))
    return found[by], by


def check_given_as(expert: Expert, where: object, name: str, metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError where a file's ``name``, or where that says nothing its metadata, is against ``expert``."""
    said, by = told(name, {})
    said, by = (said, by) if said is not None else told("", metadata)
    if said not in (None, expert):
        raise CheckpointError(f"{where} is given as the {expert} file, and {by} says {said}: change places")


def marked(module: str) -> tuple[Expert | None, str]:
    """The expert that a module's name begins with, None where it does not, and the module's name in that network."""
    match = _MARKED.match(module)
    return (None, module) if match is None else (PAIR[int(match[1]) - 1], module[match.end() :])


def named_in(tensors: Iterable[str]) -> tuple[Expert, ...]:
    """The experts that the names of tensors mark; with a second expert marked, names without a mark are the first's."""
    numbers = {match[1] if (match := _MARKED_TENSOR.match(name)) else "" for name in tensors}
    if not numbers - {""}:
        return ()
    return tuple(expert for expert, ways in zip(PAIR, (("1", ""), ("2",)), strict=True) if numbers & {*ways})


def assigned(
    checkpoint: Checkpoint, boundary: float | None, asked: Expert | None, name: str | None = None
) -> tuple[Expert | None, list[str]]:
    """Which expert of a base with the ``boundary`` a file goes into, and what has to be said of how that was told.

    None where the base has one network (``boundary`` None), or the checkpoint says itself what is for which. Raises
    ConfigError for an answer to a question that there is not, and CheckpointError where there is none.
    """
    own = checkpoint.own_experts
    if boundary is None:
        if {*PAIR} & {*checkpoint.files}:
            raise CheckpointError(
                f"{checkpoint.path} is a high-noise and a low-noise file, and the base has one network: give the Wan "
                "2.2 T2V base that they were trained on, or one file"
            )
        if asked is not None:
            raise ConfigError("--expert is for bases of two experts (Wan 2.2 T2V-A14B), which this base is not")
        return None, []
    if own is not None:
        if asked is not None:
            raise ConfigError(
                f"{checkpoint.path} says itself what is for which expert: leave --expert out, or give the one file"
            )
        return None, []
    found, by = told(name or checkpoint.name, checkpoint.metadata)
    if asked is not None:
        other = found is not None and asked not in (found, Expert.both)
        return asked, [f"it is audited as a {asked} file, as asked, and {by} says {found}"] if other else []
    if found is None:
        raise CheckpointError(
            f"{checkpoint.path}: which of the base's two experts it is for is told neither by its name nor by its "
            "metadata, and an audit of the other one would find nothing: say it with --expert high-noise, low-noise or "
            "both, or give both files (--low-noise FILE, or a folder that holds the two)"
        )
    return found, [f"it is taken for a {found} file, which {by} says; --expert says otherwise"]


def experts_of(checkpoint: Checkpoint) -> tuple[Expert, ...]:
    """The experts that an assigned checkpoint is for; empty where it may be any (an encoder alone)."""
    return checkpoint.own_experts or () if checkpoint.expert is None else changed_by(checkpoint.expert)


def changed_by(expert: Expert) -> tuple[Expert, ...]:
    """The experts that one file for ``expert`` changes."""
    return PAIR if expert is Expert.both else (expert,)


def expert_of_item(names: Iterable[str], configured: Expert | None) -> tuple[Expert | None, list[str]]:
    """Which expert an item of the catalog is for, by the ``names`` of its places, else as configured, and what to say.

    None where names contradict each other, or say nothing and nothing is configured. A version with a file for each is
    two items, and two audits: of each the other expert is the base's own.
    """
    said = {one for name in names if (one := told_by_name(name)) is not None}
    if len(said) == 1:
        found = said.pop()
        return found, [f"it is taken for a {found} file, which its name says"]
    return (None, []) if said else (configured, [])


def is_changed_alone(experts: Iterable[Expert], where: str) -> list[str]:
    """What has to be said of an audit in which one expert is the base's own."""
    changed = set(experts)
    if len(changed) != 1:
        return []
    other = next(one for one in PAIR if one not in changed)
    return [
        f"the {next(iter(changed))} expert of {where} is changed, and the {other} one is the base's own: what a second "
        "file has learnt cannot show here, and finding nothing says nothing of it"
    ]
