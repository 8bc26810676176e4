"""`lora-audit estimate`: what audits cost on a card, before one is rented."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import JsonOption, print_json, result_console
from audit.cli.options import configured
from audit.config import Config
from audit.models.published import PUBLISHED

if TYPE_CHECKING:
    from rich.console import Console

    from audit.estimate import Backlog, Estimate, Span, Work
    from audit.models.sizing import Sizing

GIB = 2**30
WIDTH = 120  # of the tables where there is no terminal
AUDITS = 1000  # for which GPU hours and costs are said
ASSUMPTIONS = (
    "Operations and memory are counted on shapes, not measured on a card. Assumed: 40 to 60 % of the maker's dense "
    "half-precision peak; 1 GiB for the CUDA context and 15 % of the free memory for kernels' workspaces; loading, "
    "merging, captions and latents of references cost nothing; control generations come to a tenth of the sampling at "
    "the defaults; membership takes all of its budget, for which there have to be references (--evidence extraction "
    "leaves it out). The host holds the base as stored (* as published), the changed weights in half precision and one "
    "tensor in float32; the device the base and the changed weights in half precision, and activations."
)


@configured(
    "settings.method", "settings.steps", "settings.images_per_training_image", "settings.resolution",
    "settings.frames", "settings.evidence", "settings.membership_evaluations",
)  # fmt: skip
def estimate(
    config: Config,
    family: Annotated[str, typer.Option(help=f"A published base model: {', '.join(PUBLISHED)}.")] = "all",
    device: Annotated[
        str,
        typer.Option(help="rtx3060, rtx4090, l4, a10g, a100-40, a100-80, h100-pcie, h100 (SXM) or h200."),
    ] = "all",
    n0: Annotated[
        int | None,
        typer.Option(
            min=1, help="Training images assumed: by default 10, and for a catalog what it claims of each network."
        ),
    ] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What an hour of the device costs; prices are not built in.")
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(help="Also estimate what its catalog holds and no audit has been made of: a folder, or s3://..."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what audits cost on a card: seconds an image, GPU hours, memory, and the batch that fits.

    [bold]Example[/bold]: lora-audit estimate --family sdxl --device rtx4090 --usd-per-hour 0.5

    [bold]Example[/bold]: lora-audit estimate --device h100 --workspace s3://bucket/audits --usd-per-hour 3

    No card and no weights are needed: operations and memory are counted on the networks' shapes, some two seconds a
    model. Speeds are the maker's peak at 40 to 60 % utilisation, an assumption; a first run on the card tells better.
    Memory is said for a LoRA on all layers of denoiser and text encoders, and for one on the denoiser's attention.
    """
    from audit.claims.captions import DEFAULT_TRAINING_IMAGES
    from audit.estimate import DEVICES, Work, device_named
    from audit.estimate import estimate as compute
    from audit.models.published import published

    devices = list(DEVICES) if device == "all" else [device]
    families = list(PUBLISHED) if family == "all" else [family]
    for name in devices:
        device_named(name)
    for name in families:
        published(name)
    from audit.models.sizing import size  # torch: after what can be refused without it

    asked = config.settings
    work = Work(
        asked.method, asked.steps, asked.images_per_training_image, n0 or DEFAULT_TRAINING_IMAGES, asked.evidence,
        asked.membership_evaluations,
    )  # fmt: skip
    backlog, unseen = _backlog(workspace, n0)
    sizings = [size(name, asked.resolution, asked.frames) for name in families]
    estimates = [compute(one, name, work) for one in sizings for name in devices]
    if as_json:
        print_json(_document(work, sizings, estimates, usd_per_hour, backlog, unseen))
        return
    out = _console()
    _show_models(out, sizings)
    for sizing in sizings:
        _show_estimates(out, sizing, [one for one in estimates if one.family == sizing.name], work, usd_per_hour)
    if backlog is not None:
        _show_backlog(out, backlog, unseen, estimates, work, usd_per_hour)
    out.print(ASSUMPTIONS, highlight=False)


