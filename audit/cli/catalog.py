"""`lora-audit catalog`: what was seen where, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import (
    JsonOption,
    console,
    print_json,
    progress_display,
    result_console,
)
from audit.cli.crawl import open_catalog, show_counts, shown_bytes
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config, CrawlSettings, Prompts

if TYPE_CHECKING:
    from audit.similar import Near
    from audit.workspace import Workspace
    from crawlers.catalog import Catalog
    from crawlers.items import Item
    from crawlers.source import Source

app = typer.Typer(
    invoke_without_command=True,
    help="""List the catalog, and add, fetch or ask again about single items.

    Without a command, the items are listed, newest first.
    [bold]Example[/bold]: lora-audit catalog --where "family = 'sd1' AND training_images < 20"
    """,
)
Where = Annotated[str, typer.Option(help="An SQL condition over the columns of the checkpoints table.")]
ASKED = (
    "crawl.civitai_endpoint",
    "crawl.hub_endpoint",
    "crawl.rate",
    "crawl.opt_out",
    "crawl.allow_private",
    "workspace",
)
TAKEN = ("crawl.max_file", *ASKED)


@app.callback()
@configured("workspace")
def list_items(
    config: Config,
    context: typer.Context,
    where: Where = "TRUE",
    source: Annotated[str | None, typer.Option(help="civitai, huggingface, folder or file.")] = None,
    state: Annotated[
        str | None, typer.Option(help="listed, stored, later, refused, failed, gone or opted-out.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows at most.")] = 50,
    near: Annotated[bool, typer.Option("--near", help="Say of each adapter which others are nearly the same.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the catalog."""
    if context.invoked_subcommand:
        return
    conditions = [_condition(where)]
    for column, value in (("source", source), ("state", state)):
        if value is not None:
            escaped = value.replace("'", "''")
            conditions.append(f"{column} = '{escaped}'")
    catalog = open_catalog(config, reading=True, create=False)
    rows = _find(catalog, " AND ".join(conditions), limit)
    hints = near_to(catalog.workspace, rows) if near else {}
    if as_json:
        print_json(
            [{name: _plain(value) for name, value in row.items()}
             | ({"near": [asdict(one) for one in hints.get(row["item_id"], [])]} if near else {}) for row in rows]
        )  # fmt: skip
        return
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        say("nothing in the catalog fits: fill it with 'lora-audit crawl', or widen --where")
        return
    out = result_console()
    table = Table("item", "title", "base", "N0", "size", "state", "why")
    table.columns[0].overflow = "fold"

    def short(text: str, most: int) -> str:
        return text[:most] if out.is_terminal else text

    for row in rows:
        base = f"{row['family'] or '?'} ({row['base_model'] or '?'})"
        size = row["bytes"] or row["claimed_bytes"]
        cells = (
            row["item_id"],
            short(row["title"] or row["name"] or "", 40),
            short(base, 30),
            row["training_images"] or "?",
            shown_bytes(size) if size else "?",
            row["state"],
            short("; ".join(filter(None, [row["reason"], *map(hint, hints.get(row["item_id"], []))])), 60),
        )
        table.add_row(*(escape(str(cell)) for cell in cells))
    out.print(table)
    if len(rows) == limit:
        say(f"the newest {limit} are shown: see more with --limit")


def near_to(workspace: Workspace, rows: list[dict[str, Any]]) -> dict[str, list[Near]]:
    """By item, the networks of the workspace that are nearly the same."""
    from audit.similar import kept, make_up, nearest

    make_up(workspace)
    vectors = kept(workspace, [row["identity"] for row in rows if row["identity"]])
    found = {one: nearest(workspace, vector, but=one) for one, vector in vectors.items()}
    return {row["item_id"]: found[row["identity"]] for row in rows if found.get(row["identity"])}


def hint(one: Near) -> str:
    """What a person is told of a near one."""
    return f"near to {one.item_ids[0]}, cosine {one.cosine:.3f}"


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _find(catalog: Catalog, where: str, limit: int) -> list[dict[str, Any]]:
    return _rows(where, lambda: catalog.find(where, limit))


def _condition(where: str) -> str:
    import duckdb

    from audit.errors import CrawlError
    from audit.workspace.workspace import condition

    try:
        return condition(where)
    except duckdb.Error as error:
        raise CrawlError(f"the condition {where[:200]!r} failed: {str(error)[:300]}") from error


def _rows(where: str, find: Callable[[], Any]) -> list[dict[str, Any]]:
    import duckdb

    from audit.errors import CrawlError

    try:
        found: list[dict[str, Any]] = find().to_pylist()
        return found
    except duckdb.Error as error:
        raise CrawlError(f"the condition {where[:200]!r} failed: {str(error)[:300]}") from error


def _sources(catalog: Catalog, how: CrawlSettings) -> dict[str, Source]:
    """The sources whose items can be asked for again, by name."""
    from crawlers.source import SOURCES

    return {name: kind.open(catalog, how) for name, kind in SOURCES.items() if kind.remote}


def _without_prompts(how: CrawlSettings) -> CrawlSettings:
    return replace(how, prompts=Prompts.never)


