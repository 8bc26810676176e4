"""Prometheus metrics of runs and crawls, all named ``lora_audit_...``; docs/operations.md lists them.

They live in the process that drives a run or a crawl: workers hand what they measured back with their results, so one
port (``--metrics-port``) tells everything, whichever engine runs the stages. Labels have few values by construction:
what comes from outside (names, reasons, users) is never a label.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from audit.engine.work import RETRIED
from audit.errors import ConfigError
from audit.states import ItemState, Verdict

REGISTRY = CollectorRegistry()

OUTCOMES = ("finished", "failed", "quarantined", "skipped")
STAGES = ("load", "sample", "control", "membership", "cluster", "match", "report")
SOURCES = ("civitai", "huggingface", "folder", "file")
STATES = tuple(ItemState)
NOTHING = "nothing"  # an audit that tells nothing, or was not asked about any set
VERDICTS = (*Verdict, NOTHING)
RETRY_REASONS = RETRIED
STATUSES = ("2xx", "3xx", "4xx", "429", "5xx", "no-answer")

audits = Counter("lora_audit_audits", "Audits by outcome", ["outcome"], registry=REGISTRY)
retries = Counter("lora_audit_retries", "Audits that were put back into the queue", ["reason"], registry=REGISTRY)
stage_seconds = Histogram(
    "lora_audit_stage_seconds",
    "Wall time of a stage of one audit, s",
    ["stage"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000),
    registry=REGISTRY,
)
images = Counter("lora_audit_images", "Images sampled", registry=REGISTRY)
evaluations = Counter("lora_audit_evaluations", "Network evaluations of one image each", registry=REGISTRY)
matches = Counter(
    "lora_audit_matches", "Reference pictures that match, of each audit by itself", registry=REGISTRY
)  # fmt: skip
verdicts = Counter(
    "lora_audit_verdicts", "Finished audits by what their page says", ["verdict"], registry=REGISTRY
)  # fmt: skip
busy_seconds = Counter(
    "lora_audit_busy_seconds", "Seconds that workers computed, summed over workers", registry=REGISTRY
)
queue_length = Gauge("lora_audit_queue_length", "Checkpoints of this run that wait for an audit", registry=REGISTRY)
running = Gauge("lora_audit_running", "Audits that run at this moment", registry=REGISTRY)
workers = Gauge("lora_audit_workers", "Workers that are alive", registry=REGISTRY)
quarantined = Gauge("lora_audit_quarantined", "Checkpoints in quarantine in this workspace", registry=REGISTRY)
gpu_memory = Gauge(
    "lora_audit_gpu_memory_bytes", "Greatest memory a worker has used on its device (resident size on a CPU)",
    registry=REGISTRY,
)  # fmt: skip
last_finished = Gauge(
    "lora_audit_last_finished_timestamp_seconds", "When the last audit finished, Unix time", registry=REGISTRY
)
crawl_requests = Counter(
    "lora_audit_crawl_requests", "HTTP requests of crawls by kind of answer", ["source", "status"], registry=REGISTRY
)
crawl_items = Counter("lora_audit_crawl_items", "Items recorded by state", ["source", "state"], registry=REGISTRY)
crawl_bytes = Counter("lora_audit_crawl_bytes", "Bytes downloaded", ["source"], registry=REGISTRY)

# Every series exists from the start, so that a rate over it is 0 and not absent.
for _outcome in OUTCOMES:
    audits.labels(_outcome)
for _reason in RETRY_REASONS:
    retries.labels(_reason)
for _verdict in VERDICTS:
    verdicts.labels(_verdict)
for _stage in STAGES:
    stage_seconds.labels(_stage)
for _source in SOURCES[:3]:
    crawl_bytes.labels(_source)
    for _state in STATES:
        crawl_items.labels(_source, _state)
    for _status in STATUSES:
        crawl_requests.labels(_source, _status)


def serve(port: int, address: str = "127.0.0.1") -> int:
    """Serve the metrics on ``port`` of ``address`` (0: a free one); the port.

    They have no password: by default only this machine reaches them. Raises ConfigError where that cannot be.
    """
    try:
        server, _ = start_http_server(port, address, registry=REGISTRY)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"metrics cannot be served on port {port} of {address}: {why}; choose another") from error
    return int(server.server_address[1])


def status_kind(status: int) -> str:
    """The value of the ``status`` label for an HTTP status; 0 for none."""
    if status == 429:
        return "429"
    return f"{status // 100}xx" if 200 <= status < 600 else "no-answer"


def count_request(source: str) -> Callable[[int], None]:
    """A function that counts one request of ``source`` by its status, 0 for no answer."""
    return lambda status: crawl_requests.labels(source, status_kind(status)).inc()
