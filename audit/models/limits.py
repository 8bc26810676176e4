"""What the numbers of a base model's configuration may be, so that no network is built that fills the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audit.errors import CheckpointError

MAX_CONFIG_BYTES = 1 << 20
MOST_ENTRIES = 1000  # of a list
MOST = 10_000_000  # of a number that nothing else is known of
# By parts of a name, the first that fits. The largest of published models: 70 layers, widths of 21504, 1000 steps.
LIMITS = (
    ("timesteps", 100_000), ("vocab_size", 1_000_000), ("layers", 1000), ("blocks", 1000), ("heads", 1000),
    ("experts", 1000), ("pre_seq_len", 1000), ("seq_len", 1_000_000), ("sequence_length", 65_536),
    ("head_dim", 65_536), ("channels", 65_536), ("size", 65_536), ("_dim", 65_536), ("width", 65_536), ("d_ff", 65_536),
    ("d_model", 65_536), ("d_kv", 65_536),
)  # fmt: skip


def check_configs(folder: Path) -> None:
    """Raise CheckpointError where a configuration of the pipeline in ``folder`` asks for more than any real one.

    They are parsed in a child process.
    """
    from audit.untrusted.documents import problem_of_configuration

    for path in sorted([*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")]):
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_CONFIG_BYTES + 1)
            if len(raw) > MAX_CONFIG_BYTES:
                raise ValueError(f"it is larger than {MAX_CONFIG_BYTES} bytes")
            problem = problem_of_configuration(raw)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {str(error)[:200]}") from error
        if problem:
            raise CheckpointError(f"{path} is refused: {problem}; no model that can be audited has so many")


def problem_of(document: Any) -> str | None:
    """What a configuration asks for that no real one does; None where there is nothing."""
    return next(_problems("", document), None)


def _problems(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _problems(key, one)
    elif isinstance(value, list):
        if len(value) > MOST_ENTRIES and not name.endswith("betas"):
            yield f"{name[:80]} has {len(value)} entries, at most {MOST_ENTRIES} are read"
        for one in value:
            yield from _problems(name, one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        most = next((limit for part, limit in LIMITS if part in name), MOST)
        if abs(value) > most:
            yield f"{name[:80]} is {value:.6g}, at most {most} is read"
