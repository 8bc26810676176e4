"""Dashboards and alerts: their form, promtool's opinion, and every expression against a real Prometheus and exporter.

Where Prometheus is not installed, what needs it is skipped; LORA_AUDIT_REQUIRE_PROMETHEUS=1 makes that a failure.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from audit import metrics
from tests.deploy.test_deploy import ROOT, uncommented, walk
from tests.engine.fleet import make_uploads, make_workspace, start

FOLDER = ROOT / "dashboards"
NAMES = ["overview", "throughput-and-cost", "failures", "crawl", "matches"]
BOARDS = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES}
ALERTS = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
EXPRESSIONS = {
    f"{name}: {panel['title']}, {target['refId']}": target["expr"]
    for name, board in BOARDS.items()
    for panel in board["panels"]
    for target in panel["targets"]
}
VARIABLES = {"$__rate_interval": "30s", "$__range": "1m", "$gpu_hour_usd": "1"}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def needs_prometheus(program: str) -> str:
    """The path of Prometheus or promtool; the test is skipped without it, or fails where it is demanded."""
    path = shutil.which(program)
    if path is None:
        missing = f"{program} is not installed (Debian: apt-get install prometheus)"
        if os.environ.get("LORA_AUDIT_REQUIRE_PROMETHEUS") == "1":
            pytest.fail(f"{missing}, and LORA_AUDIT_REQUIRE_PROMETHEUS=1 demands it")
        pytest.skip(missing)
    return path


def promtool(*arguments: object) -> None:
    done = subprocess.run(
        [needs_prometheus("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def substituted(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, "an unknown Grafana variable"
    return expression


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(lora_audit_\w+)", expression))


def exported() -> dict[str, set[str]]:
    """Every family of audit/metrics.py, and the names of its series."""
    return {
        family.name: {sample.name for sample in family.samples}
        | ({f"{family.name}_{end}" for end in ("bucket", "sum", "count")} if family.type == "histogram" else set())
        for family in metrics.REGISTRY.collect()
    }


# --- form ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_these_files() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.json" for name in NAMES} | {
        "alerts.yaml",
        "alerts_test.yaml",
    }
    assert len({board["uid"] for board in BOARDS.values()}) == len({board["title"] for board in BOARDS.values()}) == 5


@pytest.mark.parametrize("name", NAMES)
def test_dashboard(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"] == f"lora-audit-{name}"
    assert board["schemaVersion"] >= 39
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    panels = board["panels"]
    assert 1 <= len(panels) <= 10
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        assert len(panel["description"]) > 20
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == SOURCE
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["expr"]
            assert target["datasource"] == SOURCE
            for variable in re.findall(r"\$(\w+)", target["expr"]):
                assert variable.startswith("__") or variables[variable]["type"] == "constant"
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert all(0 <= x < 24 for x, _ in cells)
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells


def test_only_metrics_that_exist_and_all_of_them() -> None:
    families = exported()
    series = set().union(*families.values())
    shown = set().union(*map(metric_names, EXPRESSIONS.values()))
    asked = shown.union(*(metric_names(rule["expr"]) for rule in ALERTS))
    assert asked <= series
    assert [name for name, of_family in families.items() if not of_family & shown] == [], "no panel shows these"


def test_alerts() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())
    tested = [each for each in walk(tests) if isinstance(each, dict) and "alertname" in each]
    for rule in ALERTS:
        name = rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
        fires = {bool(each["exp_alerts"]) for each in tested if each["alertname"] == name}
        assert fires == {True, False}, f"{name} is tested firing and not firing"
    headings = re.findall(r"^#+ (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert {rule["alert"] for rule in ALERTS} <= set(headings), "docs/operations.md says what to do"


def test_without_prometheus_its_tests_are_skipped_and_ci_demands_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LORA_AUDIT_REQUIRE_PROMETHEUS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install prometheus"):
        needs_prometheus("promtool")
    monkeypatch.setenv("LORA_AUDIT_REQUIRE_PROMETHEUS", "1")
    with pytest.raises(pytest.fail.Exception, match="demands it"):
        needs_prometheus("promtool")
    assert "LORA_AUDIT_REQUIRE_PROMETHEUS" in (ROOT / ".ci/run").read_text()


# --- promtool --------------------------------------------------------------------------------------------------------


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint-fatal", FOLDER / "alerts.yaml")


def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", FOLDER / "alerts_test.yaml")


@pytest.mark.parametrize("variant", ["static", "Kubernetes"])
def test_promtool_accepts_the_configuration(variant: str, tmp_path: Path) -> None:
    text = (ROOT / "deploy/prometheus.yml").read_text()
    config = yaml.safe_load(text)
    if variant != "static":
        config["scrape_configs"] = yaml.safe_load(uncommented(text, variant))
        # Debian builds Prometheus without Kubernetes: its discovery is checked here, the rest by promtool
        (job,) = config["scrape_configs"]
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["static_configs"] = [{"targets": ["localhost:9808"]}]
    config["rule_files"] = [str((ROOT / "deploy" / each).resolve()) for each in config["rule_files"]]
    assert [job["job_name"] for job in config["scrape_configs"]] == ["lora-audit"]
    assert all(Path(each).exists() for each in config["rule_files"])
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", tmp_path / "prometheus.yml")


# --- a real Prometheus -----------------------------------------------------------------------------------------------


def start_exporter(folder: Path) -> tuple[int, Callable[[], object]]:
    """A port that serves all metrics as if much work were being done, and what stops it."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.wait(0.3):
            for outcome in metrics.OUTCOMES:
                metrics.audits.labels(outcome).inc()
            for reason in metrics.RETRY_REASONS:
                metrics.retries.labels(reason).inc()
            for stage in metrics.STAGES:
                metrics.stage_seconds.labels(stage).observe(2.0)
            for source in metrics.SOURCES[:3]:
                metrics.crawl_bytes.labels(source).inc(1e6)
                for state in metrics.STATES:
                    metrics.crawl_items.labels(source, state).inc()
                for status in metrics.STATUSES:
                    metrics.crawl_requests.labels(source, status).inc()
            for counter, amount in (
                (metrics.images, 50), (metrics.evaluations, 1500), (metrics.matches, 1), (metrics.busy_seconds, 0.5),
            ):  # fmt: skip
                counter.inc(amount)
            metrics.last_finished.set_to_current_time()
            metrics.quarantined.inc()

    for gauge, value in (
        (metrics.queue_length, 20), (metrics.running, 2), (metrics.workers, 2), (metrics.gpu_memory, 2e9),
    ):  # fmt: skip
        gauge.set(value)
    port = metrics.serve(0)
    threading.Thread(target=work, daemon=True).start()
    return port, stopped.set


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    needs_prometheus("prometheus")
    port, stop = start_exporter(tmp_path_factory.mktemp("exporter"))
    yield port
    stop()


