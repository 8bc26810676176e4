"""`lora-audit references`: the picture sets that extractions are compared with."""

from __future__ import annotations

import logging
from dataclasses import asdict
from datetime import UTC, datetime
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
from audit.states import Role, SetKind

log = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help="Add, list and remove reference sets.")


@app.command()
@configured(
    "descriptor", "run.device", "crawl.hub_endpoint", "crawl.rate", "crawl.retries", "crawl.downloads",
    "crawl.token_file", "crawl.allow_private", "workspace",
)  # fmt: skip
def add(
    config: Config,
    name: Annotated[str, typer.Argument(help="Letters, digits, '.', '_' and '-'.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures, searched with its subfolders; a tar, Parquet file or video; a list of URLs or "
            "of PDQ hashes; or hf:owner/name@COMMIT."
        ),
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
    described_by: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="SOURCE is Parquet with vectors that this descriptor has made elsewhere."),
    ] = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts",
            help="Describe five crops of 70 % of each picture as well, so that what shows a part of it is found; six "
            "times the work and the vectors. Decoys have to be added so, too.",
        ),
    ] = False,
    every: Annotated[float, typer.Option(help="Of a video: seconds between two frames.", min=0.04)] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Describe every picture of SOURCE and keep the set under NAME; adding again replaces it.

    The set appears when all of it is described, at once. Stopped before, the same command goes on where it was.

    PNG, JPEG, WebP, AVIF, BMP, GIF and TIFF are read, HEIF where pillow-heif is installed. Every file that is passed
    over is listed with its reason.

    A tar (.tar, also within the folder) is one of webdataset, as img2dataset writes it: JSON and text beside a picture
    come back with a match. Parquet (.parquet) has pictures in a column, as data sets of the Hugging Face Hub do; or,
    with --described-by, vectors: lora-audit references add laion shards/ --descriptor sscd --described-by NAME. Of
    videos (.mp4, .mov, .mkv, .webm, .avi; pip install 'lora-audit\\[videos]') a frame is taken --every few seconds. A
    list of URLs is text with one a line, or CSV with a column url.

    A list of PDQ hashes (.txt with a hash a line, perhaps a comma and its quality; .csv with a column hash; .jsonl with
    objects that have one) is for audits with --descriptor pdq: lora-audit references add known hashes.csv --descriptor
    pdq. A list has no pictures, so that nothing of it is shown, and no decoys.
    """
    from audit import api
    from audit.bench import Bench

    bench = Bench(config.run.device or default_device())
    with progress_display(console()) as progress:
        added = api.add_references(
            name, source, descriptor=config.descriptor, workspace=config.workspace, thumbnails=thumbnails,
            bases=base or (), resolution=resolution, kind=kind, decoys_of=of or (),
            drawn=drawn, workers=workers, described_by=described_by, every=every,
            crawl=config.crawl, parts=parts, progress=progress, bench=bench,
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


@app.command()
@configured("descriptor", "run.device", "workspace")
def put(
    config: Config,
    name: Annotated[str, typer.Argument(help="The set's name.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures; or lists of PDQ hashes, of a set of hashes.")],
    metadata: Annotated[
        str | None, typer.Option(metavar="JSON", help="An object that comes back with a match of these pictures.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add single pictures to a set, or replace those of the same file name; the others stay as they are.

    They are searched from the next match on. Finished audits are compared with them by 'lora-audit match', or the next
    run.
    """
    from audit.bench import Bench
    from audit.references.inputs.metadata import metadata_of
    from audit.references.lists import is_list
    from audit.references.singles import files_given
    from audit.references.singles import put as put_in
    from audit.workspace import Workspace

    try:
        about = None if metadata is None else metadata_of(metadata)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--metadata") from None
    given = [one if is_list(one) else files_given([one], about)[0] for one in files]
    loaded = Bench(config.run.device or default_device()).load_descriptor(config.descriptor)
    done = put_in(Workspace(config.workspace, create=False), name, given, loaded)
    if as_json:
        print_json(asdict(done))
        return
    tell_skipped(done.skipped)
    log.info("%s: %d new, %d replaced, %d with other metadata; %d pictures", name, done.added, done.replaced,
             done.changed, done.images)  # fmt: skip


