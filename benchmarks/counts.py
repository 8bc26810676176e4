"""How often a local run does what costs time: files hashed, bases and descriptors read, listings, DuckDB connections.

    python -m benchmarks.counts [AUDITS ...]

Audits of the embedded model by `lora-audit run` in one process, 1 and 10 by default. Functions are wrapped,
and the real ones are called. About half a minute on two cores.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

# What is counted: a module, and a function or a method in it.
COUNTED: dict[str, tuple[tuple[str, str], ...]] = {
    "jobs made": (("audit.job", "Job.__post_init__"),),
    "ids computed": (("audit.job", "audit_id_of"),),
    "checkpoints hashed": (("audit.models.checkpoint", "hash_file"),),
    "bases located": (("audit.models.base", "locate_base"),),
    "bases loaded": (("audit.models.base", "load_base"),),
    "descriptors loaded": (("audit.descriptors.registry", "load_descriptor"),),
    "listings of files": (("audit.files", "Files.list"), ("audit.files", "Files.names")),
    "DuckDB connections": (("audit.workspace.workspace", "Workspace._connect"),),
}
LOADED = ("audit.api", "audit.engine.due", "audit.engine.run", "audit.bench")  # who calls them


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts of COUNTED while it is entered, in every thread of this process. What is counted is really called."""
    found: Counter[str] = Counter()
    lock = threading.Lock()
    for module in LOADED:
        import_module(module)
    undo: list[tuple[Any, str, Any]] = []

    def counted(inner: Callable[..., Any], what: str) -> Callable[..., Any]:
        @wraps(inner)
        def call(*arguments: Any, **named: Any) -> Any:
            with lock:
                found[what] += 1
            return inner(*arguments, **named)

        return call

    for what, functions in COUNTED.items():
        for module, name in functions:
            owner, _, method = name.rpartition(".")
            holder = getattr(sys.modules[module], owner) if owner else sys.modules[module]
            inner = getattr(holder, method)
            wrapper = counted(inner, what)
            holders = [holder] if owner else _holders(method, inner)
            undo += [(one, method, inner) for one in holders]
            for one in holders:
                setattr(one, method, wrapper)
    try:
        yield found
    finally:
        for one, attribute, inner in undo:
            setattr(one, attribute, inner)


def _holders(name: str, function: Any) -> list[Any]:
    """The modules of this project that have ``function`` by its name."""
    ours = [module for key, module in list(sys.modules.items()) if key.split(".")[0] in ("audit", "crawlers")]
    return [module for module in ours if vars(module).get(name) is function]


def counts_of_a_run(audits: int, folder: Path, run: Callable[[Any], Any] | None = None) -> Counter[str]:
    """The counts of a run over ``audits`` new checkpoints of the embedded model."""
    from audit.config import load_config
    from audit.demo import ASSETS
    from audit.engine.run import Run
    from tests.engine.fleet import make_uploads, make_workspace

    make_uploads(folder / "uploads", audits)
    workspace = make_workspace(folder / "workspace", folder / "uploads")
    config = load_config(
        None,
        {},
        {
            "workspace": str(workspace.root), "descriptor": "nano", "bases.sd1": str(ASSETS / "base"),
            "references": ("animals",), "settings.steps": 2, "settings.images_per_training_image": 4,
        },
    )  # fmt: skip
    with counting() as found:
        state = (run or (lambda config: Run(config).run()))(config)
    assert state.finished == audits, state
    return found


def main(
    audits: Annotated[
        list[int] | None, typer.Argument(min=1, help="How many audits, a column each.", show_default="1 10")
    ] = None,
) -> None:
    """Print how often runs over so many checkpoints do what costs time."""
    numbers = audits or [1, 10]
    columns = []
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            columns.append(counts_of_a_run(number, Path(folder)))
    print(f"{'audits':24}" + "".join(f"{number:>8}" for number in numbers))
    for what in COUNTED:
        print(f"{what:24}" + "".join(f"{column[what]:>8}" for column in columns))


if __name__ == "__main__":
    typer.run(main)
