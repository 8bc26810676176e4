"""What a file says that its network predicts: by tensors that mark it, its header, or a scheduler's configuration.

A network that predicts v answers nonsense where it is taken to predict eps, and nothing in its weights tells the two
apart. ComfyUI and the trainers of NoobAI mark files by empty tensors, sd-scripts and ModelSpec by metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.untrusted.documents import parse_json

EDM_MARKERS = frozenset({"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"})
PREDICTION_MARKERS = frozenset({"v_pred", "ztsnr"}) | EDM_MARKERS
MAX_CONFIG_BYTES = 1 << 20
_KINDS = {
    "epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "velocity": "v_prediction",
    "sample": "sample", "x0": "sample",
}  # fmt: skip
_CLAIMS = ("modelspec.prediction_type", "modelspec.predict_key")
_NOTHING = ("", "none", "null", "unknown")
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True)
class Prediction:
    """``kind``: "epsilon", "v_prediction" or "sample"; ``zero_snr``: whether the last step is noise alone (arXiv
    2305.08891). None where nothing is said. ``source``: what says so.
    """

    kind: str | None = None
    zero_snr: bool | None = None
    source: str = ""


def said(tensors: Iterable[str], metadata: Mapping[str, str]) -> Prediction:
    """What the names of a file's tensors say, else its metadata. Raises ValueError for what is not sampled here, and
    where the two contradict each other.
    """
    marked = PREDICTION_MARKERS & set(tensors)
    if marked & EDM_MARKERS:
        raise ValueError(f"its {sorted(marked & EDM_MARKERS)[0]} says it is made for EDM's noise, which is not sampled")
    claims = {name: metadata[name].strip().lower() for name in _CLAIMS if name in metadata}
    if metadata.get("ss_v_parameterization", "").strip().lower() in _YES:
        claims["ss_v_parameterization"] = "v"
    unknown = next((name for name, value in claims.items() if value not in _KINDS and value not in _NOTHING), None)
    if unknown:
        raise ValueError(f"its {unknown} says that it predicts {claims[unknown][:40]!r}, which is not sampled here")
    kinds = {name: _KINDS[value] for name, value in claims.items() if value in _KINDS}
    if "v_pred" in marked:
        kinds = {"v_pred": "v_prediction", **kinds}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"it contradicts itself: {', '.join(f'{n} says {k}' for n, k in kinds.items())}")
    source, kind = next(iter(kinds.items()), ("", None))
    zero = metadata.get("ss_zero_terminal_snr", "").strip().lower()
    zero_snr = True if "ztsnr" in marked or zero in _YES else False if zero in _NO and zero else None
    return Prediction(kind, zero_snr, source or ("ztsnr" if zero_snr else ""))


def said_by_scheduler(folder: Path) -> Prediction:
    """What the scheduler's configuration in a diffusers folder says. Raises ValueError where it cannot be read."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return Prediction()
    try:
        with path.open("rb") as file:
            claims = parse_json(file.read(MAX_CONFIG_BYTES))
        kind, zero = claims.get("prediction_type"), claims.get("rescale_betas_zero_snr")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"its scheduler_config.json cannot be read: {str(error)[:120]}") from error
    kind = kind if isinstance(kind, str) and kind in _KINDS.values() else None
    return Prediction(kind, zero if isinstance(zero, bool) else None, "scheduler_config.json")


def contradiction(one: Prediction, scheduler: Any, base: str) -> str | None:
    """Why a file that says ``one`` cannot be sampled with the base's ``scheduler``; None where it can."""
    config = scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if one.kind is not None and one.kind != kind:
        return (
            f"its {one.source} says that it predicts {one.kind}, {base} predicts {kind}: give as --base the model of "
            "the same kind that it was trained on"
        )
    if one.zero_snr and not config.get("rescale_betas_zero_snr"):
        return (
            f"it is made for zero terminal SNR (ztsnr), the schedule of {base} is not: give as --base the model of the "
            "same kind that it was trained on"
        )
    return None


def followed(scheduler: Any, one: Prediction) -> Any:
    """``scheduler``, or where a single-file base says otherwise one that predicts what the file says."""
    wanted = {"prediction_type": one.kind, "rescale_betas_zero_snr": one.zero_snr}
    differing = {
        name: value
        for name, value in wanted.items()
        if value is not None and value != (scheduler.config.get(name) or False)
    }
    if not differing:
        return scheduler
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config, **differing)
