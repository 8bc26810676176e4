"""`lora-audit scan`: audit one file, from checkpoint to report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit.cli.common import JsonOption, console, leave, print_json, progress_display, tell_skipped
from audit.cli.logs import is_structured, tell
from audit.cli.options import configured
from audit.config import Config
from audit.states import Verdict

if TYPE_CHECKING:
    from audit.api import Result
    from audit.report import AuditFacts
    from audit.report.facts import Extraction, Match
    from audit.report.verdict import QuestionVerdict

log = logging.getLogger(__name__)
MOST_MEMBERS = 30  # of a set, that are listed
VERDICTS: dict[str, str] = {Verdict.match: "[bold red]match[/bold red]", "no match": ""}


def show(result: Result) -> None:
    """The summary table and where the report is, for a person at a terminal."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    facts = result.facts
    tell_skipped(result.skipped)
    if result.was_known:
        log.info("this audit was finished before: its result is shown, nothing was sampled again")
    verdict = facts.verdict
    for warning in [*facts.row["warnings"], *verdict.warnings]:
        log.warning("%s", warning)
    if is_structured():
        tell(
            log, "%s", verdict.tells_nothing or verdict.headline, audit_id=facts.row["audit_id"],
            verdict=verdict.said, rule=verdict.rule, rate=verdict.rate, matched=result.matched,
            matched_sets=[one.reference_set for one in verdict.matched_sets],
            tells_nothing=verdict.tells_nothing is not None, report=result.page, seconds=facts.row["seconds_total"],
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
            said_of(facts, extraction, best) if best else "",
        )
    if facts.extractions:
        out.print(table)
    show_memberships(facts)
    show_chances(facts)
    for one in facts.evaluations:
        out.print(
            f"{one['kind']} pictures: AS {one['average_similarity']:.3f} (at most {one['ceiling']:.3f}), "
            f"A-ESR {one['extraction_rate_07']:.2f} at 0.7, {one['extraction_rate_06']:.2f} at 0.6",
            highlight=False,
        )
    row = facts.row
    if facts.reference_sets:
        show_verdict(verdict)
    out.print(
        f"{row['images']} images, {row['evaluations']} network evaluations, {row['seconds_total']:.0f} s",
        highlight=False,
    )
    out.print(f"report: {escape(result.page)}", highlight=False, soft_wrap=True)


def show_memberships(facts: AuditFacts) -> None:
    """The membership scores of each reference set, the highest first: evidence, and no verdict."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    for name in facts.reference_sets:
        members = [one for one in facts.members if one.reference_set == name]
        if not members:
            continue
        title = f"membership, {escape(name)}: how much better than its base the model denoises each reference"
        table = Table("reference", "score", "above others", "", title=title)
        for one in members[:MOST_MEMBERS]:
            score = "none" if one.score is None else f"{one.score:+.2f}"
            above = "" if one.above is None else f"{one.above} of {one.others}"
            table.add_row(escape(one.name), score, above, escape(one.caveat or ""))
        out.print(table)
        more = f"; {len(members) - MOST_MEMBERS} more in the report" if len(members) > MOST_MEMBERS else ""
        out.print(f"1 is the most, 0 no better than the base; no verdict follows from a score{more}", highlight=False)
    for unmeasured in facts.unmeasured:
        out.print(f"membership of {escape(unmeasured.reference_set)}: {escape(unmeasured.reason)}", highlight=False)


def show_chances(facts: AuditFacts) -> None:
    """What can be said of the references with an error rate; the likeliest to have been trained on first."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    if not facts.chances:
        return
    table = Table("reference", "p", "by chance", "said", "", title="with its error rate")
    for one in facts.chances[:MOST_MEMBERS]:
        p = "" if one.p is None else f"{one.p:.2g}"
        expected = "" if one.expected is None else f"{one.expected:.2g}"
        alone = ["the base alone draws it as near"] if one.is_drawn_alone(facts.row["threshold"]) else []
        said = "; ".join([one.caveat, *alone] if one.caveat else alone)
        table.add_row(escape(one.name), p, expected, one.verdict, escape(said))
    out.print(table)
    for whole in facts.set_chances:
        if whole.p is not None:
            out.print(
                f"{escape(whole.reference_set)} as a whole ({whole.pictures} pictures, {whole.decoys} decoys): "
                f"p = {whole.p:.2g}", highlight=False,
            )  # fmt: skip


