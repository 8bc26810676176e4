"""`lora-audit crawl`: fill the catalog from Civitai, Hugging Face, or a folder of uploads."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import JsonOption, console, print_json, progress_display
from audit.cli.logs import tell
from audit.cli.options import configured
from audit.config import Config

if TYPE_CHECKING:
    from crawlers.catalog import Catalog
    from crawlers.crawl import Source

log = logging.getLogger(__name__)
app = typer.Typer(
    no_args_is_help=True,
    help="""Fill the catalog with checkpoints, their captions, and what is claimed about them.

    A crawl can be stopped at any point: the same command goes on from there. Once it has seen everything, running it
    again fetches only what is new. [bold]--dry-run[/bold] says first what it would take. The rules it keeps (rates,
    robots, terms, opt-outs) are in docs/crawling.md.
    """,
)

Limit = Annotated[int | None, typer.Option(min=1, help="Stop after this many new or changed files.")]
Since = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Only what is newer (UTC).")
]
MetadataOnly = Annotated[
    bool, typer.Option("--metadata-only", help="Fill the tables, download no file ('catalog fetch' does it later).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count files and estimate bytes; write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="List everything again, not only what is new.")]
TokenFile = Annotated[Path | None, typer.Option(help="A file (mode 0600) with the token, instead of the environment.")]
CRAWL = (
    "crawl.downloads",
    "crawl.max_file",
    "crawl.opt_out",
    "crawl.metrics_port",
    "crawl.metrics_address",
    "workspace",
)


def size_of(text: str) -> int:
    """Bytes of a size such as 500M. Raises typer.BadParameter."""
    units = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isdigit() or unit not in units or int(number) == 0:
        raise typer.BadParameter(f"{text!r} is no size: write one such as 500M or 8G")
    return int(number) * units[unit]


def open_catalog(config: Config, reading: bool = False, create: bool = True) -> Catalog:
    """The catalog of a workspace; where no list of opt-outs is named its own opt-out.txt counts, where there is one.

    Raises WorkspaceError where there is no workspace and ``create`` is False.
    """
    from audit.storage import Workspace
    from crawlers.catalog import Catalog, OptOuts

    opened = Workspace(config.workspace, reading, create)
    catalog = Catalog(opened, OptOuts.read(opened, config.crawl.opt_out))
    catalog.store.max_bytes = size_of(config.crawl.max_file)
    return catalog


def serve_metrics(port: int | None, address: str) -> None:
    """Serve the metrics at ``address``, where a port is given."""
    from audit import metrics

    if port is not None:
        log.info("metrics on %s, port %d", address, metrics.serve(port, address))


def run_crawl(
    source: Source, catalog: Catalog, limit: int | None, metadata_only: bool, dry_run: bool, restart: bool,
    downloads: int, as_json: bool,
) -> None:  # fmt: skip
    """Crawl or estimate, and print what was done."""
    from crawlers.crawl import Crawl, estimate

    out = console()
    started = time.monotonic()
    with progress_display(out) as progress:
        if dry_run:
            found = estimate(source, catalog, limit, progress)
        else:
            crawl = Crawl(source, catalog, not metadata_only, limit, downloads, restart, progress)
            found = asdict(crawl.run())
    found["seconds"] = round(time.monotonic() - started, 2)
    if as_json:
        print_json({"source": source.name, "dry_run": dry_run, **found})
    elif dry_run:
        unknown = f" and {found['unknown_sizes']} of unknown size" if found["unknown_sizes"] else ""
        tell(
            log,
            f"{found['items']} files seen, {found['to_download']} to download: {shown_bytes(found['bytes'])}{unknown} "
            f"({found['requests']} requests)", counts=found,
        )  # fmt: skip
    else:
        show_counts(found)


def show_counts(found: dict[str, Any]) -> None:
    """The counts of a crawl for a person."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(found["states"].items())) or "nothing new"
    tell(
        log,
        f"{found['items']} files seen, {found['new']} new or changed: {states}; {shown_bytes(found['bytes'])} in "
        f"{found['requests']} requests, {found['seconds']:.0f} s", counts=found,
    )  # fmt: skip
    for reason, count in sorted(found["reasons"].items(), key=lambda pair: -pair[1])[:10]:
        log.warning("%d x %s", count, reason)


