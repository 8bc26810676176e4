"""What runs in the processes of a Ray cluster: workers that hold a GPU, and tasks beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from audit.engine.work import OpenPlace, Outcome, Segment, Work, kept_place, outcome_of
from audit.states import Cause, Needs

NODE_DIED = "its node has died"  # how Ray words an actor's death with its node


# A worker that died is replaced by a new one, not restarted in place: a call to an actor that is just restarting fails,
# and would count against a job that has nothing to do with the crash.
@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"prepare": 1, "process": 1})
class Worker:
    """Holds the stages that need a GPU. ``prepare`` runs beside ``process``: the next checkpoint is read meanwhile."""

    def __init__(self, segments: Sequence[Segment], open_place: OpenPlace) -> None:
        self.segments, self.place = list(segments), open_place(Needs.gpu)

    @ray.method(concurrency_group="prepare")
    def prepare(self, at: int, job: Work) -> None:
        """Read ahead; what goes wrong shows when the job is processed."""
        self.segments[at].prepare(job, self.place)

    @ray.method(concurrency_group="process")
    def process(self, at: int, job: Work) -> Outcome:
        """What came of the segment ``at``."""
        return outcome_of(self.segments[at], job, self.place)

    @ray.method(concurrency_group="prepare")
    def devices(self) -> tuple[list[int], str | None]:
        """The GPU ids that Ray gave this worker, and CUDA_VISIBLE_DEVICES as it sees it."""
        import os

        return [int(i) for i in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES")


@ray.remote(max_retries=0)
def beside(segment: Segment, open_place: OpenPlace, job: Work) -> Outcome:
    """What came of a segment that needs no GPU."""
    return outcome_of(segment, job, kept_place(open_place))


def result_of(ref: Any) -> Outcome:
    """What came of a call, or why there is no answer."""
    try:
        found: Outcome = ray.get(ref)
        return found
    except NodeDiedError as error:
        return Outcome(kind=Cause.node_died, reason=_text(error))
    except (OutOfMemoryError, MemoryError) as error:
        return Outcome(kind=Cause.out_of_memory, reason=_text(error))
    except (ActorDiedError, ActorUnavailableError, WorkerCrashedError, ObjectLostError) as error:
        text = _text(error)
        return Outcome(kind=Cause.node_died if NODE_DIED in text else Cause.worker_died, reason=text)
    except RayTaskError as error:
        return Outcome(kind=Cause.error, reason=_text(error))
    except RayError as error:
        return Outcome(kind=Cause.worker_died, reason=_text(error))


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]
