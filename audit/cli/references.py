"""`lora-audit references`: the picture sets that extractions are compared with."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import (
    JsonOption,
    console,
    default_device,
    print_json,
    progress_display,
    result_console,
    tell_skipped,
)
from audit.cli.options import configured
from audit.config import Config
from audit.states import SetKind

log = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help="Add, list and remove reference sets.")


@app.command()
@configured("descriptor", "run.device", "workspace")
def add(
    config: Config,
    name: Annotated[str, typer.Argument(help="Letters, digits, '.', '_' and '-'.")],
    folder: Annotated[
        Path, typer.Argument(help="A folder of pictures, searched with its subfolders; or a list of PDQ hashes.")
    ],
    thumbnails: Annotated[
        bool, typer.Option(help="Keep small pictures for the report; without, only descriptors and hashes.")
    ] = True,
    base: Annotated[
        list[str] | None,
        typer.Option(
            help="A base model whose latents of the pictures are kept: membership is measured on them. They show "
            "the pictures to whoever has that model. Repeat for several."
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="The audits' --resolution, where they have one.", min=16)
    ] = None,
    kind: Annotated[
        SetKind,
        typer.Option(
            help="reference: pictures to be found. background: decoys, pictures of their kind that cannot have been "
            "trained on; what they score is what chance scores."
        ),
    ] = SetKind.reference,
    of: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="With --kind background: the set that they are decoys of. Repeat for several. \\[default: any]",
        ),
    ] = None,
    drawn: Annotated[
        bool,
        typer.Option(
            "--drawn",
            help="With --of SET: declare that these decoys and that set, as it is now, are a random split of one "
            "collection, drawn by lot. --rule either asks for it, and accuses wrongly where it is not so.",
        ),
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that describe pictures, each of one core.", min=1)] = 1,
    as_json: JsonOption = False,
) -> None:
    """Describe every picture of FOLDER and keep the set under NAME; adding again replaces it.

    The set appears when all of it is described, at once. Stopped before, the same command goes on where it was.

    PNG, JPEG, WebP, AVIF, BMP, GIF and TIFF are read, HEIF where pillow-heif is installed. Every file that is passed
    over is listed with its reason.

    A list of PDQ hashes (.txt with a hash a line, perhaps a comma and its quality; .csv with a column hash; .jsonl with
    objects that have one) is for audits with --descriptor pdq: lora-audit references add known hashes.csv --descriptor
    pdq. A list has no pictures, so that nothing of it is shown, and no decoys.
    """
    from audit import api
    from audit.bench import Bench

    bench = Bench(config.run.device or default_device())
    with progress_display(console()) as progress:
        added = api.add_references(
            name, folder, descriptor=config.descriptor, workspace=config.workspace, thumbnails=thumbnails,
            bases=base or (), resolution=resolution, kind=kind, decoys_of=of or (),
            drawn=drawn, workers=workers, progress=progress, bench=bench,
        )  # fmt: skip
    loaded = bench.load_descriptor(config.descriptor)
    if as_json:
        skipped = [{"name": one.name, "reason": one.reason} for one in added.skipped]
        print_json(
            {"reference_set": name, "images": added.images, "descriptor": loaded.name, "skipped_images": skipped}
        )
        return
    tell_skipped(added.skipped)
    log.info("%s: %d pictures, described by %s", name, added.images, loaded.name)


@app.command("list")
@configured("workspace")
def list_sets(config: Config, as_json: JsonOption = False) -> None:
    """List the reference sets of the workspace."""
    from audit.references import ReferenceSets
    from audit.workspace import Workspace

    rows = ReferenceSets(Workspace(config.workspace, reading=True, create=False)).list()
    if as_json:
        print_json(rows)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("reference set", "kind", "of", "drawn", "pictures", "descriptor", "added (UTC)")
    for row in rows:
        added = f"{row['added_at']:%Y-%m-%d %H:%M}"
        table.add_row(
            escape(row["reference_set"]), row["kind"], escape(", ".join(row["decoys_of"] or [])),
            "yes" if row["drawn"] else "", str(row["images"]), escape(row["descriptor_name"]), added,
        )  # fmt: skip
    result_console().print(table)


@app.command()
@configured("workspace")
def remove(
    config: Config,
    name: Annotated[str, typer.Argument(help="The set's name.")],
    as_json: JsonOption = False,
) -> None:
    """Remove a reference set for good: its pictures, the matches with it, and the report pages that show it."""
    from audit.references import ReferenceSets
    from audit.workspace import Workspace

    removed = ReferenceSets(Workspace(config.workspace, create=False)).remove(name)
    if as_json:
        print_json(asdict(removed))
        return
    log.info(
        "%s removed: %d pictures, %d matches with them, %d report pages", name, removed.pictures, removed.matches,
        len(removed.pages),
    )  # fmt: skip
