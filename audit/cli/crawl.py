"""`lora-audit crawl`: fill the catalog from Civitai, Hugging Face, or a folder of uploads."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from audit.cli.common import JsonOption, console, print_json, progress_display
from audit.cli.logs import tell
from audit.cli.options import configured
from audit.config import Config

if TYPE_CHECKING:
    from crawlers.catalog import Catalog
    from crawlers.source import Source, SourceKind

log = logging.getLogger(__name__)
HELP = """Fill the catalog with checkpoints, their captions, and what is claimed about them.

    A crawl can be stopped at any point: the same command goes on from there. Once it has seen everything, running it
    again fetches only what is new. [bold]--dry-run[/bold] says first what it would take. The rules it keeps (rates,
    robots, terms, opt-outs) are in docs/crawling.md.
    """

Limit = Annotated[int | None, typer.Option(min=1, help="Stop after this many new or changed files.")]
MetadataOnly = Annotated[
    bool, typer.Option("--metadata-only", help="Fill the tables, download no file ('catalog fetch' does it later).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count files and estimate bytes; write nothing.")]
Restart = Annotated[bool, typer.Option("--restart", help="List everything again, not only what is new.")]
Watch = Annotated[bool, typer.Option("--watch", help="Go on looking for new files until stopped (Ctrl-C).")]
Every = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")]
COMMON = (
    "crawl.downloads", "crawl.max_file", "crawl.opt_out", "crawl.metrics_port", "crawl.metrics_address", "workspace",
)  # fmt: skip


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
    from audit.workspace import Workspace
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


def command_of(kind: SourceKind) -> Callable[..., None]:
    """The command that crawls a source: options of what it is asked for, and of the configuration."""
    own = [f"crawl.{name}" for name in kind.settings]
    renamed = {"endpoint": f"crawl.{kind.endpoint}"} if kind.endpoint else {}

    def run(
        config: Config,
        asked: Any,
        limit: Limit = None,
        metadata_only: MetadataOnly = False,
        dry_run: DryRun = False,
        restart: Restart = False,
        watch: Watch = False,
        every: Every = 30.0,
        as_json: JsonOption = False,
    ) -> None:
        serve_metrics(config.crawl.metrics_port, config.crawl.metrics_address)
        catalog = open_catalog(config)
        source = kind.open(catalog, config.crawl, asked)
        while True:
            run_crawl(source, catalog, limit, metadata_only, dry_run, restart, config.crawl.downloads, as_json)
            if remark := kind.remark(source):
                log.info("%s", remark)
            if not watch:
                return
            time.sleep(every)

    run.__doc__ = inspect.cleandoc(kind.__doc__ or f"Crawl {kind.name}.")
    left_out = [*([] if kind.remote else ["restart"]), *([] if kind.looks_again else ["watch", "every"])]
    return configured(*own, *COMMON, asks=kind.asks, left_out=left_out, **renamed)(run)


class Sources(TyperGroup):
    """A command a source; which there are is looked up when one of them, or the help, is asked for."""

    @property  # typer writes to it, and reads it where a command is looked for
    def commands(self) -> Any:
        """The commands of all sources, by name."""
        from crawlers.source import SOURCES

        for name, kind in SOURCES.items():
            if name not in self._commands:
                one = typer.Typer(rich_markup_mode="rich", add_completion=False)
                one.command(name)(command_of(kind))
                self._commands[name] = typer.main.get_command(one)
        return self._commands

    @commands.setter
    def commands(self, given: Any) -> None:
        self._commands: dict[str, Any] = dict(given)


app = typer.Typer(cls=Sources, no_args_is_help=True, help=HELP)


@app.callback()
def sources() -> None:
    """A group, though its commands are made when they are asked for."""
