"""Read an adapter's tensor names: which module each belongs to, and which part of which algorithm it is.

Nothing but names and shapes is looked at here. The names are those that the trainers write: kohya's sd-scripts and
LyCORIS (underscores, ``lora_unet_...``), PEFT and diffusers (dots, ``lora_A``), diffusers' attention processors of
old (``to_q_lora.down``), XLabs and ai-toolkit (Flux under its original names).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from audit.models.formats.prediction import PREDICTION_MARKERS
from audit.models.safetensors_header import TensorInfo


class Algorithm(StrEnum):
    """How the tensors of a module change its weights."""

    lora = "lora"
    loha = "loha"
    lokr = "lokr"
    oft = "oft"
    oft_kohya = "oft-kohya"
    boft = "boft"
    ia3 = "ia3"
    glora = "glora"
    tlora = "tlora"
    full = "full"
    norm = "norm"
    peft_oft = "peft-oft"
    peft_boft = "peft-boft"
    peft_ia3 = "peft-ia3"


class Naming(StrEnum):
    """Whose way to name tensors a file follows."""

    kohya = "kohya"
    peft = "peft"
    processor = "processor"
    xlabs = "xlabs"


_DOTTED_PARAMETERS = (
    (re.compile(r"\.lora_down\.weight$"), "down"),
    (re.compile(r"\.lora_up\.weight$"), "up"),
    (re.compile(r"\.lora_mid\.weight$"), "mid"),
    (re.compile(r"\.lora_A\.(?:(?P<adapter>[^.]+)\.)?weight$"), "down"),
    (re.compile(r"\.lora_B\.(?:(?P<adapter>[^.]+)\.)?weight$"), "up"),
    (re.compile(r"\.lora_B\.(?:(?P<adapter>[^.]+)\.)?bias$"), "up_bias"),
    (re.compile(r"\.lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?$"), "magnitude"),
    (re.compile(r"\.processor\.(?P<xlabs>(?:qkv|proj)_lora[12]?)\.down\.weight$"), "down"),
    (re.compile(r"\.processor\.(?P<xlabs>(?:qkv|proj)_lora[12]?)\.up\.weight$"), "up"),
    (re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight$"), "down"),
    (re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.dora_scale$"), "dora_scale"),
    (re.compile(r"\.(?P<same>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))$"), ""),
    (re.compile(r"\.(?P<same>oft_blocks|rescale|diff|diff_b|w_norm|b_norm|on_input)$"), ""),
    (re.compile(r"\.oft_blocks\.(?P<rows>\d)$"), "oft_blocks_"),
    (re.compile(r"\.(?P<same>a1|a2|b1|b2|bm|q_layer|p_layer)\.weight$"), ""),
    (re.compile(r"\.(?P<same>lambda_layer|base_q|base_p|base_lambda)$"), ""),
    (re.compile(r"\.oft_R\.scaled_oft$"), "scaled"),
    (re.compile(r"\.oft_[rR](?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?$"), "oft_r"),
    (re.compile(r"\.boft_R(?:\.(?P<adapter>[^.]+))?$"), "boft_r"),
    (re.compile(r"\.boft_s(?:\.(?P<adapter>[^.]+))?$"), "boft_s"),
    (re.compile(r"\.ia3_l(?:\.(?P<adapter>[^.]+))?$"), "ia3_l"),
    (re.compile(r"\.weight$"), "weight"),  # of IA3, where on_input stands beside it
)
# Needed tensors, in the order in which an algorithm is recognised, and those that may stand with them.
_ALGORITHMS: tuple[tuple[Algorithm, frozenset[str], frozenset[str]], ...] = (
    (Algorithm.lora, frozenset({"down", "up"}), frozenset({"mid", "alpha", "dora_scale", "magnitude", "up_bias"})),
    (
        Algorithm.loha,
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        frozenset({"hada_t1", "hada_t2", "alpha", "dora_scale"}),
    ),
    (
        Algorithm.lokr,
        frozenset(),
        frozenset(
            {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale"}
        ),
    ),
    (Algorithm.oft, frozenset({"oft_blocks"}), frozenset({"rescale", "alpha"})),
    (Algorithm.oft_kohya, frozenset({"oft_blocks_0"}), frozenset({"alpha", *(f"oft_blocks_{i}" for i in range(1, 8))})),
    (Algorithm.ia3, frozenset({"weight", "on_input"}), frozenset({"alpha"})),
    (Algorithm.glora, frozenset({"a1", "a2", "b1", "b2"}), frozenset({"bm", "alpha"})),
    (
        Algorithm.tlora,
        frozenset({"q_layer", "p_layer", "lambda_layer"}),
        frozenset({"base_q", "base_p", "base_lambda", "alpha"}),
    ),
    (Algorithm.full, frozenset({"diff"}), frozenset({"alpha"})),
    (Algorithm.norm, frozenset({"w_norm"}), frozenset({"b_norm", "alpha"})),
    (Algorithm.peft_oft, frozenset({"oft_r"}), frozenset({"scaled"})),
    (Algorithm.peft_boft, frozenset({"boft_r", "boft_s"}), frozenset()),
    (Algorithm.peft_ia3, frozenset({"ia3_l"}), frozenset()),
)
# What a prefix says of the part of the model; flat names have underscores for dots.
_KOHYA_OFT = "oft_unet_"  # of sd-scripts' networks.oft and networks.oft_flux, whose constraint is their own
_PARTS = (
    ("unet", "denoiser"), ("transformer", "denoiser"), ("te1", "te1"), ("te2", "te2"), ("te3", "te3"), ("te4", "te4"),
    ("te", "te1"),
)  # fmt: skip
_FLAT = (
    *((f"{who}_{name}_", part) for who in ("lora", "oft", "lycoris") for name, part in _PARTS),
    ("lycoris_", "denoiser"),
)
_DOTTED = (
    *((f"lora_{name}.", part) for name, part in _PARTS),
    ("unet.", "denoiser"), ("transformer.", "denoiser"), ("diffusion_model.", "denoiser"),
    ("model.diffusion_model.", "denoiser"), ("text_encoder_2.", "te2"), ("text_encoder_3.", "te3"),
    ("text_encoder_4.", "te4"),
    ("text_encoder.", "te1"), ("text_encoders.clip_l.transformer.", "te1"), ("text_conditioner.", "conditioner"),
    ("text_encoders.qwen3_06b.transformer.", "te1"),
    ("text_encoders.clip_g.transformer.", "te2"), ("text_encoders.t5xxl.transformer.", "te3"),
)  # fmt: skip
CONDITIONER = "llm_adapter"  # of Anima, within its denoiser by the first code's names
_SPLIT_BY_COMFY = re.compile(r"^(?:text_encoder(?:_[234])?|unet|transformer)\.")
_VECTORS = {"clip_l": "te1", "clip_g": "te2", "t5": "te3", "t5xxl": "te3"}
_KEYS = r"(?P<key>clip_l|clip_g|emb_params|t5|t5xxl|string_to_param\..+)"
_EMBEDDING = re.compile(rf"^(?=[^\n]*$)bundle_emb\.(?P<token>.+?)\.{_KEYS}$")
_OWN_EMBEDDING = re.compile(rf"^{_KEYS}$")
# OneTrainer's vectors in place of an encoder's answer, and those of encoders that no family here has
_LOST = re.compile(
    r"^bundle_emb\.(?P<token>.+?)\.(?:(?:clip_[lg]|t5(?:xxl)?)_out|(?:llama|qwen\w*|gemma\w*)(?:_out)?)$"
)
# diffusers' learned_embeds.safetensors: the token alone
_TOKEN = re.compile(r"^(?:[^.\s]{1,100}|<[^<>]{1,100}>)$")
ANY_ENCODER = "any"
MAX_TOKENS, MAX_VECTORS = 64, 256


@dataclass(frozen=True)
class Group:
    """The tensors that together change one module. ``tensors`` maps their role to their name in the file."""

    part: str
    module: str
    flat: bool
    algorithm: Algorithm
    naming: Naming
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Embedding:
    """A token's vectors for one text encoder ("te1", "te2", "te3"), or for the one of their width ("any")."""

    token: str | None
    part: str
    tensor: str