def _console() -> Console:
    return result_console(WIDTH)


def _backlog(workspace: str | None, n0: int | None) -> tuple[list[Backlog] | None, int]:
    from audit.claims.captions import DEFAULT_TRAINING_IMAGES
    from audit.estimate import backlog_of, unseen_items
    from audit.workspace import Workspace

    if workspace is None:
        return None, 0
    opened = Workspace(workspace, create=False)
    return backlog_of(opened, n0, DEFAULT_TRAINING_IMAGES), unseen_items(opened)


def _document(
    work: Work,
    sizings: list[Sizing],
    estimates: list[Estimate],
    usd_per_hour: float | None,
    backlog: list[Backlog] | None,
    unseen: int,
) -> dict[str, Any]:
    from audit.estimate import DEVICES, UTILISATION

    found: dict[str, Any] = {
        "assumptions": {"text": ASSUMPTIONS, "utilisation": UTILISATION, "usd_per_hour": usd_per_hour},
        "work": {
            **asdict(work),
            "images": work.images,
            "evaluations_an_image": work.evaluations,
            "evaluations_of_membership": work.membership,
        },
        "models": [_model(one) for one in sizings],
        "estimates": [
            {**asdict(one), "hours_an_audit": asdict(one.hours_an_audit), "usd_an_audit": _usd(one, usd_per_hour)}
            for one in estimates
        ],
        "devices": {name: asdict(DEVICES[name]) for name in {one.device for one in estimates}},
    }
    if backlog is not None:
        found["backlog"] = {
            "networks": [asdict(one) for one in backlog],
            "not_estimated": sum(one.networks for one in backlog if not _is_estimated(one, estimates)),
            "items_not_downloaded": unseen,
            "hours": _hours(backlog, estimates, work),
        }
    return found


def _usd(one: Estimate, usd_per_hour: float | None) -> dict[str, float] | None:
    return None if usd_per_hour is None else asdict(one.hours_an_audit.times(usd_per_hour))