def shown_bytes(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@app.command()
@configured(
    "crawl.prompts", "crawl.rate", "crawl.retries", "crawl.allow_private", *CRAWL, endpoint="crawl.civitai_endpoint"
)
def civitai(
    config: Config,
    base_model: Annotated[list[str] | None, typer.Option(help='Such as "SD 1.5"; repeat for several.')] = None,
    tag: Annotated[str | None, typer.Option(help="Only models with this tag.")] = None,
    username: Annotated[str | None, typer.Option(help="Only this uploader's.")] = None,
    query: Annotated[str | None, typer.Option(help="Words in the model's name.")] = None,
    type_: Annotated[
        list[str] | None, typer.Option("--type", help="LORA, LoCon, DoRA, Checkpoint. \\[default: the first three]")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="Newest (ends early when run again), Most Downloaded, Highest Rated.")
    ] = "Newest",
    nsfw: Annotated[bool, typer.Option(help="Also what the source marks as adult; hidden by default.")] = False,
    since: Since = None,
    ground_truth: Annotated[
        bool, typer.Option("--training-data", help="Also take uploaders' published training sets, to score audits.")
    ] = False,
    limit: Limit = None,
    metadata_only: MetadataOnly = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    token_file: TokenFile = None,
    as_json: JsonOption = False,
) -> None:
    """Crawl Civitai. Downloads need a token: in CIVITAI_TOKEN, or a file given with --token-file.

    [bold]Example[/bold]: lora-audit crawl civitai --base-model "SD 1.5" --tag style --limit 100
    """
    from crawlers.civitai import ADAPTERS, SORTS, Civitai, CivitaiQuery
    from crawlers.http import read_token

    _one_of(sort, SORTS, "--sort")
    serve_metrics(config.crawl.metrics_port, config.crawl.metrics_address)
    catalog = open_catalog(config)
    asked = CivitaiQuery(
        query, tag, username, tuple(base_model or ()), tuple(type_ or ADAPTERS), sort, nsfw, _utc(since)
    )
    how = config.crawl
    source = Civitai(
        catalog, asked, how.civitai_endpoint, read_token("CIVITAI_TOKEN", token_file), how.prompts, ground_truth,
        how.rate, how.allow_private, how.retries,
    )  # fmt: skip
    run_crawl(source, catalog, limit, metadata_only, dry_run, restart, config.crawl.downloads, as_json)


@app.command()
@configured("crawl.allow_private", *CRAWL, endpoint="crawl.hub_endpoint")
def huggingface(
    config: Config,
    filter_: Annotated[
        list[str] | None,
        typer.Option("--filter", help="Tags, such as lora or base_model:adapter:ID. \\[default: lora]"),
    ] = None,
    author: Annotated[str | None, typer.Option(help="Only this user's or organisation's.")] = None,
    search: Annotated[str | None, typer.Option(help="Words in the model's name.")] = None,
    since: Since = None,
    limit: Limit = None,
    metadata_only: MetadataOnly = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    token_file: TokenFile = None,
    as_json: JsonOption = False,
) -> None:
    """Crawl the Hugging Face Hub. Gated models need the token of an account with access, in HF_TOKEN.

    [bold]Example[/bold]: lora-audit crawl huggingface --filter lora --filter
    base_model:adapter:stable-diffusion-v1-5/stable-diffusion-v1-5 --since 2026-11-01
    """
    from crawlers.http import read_token
    from crawlers.huggingface import HuggingFace, HuggingFaceQuery

    serve_metrics(config.crawl.metrics_port, config.crawl.metrics_address)
    catalog = open_catalog(config)
    asked = HuggingFaceQuery(tuple(filter_ or ("lora",)), author, search, _utc(since))
    source = HuggingFace(
        catalog, asked, config.crawl.hub_endpoint, read_token("HF_TOKEN", token_file), config.crawl.allow_private
    )
    run_crawl(source, catalog, limit, metadata_only, dry_run, restart, config.crawl.downloads, as_json)


@app.command()
@configured(*CRAWL)
def folder(
    config: Config,
    location: Annotated[str, typer.Argument(metavar="DIR", help="A folder, or s3://bucket/prefix.")],
    watch: Annotated[bool, typer.Option("--watch", help="Go on looking for new files until stopped (Ctrl-C).")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 30.0,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds a file must stay as it is before it counts as complete.")
    ] = 2.0,
    limit: Limit = None,
    metadata_only: MetadataOnly = False,
    dry_run: DryRun = False,
    as_json: JsonOption = False,
) -> None:
    """Take in a platform's own uploads, each with an optional JSON sidecar (docs/crawling.md has its fields).

    [bold]Example[/bold]: lora-audit crawl folder /srv/uploads --watch
    """
    from crawlers.folder import Folder

    serve_metrics(config.crawl.metrics_port, config.crawl.metrics_address)
    catalog = open_catalog(config)
    source = Folder(catalog, location, settle)
    while True:
        run_crawl(source, catalog, limit, metadata_only, dry_run, False, config.crawl.downloads, as_json)
        if source.unfinished:
            log.info("%d files are still being written: left for the next look", len(source.unfinished))
        if not watch:
            return
        time.sleep(every)


def _one_of(value: str, allowed: tuple[str, ...], option: str) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}", param_hint=option)


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment else None