@dataclass(frozen=True)
class AdapterNames:
    """An adapter file by its names.

    ``unknown``: tensors that make up no known set; of them, ``strange`` have names that no known format has, and what
    they do to the others is not known. ``lost``: tokens' vectors that no loader takes. ``markers``: of what the network
    predicts. ``adapters``: names of several.
    """

    groups: list[Group]
    embeddings: list[Embedding]
    unknown: list[str]
    strange: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    markers: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    incomplete: Naming | None = None  # whose names the tensors have that make up no whole group

    @property
    def algorithms(self) -> list[Algorithm]:
        """Every algorithm in the file, without repetition."""
        return sorted({group.algorithm for group in self.groups})


def read_names(tensors: Mapping[str, TensorInfo], adapter: str | None = None) -> AdapterNames:
    """Sort ``tensors`` into groups. ``adapter`` chooses one of several that lie in one file by PEFT's names."""
    markers = sorted(PREDICTION_MARKERS & set(tensors))
    embeddings, lost, rest = _embeddings(name for name in tensors if name not in PREDICTION_MARKERS)
    found: dict[tuple[str, str, bool], dict[str, str]] = {}
    naming: dict[tuple[str, str, bool], Naming] = {}
    adapters = _adapters(rest)
    strange = []
    for name in rest:
        if len(adapters) > 1 and _adapter_of(name) not in (None, adapter):
            continue  # another adapter's, left out on purpose
        parsed = _parse(name)
        if parsed is None:
            strange.append(name)
            continue
        key, role, kind = parsed
        if role in found.setdefault(key, {}):
            strange.append(name)  # two spellings of one place: which of them holds is not ours to guess
            continue
        found[key][role] = name
        naming[key] = kind if role != "alpha" or key not in naming else naming[key]
    groups, incomplete = [], None
    unknown = list(strange)
    for (part, module, flat), roles in found.items():
        algorithm = _algorithm(set(roles), tensors, roles)
        if algorithm is None:
            unknown += roles.values()
            if "weight" in roles or _has_more(set(roles)):  # a whole weight among adapters, or a set and more
                strange += roles.values()
            if set(roles) - {"weight", "alpha"}:
                incomplete = naming[part, module, flat]
        else:
            groups.append(Group(part, module, flat, algorithm, naming[part, module, flat], roles))
    if not groups and not embeddings and not lost and (tokens := _tokens(tensors)):
        return AdapterNames([], tokens, [])
    return AdapterNames(groups, embeddings, unknown, strange, lost, markers, adapters, incomplete)


