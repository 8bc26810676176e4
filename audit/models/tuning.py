"""Apply a checkpoint to a base model: its networks, changed, and an account of every tensor of the file."""

from __future__ import annotations

import torch
from safetensors import SafetensorError

from audit.choices import Expert
from audit.devices import raise_fault
from audit.errors import CheckpointError, NoEffectError
from audit.models.base import BaseModel
from audit.models.bases import claims_of, mismatches, prediction_refusal
from audit.models.checkpoint import Checkpoint
from audit.models.experts import PAIR, is_changed_alone
from audit.models.families.identify import Family, agree, family_of_name, family_of_shapes
from audit.models.families.unaudited import by_claim, by_tensors
from audit.models.formats.adapter import Tuned, apply_adapter
from audit.models.formats.detect import Format
from audit.models.formats.names import shown
from audit.models.formats.prediction import contradiction
from audit.models.formats.tensors import TensorNotFiniteError, Tensors
from audit.models.formats.weights import apply_weights

MAX_UNUSED_SHARE = 0.01  # of the squared norm of all that the file holds
_ERRORS = (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError, SafetensorError, MemoryError)


def tune(
    base: BaseModel,
    checkpoint: Checkpoint,
    lora_scale: float = 1.0,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tuned:
    """What ``checkpoint`` makes of ``base`` on the CPU; what it does not touch is not copied.

    Changes are computed in float32, tensor by tensor, and kept in ``dtype`` (float32 by default). Raises NoEffectError
    where a number is not finite; CheckpointError where tensors do not fit the base, or where more than 1 % of the file
    would be without effect: an audit of the rest would report "nothing found" of a model that nobody has run; and
    DeviceMemoryError where the host has too little memory.
    """
    hint = "; ".join([*family_warnings(checkpoint, base), "check that --base is what it was trained on"])
    check_prediction(base, checkpoint)
    try:
        tuned = _tune(base, checkpoint, lora_scale, adapter, dtype)
    except TensorNotFiniteError as error:
        raise NoEffectError(f"{checkpoint.path}: {error}: the file is broken; download it again") from error
    except _ERRORS as error:
        raise_fault(error, f"putting {checkpoint.path} into {base.name}", "the host")
        raise CheckpointError(
            f"{checkpoint.path} does not fit the base model {base.name}: {str(error)[:300]}; {hint}"
        ) from error
    if not tuned.unused_share <= MAX_UNUSED_SHARE:  # nor where it is no number
        raise CheckpointError(
            f"{checkpoint.path}: {len(tuned.unused)} of its tensors have no place in {base.name} "
            f"({tuned.unused_share:.0%} of its weight; {shown(tuned.unused)}); an audit of the rest would be "
            f"misleading: {hint}"
        )
    if tuned.unused:
        tuned.warnings.append(f"{len(tuned.unused)} tensors of the file have no effect: {shown(tuned.unused)}")
    return tuned


def check_prediction(base: BaseModel, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where the file, or the base that it claims, predicts something else than the base does.

    Nothing in the weights tells, and a network that is taken for another answers nonsense: an audit would find nothing.
    """
    if base.architecture.flow:
        return
    try:
        one = checkpoint.prediction
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    wrong = contradiction(one, base.pipeline.scheduler, base.name)
    if one.kind is None and not wrong:
        kind = base.pipeline.scheduler.config.get("prediction_type", "epsilon")
        wrong = prediction_refusal(claims_of(checkpoint.metadata), base.name, kind)
    if wrong:
        raise CheckpointError(f"{checkpoint.path}: {wrong}")


def _tune(
    base: BaseModel, checkpoint: Checkpoint, lora_scale: float, adapter: str | None, dtype: torch.dtype | None
) -> Tuned:
    experts, whole = _experts(base, checkpoint), Tuned()
    for expert, files in experts:
        found = (
            _adapted(base, checkpoint, files, expert, lora_scale, adapter, dtype)
            if checkpoint.format.is_adapter
            else _replaced(base, checkpoint, files, expert, dtype)
        )
        if len(experts) > 1 and not sum(change.norm for change in found.changes) > 0:
            raise NoEffectError(
                f"{checkpoint.path}: its {expert} half changes nothing: audit the other file alone, with --expert"
            )
        if expert is not experts[0][0]:
            _leave_shared(found, whole, checkpoint)
        _join(whole, found)
    moved = {change.part for change in whole.changes if change.norm > 0}
    changed = {one for one, part in zip(PAIR, base.architecture.denoisers, strict=False) if part in moved}
    if base.architecture.boundary(base.pipeline) is not None:
        whole.warnings += is_changed_alone(changed, base.name)
    return whole


def _leave_shared(found: Tuned, whole: Tuned, checkpoint: Checkpoint) -> None:
    """Leave out of the second half, ``found``, what the first has: of one file for both, all but its denoiser.

    Raises ValueError where two files change the same, such as the text encoder: the second would undo the first.
    """
    shared = {*whole.networks} & {*found.networks} | {*whole.embeddings} & {*found.embeddings}
    if shared and checkpoint.expert is not Expert.both:
        raise ValueError(f"both files change {', '.join(sorted(shared))[:120]}: which of them holds is not known")
    found.networks = {part: network for part, network in found.networks.items() if part not in shared}
    found.embeddings = {token: one for token, one in found.embeddings.items() if token not in shared}
    found.changes = [change for change in found.changes if change.part not in shared]
    if checkpoint.expert is Expert.both:
        found.unused = []


def _join(whole: Tuned, more: Tuned) -> None:
    whole.networks |= more.networks
    whole.embeddings |= more.embeddings
    whole.changes += more.changes
    whole.unused += more.unused
    whole.warnings += [one for one in more.warnings if one not in whole.warnings]
    whole.unused_share = max(whole.unused_share, more.unused_share)


def _experts(base: BaseModel, checkpoint: Checkpoint) -> list[tuple[Expert | None, list[str]]]:
    """The parts of a checkpoint, by the expert that they are for; None: they say themselves, or there is one network.

    Raises ValueError where that is not known: in the other expert a change does nothing that anyone has trained.
    """
    pair = [(one, [one]) for one in PAIR if one in checkpoint.files]
    if base.architecture.boundary(base.pipeline) is None:
        if pair or checkpoint.expert is not None:
            raise ValueError("it is for a base with two experts, and the base has one network")
        return [(None, list(checkpoint.files))]
    if pair:
        return [(one, [str(part) for part in parts]) for one, parts in pair]
    if checkpoint.expert is not None and checkpoint.own_experts is not None:
        raise ValueError("it names an expert itself, or is a folder that does: it is for no other")
    if checkpoint.expert is None:
        if checkpoint.own_experts is None:
            raise ValueError("which of the base's two experts it is for is not said: --expert says it")
        return [(None, list(checkpoint.files))]
    chosen = PAIR if checkpoint.expert is Expert.both else (checkpoint.expert,)
    return [(one, list(checkpoint.files)) for one in chosen]


def _adapted(
    base: BaseModel, checkpoint: Checkpoint, parts: list[str], expert: Expert | None, lora_scale: float,
    adapter: str | None, dtype: torch.dtype | None,
) -> Tuned:  # fmt: skip
    files = [checkpoint.files[part] for part in parts]
    metadata = files[0][1].metadata if len(parts) < len(checkpoint.files) else checkpoint.metadata
    with Tensors(files) as tensors:
        return apply_adapter(base, tensors, metadata, lora_scale, adapter, checkpoint.path.stem, dtype, expert)


def _replaced(
    base: BaseModel, checkpoint: Checkpoint, names: list[str], expert: Expert | None, dtype: torch.dtype | None
) -> Tuned:
    denoiser = None if expert is None else base.architecture.denoisers[PAIR.index(expert)]
    whole = Tuned()
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition("/")[0], []).append(name)
    for part, named in parts.items():
        component = None if checkpoint.format is Format.ldm else denoiser or part
        if component and (component not in base.architecture.networks or base.part(component) is None):
            raise ValueError(f"the base has no {component}")
        with Tensors([checkpoint.files[name] for name in named]) as tensors:
            _join(whole, apply_weights(base, tensors, component, dtype, denoiser))
    return whole


def families_of(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The families that a checkpoint's shapes show and that its metadata claims."""
    headers = [header for _, header in checkpoint.files.values()]
    shapes = next((found for header in headers if (found := family_of_shapes(header.tensors))), None)
    names = ("modelspec.architecture", "ss_base_model_version")
    claims = [family_of_name(checkpoint.metadata[name]) for name in names if name in checkpoint.metadata]
    return shapes, next((claim for claim in claims if claim != Family.other), None)


def _unaudited(checkpoint: Checkpoint, shapes: str | None, claimed: str | None) -> list[str]:
    """That it is of a model which is not audited, by what its metadata claims, else by the names of its tensors."""
    names = ("modelspec.architecture", "ss_base_model_version")
    said = [(name, by_claim(checkpoint.metadata[name])) for name in names if name in checkpoint.metadata]
    found = next(((name, one) for name, one in said if one), None)
    if found is not None and claimed is None:
        also = f"; its shapes are also those of family {shapes}, and the base that is given holds" if shapes else ""
        return [f"{found[1].sentence}, and its {found[0]} claims it{also}"]
    if shapes or claimed:
        return []
    other = next((one for _, header in checkpoint.files.values() if (one := by_tensors(header.tensors))), None)
    return [f"{other.sentence}, and its tensors are named as those of it are"] if other else []


def _alike(checkpoint: Checkpoint, shapes: str | None, claimed: str | None, given: str) -> list[str]:
    """Of families that have each other's shapes: that another than the given one is claimed, or may be meant."""
    claims = claims_of(checkpoint.metadata, checkpoint.claimed_bases)
    known = [one.known.family for one in claims if one.known is not None]
    named = [one for one in (*known, claimed) if one is not None]
    if shapes in (None, given) and named and named[0] != given and (shapes is None or agree(shapes, named[0])):
        return [
            f"it claims to be of family {named[0]}, the base is of family {given}: its shapes do not tell them apart"
        ]
    if shapes and shapes != given and agree(shapes, given) and given not in named:
        return [
            f"its shapes are those of family {shapes}, which {given} has too, and nothing that is claimed says "
            f"{given}: if it was trained on a model of {shapes}, finding nothing says little"
        ]
    return []


def family_warnings(checkpoint: Checkpoint, base: BaseModel | None) -> list[str]:
    """Where shapes, metadata and the base name different families, or metadata another base than the one given.

    The base that was given holds, and it is said.
    """
    shapes, claimed = families_of(checkpoint)
    warnings = []
    if shapes and base and not agree(shapes, base.family):
        warnings.append(f"its shapes are those of family {shapes}, the base is of family {base.family}")
    if shapes and claimed and not agree(shapes, claimed):
        warnings.append(f"its shapes are those of family {shapes}, its metadata claims {claimed}")
    warnings += _unaudited(checkpoint, shapes, claimed)
    if base:
        warnings += _alike(checkpoint, shapes, claimed, base.family)
        warnings += mismatches(claims_of(checkpoint.metadata), base.name, base.sha256 or base.revision)
        warnings += base.architecture.doubts(base.pipeline, checkpoint.name)
    return warnings
