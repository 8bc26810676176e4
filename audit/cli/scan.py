"""`lora-audit scan`: audit one file, from checkpoint to report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import (
    DEFAULT_WORKSPACE,
    DESCRIPTOR_HELP,
    EXIT_MATCHES_FOUND,
    EXIT_TELLS_NOTHING,
    JsonOption,
    WorkspaceOption,
    console,
    print_json,
    progress_display,
    tell_skipped,
)
from audit.cli.logs import is_structured, tell
from audit.config import (
    BaseCaption,
    Clustering,
    Compile,
    Method,
    Precision,
    Settings,
    Solver,
    StoredImages,
    default_of,
    help_of,
)
from audit.states import Verdict

if TYPE_CHECKING:
    from audit.api import Result
    from audit.report import AuditFacts

log = logging.getLogger(__name__)
VERDICTS: dict[str, str] = {Verdict.match: "[bold red]match[/bold red]", Verdict.possible: "possible"}


def show(result: Result) -> None:
    """The summary table and where the report is, for a person at a terminal."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    facts = result.facts
    tell_skipped(result.skipped)
    if result.was_known:
        log.info("this audit was finished before: its result is shown, nothing was sampled again")
    for warning in facts.row["warnings"]:
        log.warning("%s", warning)
    if is_structured():
        said = f"{len(facts.matched)} of {len(facts.references)} reference pictures recovered"
        tell(
            log, "%s", facts.tells_nothing or said, audit_id=facts.row["audit_id"],
            matched=[match.name for _, match in facts.matched], tells_nothing=facts.tells_nothing is not None,
            report=result.page, seconds=facts.row["seconds_total"],
        )  # fmt: skip
        return
    table = Table(
        "rank",
        "confidence",
        "group",
        "nearest reference",
        "similarity",
        "PDQ",
        "",
        title=escape(facts.row["checkpoint_name"]),
    )
    for extraction in facts.extractions:
        best = extraction.matches[0] if extraction.matches else None
        table.add_row(
            str(extraction.rank),
            f"{extraction.confidence:.2f}",
            str(extraction.size),
            escape(best.name) if best else "",
            f"{best.similarity:.2f}" if best else "",
            "" if best is None or best.pdq_distance is None else str(best.pdq_distance),
            VERDICTS.get(best.verdict, "") if best else "",
        )
    out.print(table)
    for one in facts.evaluations:
        out.print(
            f"{one['kind']} pictures: AS {one['average_similarity']:.3f} (at most {one['ceiling']:.3f}), "
            f"A-ESR {one['extraction_rate_07']:.2f} at 0.7, {one['extraction_rate_06']:.2f} at 0.6",
            highlight=False,
        )
    row = facts.row
    if facts.tells_nothing:
        out.print(
            f"[bold yellow]this audit tells nothing:[/bold yellow] {escape(facts.tells_nothing)}", highlight=False
        )
    elif facts.reference_sets:
        out.print(verdict_of(facts), highlight=False)
    out.print(
        f"{row['images']} images, {row['evaluations']} network evaluations, {row['seconds_total']:.0f} s",
        highlight=False,
    )
    out.print(f"report: {escape(result.page)}", highlight=False, soft_wrap=True)


def verdict_of(facts: AuditFacts) -> str:
    """One line, with its denominator, in rich's markup."""
    of = f"of {len(facts.references)} reference pictures"
    maybe = f"; {len(facts.possible)} possibly: they are too small to be sure of" if facts.possible else ""
    if facts.matched:
        return f"[bold red]{len(facts.matched)} {of} recovered[/bold red]{maybe}"
    return f"[bold]none {of} recovered[/bold]{maybe}"


def finish(result: Result, as_json: bool) -> None:
    """Print the result and leave with the exit code it calls for."""
    if as_json:
        print_json(result.as_dict())
    else:
        show(result)
    if result.facts.matched:
        raise typer.Exit(EXIT_MATCHES_FOUND)
    if result.facts.tells_nothing:
        raise typer.Exit(EXIT_TELLS_NOTHING)


def _setting(name: str, **limits: Any) -> Any:
    return typer.Option(
        help=help_of(name), rich_help_panel="Settings (all of them are part of the audit's id)", **limits
    )


