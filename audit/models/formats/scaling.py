"""What PEFT's configuration says that no tensor does: diffusers writes it into the header, PEFT beside the file.

Alpha, and what else changes the network, is part of a checkpoint's identity wherever it is not what goes without
saying. Every field of PEFT's configurations is in one of three tables: put into effect, without effect on what the
tensors do, or refused where it says anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from audit.choices import Expert
from audit.errors import CheckpointError
from audit.models.experts import marked
from audit.models.formats.patterns import PatternKeys, checked
from audit.untrusted.documents import parse_json

KEY = "lora_adapter_metadata"  # of the header's metadata, where diffusers keeps it
CONFIG_NAME = "adapter_config.json"  # beside the file, where PEFT keeps it
MAX_CONFIG_BYTES = 1 << 20
_SECOND = "denoiser_2"  # the low-noise expert of a base with two
_COMPONENTS = {
    "unet": "denoiser", "transformer": "denoiser", "transformer_2": _SECOND, "text_encoder": "te1",
    "text_encoder_2": "te2", "text_encoder_3": "te3", "text_encoder_4": "te4", "text_conditioner": "conditioner",
}  # fmt: skip
TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
HONOURED = frozenset({
    "r", "lora_alpha", "alpha", "use_rslora", "alpha_pattern", "rank_pattern", "peft_type", "init_lora_weights",
    "use_dora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
})  # fmt: skip
# of training alone, seen by the tensors' own shapes and names, or of layers that no network here has (Conv1D)
HARMLESS = frozenset({
    "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "boft_dropout", "runtime_config",
    "init_weights", "init_ia3_weights", "fan_in_fan_out", "lora_bias", "feedforward_modules",
    "oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor",
    "use_effective_conv2d", "decompose_both", "decompose_factor",
    "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "megatron_core", "qalora_group_size",
})  # fmt: skip
REFUSED = frozenset({
    "bias", "modules_to_save", "loftq_config", "layer_replication", "megatron_config", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "monteclora_config", "target_parameters", "use_bdlora", "arrow_config",
    "kasa_config", "ensure_weight_tying",
})  # fmt: skip
# How LoRA was initialised: the base is as it was, or PEFT takes from it what it puts into the factors
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
RECOMPUTED_STARTS = ("pissa", "olora")
_NOTHING = (None, False, "", "none")


@dataclass(frozen=True)
class Rotation:
    """How PEFT turns OFT's numbers into rotations; ``shared``: None where the shape says it."""

    cayley_neumann: bool = True
    terms: int = 5
    constrained: bool = False
    eps: float = 6e-5
    shared: bool | None = None


@dataclass(frozen=True)
class Scaling:
    """What a PEFT configuration says of one part's adapters.

    ``start``: the initialisation that took its factors from the base's weights. ``decomposed``: whether it is DoRA,
    None where it is not said.
    """

    alpha: float | None = None
    rank_stabilised: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank: float | None = None
    rank_patterns: Mapping[str, float] = field(default_factory=dict)
    start: str | None = None
    rotation: Rotation = field(default_factory=Rotation)
    decomposed: bool | None = None
    targets: Mapping[str, Any] = field(default_factory=dict)

    def of(self, module: str) -> float | None:
        """The alpha of a module: that of the first pattern which its name ends with, else the general one."""
        found = self._alphas.find(module)
        return self.alpha if found is None else self.patterns[found]

    def rank_of(self, module: str) -> float | None:
        """The rank of a module, None where nothing is said."""
        found = self._ranks.find(module)
        return self.rank if found is None else self.rank_patterns[found]

    @cached_property
    def _alphas(self) -> PatternKeys:
        return PatternKeys(self.patterns)

    @cached_property
    def _ranks(self) -> PatternKeys:
        return PatternKeys(self.rank_patterns)

    def admits(self, module: str) -> bool:
        """Whether PEFT would put an adapter on this module: where it would not, it leaves the tensors aside."""
        if not self.targets:
            return True
        from peft.tuners.tuners_utils import check_target_module_exists

        config = SimpleNamespace(**{"target_modules": [module], "target_parameters": None, **self.targets})
        return bool(check_target_module_exists(config, module))


def _told(metadata: Mapping[str, str]) -> Any:
    """The document in a header's metadata, as it is. Raises ValueError where it is none."""
    return parse_json(metadata[KEY]) if KEY in metadata else {}


