"""Of several bases at hand, the one that a file was trained on: by what it claims, then by its weights, or not at all.

Full weights tell their base: those that were trained further from a model are nearer to it than to others, as in MoTHer
(arXiv 2405.18432). The factors of a LoRA do not tell it well enough to go by (docs/models.md has the figures), so that
nothing is chosen where only they could say: an audit on another base finds less, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from audit.choices import Expert
from audit.errors import CheckpointError, ConfigError
from audit.models.base import BaseLocation, BaseModel, load_base, locate_base
from audit.models.bases import claims_of, identified, known_bases, named_in, of_name, same, wanted
from audit.models.checkpoint import Checkpoint
from audit.models.experts import PAIR, experts_of
from audit.models.families.identify import Family
from audit.models.formats.adapter import norm_of
from audit.models.published import ALIASES
from audit.models.tuning import families_of, tune

NEARER = 1.25  # times as far as the nearest base the next one has to be


@dataclass(frozen=True)
class Choice:
    """The base that was taken: what it is called among those at hand, its source, and why it was taken."""

    name: str
    source: str
    config: str | None
    why: str


def choose_base(
    checkpoint: Checkpoint,
    bases: Mapping[str, str],
    configs: Mapping[str, str],
    others: Sequence[tuple[str, str]] = (),
) -> Choice:
    """The one of ``bases`` (name -> source) that ``checkpoint`` wants.

    ``others`` are claims (text, field) of a catalog. Raises ConfigError where it cannot be told, with what would tell
    it.
    """
    claims = claims_of(checkpoint.metadata, others)
    shapes, claimed = families_of(checkpoint)
    one = wanted(claims, shapes, claimed)
    located = {name: locate_base(source, configs.get(name)) for name, source in bases.items()}
    for claim in claims:
        if claim.by_hash and (
            found := next((n for n, at in located.items() if claim.text.lower() in (at.revision, at.file_sha256)), None)
        ):
            return _chosen(found, bases, configs, f"{claim.source} is the SHA256 of its file")
    if one.base is not None:
        claim = next(claim for claim in claims if claim.known is not None and claim.known.key == one.base)
        found = named_in(claim, bases) or next((n for n in bases if _is(located[n], bases[n], one.base)), None)
        if found is not None:
            return _chosen(found, bases, configs, one.why)
        if one.base in ALIASES:
            return Choice(one.base, one.base, None, one.why)
        raise ConfigError(
            f"{checkpoint.path} wants {one.title} ({one.why}), which is none of the bases at hand "
            f"({_listed(bases)}): give it with --among NAME=SOURCE, or name with --base the one to audit it on"
        )
    fitting = _of_family(bases, located, one.family)
    if not checkpoint.format.is_adapter and len(fitting) > 1:
        return _nearest(checkpoint, fitting, bases, configs)
    if len(fitting) == 1 and one.family is not None:
        return _chosen(fitting[0], bases, configs, f"it is the only base of family {one.family} at hand; {one.why}")
    raise ConfigError(
        f"{checkpoint.path} does not say what it was trained on ({one.why}), and the factors of an adapter do not tell "
        f"it: name one of {_listed(bases)} with --base"
    )


def _is(location: BaseLocation, source: str, key: str) -> bool:
    found = identified(location.name, location.sha256, source)
    return found is not None and same(found, known_bases()[key])


def _of_family(bases: Mapping[str, str], located: Mapping[str, BaseLocation], family: str | None) -> list[str]:
    """The bases of a family, by their names in the configuration or by what they are; those of which nothing is known
    are among them.
    """
    found = []
    for name in bases:
        known = identified(located[name].name, located[name].revision, bases[name]) or of_name(name)
        of = name if name in [*Family] else known.family if known else None
        if family is None or of is None or of == family:
            found.append(name)
    return found


def _nearest(
    checkpoint: Checkpoint, names: Sequence[str], bases: Mapping[str, str], configs: Mapping[str, str]
) -> Choice:
    """Of several bases the one whose weights full weights are nearest to, one base in memory at a time."""
    distances: dict[str, float] = {}
    refused: list[str] = []
    for name in names:
        try:
            distances[name] = distance(load_base(locate_base(bases[name], configs.get(name))), checkpoint)
        except CheckpointError as error:  # of another shape, or it predicts something else
            refused.append(f"{name}: {str(error)[:200]}")
    found, said = nearest(distances)
    if not distances:
        raise ConfigError(f"{checkpoint.path} fits none of {_listed(bases)}: {'; '.join(refused)[:600]}")
    if found is None:
        raise ConfigError(
            f"{checkpoint.path} is about as far from several bases (relative change of the weights: {said}): name with "
            "--base the one that it was trained on"
        )
    return _chosen(found, bases, configs, f"its weights are nearest to it (relative change: {said})")


def distance(base: BaseModel, checkpoint: Checkpoint) -> float:
    """How far full weights are from ``base``: the norm of their change by that of the base's weights.

    Of a base with two experts, weights of one are compared with that one, or the nearer where nothing says which: they
    are as far as from a base of that one network. Raises CheckpointError where they do not fit it.
    """
    if base.architecture.boundary(base.pipeline) is None:
        return _change(base, checkpoint) / base.weight_norm
    own = experts_of(checkpoint)
    if own or checkpoint.own_experts is not None:
        return _change(base, checkpoint) / _norm_of(base, own or PAIR)
    return min(_change(base, replace(checkpoint, expert=one)) / _norm_of(base, [one]) for one in PAIR)


def _change(base: BaseModel, checkpoint: Checkpoint) -> float:
    return float(sum(one.norm**2 for one in tune(base, checkpoint).changes) ** 0.5)


def _norm_of(base: BaseModel, experts: Sequence[Expert]) -> float:
    """The norm of the base's weights without those of the experts that are not named."""
    parts = zip(PAIR, base.architecture.denoisers, strict=True)
    others = [base.part(part) for one, part in parts if one not in experts]
    return float((base.weight_norm**2 - sum(norm_of(one) ** 2 for part in others for one in part.parameters())) ** 0.5)


def nearest(distances: Mapping[str, float]) -> tuple[str | None, str]:
    """The base that weights are nearest to, None where the next one is not NEARER times as far; and all in words."""
    order = sorted(distances, key=distances.__getitem__)
    said = ", ".join(f"{name} {distances[name]:.3g}" for name in order)
    if not order or (len(order) > 1 and distances[order[1]] < NEARER * distances[order[0]]):
        return None, said
    return order[0], said


def _chosen(name: str, bases: Mapping[str, str], configs: Mapping[str, str], why: str) -> Choice:
    return Choice(name, bases[name], configs.get(name), why)


def _listed(bases: Mapping[str, str]) -> str:
    return ", ".join(bases) or "none are given: --among NAME=SOURCE, or [bases] in the configuration"