def _model(one: Sizing) -> dict[str, Any]:
    weights = one.footprint
    return {
        "family": one.name,
        "title": one.model.title,
        "resolution": one.resolution,
        "stored_bytes_a_weight": one.model.stored_bytes,
        "evaluation": asdict(one.sampling.evaluation),
        "decoding": asdict(one.sampling.decoding),
        **asdict(weights),
        "host_bytes": {
            name: {str(stored): weights.host_bytes(changed, stored) for stored in (2, 4)}
            for name, changed in (("everything", weights.everything), ("attention", weights.attention))
        },
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _span(span: Span) -> str:
    """Three digits, none of them behind the point from 100 on."""
    low, high = (f"{end:,.0f}" if end >= 100 else f"{end:.3g}" for end in (span.low, span.high))
    return low if low == high else f"{low} - {high}"


def model_row(one: Sizing) -> tuple[str, ...]:
    """The cells of a model: name, pixels, TFLOP of an evaluation and of decoding, then memory in GiB."""
    weights, sampling = one.footprint, one.sampling
    host = [
        " / ".join(_gib(weights.host_bytes(changed, stored)) for changed in (weights.everything, weights.attention))
        + ("*" if stored == one.model.stored_bytes else "")
        for stored in (2, 4)
    ]
    return (
        one.name,
        str(one.resolution),
        f"{sampling.evaluation.flops / 1e12:.3g} / {sampling.decoding.flops / 1e12:.3g}",
        *host,
        _gib(weights.device_base_bytes),
        " / ".join(_gib(changed * 2) for changed in (weights.everything, weights.attention)),
        f"{sampling.evaluation.peak_bytes(1) / GIB:.2f} / {sampling.decoding.peak_bytes(1) / GIB:.2f}",
    )


def _show_models(out: Console, sizings: list[Sizing]) -> None:
    from rich.table import Table

    table = Table(
        "model", "pixels", "TFLOP: evaluation / decoding", "host, 2-byte files", "host, 4-byte files",
        "device: base", "device: LoRA", "device, an image: evaluation / decoding",
        title="Operations, and memory in GiB (LoRA on everything / on attention)",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    for sizing in sizings:
        table.add_row(*model_row(sizing))
    out.print(table)


def estimate_row(one: Estimate, usd_per_hour: float | None = None) -> tuple[str, ...]:
    """The cells of a model on a device; with a price, the costs behind the hours."""
    from audit.estimate import DEVICES

    hours = one.hours_an_audit.times(AUDITS)
    money = [] if usd_per_hour is None else [_span(hours.times(usd_per_hour))]
    return (
        DEVICES[one.device].title,
        _span(one.seconds_an_image),
        _span(one.seconds_of_membership),
        _span(one.seconds_an_audit),
        _span(hours),
        *money,
        f"{_gib(one.bytes_everything)} / {_gib(one.bytes_attention)}",
        " / ".join(str(batch or "none") for batch in (one.batch_everything, one.batch_attention)),
    )


def _show_estimates(
    out: Console, sizing: Sizing, estimates: list[Estimate], work: Work, usd_per_hour: float | None
) -> None:
    from rich.table import Table

    title = (
        f"{sizing.model.title}, {sizing.resolution} pixels: {work.images} images an audit, "
        f"{work.evaluations} evaluations an image, {work.membership:,} of membership "
        "(LoRA on everything / on attention)"
    )
    table = Table("device", "s an image", "s of membership", "GPU s an audit", f"GPU h, {AUDITS:,} audits", title=title)
    if usd_per_hour is not None:
        table.add_column(f"USD, {AUDITS:,} audits")
    table.add_column("GiB at batch 1")
    table.add_column("batch that fits")
    for one in estimates:
        table.add_row(*estimate_row(one, usd_per_hour))
    out.print(table)


def _is_estimated(one: Backlog, estimates: list[Estimate]) -> bool:
    return one.model in {each.family for each in estimates}


def _hours(backlog: list[Backlog], estimates: list[Estimate], work: Work) -> dict[str, dict[str, Any]]:
    """GPU hours by device and published model, and their sum."""
    from audit.estimate import hours

    found: dict[str, dict[str, Any]] = {}
    for device in dict.fromkeys(one.device for one in estimates):
        spans = hours(backlog, {one.family: one for one in estimates if one.device == device}, work)
        total = {end: sum(getattr(span, end) for span in spans.values()) for end in ("low", "high")}
        found[device] = {**{name: asdict(span) for name, span in spans.items()}, "all": total}
    return found


def _show_backlog(
    out: Console,
    backlog: list[Backlog],
    unseen: int,
    estimates: list[Estimate],
    work: Work,
    usd_per_hour: float | None,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from audit.estimate import DEVICES, Span

    table = Table("family", "networks", "training images", "counted as", "", title="In the catalog, without an audit")
    for one in backlog:
        counted = one.model if _is_estimated(one, estimates) else "not estimated"
        table.add_row(
            escape(one.family), f"{one.networks:,}", f"{one.training_images:,}", counted, _note(one, estimates)
        )
    out.print(table if backlog else "every network of the catalog has an audit")
    if unseen:
        out.print(f"{unseen:,} items are listed and not downloaded: they are not counted", highlight=False)
    if not any(_is_estimated(one, estimates) for one in backlog):
        return
    sums = Table("device", "GPU hours", title="All of what is estimated")
    if usd_per_hour is not None:
        sums.add_column("USD")
    for device, spans in _hours(backlog, estimates, work).items():
        total = Span(**spans["all"])
        money = [] if usd_per_hour is None else [_span(total.times(usd_per_hour))]
        sums.add_row(DEVICES[device].title, _span(total), *money)
    out.print(sums)


def _note(one: Backlog, estimates: list[Estimate]) -> str:
    if one.model is None:
        return "no published model of this family is known here"
    return one.note if _is_estimated(one, estimates) else f"would be {one.model}: leave out --family"