def _claims(metadata: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, its configuration) of every component. Raises ValueError and others where it cannot be read."""
    claims = _told(metadata)
    if not isinstance(claims, dict):
        raise ValueError("it is no object")
    for component, part in _COMPONENTS.items():
        own = {k.split(".", 1)[1]: v for k, v in claims.items() if k.startswith(f"{component}.")}
        if own:
            yield part, own


def read_scaling(metadata: Mapping[str, str]) -> dict[str, Scaling]:
    """By part ("denoiser", "te1", ...), from a header's metadata; empty where it says nothing that can be read.

    ``problems`` says what could not be.
    """
    try:
        found = {part: _scaling(own) for part, own in _claims(metadata)}
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        return {}
    return {part: scaling for part, scaling in found.items() if scaling is not None}


def scaling_of(scalings: Mapping[str, Scaling], part: str, module: str) -> Scaling:
    """What is said of a ``module`` of a file's ``part``: where it marks the second expert, of that one's adapter."""
    of_second = part == "denoiser" and marked(module)[0] is Expert.low_noise
    return scalings.get(_SECOND if of_second else part, Scaling())


def problems(metadata: Mapping[str, str]) -> list[str]:
    """What a PEFT configuration says that is not put into effect here: each a reason to refuse the file."""
    try:
        found = [problem for _, own in _claims(metadata) for problem in _problems(own)]
        bare = sorted((HONOURED | REFUSED) & set(_told(metadata)))
        return [*found, *(f"its configuration says {name} of no part of the model" for name in bare)]
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        return [f"the configuration in its header cannot be read ({str(error)[:120]})"]


def _problems(own: dict[str, Any]) -> Iterator[str]:
    kind = own.get("peft_type")
    if kind is not None and kind not in TYPES:
        yield f"its configuration is of {str(kind)[:40]}, which is not read"
        return
    for name, value in own.items():
        if name in HONOURED or name in HARMLESS or value in _NOTHING or value in ({}, []):
            continue
        yield f"its configuration says {name[:60]} = {str(value)[:60]}, which is not put into effect"
    for name in ("lora_alpha", "alpha", "r", "eps", "num_cayley_neumann_terms"):
        if own.get(name) is not None and not _is_number(own[name]):
            yield f"its configuration says {name} = {str(own[name])[:60]}, which is no finite number"
    for name in ("use_rslora", "use_dora", "coft", "block_share", "use_cayley_neumann"):
        if not isinstance(own.get(name, False), (bool, type(None))):
            yield f"its configuration says {name} = {str(own[name])[:60]}, which is neither true nor false"
    start = own.get("init_lora_weights")
    if not isinstance(start, (bool, type(None))) and str(start).lower() not in (*_PLAIN_STARTS, *RECOMPUTED_STARTS):
        yield (
            f"its init_lora_weights is {str(start)[:40]!r}, which changed the base's weights in a way that the file "
            "does not hold: save it as a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    for name in ("alpha_pattern", "rank_pattern"):
        yield from _pattern_problems(name, own.get(name))
    if own.get("alpha_pattern") and _alpha_of(own) is None:
        yield "its configuration has an alpha_pattern and no alpha"
    try:
        _targets(own)
    except (ValueError, TypeError) as error:
        yield f"its configuration names modules in a way that is not read: {error}"


def _pattern_problems(name: str, patterns: Any) -> Iterator[str]:
    if not patterns:
        return
    if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
        yield f"its {name} is no table of finite numbers"
        return
    try:
        PatternKeys(map(str, patterns))
    except ValueError as error:
        yield f"its {name}: {error}"


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _number_or(value: Any, otherwise: float) -> float:
    """``value`` where it is a finite number other than 0, else ``otherwise``: ``problems`` refuses the file then."""
    return float(value) if value and _is_number(value) else otherwise


def _alpha_of(own: Mapping[str, Any]) -> float | None:
    """LoRA's name for it, else that of LoHa and LoKr."""
    value = own.get("lora_alpha") if own.get("lora_alpha") is not None else own.get("alpha")
    return float(value) if value is not None and _is_number(value) else None


