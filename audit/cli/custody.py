"""`lora-audit sign`, `verify` and `reproduce`: the chain of custody of a report, and what other commands give to it."""

from __future__ import annotations

import logging
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.cli.common import EXIT_DAMAGED, JsonOption, console, print_json, progress_display
from audit.cli.options import GIVEN, configured
from audit.cli.text import say
from audit.config import Config
from audit.locations import is_remote, without_credentials
from audit.states import Agreement

if TYPE_CHECKING:
    from audit.custody.again import Reproduced
    from audit.custody.keep import Custody
    from audit.custody.signing import SigningKey
    from audit.custody.statement import Command

log = logging.getLogger(__name__)
# Of no weight for a result, or about this machine alone.
UNTOLD = {
    "workspace", "operator", "signing_key", "output", "as_json", "metrics_port", "metrics_address", "address",
    "config_file",
}  # fmt: skip
SIGNS = {Agreement.agrees: "agrees", Agreement.differs: "DIFFERS", Agreement.removed: "removed since",
         Agreement.unchecked: "not checked"}  # fmt: skip


def custody_of(config: Config) -> Custody:
    """Who asks and with which command, and the key that signs. Raises CustodyError for a key that cannot be had."""
    from audit.custody.keep import Custody

    return Custody(config.operator, _command(), _key(config.signing_key) if config.signing_key else None)


def _command() -> Command:
    """The command that runs and what it was given: paths as names alone, no credentials."""
    from audit.custody.statement import Command

    name, given = GIVEN.get()
    return Command(name, {told: plain_option(value) for told, value in given.items() if told not in UNTOLD})


def plain_option(value: Any) -> Any:
    """An option's value for a manifest: what is a place of this machine, or a URL, is its name alone."""
    if isinstance(value, list | tuple):
        return [plain_option(one) for one in value]
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Path):
        return value.name
    text = without_credentials(str(value))
    name, equals, rest = text.partition("=")
    if equals and name.replace("_", "").replace(".", "").isalnum():
        return f"{name}={plain_option(rest)}"
    if is_remote(text) or "://" in text:
        return f"{text.partition('://')[0]}://..."
    is_place = os.path.isabs(text) or text.startswith(("~", "./", "../")) or (os.sep in text and Path(text).exists())
    return Path(text).name if is_place else text


def _key(file: Path) -> SigningKey:
    from audit.custody.signing import PasswordNeededError, load_key

    try:
        return load_key(file)
    except PasswordNeededError:
        if not sys.stdin.isatty():
            raise
        return load_key(file, typer.prompt(f"password of {file.name}", hide_input=True, err=True))


AuditArgument = Annotated[str, typer.Argument(metavar="AUDIT", help="The audit's id, or its beginning.")]


@configured("signing_key", "workspace")
def sign(config: Config, audit: AuditArgument, as_json: JsonOption = False) -> None:
    """Sign the manifests of an audit's report pages with --signing-key: DSSE envelopes beside the pages.

    The key is a PEM file of mode 0600: openssl genpkey -algorithm ed25519. The password of an encrypted one is in
    LORA_AUDIT_SIGNING_KEY_PASSWORD, or is asked for.
    """
    from audit.custody.keep import sign_report
    from audit.errors import ConfigError
    from audit.workspace import Workspace

    if config.signing_key is None:
        raise ConfigError("say which key signs: --signing-key FILE, or LORA_AUDIT_SIGNING_KEY")
    opened = Workspace(config.workspace, create=False)
    key = _key(config.signing_key)
    signed = sign_report(opened, audit, key)
    if as_json:
        print_json({"key_id": key.key_id, "pages": [{"page": page, "signed_now": now} for page, now in signed.items()]})
        return
    for page, now in signed.items():
        say(f"{page}: {'signed' if now else 'was signed before'} by the key {key.key_id}")