def weight(text: str) -> float | None:
    """A guidance weight from the command line; None for auto. Raises typer.BadParameter."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1000:
        raise typer.BadParameter(f"{text!r} is neither a number from 0 to 1000 nor auto", param_hint="--w")
    return value


def scan(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A LoRA or full-weight .safetensors file, a diffusers folder, or an item of the catalog.",
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            help="What it was trained on: sd15, sdxl, nano, owner/name@COMMIT, a diffusers folder, a .safetensors file."
        ),
    ],
    references: Annotated[
        list[str] | None, typer.Option(help="A reference set's name, or a folder of pictures. Repeat for several.")
    ] = None,
    caption: Annotated[
        list[str] | None,
        typer.Option(help="The training caption. Repeat for several. [default: the catalog's, the file's metadata]"),
    ] = None,
    caption_file: Annotated[Path | None, typer.Option(help="A text file with a caption a line.")] = None,
    n0: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Training images to expect. [default: the file's metadata, else 10]"),
    ] = None,
    base_config: Annotated[
        str | None, typer.Option(help="For a single-file base: a folder or owner/name@COMMIT with its configuration.")
    ] = None,
    descriptor: Annotated[str, typer.Option(help=DESCRIPTOR_HELP)] = "sscd",
    training_images: Annotated[
        Path | None, typer.Option(help="The known training images, to score the audit (AS, A-ESR).")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="Pictures known NOT to be trained on, to score false positives.")
    ] = None,
    method: Annotated[Method, _setting("method")] = default_of("method"),
    w: Annotated[str, _setting("w", metavar="NUMBER|auto")] = "auto",
    k: Annotated[float, _setting("k")] = default_of("k"),
    base_caption: Annotated[BaseCaption, _setting("base_caption")] = default_of("base_caption"),
    solver: Annotated[Solver, _setting("solver")] = default_of("solver"),
    steps: Annotated[int, _setting("steps", min=1, max=1000)] = default_of("steps"),
    seed: Annotated[int, _setting("seed", min=0)] = default_of("seed"),
    images_per_training_image: Annotated[int, _setting("images_per_training_image", min=1)] = default_of(
        "images_per_training_image"
    ),
    lora_scale: Annotated[float, _setting("lora_scale")] = default_of("lora_scale"),
    adapter: Annotated[str | None, _setting("adapter", metavar="NAME")] = default_of("adapter"),
    resolution: Annotated[int | None, _setting("resolution", min=16)] = default_of("resolution"),
    embedded_guidance: Annotated[float, _setting("embedded_guidance")] = default_of("embedded_guidance"),
    precision: Annotated[Precision, _setting("precision")] = default_of("precision"),
    clustering: Annotated[Clustering, _setting("clustering")] = default_of("clustering"),
    stored_images: Annotated[StoredImages, _setting("stored_images")] = default_of("stored_images"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one]")] = None,
    batch_size: Annotated[
        int, typer.Option(min=0, help="Images a batch; halved when memory runs out. [default: by device]")
    ] = 0,
    compile: Annotated[
        Compile, typer.Option(help="torch.compile: the denoiser's repeated blocks, or all of it with CUDA graphs.")
    ] = Compile.off,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Audit one checkpoint: sample it, cluster, match with references, and write a report page.

    [bold]Example[/bold]: lora-audit scan monet.safetensors --base sd15 --references my-paintings/
    --caption "art style of claude monet" --n0 10

    Stopping it loses nothing: the same command goes on where it was. Exit codes: 0 nothing found, 10 matches found,
    11 the audit tells nothing (what was sampled are no pictures), 2 bad input.
    """
    from audit import api
    from audit.job import Request

    settings = Settings(
        method,
        weight(w),
        k,
        base_caption,
        solver,
        steps,
        seed,
        images_per_training_image,
        lora_scale,
        clustering,
        stored_images,
        adapter,
        resolution,
        embedded_guidance,
        precision,
    )
    request = Request(Path(file), base, base_config, caption or [], caption_file, n0, settings)
    with progress_display(console()) as progress:
        result = api.scan(
            request, references=references or [], descriptor=descriptor, workspace=workspace, device=device,
            batch_size=batch_size, training_images=training_images, control=control, compile=compile,
            progress=progress,
        )  # fmt: skip
    finish(result, as_json)