def _embeddings(tensors: Iterable[str]) -> tuple[list[Embedding], list[str], list[str]]:
    """Tokens' vectors, those of them that no loader takes, and the other tensors."""
    found, lost, rest = [], [], []
    for name in tensors:
        match = _EMBEDDING.match(name) or _OWN_EMBEDDING.match(name)
        if _LOST.match(name):
            lost.append(name)
        elif match is None:
            rest.append(name)
        else:
            found.append(Embedding(match.groupdict().get("token"), _VECTORS.get(match["key"], "te1"), name))
    return found, lost, rest


def _tokens(tensors: Mapping[str, TensorInfo]) -> list[Embedding]:
    """diffusers' textual inversion: every tensor is one token's vectors, named by the token. Empty where it is not."""
    fits = len(tensors) <= MAX_TOKENS and all(
        _TOKEN.match(name)
        and name not in (*PREDICTION_MARKERS, "weight", "bias", "alpha")
        and info.dtype in ("F64", "F32", "F16", "BF16")
        and 1 <= len(info.shape) <= 2
        and (len(info.shape) == 1 or info.shape[0] <= MAX_VECTORS)
        and info.shape[-1] >= 8
        for name, info in tensors.items()
    )
    return [Embedding(name, ANY_ENCODER, name) for name in tensors] if fits else []


