"""`lora-audit inspect`: what a file is and what was trained, before anything is sampled."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit.cli.common import EXIT_BAD_INPUT, JsonOption, print_json, result_console
from audit.cli.options import configured
from audit.cli.text import say
from audit.config import Config, Expert
from audit.text import printable

if TYPE_CHECKING:
    from audit.models.inspect import Inspection

WIDTH = 32  # of the longest bar


@configured(among="bases")
def inspect(
    config: Config,
    file: Annotated[Path, typer.Argument(help="A LoRA, LyCORIS, embedding or full-weight file, or a folder.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Also look whether every tensor has a place in this base model (as for scan), and how far it moves "
            "it; auto: the one of --among that the file wants."
        ),
    ] = None,
    base_config: Annotated[
        str | None,
        typer.Option(
            help="For a single-file base: a folder or owner/name@COMMIT with its configuration, and its other parts "
            "where the file is the denoiser alone."
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="NAME", help="Of a file that holds several.")] = None,
    low_noise: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The second file, for a base's low-noise expert (as for scan).")
    ] = None,
    expert: Annotated[
        Expert | None, typer.Option(help="Which expert of a base with two the file is for (as for scan).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is: format, family, rank, what was trained, how far each block moved, what it claims.

    [bold]Example[/bold]: lora-audit inspect monet.safetensors

    Nothing is sampled and no model is needed; with [bold]--base[/bold] the file is also applied to it. It ends with the
    command that audits the file. Exit codes: 0 it can be audited, 2 it cannot, and why.
    """
    from audit import api
    from audit.cli.bases import chosen
    from audit.models.inspect import as_json as plain

    if base is not None:
        base, base_config = chosen(config, file, base, base_config)
    found = api.inspect(file, base, base_config=base_config, adapter=adapter, low_noise=low_noise, expert=expert)
    command = None if found.problem else scan_command(found, base, base_config, adapter, low_noise, expert)
    if as_json:
        print_json({**plain(found), "scan": command})
    else:
        show(found)
        if command:
            say(f"\naudit it with\n\n    {printable(command, lines=False)}", lines=True)
    if found.problem:
        raise typer.Exit(EXIT_BAD_INPUT)


def scan_command(
    found: Inspection, base: str | None = None, base_config: str | None = None, adapter: str | None = None,
    low_noise: Path | None = None, expert: Expert | None = None,
) -> str:  # fmt: skip
    """The command that audits the file: with ``base``, else the pinned model it claims, or of its family."""
    from audit.models.bases import known_bases
    from audit.models.published import ALIASES

    families = {"sd1": "sd15", "sdxl": "sdxl"}
    claimed = found.claims.get("ss_sd_model_name", "")
    family = families.get(found.family or found.claimed_family or "")
    known = known_bases().get((found.wants.base if found.wants else None) or "")
    if known is not None and known.key not in ALIASES:  # of its parent an audit would find less
        family = f"{known.repos[0]}@COMMIT" if known.repos else None
    base = base or (claimed if claimed in ALIASES else family)
    words = ["lora-audit", "scan", found.path, "--base", base or "OWNER/NAME@COMMIT"]
    words += ["--base-config", base_config] if base_config else []
    words += ["--adapter", adapter] if adapter else []
    words += ["--low-noise", str(low_noise)] if low_noise else []
    words += ["--expert", str(expert)] if expert else []
    words += ["--descriptor", "nano"] if base in ("nano", "nano-flow") else []  # SSCD looks at larger pictures
    return shlex.join([*words, "--references", "FOLDER"])


def show(found: Inspection) -> None:
    """For people: two tables and a bar a block."""
    from rich.markup import escape
    from rich.table import Table

    out = result_console()
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts(found):
        table.add_row(f"[bold]{label}[/bold]", escape(value))
    out.print(table)
    if found.blocks:
        with_base = found.blocks[0].base_norm is not None
        bars = Table("part", "block", "modules", "norm of the change", "", title="How far each block moved", box=None)
        if with_base:
            bars.add_column("of the base's", justify="right")
        shares = [b.norm / max(b.base_norm or 0.0, 1e-12) if with_base else b.norm for b in found.blocks]
        longest = max(shares) or 1.0
        for block, share in zip(found.blocks, shares, strict=True):
            row = [escape(block.part), escape(block.name), str(block.modules), f"{block.norm:.4g}",
                   "█" * max(1, round(WIDTH * share / longest))]  # fmt: skip
            bars.add_row(*row, *([f"{share:.2%}"] if with_base else []))
        out.print()
        out.print(bars)
    if found.unmeasured:
        out.print(f"{found.unmeasured} modules change with the base's weights: give --base to measure them")
    for warning in found.warnings:
        out.print(f"[yellow]warning[/yellow] {escape(warning)}", highlight=False)
    if found.problem:
        out.print(f"[bold red]cannot be audited[/bold red] {escape(found.problem)}", highlight=False)
    elif found.unused and found.unused_share is None:
        out.print(f"{len(found.unused)} tensors are of no known format, such as {escape(found.unused[0][:100])}")
    elif found.base:
        out.print(f"[bold]every tensor has its place[/bold] in {escape(found.base)}" if not found.unused else "")


def facts(found: Inspection) -> list[tuple[str, str]]:
    """Label and text of everything that fits on a line."""
    rows = [("file", found.path)]
    if found.format is None:
        return rows
    methods = ", ".join(f"{name} ({n})" for name, n in found.algorithms.items())
    kind = " with " + methods if methods else ""
    dora = ", weight-decomposed (DoRA)" if found.decomposed else ""
    family = found.family or "not told by its shapes"
    claim = f", claimed {found.claimed_family}" if found.claimed_family else ""
    rows += [
        ("format", f"{found.format}{kind}{dora}"),
        ("family", f"{family}{claim}"),
        ("wants", wants(found)),
        ("size", f"{found.bytes / 1e6:,.1f} MB, {found.tensors} tensors, {found.parameters / 1e6:,.2f} M numbers"),
        ("precision", _counted(found.precisions)),
        ("rank", _counted(found.ranks)),
        ("alpha", _counted(found.alphas) or ("the rank" if found.ranks else "")),
        ("parts", _counted(found.parts)),
        ("layers", _counted(found.targets)),
        ("adapters", ", ".join(found.adapters) if len(found.adapters) > 1 else ""),
        (
            "tokens",
            ", ".join(f"{name} ({_counted(dict(sorted(parts.items())))})" for name, parts in found.tokens.items()),
        ),
        ("SHA256", found.sha256 or ""),
        ("identity", found.identity or ""),
    ]
    rows += [(f"claims {name}", value) for name, value in found.claims.items()]
    return [(label, value) for label, value in rows if value]


def wants(found: Inspection) -> str:
    """Which base the file wants, how sure that is, and why."""
    if found.wants is None:
        return ""
    one = found.wants
    what = one.title or (f"a model of family {one.family}" if one.family else "not told")
    return f"{what} (sure: {one.sure}; {one.why})"


def _counted(counts: dict[str, int] | dict[int, int] | dict[float, int]) -> str:
    """ "64 (190), 32 (4)"."""
    items = list(counts.items())
    text = ", ".join(f"{name} ({n})" for name, n in items[:12])
    return f"{text}, {len(items) - 12} more" if len(items) > 12 else text
