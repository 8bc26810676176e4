"""Both engines on stages without a model: order, failures, retries, quarantine, deadlines, draining, devices."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from audit.engine.local import LocalEngine
from audit.engine.ray import RayEngine, RayOptions
from audit.engine.work import Event, Queue
from audit.errors import DeviceLostError, WorkspaceError
from audit.states import Cause
from tests.engine import work
from tests.engine.work import Piece, Seen, jobs, nowhere, stages


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A real Ray on this machine with four logical GPUs."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.cloudpickle.register_pickle_by_value(work)
    ray.init(num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def run(engine: LocalEngine | RayEngine, work_: Iterator[Piece], stop: threading.Event | None = None) -> list[Event]:
    return list(engine.run(work_, stages(), nowhere, stop or threading.Event(), {}))


def outcomes(events: list[Event]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for event in events:
        if event.what not in ("started", "passed"):
            found.setdefault(event.job.id, []).append(event.what)
    return found


def seen(events: list[Event]) -> list[Seen]:
    """What the first stage of every finished job has seen."""
    found = [event.record(Seen) for event in events if event.what == "finished"]
    return [one for one in found if one is not None]


def quick(**options: object) -> RayEngine:
    return RayEngine(RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, **options))  # type: ignore[arg-type]


def test_the_local_engine_runs_everything_and_costs_a_bad_task_alone(tmp_path: Path) -> None:
    events = run(LocalEngine(attempts=3), jobs(tmp_path, "ok", "input", "error-once", "error", "memory-once", "ok"))
    assert outcomes(events) == {
        "t0000": ["finished"], "t0001": ["failed"], "t0002": ["retry", "finished"],
        "t0003": ["retry", "retry", "quarantined"], "t0004": ["retry", "finished"], "t0005": ["finished"],
    }  # fmt: skip
    assert {event.kind for event in events if event.job.id == "t0004"} == {None, "out-of-memory"}


def traced(events: list[Event]) -> list[str]:
    """The trace ids in the reasons of events of the kind "error"."""
    reasons = [event.reason for event in events if event.kind == "error"]
    found = [re.fullmatch(r"RuntimeError: something broke \(trace ([0-9a-f]{8})\)", reason) for reason in reasons]
    assert found
    return [one[1] for one in found if one is not None]


def test_the_log_has_the_traceback_of_a_failed_task_under_the_id_of_its_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [trace] = traced(run(LocalEngine(attempts=1), jobs(tmp_path, "ok", "error", "input")))
    [record] = [one for one in caplog.records if trace in one.getMessage()]
    assert record.exc_info
    assert record.exc_info[1].__traceback__
    assert not any("the file is at fault" in one.getMessage() for one in caplog.records)  # its words say enough


def test_the_log_of_a_worker_of_ray_has_it_too(cluster: None, tmp_path: Path) -> None:
    [trace] = traced(run(quick(max_workers=1, attempts=1), jobs(tmp_path, "error")))
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [text for path in logs.glob("worker-*") if trace in (text := path.read_text(errors="replace"))]
        if found:
            break
        time.sleep(0.2)
    [text] = found
    assert "Traceback" in text
    assert 'raise RuntimeError("something broke")' in text


def test_the_local_engine_stops_after_the_running_task(tmp_path: Path) -> None:
    stop = threading.Event()
    events = []
    for event in LocalEngine().run(jobs(tmp_path, *["ok"] * 5), stages(), nowhere, stop, {}):
        events.append(event)
        stop.set()
    assert list(outcomes(events)) == ["t0000"]


def test_every_task_is_finished_once_on_ray(cluster: None, tmp_path: Path) -> None:
    events = run(quick(max_workers=3), jobs(tmp_path, *["ok"] * 40))
    assert outcomes(events) == {f"t{number:04d}": ["finished"] for number in range(40)}
    assert {path.read_text() for path in tmp_path.glob("*.done")} == {"x"}
    assert list(tmp_path.glob("*.prepared"))  # read ahead while the worker was busy


def test_failures_of_every_kind_cost_one_task_alone(cluster: None, tmp_path: Path) -> None:
    behaviours = [
        "ok",
        "input",
        "error",
        "crash",
        "crash-once",
        "error-once",
        "memory-once",
        "storage-once",
        "ok",
        "ok",
    ]
    events = run(quick(max_workers=2), jobs(tmp_path, *behaviours))
    found = outcomes(events)
    assert found["t0001"] == ["failed"]
    assert found["t0002"] == ["retry", "retry", "quarantined"]
    # the death under crash-once may count for it, where it came first
    assert found["t0003"] in (["retry"] * 2 + ["quarantined"], ["retry"] * 3 + ["quarantined"])
    for key in ("t0004", "t0005", "t0006", "t0007"):
        assert found[key] == ["retry", "finished"]
    for key in ("t0000", "t0008", "t0009"):
        assert found[key][-1] == "finished"
    kinds = {event.job.id: event.kind for event in events if event.what in ("retry", "failed", "quarantined")}
    assert kinds == {
        "t0001": "input", "t0002": "error", "t0003": "worker-died", "t0004": "worker-died", "t0005": "error",
        "t0006": "out-of-memory", "t0007": "storage",
    }  # fmt: skip


def test_kills_that_hit_others_too_are_counted_against_nobody_alone(cluster: None, tmp_path: Path) -> None:
    """Every death of a worker under another task is one more attempt for a task: something kills, and not the task."""
    engine = quick(max_workers=1)
    jobs_ = list(jobs(tmp_path, "crash", "crash-once", "ok"))
    queue = Queue(iter([]), 1)
    failed: dict[str, int] = {}
    for job in (jobs_[1], jobs_[2], jobs_[1]):
        assert engine._failed(queue, job, Cause.worker_died, "killed", "sample", failed).what == "retry"
    whats = [engine._failed(queue, jobs_[0], Cause.worker_died, "killed", "sample", failed).what for _ in range(6)]
    assert whats == ["retry"] * 5 + ["quarantined"]  # three attempts, and three for the deaths of others
    assert engine._failed(queue, jobs_[2], Cause.error, "its own", "sample", failed).what == "retry"
    assert engine._failed(queue, jobs_[2], Cause.error, "its own", "sample", failed).what == "quarantined"


def test_a_crash_while_finishing_is_retried_and_quarantined(cluster: None, tmp_path: Path) -> None:
    found = outcomes(run(quick(max_workers=1), jobs(tmp_path, "finish-crash", "ok")))
    assert found == {"t0000": ["retry", "retry", "quarantined"], "t0001": ["finished"]}


def test_attempts_of_earlier_runs_count(cluster: None, tmp_path: Path) -> None:
    engine = quick(max_workers=1)
    events = list(engine.run(jobs(tmp_path, "crash", "ok"), stages(), nowhere, threading.Event(), {"t0000": 2}))
    assert outcomes(events) == {"t0000": ["quarantined"], "t0001": ["finished"]}


def test_an_attempt_that_got_work_done_does_not_count(cluster: None, tmp_path: Path) -> None:
    def progress(job: Piece) -> tuple[bool, int]:
        return True, len((tmp_path / f"{job.id}.tries").read_text().splitlines())

    engine = RayEngine(RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, max_workers=1, attempts=1), progress)
    events = run(engine, jobs(tmp_path, "crash-once"))
    assert outcomes(events) == {"t0000": ["retry", "finished"]}
    assert [event.counted for event in events if event.what == "retry"] == [False]


def test_a_worker_that_dies_before_it_begins_counts_against_nobody(cluster: None, tmp_path: Path) -> None:
    options = RayOptions(gpus_per_worker=0, cpus_per_worker=0.5, max_workers=1, attempts=1)
    engine = RayEngine(options, lambda job: (False, 0))
    assert outcomes(run(engine, jobs(tmp_path, "crash-once"))) == {"t0000": ["retry", "finished"]}


def test_storage_that_is_away_ends_the_run_and_blames_no_task(cluster: None, tmp_path: Path) -> None:
    told: list[Event] = []
    with pytest.raises(WorkspaceError, match="in a row"):
        told.extend(
            quick(max_workers=1).run(jobs(tmp_path, "storage", "storage"), stages(), nowhere, threading.Event(), {})
        )
    assert not [event for event in told if event.what == "quarantined"]


def test_a_hung_worker_is_killed_at_the_deadline(cluster: None, tmp_path: Path) -> None:
    events = run(quick(max_workers=2, sample_deadline=6.0), jobs(tmp_path, "hang-once", "ok", "ok"))
    assert outcomes(events)["t0000"] == ["retry", "finished"]
    assert [event.kind for event in events if event.what == "retry"] == ["deadline"]


def test_stopping_drains(cluster: None, tmp_path: Path) -> None:
    stop = threading.Event()
    events = []
    for event in quick(max_workers=2).run(jobs(tmp_path, *["ok"] * 30, seconds=1.0), stages(), nowhere, stop, {}):
        events.append(event)
        if event.what == "finished":
            stop.set()
    counts = Counter(event.what for event in events)
    assert counts["started"] == counts["finished"] <= 6


def test_draining_has_an_end(cluster: None, tmp_path: Path) -> None:
    stop = threading.Event()
    started = 0.0
    for event in quick(max_workers=1, drain_seconds=2.0).run(jobs(tmp_path, "hang"), stages(), nowhere, stop, {}):
        if event.what == "started":
            stop.set()
            started = time.monotonic()
    assert 1 < time.monotonic() - started < 30


def test_each_worker_sees_its_own_device_alone(cluster: None, tmp_path: Path) -> None:
    engine = RayEngine(RayOptions(gpus_per_worker=1, cpus_per_worker=1, min_workers=4))
    events = run(engine, jobs(tmp_path, *["ok"] * 24, seconds=0.3))
    by_worker: dict[int, set[tuple[str, ...]]] = {}
    for found in seen(events):
        assert found.visible == ",".join(found.gpus)
        by_worker.setdefault(found.pid, set()).add(tuple(found.gpus))
    assert len(by_worker) == 4
    assert sorted(next(iter(gpus)) for gpus in by_worker.values()) == [("0",), ("1",), ("2",), ("3",)]


def test_fractions_of_a_gpu_share_it(cluster: None, tmp_path: Path) -> None:
    engine = RayEngine(RayOptions(gpus_per_worker=0.5, cpus_per_worker=0.5, min_workers=6, max_workers=6))
    events = run(engine, jobs(tmp_path, *["ok"] * 30, seconds=0.3))
    devices = {one.pid: one.gpus[0] for one in seen(events)}
    assert len(devices) == 6
    assert max(Counter(devices.values()).values()) == 2


def test_a_worker_keeps_its_base_model_as_long_as_there_is_work_for_it(cluster: None, tmp_path: Path) -> None:
    events = run(quick(min_workers=2, max_workers=2), jobs(tmp_path, *["ok"] * 40, groups=4, seconds=0.05))
    last = {one.pid: one.switches for one in seen(events)}
    assert sum(last.values()) <= 6  # 40 tasks of four base models on two workers


def test_memory_does_not_grow_with_the_work() -> None:
    read = 0

    def endless() -> Iterator[Piece]:
        nonlocal read
        while True:
            read += 1
            yield Piece(str(read), "g", "ok", 0.0, "")

    queue = Queue(endless(), ahead=100)
    for _ in range(1000):
        queue.take("g")
    assert read <= 1100


def test_a_lost_device_costs_a_worker_and_no_task(cluster: None, tmp_path: Path) -> None:
    """An error of CUDA stays in its process: the worker is replaced, and whoever came after it is not to blame."""
    behaviours = ["ok"] * 3 + ["assert-once"] + ["ok"] * 13
    events = run(quick(max_workers=2), jobs(tmp_path, *behaviours))
    found = outcomes(events)
    assert found.pop("t0003") == ["retry", "finished"]
    assert set(map(tuple, found.values())) == {("finished",)}
    assert len(found) == 16
    assert [(event.kind, event.counted) for event in events if event.what == "retry"] == [("device-lost", False)]


def test_a_task_that_loses_device_after_device_is_quarantined_alone(cluster: None, tmp_path: Path) -> None:
    found = outcomes(run(quick(max_workers=1), jobs(tmp_path, "assert", *["ok"] * 4)))
    assert found.pop("t0000") == ["retry"] * 4 + ["quarantined"]
    assert set(map(tuple, found.values())) == {("finished",)}


def test_devices_that_are_all_lost_end_the_run_and_blame_no_task(cluster: None, tmp_path: Path) -> None:
    told: list[Event] = []
    with pytest.raises(DeviceLostError, match="times in a row"):
        told.extend(quick(max_workers=1).run(jobs(tmp_path, *["assert"] * 4), stages(), nowhere, threading.Event(), {}))
    assert not [event for event in told if event.what == "quarantined"]


def test_the_local_engine_ends_when_its_device_is_lost(tmp_path: Path) -> None:
    events: list[Event] = []
    running = LocalEngine().run(jobs(tmp_path, "ok", "assert", "ok"), stages(), nowhere, threading.Event(), {})
    with pytest.raises(DeviceLostError, match="device-side assert"):
        events.extend(running)
    assert outcomes(events) == {"t0000": ["finished"], "t0001": ["retry"]}
    assert not events[-1].counted


def test_the_local_engine_reads_the_next_task_ahead(tmp_path: Path) -> None:
    work_ = jobs(tmp_path, "ok", "ok", "ok")
    for event in LocalEngine().run(work_, stages(), nowhere, threading.Event(), {}):
        if event.what == "started":
            following = tmp_path / f"t{int(event.job.id[1:]) + 1:04d}.prepared"
            assert following.exists() == (event.job.id != "t0002")


def test_a_lost_worker_process_is_replaced(cluster: None, tmp_path: Path) -> None:
    killed = False
    events = []
    for event in quick(max_workers=2).run(
        jobs(tmp_path, *["ok"] * 20, seconds=0.5), stages(), nowhere, threading.Event(), {}
    ):
        events.append(event)
        if event.what == "finished" and not killed:
            os.kill(seen([event])[0].pid, signal.SIGKILL)
            killed = True
    found = outcomes(events)
    assert len(found) == 20
    assert all(whats[-1] == "finished" for whats in found.values())
    assert {path.read_text() for path in tmp_path.glob("*.done")} == {"x"}
