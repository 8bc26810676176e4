"""What an audit's networks compute in: a wider precision where numbers overflow and none was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.config import Precision
    from audit.job import Job
    from audit.workspace import Workspace

R = TypeVar("R")


def widening(
    job: Job, workspace: Workspace, bench: Bench, work: Callable[[Precision, list[str]], R],
    begin_again: Callable[[Precision], None],
) -> R:  # fmt: skip
    """What ``work`` finds in the audit's precision, and with warnings about it; on overflow again in a wider one.

    ``begin_again`` is told of the wider one before. Raises AuditError.
    """
    from audit.config import Precision
    from audit.devices import raise_fault
    from audit.errors import NotFiniteError

    kept = workspace.spool(job.id).precision()
    precision = Precision(kept) if kept else job.settings.precision
    warnings: list[str] = []
    if kept:
        warnings.append(f"its numbers overflow in a narrower precision: it was sampled in {kept}")
    while True:
        try:
            return work(precision, warnings)
        except NotFiniteError as error:
            found = wider(job, precision, bench)
            if found is None:
                raise
            precision = found
            warnings = [f"{str(error)[:200]}: it was sampled in {precision}"]
            begin_again(precision)
        except RuntimeError as error:
            raise_fault(error, f"auditing {job.name}", bench.device)
            raise
        bench.forget()


def wider(job: Job, precision: Precision, bench: Bench) -> Precision | None:
    """What to try after ``precision``; None where there is nothing, or where the request fixes it."""
    import torch

    from audit.config import Precision
    from audit.models.placement import NAMES, choose_precision, next_precision

    base = bench.loaded_base()
    if job.settings.precision is not Precision.auto or base is None:
        return None
    device = torch.device(bench.device)
    found = next_precision(choose_precision(precision, base.architecture.half, device), device)
    return None if found is None else NAMES[found]