def _adapters(names: Iterable[str]) -> list[str]:
    return sorted({adapter for name in names if (adapter := _adapter_of(name))})


def _adapter_of(name: str) -> str | None:
    """The adapter's name in a tensor's, by PEFT's way to name them."""
    match = next((match for pattern, _ in _DOTTED_PARAMETERS if (match := pattern.search(name))), None)
    return match.groupdict().get("adapter") if match else None


def _parse(name: str) -> tuple[tuple[str, str, bool], str, Naming] | None:
    for pattern, role in _DOTTED_PARAMETERS:
        match = pattern.search(name)
        if match is None:
            continue
        groups = match.groupdict()
        stem = name[: match.start()]
        kind = Naming.peft
        if groups.get("xlabs"):
            stem, kind = f"{stem}.processor.{groups['xlabs']}", Naming.xlabs
        elif "lora" in match[0] and (".down." in match[0] or ".up." in match[0]):
            kind = Naming.processor
        part, module, flat = _place(stem)
        role = groups.get("same") or role + (groups.get("rows") or "")
        if stem.startswith(_KOHYA_OFT) and role == "oft_blocks":
            role = "oft_blocks_0"
        return (part, module, flat), role, Naming.kohya if flat else kind
    return None


def _place(stem: str) -> tuple[str, str, bool]:
    """(part, module, flat) of a module's name as the file has it."""
    part, module, flat = _prefixed(stem)
    inner = f"{CONDITIONER}{'_' if flat else '.'}"
    if part == "denoiser" and module.startswith(inner):
        return "conditioner", module.removeprefix(inner), flat
    return part, module, flat


def _prefixed(stem: str) -> tuple[str, str, bool]:
    for prefix, part in _FLAT:
        if stem.startswith(prefix):
            return part, stem.removeprefix(prefix), True
    stem = stem.removeprefix("base_model.model.")
    for prefix, part in _DOTTED:
        if stem.startswith(prefix):
            return part, stem.removeprefix(prefix).removeprefix("base_model.model."), False
    return "denoiser", stem, False


def _algorithm(roles: set[str], tensors: Mapping[str, TensorInfo], names: Mapping[str, str]) -> Algorithm | None:
    if "diff_b" in roles:  # ComfyUI's and LyCORIS' change of the bias stands beside anything, or alone
        roles = roles - {"diff_b"}
        if roles <= {"alpha"}:
            return Algorithm.full
    for algorithm, needed, others in _ALGORITHMS:
        if not (needed <= roles <= needed | others):
            continue
        if algorithm is Algorithm.lokr:
            halves = [f"lokr_w{i}" in roles or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= roles for i in (1, 2)]
            if not all(halves):
                continue
        if algorithm is Algorithm.oft and len(tensors[names["oft_blocks"]].shape) == 4:
            return Algorithm.boft
        return algorithm
    return None


def _has_more(roles: set[str]) -> bool:
    """Whether a whole set is among roles that are none: what the others do to it is not known."""
    return any(needed and needed < roles for _, needed, _ in _ALGORITHMS)


def shown(names: Iterable[str], most: int = 5) -> str:
    """Some of ``names``, shortened, and how many more there are."""
    listed = list(names)
    text = ", ".join(name[:100] for name in listed[:most])
    return f"{text} and {len(listed) - most} more" if len(listed) > most else text


def rank_of(algorithm: Algorithm, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank of a low-rank change, None where there is none."""
    if algorithm is Algorithm.lora:
        return shapes["down"][0]
    if algorithm is Algorithm.loha:
        return shapes["hada_w1_b"][0]
    if algorithm is Algorithm.lokr:
        name = next((n for n in ("lokr_w1_a", "lokr_w2_a") if n in shapes), None)
        if name is None:
            return None
        return shapes[name][0 if name == "lokr_w2_a" and "lokr_t2" in shapes else 1]
    if algorithm is Algorithm.glora:
        return shapes["a2"][0]
    return None