@configured("workspace")
def verify(
    config: Config,
    audit: Annotated[
        str | None, typer.Argument(metavar="[AUDIT]", help="An audit's id, or its beginning: its reports alone.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="A PEM file with the public key that has to have signed. With AUDIT.")
    ] = None,
    references: Annotated[
        list[Path] | None, typer.Option(help="A folder with original pictures. Repeat for several. With AUDIT.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The file that was audited. With AUDIT.")] = None,
    envelope: Annotated[
        Path | None,
        typer.Option(
            help="An envelope (.dsse.json) that was kept outside the workspace: its page is compared with what it "
            "says. With AUDIT."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a report against its manifest, or, without AUDIT, every stored file against its recorded hash.

    With AUDIT: the page, every row that it rests on, settings and inputs, the signature, and the originals that are
    given; each thing that differs is named. Whoever can write to the workspace can change all of it alike, but no
    envelope that was kept elsewhere (--envelope). Without AUDIT: table files, manifests and the states of runs that
    cannot be read are named; all else passes them over.

    Exit codes: 0 nothing differs (what could not be checked is said), 1 something does, or is damaged, 2 bad input.
    """
    from audit.cli.operate import verify_workspace
    from audit.custody.check import verify_report
    from audit.workspace import Workspace

    if audit is None:
        if public_key or references or checkpoint or envelope:
            told = "--public-key, --references, --checkpoint and --envelope are about one report: give AUDIT"
            raise typer.BadParameter(told)
        verify_workspace(config, as_json)
        return
    opened = Workspace(config.workspace, reading=True, create=False)
    with progress_display(console()) as progress:
        found = verify_report(
            opened, audit, public_key=public_key, references=references or (), checkpoint=checkpoint,
            envelope=envelope, tell=progress,
        )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        for page in found.pages:
            say(page.page)
            for one in page.findings:
                say(f"  {SIGNS[one.state]}: {one.part}: {one.said}")
        differing = len(found.of(Agreement.differs))
        say(f"differing: {differing}" if differing else "nothing that was checked differs")
    if not found.agrees:
        raise typer.Exit(EXIT_DAMAGED)


@configured("run.device", "run.batch_size", "workspace")
def reproduce(
    config: Config,
    audit: AuditArgument,
    checkpoint: Annotated[Path, typer.Option(help="The file or folder that was audited.")],
    base: Annotated[str, typer.Option(help="The base model of the audit, as for scan.")],
    base_config: Annotated[str | None, typer.Option(help="For a single-file base: its configuration.")] = None,
    references: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with original pictures of the audit's sets and decoys. Repeat for several."),
    ] = None,
    descriptor: Annotated[str | None, typer.Option(help="The descriptor, where it is a file of your own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run an audit again from what is recorded of it, in a temporary workspace, and say what agrees.

    The same seed, settings and captions. On the same device with the same versions everything agrees to the last bit;
    else small differences are to be expected, and the largest is told. Files that are not those of the audit are
    refused, and so are other versions of the method.

    Exit codes: 0 every verdict that was compared is the same, 1 one is another, 2 bad input.
    """
    from audit.custody.again import reproduce as again
    from audit.workspace import Workspace

    opened = Workspace(config.workspace, reading=True, create=False)
    with progress_display(console()) as progress:
        found = again(
            opened, audit, checkpoint, base, base_config=base_config, references=references or (),
            descriptor=descriptor, device=config.run.device, batch_size=config.run.batch_size, tell=progress,
        )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        _show(found)
    if not found.agrees:
        raise typer.Exit(EXIT_DAMAGED)


def _show(found: Reproduced) -> None:
    """What agrees, a line a table or, where it is not equal, a column."""
    for table in dict.fromkeys(part.table for part in found.parts):
        parts = [part for part in found.parts if part.table == table]
        apart = [part for part in parts if not part.exact]
        if not apart:
            say(f"{table}: all {max(part.rows for part in parts)} are equal to the last bit")
        for part in apart:
            largest = "" if part.largest is None else f", the largest difference is {part.largest:.2g}"
            say(f"{table}, {part.column}: {part.equal} of {part.rows} are equal{largest}")
    for one in found.left_out:
        say(f"not compared: {one}")
    for name, (then, now) in found.others.items():
        say(f"{name} was {then} and is {now}: small differences are to be expected")
    same = "every verdict that was compared is the same" if found.agrees else "VERDICTS DIFFER"
    say("everything that was compared is equal to the last bit" if found.exact else same)