Query = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def query(exporter: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Asks a Prometheus that has scraped the exporter for some seconds."""
    with prometheus(exporter, tmp_path_factory.mktemp("prometheus")) as ask:
        yield ask


@contextmanager
def prometheus(exporter: int, folder: Path) -> Iterator[Query]:
    """A real Prometheus that scrapes a port; it is asked once it has done so five times."""
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(FOLDER / "alerts.yaml")],
        "scrape_configs": [
            {"job_name": "lora-audit", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [needs_prometheus("prometheus"), f"--config.file={folder}/prometheus.yml",
             f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"],
            stdout=log, stderr=log,
        )  # fmt: skip

    def ask(expression: str) -> list[dict[str, Any]]:
        answer = requests.get(f"http://{address}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def scrapes() -> int:
        try:
            return max((int(each["value"][1]) for each in ask("count_over_time(lora_audit_workers[1m])")), default=0)
        except (requests.RequestException, ValueError):
            return 0

    try:
        deadline = time.monotonic() + 60
        while scrapes() < 5:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.3)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_panels_show_something(where: str, query: Query) -> None:
    result = query(substituted(EXPRESSIONS[where]))
    assert result
    assert all(each["value"][1] != "NaN" for each in result)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_ask_for_series_that_exist(rule: dict[str, Any], query: Query) -> None:
    query(rule["expr"])
    selectors = re.findall(r"\b(?:lora_audit_\w+|up)(?:\{[^}]*\})?", rule["expr"])
    assert selectors
    for selector in selectors:
        assert query(selector), f"nothing is exported as {selector}"


def test_the_cost_panel_computes_the_cost(query: Query) -> None:
    """Every finished audit takes 0.5 worker seconds: 1,000 of them, at 3,600 USD an hour, cost 500 USD."""
    (expression,) = (each for where, each in EXPRESSIONS.items() if "Cost of 1,000 audits" in where)
    ((_, cost),) = (each["value"] for each in query(substituted(expression.replace("$gpu_hour_usd", "3600"))))
    assert float(cost) == pytest.approx(500, rel=0.2)  # a scrape may fall between the two counters


def test_prometheus_evaluates_the_rules(query: Query) -> None:
    """The synthetic exporter fails half of its audits and has its requests refused: these alerts are on their way."""
    time.sleep(1.5)
    pending = {each["metric"]["alertname"] for each in query('ALERTS{alertstate=~"pending|firing"}')}
    assert {"HighFailureRatio", "CrawlRateLimited", "CrawlErrors"} <= pending
    assert not pending & {"RunStalled", "NoWorkers", "MetricsDown"}


def test_a_real_run_is_seen_as_it_is(tmp_path: Path) -> None:
    """Prometheus scrapes `lora-audit run` itself, over real audits; its figures agree with the run's own count."""
    needs_prometheus("prometheus")
    make_uploads(tmp_path / "uploads", 6, broken=1)
    workspace = make_workspace(tmp_path / "w", tmp_path / "uploads")
    sets = ("settings.steps=10", "settings.images_per_training_image=20")
    running = start(workspace.root, "--json", "--metrics-port", "0", settings=sets)
    port = int(running.stderr.readline().split()[-1])
    with prometheus(port, tmp_path) as ask:
        out, errors = running.communicate(timeout=200)
        state = json.loads(out)
        assert (state["finished"], state["failed"]) == (6, 1), errors

        def last(metric: str) -> float:
            (result,) = ask(f"max_over_time({metric}[5m])")
            return float(result["value"][1])

        # the last scrape can be a second older than the end
        assert 5 <= last('lora_audit_audits_total{outcome="finished"}') <= 6
        assert last("lora_audit_workers") == 1
        assert last("lora_audit_queue_length") >= 4
        assert 5 / 6 * state["images"] <= last("lora_audit_images_total") <= state["images"]
        assert last('lora_audit_stage_seconds_count{stage="sample"}') >= 5
        assert last("lora_audit_gpu_memory_bytes") > 1e8