@app.command()
@configured("crawl.prompts", *TAKEN)
def add(
    config: Config,
    what: Annotated[str, typer.Argument(
        metavar="URL_OR_FILE",
        help="A Civitai or Hugging Face page, a Civitai model id, AIR urn or hash, owner/name, or a file here.",
    )],
    caption: Annotated[list[str] | None, typer.Option(help="For a file: its training caption. Repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Add one model, and download its files.

    [bold]Example[/bold]: lora-audit catalog add https://civitai.com/models/12345?modelVersionId=67890
    """
    from audit.errors import CrawlError
    from crawlers.crawl import Crawl
    from crawlers.local import LocalFile
    from crawlers.source import SOURCES

    catalog = open_catalog(config)
    source: Source
    items: list[Item]
    if Path(what).is_file():
        source = LocalFile(catalog, Path(what), caption or [])
        items = source.items()
    else:
        found = next(((kind, named) for kind in SOURCES.values() if (named := kind.named(what)) is not None), None)
        if found is None:
            titles = " or ".join(kind.title or kind.name for kind in SOURCES.values() if kind.remote)
            raise CrawlError(f"{what[:200]!r} is no file here, and no {titles} page, model id, AIR urn or hash")
        source = found[0].open(catalog, config.crawl)
        items = found[0].find(source, found[1])
    if not items:
        raise CrawlError(f"{what[:200]!r} names a model without weight files")
    _take(Crawl(source, catalog), items, as_json)


def _take(crawl: Any, items: list[Item], as_json: bool) -> None:
    started = time.monotonic()
    with progress_display(console()) as progress:
        crawl.progress = progress
        counts = asdict(crawl.take(items))
    counts["seconds"] = round(time.monotonic() - started, 2)
    rows = crawl.catalog.known([item.item_id for item in items])
    if as_json:
        print_json({**counts, "items": [{k: _plain(v) for k, v in row.items()} for row in rows.values()]})
        return
    show_counts(counts)
    for item in items[:20]:
        row = rows[item.item_id]
        say(f"{item.item_id}: {row['state']}{': ' + row['reason'] if row['reason'] else ''}")


@app.command()
@configured("crawl.downloads", *TAKEN)
def fetch(
    config: Config,
    where: Where = "TRUE",
    retry: Annotated[bool, typer.Option("--retry", help="Also what failed too often before.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Files at most.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Download files that are listed, and those whose download failed.

    [bold]Example[/bold]: lora-audit catalog fetch --where "family = 'sd1' AND claimed_bytes < 200e6"
    """
    from crawlers.catalog import MAX_ATTEMPTS
    from crawlers.crawl import Crawl

    catalog = open_catalog(config, create=False)
    tried = "TRUE" if retry else f"attempts < {MAX_ATTEMPTS}"
    due = "state = 'later' AND coalesce(available_at <= now(), TRUE)"
    condition = f"{_condition(where)} AND (state = 'listed' OR (state = 'failed' AND {tried}) OR ({due}))"
    sources = _sources(catalog, _without_prompts(config.crawl))
    names = ", ".join(f"'{name}'" for name in sources)
    rows = _find(catalog, f"{condition} AND source IN ({names})", limit)
    started = time.monotonic()
    total: dict[str, Any] = {"items": 0, "new": 0, "bytes": 0, "requests": 0, "states": {}, "reasons": {}}
    for name, source in sources.items():
        items = catalog.items([row for row in rows if row["source"] == name])
        if items:
            with progress_display(console()) as progress:
                found = asdict(
                    Crawl(source, catalog, downloads=config.crawl.downloads, progress=progress).take(items, again=True)
                )
            for key in ("items", "new", "bytes", "requests"):
                total[key] += found[key]
            for key in ("states", "reasons"):
                for value, count in found[key].items():
                    total[key][value] = total[key].get(value, 0) + count
    total["seconds"] = round(time.monotonic() - started, 2)
    print_json(total) if as_json else show_counts(total)


@app.command()
@configured(*ASKED)
def refresh(
    config: Config,
    where: Where = "TRUE",
    limit: Annotated[int, typer.Option(min=1, help="Items at most.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Ask the sources again about known items: what they changed, deleted or took down is recorded.

    Those asked longest ago come first, so that repeated calls reach all. Nothing is downloaded, and nothing that is
    stored is removed: a deleted model's row says "gone" and keeps its file.
    """
    from crawlers.crawl import Crawl

    catalog = open_catalog(config, create=False)
    sources = _sources(catalog, _without_prompts(config.crawl))
    rows = _rows(where, lambda: catalog.longest_unasked(where, limit, list(sources)))
    started = time.monotonic()
    total: dict[str, Any] = {}
    for name, source in sources.items():
        mine = [row for row in rows if row["source"] == name]
        if mine:
            with progress_display(console()) as progress:
                total[name] = asdict(Crawl(source, catalog, download=False, progress=progress).refresh(mine))
    seconds = round(time.monotonic() - started, 2)
    if as_json:
        print_json({"seconds": seconds, **total})
        return
    for name, found in total.items():
        say(name)
        show_counts({**found, "seconds": seconds})
