"""`lora-audit captions`: what a model was captioned with, read out of the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit.cli.common import JsonOption, console, print_json, progress_display, result_console
from audit.cli.options import configured
from audit.config import Config

if TYPE_CHECKING:
    from audit.recovery.recover import Recovered

SHOWN = 20  # keywords


@configured(
    "captions.method", "captions.evaluations", "captions.iterations", "settings.seed", "settings.lora_scale",
    "settings.adapter", "settings.resolution", "settings.precision", "run.device", "workspace",
)  # fmt: skip
def captions(
    config: Config,
    file: Annotated[Path, typer.Argument(help="A LoRA or full-weight .safetensors file, or a diffusers folder.")],
    base: Annotated[
        str, typer.Option(help="What it was trained on: sd15, nano, owner/name@COMMIT, a folder, a .safetensors file.")
    ],
    base_config: Annotated[
        str | None,
        typer.Option(
            help="For a single-file base: a folder or owner/name@COMMIT with its configuration, and its other parts "
            "where the file is the denoiser alone."
        ),
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="A word that may have been its trigger, too. Repeat for several.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Recover keywords and captions from a model that nobody has told them of, ranked, with the reason.

    [bold]Example[/bold]: lora-audit captions monet.safetensors --base sd15

    Words are those of the base's tokenizer, identifiers that trainers use, words of the metadata and those of --word:
    another trigger is not found. What is found is an estimate. [bold]lora-audit scan --captions auto[/bold] samples
    with it where no caption is known. Of Stable Diffusion 1, 2 and XL.
    """
    from audit.job import Request
    from audit.recovery.ask import recover_captions

    request = Request(file, base, base_config, settings=config.settings)
    with progress_display(console()) as progress:
        found = recover_captions(
            request, settings=config.captions, words=word or (), workspace=config.workspace, device=config.run.device,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        show(found)


def show(found: Recovered) -> None:
    """For people: the keywords, and the captions that a scan would sample with."""
    from rich.markup import escape
    from rich.table import Table

    from audit.models.soft import is_soft

    out = result_console()
    table = Table(
        "", "word", "confidence", "score", "why", title=f"of {found.words} words, by {found.method}", box=None
    )
    for rank, one in enumerate(found.keywords[:SHOWN], start=1):
        table.add_row(str(rank), escape(one.word), f"{one.confidence:.2f}", f"{one.score:+.2f}", escape(one.why))
    out.print(table)
    out.print("\n[bold]captions to sample with[/bold]")
    for caption in found.captions:
        said = " (an embedding, no words; kept in the workspace)" if is_soft(caption.text) else ""
        out.print(f"  {escape(caption.text)}{said}", highlight=False)
    out.print(
        f"\n{found.evaluations} network evaluations, {found.seconds:.0f} s; an estimate: no error rate is known",
        highlight=False,
    )