def _targets(own: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which modules have an adapter, empty where nothing does. Raises ValueError."""
    found: dict[str, Any] = {}
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = own.get(name)
        if not value or (name == "target_modules" and value == "all-linear"):
            continue
        if isinstance(value, str):
            found[name] = checked(value, 4)
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            found[name] = [checked(one, 2) if name == "layers_pattern" else one for one in value]
        else:
            raise ValueError(f"{name} is neither a name nor a list of names")
    layers = own.get("layers_to_transform")
    if layers is not None and layers != []:
        if not all(isinstance(one, int) for one in (layers if isinstance(layers, list) else [layers])):
            raise ValueError("layers_to_transform are no numbers")
        found["layers_to_transform"] = layers
    if "layers_to_transform" not in found:
        found.pop("layers_pattern", None)
    return found


def _scaling(own: dict[str, Any]) -> Scaling | None:
    alpha = _alpha_of(own)
    told = {"peft_type", "init_lora_weights", "use_dora", "target_modules", "exclude_modules"} & set(own)
    if alpha is None and not told:
        return None
    start = str(own.get("init_lora_weights")).lower()
    shared = own.get("block_share")
    return Scaling(
        alpha,
        own.get("use_rslora") is True,
        _numbers(own.get("alpha_pattern")),
        float(own["r"]) if own.get("r") and _is_number(own["r"]) else None,
        _numbers(own.get("rank_pattern")),
        start if start in RECOMPUTED_STARTS else None,
        Rotation(
            own.get("use_cayley_neumann") is not False,
            int(_number_or(own.get("num_cayley_neumann_terms"), 5)),
            own.get("coft") is True,
            _number_or(own.get("eps"), 6e-5),
            shared if isinstance(shared, bool) else None,
        ),
        own["use_dora"] if isinstance(own.get("use_dora"), bool) else None,
        _targets(own),
    )


def _numbers(patterns: Any) -> dict[str, float]:
    return {str(k): float(v) for k, v in (patterns or {}).items() if _is_number(v)}


def identifying(metadata: Mapping[str, str]) -> list[list[Any]]:
    """What of it belongs to a file's identity: nothing where every alpha is its rank, the usual case."""
    found = []
    try:
        read = [(part, _scaling(own)) for part, own in _claims(metadata)]
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        return []
    for part, scaling in read:
        if scaling is None:
            continue
        plain = (None, scaling.rank) if scaling.alpha is None else (scaling.rank,)
        if scaling.alpha not in plain or scaling.rank_stabilised or scaling.patterns:
            found.append([part, scaling.alpha, scaling.rank_stabilised, sorted(scaling.patterns.items())])
        if scaling.start:
            found.append([part, scaling.start])
        if scaling.rotation != Rotation(shared=scaling.rotation.shared):
            found.append([part, *astuple(scaling.rotation)])
    return found


def joined_configurations(headers: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The configurations of several parts, each under its component's name, as one header has them."""
    joined: dict[str, Any] = {}
    for metadata in headers:
        try:
            joined |= _told(metadata)
        except (ValueError, TypeError, RecursionError):
            return {KEY: metadata[KEY]}  # ``problems`` says what is wrong with it
    return {KEY: json.dumps(joined)} if joined else {}


def config_beside(path: Path) -> Path | None:
    """PEFT's configuration of the adapter ``path``: one of its own name, as a crawl stores it, or the folder's."""
    own = path.with_name(f"{path.stem}.{CONFIG_NAME}")
    return next((one for one in (own, path.with_name(CONFIG_NAME)) if one.is_file()), None)


def with_config_beside(path: Path, metadata: dict[str, str], component: str | None = None) -> dict[str, str]:
    """``metadata`` with what PEFT's adapter_config.json beside ``path`` says, where there is one.

    ``component`` is the network it is of, None where nothing says so: then the denoiser. Raises CheckpointError where
    it cannot be read: without it the strength of the adapter would be a guess.
    """
    config = config_beside(path)
    if KEY in metadata or config is None:
        return metadata
    try:
        with config.open("rb") as file:
            claims = parse_json(file.read(MAX_CONFIG_BYTES))
        components = (component,) if component else ("unet", "transformer")
        kept = {f"{part}.{name}": value for part in components for name, value in claims.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{config} cannot be read: {str(error)[:200]}; repair it or take it away") from error
    return {**metadata, KEY: json.dumps(kept)}
