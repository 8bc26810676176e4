"""What the project promises to scripts, as one snapshot: options, JSON keys, tables, settings, exit codes, names.

    python -m tests.public           # writes tests/public.json, where the promise is changed on purpose
    python -m tests.public --check   # says what differs; so does tests/test_public.py

Files, options and columns that scripts rely on change in the diff of that file, which a reviewer sees.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

SNAPSHOT = Path(__file__).parent / "public.json"
# Objects whose keys are data (a name, a rank, a device): scripts rely on their values alone.
BY_DATA = {
    "inspect": ("precisions", "algorithms", "ranks", "alphas", "parts", "targets", "tokens", "claims"),
    "scan": ("audit.versions", "checkpoint.claimed_metadata"),
    "report": ("audit.versions", "checkpoint.claimed_metadata"),
    "match": ("left_out",),
    "compact": ("files", "merged"),
    "crawl folder": ("states", "reasons"),
    "run": ("skipped",),
    "status": ("runs[].skipped",),
    "export": ("",),
    "verify AUDIT": ("pages[].made.command.options", "pages[].made.versions"),
    "reproduce": ("others",),
    "estimate": ("devices", "backlog.hours", "backlog.hours.*"),
    "config show": ("bases", "base_configs"),
}
WHOLE = ("config",)  # objects that another command documents: `config show`
TINY = ("--steps", "2", "--images-per-training-image", "4", "--n0", "1", "--device", "cpu", "--descriptor", "nano")
FAILURE = {
    "audit_id": "0" * 32, "item_id": "folder:a:b", "name": "b.safetensors", "stage": "sample", "kind": "error",
    "reason": "a reason", "counted": True, "state": "retry", "run_id": "a-run",
}  # fmt: skip
STUDY = """
study = "one"
base = "nano"
descriptor = "nano"
sets = "demo"
only = ["stamps-fruit"]
factors = { n0 = 2, steps = 1, rank = 2, images = 1 }
settings = { steps = 2 }
"""
TINY_RUN = ("--set", "settings.steps=2", "--set", "settings.images_per_training_image=1", "--descriptor", "nano")


def options() -> dict[str, list[str]]:
    """The arguments and options of every command, each with the environment variable that stands for it."""
    from audit.cli import app

    return dict(sorted(_commands(typer.main.get_command(app), ())))


def _commands(command: Any, name: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    if parameters := [_option(one) for one in command.params]:
        yield " ".join(name), sorted(parameters)
    for word, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*name, word))


def _option(parameter: Any) -> str:
    names = ", ".join((*parameter.opts, *parameter.secondary_opts))
    shown = names if names.startswith("-") else parameter.metavar or parameter.name.upper()
    return f"{shown} ${parameter.envvar}" if parameter.envvar else shown


def tables() -> dict[str, dict[str, str]]:
    """The type of every column of every table."""
    from audit.schemas import TABLES

    return {table: {field.name: str(field.type) for field in schema} for table, schema in TABLES.items()}


def settings() -> dict[str, str]:
    """Every setting of a configuration, with its default."""
    from audit.config import Config, leaves

    return {name: str(value) for name, (value, _) in leaves(Config())}


def exit_codes() -> dict[str, int]:
    """What the commands end with."""
    from audit.cli import common, operate

    return {
        name.removeprefix("EXIT_").lower().replace("_", "-"): value
        for module in (common, operate)
        for name, value in vars(module).items()
        if name.startswith("EXIT_")
    }


def names() -> list[str]:
    """What `import audit` offers."""
    import audit

    return sorted(getattr(audit, "__all__", ["__version__"]))


def keys(value: Any, by_data: tuple[str, ...], at: str = "") -> set[str]:
    """The paths of a JSON document: "audit.steps", "extractions[].rank", "ranks.*" where the key is data."""
    found = {at} if at else set()
    if at.rpartition(".")[2] in WHOLE:
        return found
    if isinstance(value, dict):
        for name, one in value.items():
            shown = "*" if at in by_data else name
            found |= keys(one, by_data, f"{at}.{shown}" if at else shown)
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, (dict, list)):
                found |= keys(one, by_data, f"{at}[]")
    return found


def outputs(folder: Path) -> dict[str, list[str]]:
    """The keys of what commands print with --json, by running them in a workspace in the empty ``folder``."""
    documents = dict(_run_all(folder))
    return {name: sorted(keys(value, BY_DATA.get(name, ()))) for name, value in sorted(documents.items())}


def _run_all(folder: Path) -> Iterator[tuple[str, Any]]:
    from audit.demo import BASE, FINE_TUNES
    from audit.workspace import Workspace

    lora = FINE_TUNES["lora-kohya"].path
    uploads, pictures = folder / "uploads", folder / "pictures"
    uploads.mkdir()
    pictures.mkdir()
    shutil.copy(lora, uploads)
    (uploads / "broken.safetensors").write_bytes(b"\x08" + bytes(7) + b"{broken}")
    (pictures / "note.txt").write_text("no picture")
    where = ("--workspace", str(folder / "workspace"))

    yield "inspect", call("inspect", lora, "--base", BASE)
    yield "captions", call("captions", lora, "--base", BASE, "--caption-evaluations", 0, "--device", "cpu", *where)
    yield "crawl folder", call("crawl", "folder", uploads, *where)
    yield "estimate", call("estimate", "--family", "sd15", "--device", "l4", "--usd-per-hour", "1", *where)
    yield "catalog", call("catalog", *where)
    yield "similar", call("similar", FINE_TUNES["lora-peft"].path, "--least", -1, *where)
    call("scan", lora, "--base", BASE, *TINY, *where)
    [row] = Workspace(folder / "workspace").rows("SELECT image FROM extractions WHERE rank = 1")
    (pictures / "recovered.png").write_bytes(row["image"])  # what it matches for certain
    yield "references add", call("references", "add", "own", pictures, "--descriptor", "nano", *where)
    yield "references list", call("references", "list", *where)
    yield "match", call("match", "--references", "own", "--rule", "fixed", *where)
    control = FINE_TUNES["lora-kohya"].pictures / "control"
    training = ("--training-images", pictures, "--control", control)
    sets = ("--references", "own", "--references", pictures, "--background", control)
    scanned = call("scan", lora, "--base", BASE, *sets, "--rule", "fixed", *TINY, *training, *where)
    yield "scan", scanned
    yield "report", call("report", scanned["audit"]["audit_id"], "--rule", "fixed", *where)
    yield "run", call("run", "--base", f"sd1={BASE}", "--references", "own", "--rule", "fixed", *TINY_RUN, *where)
    Workspace(folder / "workspace").append("failures", [FAILURE | {"failed_at": datetime.now(UTC)}])
    yield "status", call("status", *where)
    yield "failures", call("failures", *where)
    yield "query", call("query", "SELECT audit_id FROM audits", *where)
    yield "verify", call("verify", *where)
    audit_id = scanned["audit"]["audit_id"]
    yield "sign", call("sign", audit_id, "--signing-key", _key(folder), *where)
    yield "verify AUDIT", call("verify", audit_id, *where)
    again = ("--checkpoint", lora, "--base", BASE, "--references", pictures)
    yield "reproduce", call("reproduce", audit_id, *again, *where)
    yield "compact", call("compact", *where)
    yield "migrate", call("migrate", *where)
    yield "export", call("export", folder / "out", "--format", "csv", "--table", "audits", *where)
    yield "config show", call("config", "show")
    yield "study catalog", call("study", "catalog", *where)
    (folder / "study.toml").write_text(STUDY)
    yield "study run --dry-run", call("study", "run", folder / "study.toml", "--dry-run", *where)
    yield "study run", call("study", "run", folder / "study.toml", *where)
    yield "study resume", call("study", "resume", "one", *where)
    yield "study report", call("study", "report", "one", *where)
    yield "study export", call("study", "export", "one", folder / "long", *where)
    single = min(control.glob("*.png"))
    yield "references policy", call("references", "policy", "own", "--owner", "me", *where)
    yield "references put", call("references", "put", "own", single, "--descriptor", "nano", *where)
    yield "references drop", call("references", "drop", "own", single.name, *where)
    yield "references remove", call("references", "remove", "own", *where)


def _key(folder: Path) -> Path:
    """A private key in a file of its owner's alone."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from audit.files import private_file

    with private_file(folder / "key.pem") as file:
        file.write(
            Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return folder / "key.pem"


def call(*arguments: object) -> Any:
    """What a command prints with --json, run in this process. Raises AssertionError where it prints nothing."""
    from audit.cli import app

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        app([str(one) for one in arguments] + ["--json"], standalone_mode=False)
    assert said.getvalue(), arguments
    return json.loads(said.getvalue())


def quick() -> dict[str, Any]:
    """All of the snapshot but the commands' output."""
    return {
        "names": names(), "exit codes": exit_codes(), "options": options(), "settings": settings(), "tables": tables(),
    }  # fmt: skip


def shown(part: Any) -> str:
    """A part of the snapshot as it stands in the file."""
    return json.dumps(part, indent=2) + "\n"


def difference(promised: Any, found: Any) -> str:
    """What differs, as a diff and with the mend; empty where nothing does."""
    lines = difflib.unified_diff(shown(promised).splitlines(), shown(found).splitlines(), "promised", "found", n=2)
    text = "\n".join(lines)
    return text and f"{text}\nif this is on purpose: python -m tests.public, and a line in CHANGELOG.md"


def main(
    check: Annotated[bool, typer.Option(help="Write nothing; exit code 1 where something differs.")] = False,
) -> None:
    """Write the snapshot, or compare with it."""
    with tempfile.TemporaryDirectory(prefix="lora-audit-public-") as name:
        found = quick() | {"json": outputs(Path(name))}
    if check:
        different = difference(json.loads(SNAPSHOT.read_text()), found)
        typer.echo(different or "nothing differs")
        sys.exit(bool(different))
    SNAPSHOT.write_text(shown(found))


if __name__ == "__main__":
    typer.run(main)