@app.command()
@configured("workspace")
def drop(
    config: Config,
    name: Annotated[str, typer.Argument(help="The set's name.")],
    pictures: Annotated[list[str], typer.Argument(help="Names of pictures, their SHA256, or its first 8 digits.")],
    as_json: JsonOption = False,
) -> None:
    """Take single pictures out of a set for good, with what was found with the set, and the pages that show it."""
    from audit.references.singles import drop as drop_from
    from audit.workspace import Workspace

    done = drop_from(Workspace(config.workspace, create=False), name, pictures)
    if as_json:
        print_json(asdict(done))
        return
    log.info(
        "%s: %d taken out, %d left; %d report pages removed", name, len(done.pictures), done.images, len(done.pages)
    )


@app.command()
@configured("workspace")
def policy(
    config: Config,
    name: Annotated[str, typer.Argument(help="The set's name.")],
    role: Annotated[
        Role | None,
        typer.Option(
            help="deny: its pictures are to be found, as those of any set. allow: they are known-good (official art, "
            "logos), and references that are copies of them are no match."
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            metavar="COSINE|own", help="From which descriptor cosine a picture counts; own: the descriptor's."
        ),
    ] = None,
    threshold_of: Annotated[
        str | None, typer.Option(metavar="NAME", help="The descriptor whose cosine it is, where the set has several.")
    ] = None,
    pdq_distance: Annotated[int | None, typer.Option(help="Up to how many bits PDQ agrees.", min=0, max=31)] = None,
    expires: Annotated[str | None, typer.Option(metavar="DATE|never", help="From when on it is not matched.")] = None,
    disable_until: Annotated[
        str | None, typer.Option(metavar="DATE|never", help="Until when it is not matched.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Whose it is.")] = None,
    notes: Annotated[str | None, typer.Option(help="What is to be known of it.")] = None,
    of: Annotated[
        list[str] | None,
        typer.Option(metavar="SET", help="Of an allow bank: a set that it silences. Repeat. \\[default: any]"),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Let it have no policy.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show or change what is made of a set: what a match with it means, how near is near, and when it is in force.

    It holds for what is matched from now on; finished audits keep what they were matched by, until 'lora-audit match'.
    An allow bank silences references alone that are copies of its pictures, by the descriptor's threshold or a stricter
    one, and by PDQ; what was silenced is counted and shown.
    """
    from audit.references import ReferenceSets
    from audit.references.policy import Policy, clear_policy, policies, set_policy
    from audit.workspace import Workspace

    changes = {
        "role": role, "threshold": _number(threshold), "threshold_of": threshold_of, "pdq_distance": pdq_distance,
        "expires_at": _date("--expires", expires), "disabled_until": _date("--disable-until", disable_until),
        "owner": owner, "notes": notes, "sets": of or None,
    }  # fmt: skip
    given = {
        name: value for name, value in changes.items()
        if value is not None or (name, "own") == ("threshold", threshold)
        or (name, expires) == ("expires_at", "never") or (name, disable_until) == ("disabled_until", "never")
    }  # fmt: skip
    workspace = Workspace(config.workspace, reading=not given and not clear, create=False)
    ReferenceSets(workspace).require_any([name])
    if clear:
        clear_policy(workspace, name)
    found = set_policy(workspace, name, **given) if given else policies(workspace).get(name, Policy(name))
    if as_json:
        print_json(found.as_json())
        return
    from rich.markup import escape

    said = {what: value for what, value in found.as_json().items() if value is not None}
    for what, value in said.items():
        result_console().print(f"{what}: {escape(str(value))}", highlight=False)


def _number(text: str | None) -> float | None:
    try:
        return None if text in (None, "own") else float(text or "")
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write a cosine such as 0.8, or own", param_hint="--threshold") from None


def _date(option: str, text: str | None) -> datetime | None:
    """UTC where it says no other zone."""
    if text in (None, "never"):
        return None
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        told = f"{text!r}: write a date such as 2027-01-31, or never"
        raise typer.BadParameter(told, param_hint=option) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


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

    table = Table("reference set", "kind", "role", "of", "drawn", "pictures", "parts", "descriptor", "added (UTC)")
    for row in rows:
        added = f"{row['added_at']:%Y-%m-%d %H:%M}"
        out = f" ({row['out_of_force']})" if row["out_of_force"] else ""
        table.add_row(
            escape(row["reference_set"]), row["kind"], row["role"] + out, escape(", ".join(row["decoys_of"] or [])),
            "yes" if row["drawn"] else "", str(row["images"]), escape(row["parts_layout"] or ""),
            escape(row["descriptor_name"]), added,
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