def said_of(facts: AuditFacts, extraction: Extraction, best: Match) -> str:
    """What is said of an extraction and the reference nearest to it, in rich's markup."""
    label = facts.verdict.label(best.reference_id, extraction.rank, best.verdict != Verdict.none)
    return VERDICTS.get(label, label)


def show_verdict(verdict: QuestionVerdict) -> None:
    """The headline and what it rests on."""
    from rich.markup import escape

    style = {Verdict.match: "bold red", Verdict.none: "bold"}.get(verdict.said or Verdict.possible, "bold yellow")
    out = console()
    out.print(f"[{style}]{escape(verdict.headline)}[/{style}]", highlight=False)
    for sentence in verdict.explanation:
        out.print(escape(sentence), highlight=False)


def finish(result: Result, as_json: bool) -> None:
    """Print the result and leave with the exit code it calls for."""
    if as_json:
        print_json(result.as_dict())
    else:
        show(result)
    leave(result.verdict.said, result.tells_nothing is not None)


@configured(
    "references", "descriptor", "settings.*", "verdict.*", "captions.*", "run.device", "run.batch_size", "run.compile",
    "run.latents", "workspace", "operator", "signing_key", among="bases",
)  # fmt: skip
def scan(
    config: Config,
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
            help="What it was trained on: sd15, sdxl, nano, owner/name@COMMIT, a diffusers folder, a .safetensors "
            "file, or auto: the one of --among that the file wants."
        ),
    ],
    caption: Annotated[
        list[str] | None,
        typer.Option(help="The training caption. Repeat for several. \\[default: the catalog's, the file's metadata]"),
    ] = None,
    caption_file: Annotated[Path | None, typer.Option(help="A text file with a caption a line.")] = None,
    n0: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Training images to expect. \\[default: the file's metadata, else 10]"),
    ] = None,
    base_config: Annotated[
        str | None,
        typer.Option(
            help="For a single-file base: a folder or owner/name@COMMIT with its configuration, and its other parts "
            "where the file is the denoiser alone."
        ),
    ] = None,
    low_noise: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The second file of an adapter of Wan 2.2 T2V-A14B, for its low-noise expert (an item, where FILE is "
            "one); FILE is the high-noise one. A folder that holds both, so named, is the same.",
        ),
    ] = None,
    training_images: Annotated[
        Path | None, typer.Option(help="The known training images, to score the audit (AS, A-ESR).")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="Pictures known NOT to be trained on, to score false positives.")
    ] = None,
    background: Annotated[
        list[str] | None,
        typer.Option(
            help="Decoys: a folder, or a set, of pictures of the references' kind that cannot have been trained on, 19 "
            "at least. What they score is what chance scores: without them there is no verdict."
        ),
    ] = None,
    drawn: Annotated[
        bool,
        typer.Option(
            "--drawn",
            help="Declare that the folders of --background and the references are a random split of one collection, "
            "drawn by lot. --rule either asks for it, and accuses wrongly where it is not so.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Audit one checkpoint: sample it, cluster, match with references, and write a report page.

    [bold]Example[/bold]: lora-audit scan monet.safetensors --base sd15 --references my-paintings/
    --background later-paintings/ --caption "art style of claude monet" --n0 10

    Stopping it loses nothing: the same command goes on where it was. Exit codes: 0 no match, 10 a match, 11 the audit
    tells nothing (what was sampled are no pictures), 12 no verdict on a set (too few decoys), 13 possible: no match,
    and something stands out, 2 bad input.
    """
    from audit import api
    from audit.cli.bases import chosen
    from audit.cli.custody import custody_of
    from audit.job import Request

    custody = custody_of(config)
    base, base_config = chosen(config, file, base, base_config)
    request = Request(
        Path(file), base, base_config, caption or [], caption_file, n0, config.settings, recovery=config.captions,
        low_noise=low_noise,
    )  # fmt: skip
    with progress_display(console()) as progress:
        result = api.scan(
            request, references=config.references, descriptor=config.descriptor, workspace=config.workspace,
            device=config.run.device, batch_size=config.run.batch_size, training_images=training_images,
            control=control, compile=config.run.compile, latents=config.run.latents, background=background or (),
            drawn=drawn, rule=config.verdict.rule, fdr=config.verdict.fdr, custody=custody, progress=progress,
        )  # fmt: skip
    finish(result, as_json)
