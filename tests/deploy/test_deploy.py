"""What deploys the project: parsed, held against the schemas and tools that read it, and against the real command line.

Nothing here talks to a cloud, a cluster or a container engine.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.exceptions import TyperException

from audit.cli import app
from audit.config import RunSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CLI = typer.main.get_command(app)
# file: command lines of lora-audit in it; fewer means that this test no longer finds them
COMMAND_FILES = {
    "ray_cluster.yaml": 3,
    "deploy/rayjob.yaml": 1,
    "deploy/raycronjob.yaml": 2,
    "deploy/prometheus.yml": 1,
    "deploy/lora-audit.service": 2,
}
KUBERNETES = ["rayjob.yaml", "raycronjob.yaml"]


def uncommented(text: str, name: str) -> str:
    """The lines between ``# begin NAME`` and ``# end NAME``, without their comment marks."""
    inside = re.search(rf"^( *)# begin {name}\n(.*?)^ *# end {name}$", text, re.DOTALL | re.MULTILINE)
    assert inside, f"no lines between '# begin {name}' and '# end {name}'"
    return "".join(re.sub(r"^( *)# ?", r"\1", line) for line in inside[2].splitlines(keepends=True))


def walk(value: Any) -> Iterator[Any]:
    """Everything in a document, from the outside in."""
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


# --- command lines ---------------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every ``lora-audit COMMAND ...`` in ``text``, up to the end of each shell command."""
    names = "|".join(CLI.commands)
    text = re.sub(r"\\\n\s*", " ", text)
    for found in re.finditer(rf"(?:/opt/lora-audit/bin/|(?<![\w./~-]))lora-audit (?=(?:{names})\b)", text):
        rest, before = text[found.end() :].split("\n")[0], text[: found.start()][-1:]
        lexer = shlex.shlex(rest.split(before)[0] if before == '"' else rest, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in iter(lexer.get_token, None):
            if set(word) <= set(";&|"):
                break
            words.append(word)
        yield words


def commands_of(path: Path) -> list[list[str]]:
    text = path.read_text()
    comments = "\n".join(re.sub(r"^\s*# ?", "", line) for line in text.splitlines() if line.lstrip().startswith("#"))
    if path.suffix not in (".yaml", ".yml"):
        return [*command_lines(text)]
    found = [*command_lines(comments)]
    for value in (each for document in yaml.safe_load_all(text) for each in walk(document)):
        if isinstance(value, str):
            found += command_lines(value)
        elif isinstance(value, dict) and "image" in value and "args" in value:  # the image's entry point is lora-audit
            assert "command" not in value
            found.append(value["args"])
    return found


def parse(words: list[str]) -> dict[str, Any]:
    """What the real command line makes of ``words``, without running anything."""
    command, name, context = CLI, "lora-audit", None
    while True:
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return context.params
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize(
    ("file", "words"),
    [(file, words) for file in COMMAND_FILES for words in commands_of(ROOT / file)],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)
def test_command_lines_are_those_of_the_program(file: str, words: list[str]) -> None:
    assert parse(words)


@pytest.mark.parametrize(("file", "number"), COMMAND_FILES.items())
def test_all_command_lines_are_found(file: str, number: int) -> None:
    assert len(commands_of(ROOT / file)) == number


def test_the_parser_of_command_lines() -> None:
    text = """sh -c 'lora-audit crawl civitai --base-model "SD 1.5" --limit 3; code=$?' # or "lora-audit query x" and"""
    first, second = command_lines(text)
    assert first == ["crawl", "civitai", "--base-model", "SD 1.5", "--limit", "3"]
    assert second == ["query", "x"]
    assert parse(first)["limit"] == 3
    for wrong in (["crawl", "civitai", "--nope"], ["crawl", "folder"], ["crawl", "civitai", "--limit", "x"], ["nope"]):
        with pytest.raises(TyperException):
            parse(wrong)


# --- ray_cluster.yaml ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["AWS", "GCP"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    text = (ROOT / "ray_cluster.yaml").read_text()
    config = yaml.safe_load(text)
    return config if request.param == "AWS" else config | yaml.safe_load(uncommented(text, "GCP"))


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "gpu"}, "no default node types are left in it"


def test_cluster(cluster: dict[str, Any]) -> None:
    head, gpu = cluster["available_node_types"]["head"], cluster["available_node_types"]["gpu"]
    assert cluster["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert any("--require-hashes" in command for command in cluster["setup_commands"])
    assert gpu["resources"]["GPU"] == 1
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, cluster["max_workers"])
    spot = gpu["node_config"].get("InstanceMarketOptions") or gpu["node_config"]["scheduling"]
    assert spot.get("MarketType") == "spot" or spot.get("preemptible") is True
    for kind in ("head", "worker"):
        installs = [one for one in cluster[f"{kind}_setup_commands"] if "pip install" in one]
        assert installs
        assert all(any(word in one for word in ("constraints.txt", "--no-deps")) for one in installs)
        start = cluster[f"{kind}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "--metrics-export-port=" in start
    for mounted in cluster["file_mounts"].values():
        assert mounted.startswith("~/.ray/") or (ROOT / mounted).exists()
    for command in (each for key, several in cluster.items() if key.endswith("_commands") for each in several):
        subprocess.run(["bash", "-n", "-c", command], check=True)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def documents(name: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / name).read_text())}


def pods(value: Any) -> list[dict[str, Any]]:
    return [each for each in walk(value) if isinstance(each, dict) and "containers" in each]


def containers(value: Any) -> list[dict[str, Any]]:
    return [container for pod in pods(value) for container in pod["containers"]]


def test_kinds() -> None:
    job, nightly = documents("rayjob.yaml"), documents("raycronjob.yaml")
    assert {kind: document["apiVersion"] for kind, document in (job | nightly).items()} == {
        "RayJob": "ray.io/v1",
        "RayCronJob": "ray.io/v1",
        "CronJob": "batch/v1",
    }
    # KubeRay's RayCronJobSpec; its jobTemplate is a RayJobSpec, not an object with one
    assert set(nightly["RayCronJob"]["spec"]) == {"schedule", "timeZone", "suspend", "jobTemplate"}
    assert nightly["RayCronJob"]["spec"]["jobTemplate"] == job["RayJob"]["spec"]


def test_rayjob() -> None:
    spec = documents("rayjob.yaml")["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] < 24 * 3600
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in containers(cluster["headGroupSpec"])[0]["resources"]["limits"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"]) == (0, 0)
    words = next(command_lines(spec["entrypoint"]))
    assert words[words.index("--max-workers") + 1] == str(group["maxReplicas"])
    assert containers(group)[0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (10, 0), (12, 0), (13, 0), (2, 2), (130, 130)])
def test_matches_do_not_fail_the_job(code: int, expected: int, tmp_path: Path) -> None:
    program = tmp_path / "lora-audit"
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    entrypoint = documents("rayjob.yaml")["RayJob"]["spec"]["entrypoint"]
    # as "ray job submit -- ENTRYPOINT" does it: the submitter's shell splits, ray quotes again, the head's shell runs
    again = shlex.join(shlex.split(entrypoint))
    done = subprocess.run(again, shell=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
    assert done.returncode == expected


@pytest.mark.parametrize("name", KUBERNETES)
def test_pods(name: str) -> None:
    found = documents(name)
    for pod in pods(found):
        for container in pod["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) <= set(resources["limits"])
            environment = {each["name"]: each.get("value") for each in container.get("env", ())}
            if container["name"] == "ray-job-submitter":
                assert environment == {}
                continue
            assert environment["LORA_AUDIT_WORKSPACE"].startswith("s3://")
            if "RAY_JOB_STOP_WAIT_TIME_S" in environment:
                waits = int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
                assert RunSettings().drain_seconds + 60 < waits < pod["terminationGracePeriodSeconds"]
    ports = [port["containerPort"] for each in containers(found) for port in each.get("ports", ())]
    assert 9808 in ports


def contexts(name: str) -> list[dict[str, Any]]:
    """The security context of every container, the autoscaler's, which KubeRay adds, included."""
    found = documents(name)
    options = [
        each["autoscalerOptions"] for each in walk(found) if isinstance(each, dict) and "autoscalerOptions" in each
    ]
    assert options
    return [each.get("securityContext", {}) for each in (*containers(found), *options)]


@pytest.mark.parametrize("name", KUBERNETES)
def test_every_container_is_locked(name: str) -> None:
    for context in contexts(name):
        assert context == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    for pod in pods(documents(name)):
        assert pod["securityContext"] == {
            "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])


@pytest.mark.parametrize("name", KUBERNETES)
def test_what_is_written_lies_in_volumes(name: str) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    home = re.search(r"^WORKDIR (/home/\S+)$", dockerfile, re.MULTILINE)[1]
    for pod in pods(documents(name)):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert {"/tmp", home} <= set(mounts)
            assert all(volume["emptyDir"]["sizeLimit"] for volume in mounts.values())


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_autoscaler_alone_has_a_token_of_kubernetes(name: str) -> None:
    found = documents(name)
    for pod in pods(found):
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert not any("serviceaccount" in mount["mountPath"] for mount in container["volumeMounts"])
    (options,) = (
        each["autoscalerOptions"] for each in walk(found) if isinstance(each, dict) and "autoscalerOptions" in each
    )
    head = next(pod for pod in pods(found) if pod["containers"][0]["name"] == "ray-head")
    volumes = {volume["name"]: volume for volume in head["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in options["volumeMounts"]}
    sources = mounts["/var/run/secrets/kubernetes.io/serviceaccount"]["projected"]["sources"]
    assert {kind for source in sources for kind in source} == {"serviceAccountToken", "configMap", "downwardAPI"}
    assert "/tmp" in mounts


# What a container may know: a crawl asks Civitai, a driver fetches gated base models; all of them the bucket. Workers,
# which parse strangers' files, have no token.
BUCKET = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
SECRETS = {
    "crawl": {"CIVITAI_TOKEN"} | BUCKET,
    "ray-head": {"HF_TOKEN"} | BUCKET,
    "ray-worker": BUCKET,
    "ray-job-submitter": set(),
}


@pytest.mark.parametrize("name", KUBERNETES)
def test_secrets_are_only_where_they_are_used(name: str) -> None:
    for container in containers(documents(name)):
        assert "envFrom" not in container
        named = {each["name"]: each["valueFrom"] for each in container.get("env", ()) if "valueFrom" in each}
        assert set(named) == SECRETS[container["name"]]
        for variable, source in named.items():
            assert source["secretKeyRef"]["name"] == "lora-audit"
            assert source["secretKeyRef"]["key"] == variable


@pytest.mark.parametrize("name", KUBERNETES)
def test_no_image_goes_by_a_tag(name: str) -> None:
    for container in containers(documents(name)):
        image, at, digest = container["image"].partition("@")
        assert image == "registry.example.com/lora-audit", "a tag can be moved to another image"
        assert at
        assert digest == "sha256:EDIT", "the digest is that of the reader's build: a valid one here would be invented"


def test_the_digest_is_written_in_one_place(tmp_path: Path) -> None:
    text = (DEPLOY / "kustomization.yaml").read_text()
    said = yaml.safe_load(text)
    (image,) = said["images"]
    assert set(image) == {"name", "newName", "digest"}, "no newTag"
    assert "EDIT: newName, and digest" in text
    assert all((DEPLOY / one).is_file() for one in said["resources"])
    assert "networkpolicy.yaml" in said["resources"]
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    built = text.replace("newName: registry.example.com", "newName: registry.test").replace("EDIT\n", f"{'ab' * 32}\n")
    (tmp_path / "deploy/kustomization.yaml").write_text(built.replace("# - rayjob", "- rayjob"))
    done = subprocess.run(
        ["kubectl", "kustomize", tmp_path / "deploy"], capture_output=True, text=True, check=True, timeout=60
    )
    images = [each["image"] for each in containers([*yaml.safe_load_all(done.stdout)])]
    assert images == [f"registry.test/lora-audit@sha256:{'ab' * 32}"] * 7


def test_the_network_policy() -> None:
    policies = {
        one["metadata"]["name"]: one["spec"] for one in yaml.safe_load_all((DEPLOY / "networkpolicy.yaml").read_text())
    }
    spec, scaler = policies["lora-audit"], policies["lora-audit-autoscaler"]
    labels = [
        each["template"]["metadata"]["labels"]
        for name in KUBERNETES
        for each in walk(documents(name))
        if isinstance(each, dict) and "containers" in each.get("template", {}).get("spec", {})
    ]
    labels += [
        each["submitterPodTemplate"]["metadata"]["labels"]
        for name in KUBERNETES
        for each in walk(documents(name))
        if isinstance(each, dict) and "submitterPodTemplate" in each
    ]
    assert len(labels) == 7
    assert all(one == spec["podSelector"]["matchLabels"] for one in labels), "every pod is under the policy"
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    for rule in spec["ingress"]:
        assert rule["from"], "nobody is let in without a name"
        assert all("podSelector" in one for one in rule["from"])
    closed = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10", "127.0.0.0/8"}
    for rule in spec["egress"]:
        assert rule["to"]
        for block in (one["ipBlock"] for one in rule["to"] if "ipBlock" in one):
            assert closed <= set(block["except"])
            assert rule["ports"] == [{"protocol": "TCP", "port": 443}]
    assert scaler["podSelector"]["matchLabels"] == {"app": "lora-audit", "ray.io/node-type": "head"}
    assert scaler["policyTypes"] == ["Egress"]
    assert {port["port"] for rule in spec["ingress"] for port in rule.get("ports", ())} == {8265, 9808, 8080}


@pytest.mark.parametrize("name", KUBERNETES)
def test_stopping_waits_for_the_work(name: str) -> None:
    driver = "/opt/lora-audit/bin/python3 /opt/lora-audit/bin/lora-audit run --engine ray"
    hooks = [each["lifecycle"]["preStop"] for each in containers(documents(name)) if "lifecycle" in each]
    head, worker = (hook["exec"]["command"][2] for hook in hooks)
    for script in (head, worker):
        subprocess.run(["sh", "-n", "-c", script], check=True)
        for pattern in re.findall(r'-f "([^"]+)"', script):
            assert not re.search(pattern, f"sh -c {script}"), "it must not wait for itself"
            assert bool(re.search(pattern, driver)) == (script is head)
    (busy,) = re.findall(r'-f "([^"]+)"', worker)
    assert re.search(busy, "ray::Worker.audit")
    assert not any(re.search(busy, idle) for idle in ("ray::Worker", "ray::IDLE", "ray::RuntimeEnvAgent"))


# --- secrets, images, systemd ----------------------------------------------------------------------------------------


def test_no_secret_is_written_down() -> None:
    for path in [ROOT / "ray_cluster.yaml", *DEPLOY.iterdir()]:
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{12}|\bhf_[A-Za-z0-9]{8}|BEGIN [A-Z ]*PRIVATE KEY", text), path
        assert not re.search(r"(TOKEN|SECRET|PASSWORD|_KEY)[A-Z_]*(=|, value:|: )\s*[\"']?\w", text), path


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_dockerfile(name: str) -> None:
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE)
    lines = [line.split(maxsplit=1) for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]
    stages = [index for index, (word, _) in enumerate(lines) if word == "FROM"]
    build, last = lines[stages[0] : stages[-1]], lines[stages[-1] :]
    given = dict(rest.split("=", 1) for word, rest in lines[: stages[0]] if word == "ARG")
    bases = [rest.split()[0] for word, rest in lines if word == "FROM"]
    (base,) = {given[one.strip("${}")] for one in bases}  # both stages: what another image or digest can be given for
    assert ":" in base, "base images have a tag at least"
    assert [rest for word, rest in last if word == "USER"] == ["10001"]
    assert [rest for word, rest in last if word == "ENTRYPOINT"] == ['["lora-audit"]']
    assert any("g++" in rest for word, rest in build if word == "RUN")
    assert not any("g++" in rest for word, rest in last if word == "RUN")
    assert [rest for word, rest in build if word == "USER"] == [], "what is copied belongs to root: no run changes it"
    arguments = dict(rest.split("=") for word, rest in build if word == "ARG")
    assert arguments["TORCH_INDEX"].startswith("https://download.pytorch.org/whl/c")
    installs = [part for word, rest in build if word == "RUN" for part in rest.split("&&") if "pip install" in part]
    locked, torch, *libraries, ours = installs
    assert "--require-hashes --no-deps --requirement requirements.lock" in locked
    assert "--no-deps --index-url" in torch
    assert "torch.txt" in torch
    assert "grep '^torch==' constraints.txt" in " ".join(rest for _, rest in build)
    assert arguments["TORCH_SHA256"] == ""
    assert "${TORCH_SHA256:+--hash=sha256:$TORCH_SHA256}" in " ".join(rest for _, rest in build)
    assert len(libraries) == (name == "Dockerfile"), "torch's CUDA libraries, of which a CPU has none"
    assert all("constraints.txt)" in part for part in libraries)
    assert "--no-deps --no-build-isolation ." in ours, "what builds it is locked, too"

    copied = [source for word, rest in build if word == "COPY" for source in rest.split()[:-1]]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(kept), ".dockerignore keeps what is copied, and nothing else"
    assert all((ROOT / source).exists() for source in copied)
    needed = re.findall(r'"(\w+)\*"', re.search(r"^include = .*", (ROOT / "pyproject.toml").read_text(), re.M)[0])
    assert set(needed) <= {source for source in copied if not fnmatch(source, "*.*")}


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of every package of requirements.lock."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "requirements.lock").read_text())
    found = {}
    for line in (one for one in text.splitlines() if one.strip() and not one.startswith("#")):
        name, version_, hashes = re.fullmatch(
            r"([A-Za-z0-9._-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line
        ).groups()
        found[canonicalize_name(name)] = (version_, hashes.split())
    return found


def versions_of(name: str) -> dict[str, str]:
    pairs = (line.split("==") for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(package): number for package, number in pairs}


def test_the_lock_names_every_package_by_hash_and_the_tested_versions() -> None:
    found, tested = locked(), versions_of("constraints.txt")
    assert "torch" not in found, "its builds differ by index"
    assert "torch" in tested
    assert "setuptools" in found, "it builds the project without a network"
    for name, (number, hashes) in found.items():
        assert hashes
        assert tested.get(name, number) == number, name
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|^--|/tmp|/opt|/home", text, re.MULTILINE)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_is_complete(python: str) -> None:
    """What the project and every locked package need, on the Pythons of the images."""
    found = locked()
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    wanted = [
        Requirement(one) for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    seen: set[str] = set()
    while wanted:
        one = wanted.pop()
        name = canonicalize_name(one.name)
        if one.marker is not None and not one.marker.evaluate(environment):
            continue
        assert name in found or name == "torch", f"{one} is not locked for Python {python}"
        if name != "torch":
            assert one.specifier.contains(found[name][0], prereleases=True), one
        for extra in ("", *one.extras):
            if (key := f"{name}[{extra}]") not in seen:
                seen.add(key)
                for text in requires(name) or []:
                    need = Requirement(text)
                    marker = need.marker
                    if marker is None:
                        wanted += [need] if not extra else []
                    elif marker.evaluate(environment | {"extra": extra}):
                        need.marker = None
                        wanted.append(need)


def test_make_knows_the_lock_the_bill_of_materials_and_the_audit() -> None:
    for target, word in (
        ("lock", "--generate-hashes"),
        ("sbom", "cyclonedx-py requirements"),
        ("audit", "pip-audit --strict --require-hashes"),
    ):
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", target], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert word in done.stdout


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in re.sub(r"\\\n\s*", " ", (DEPLOY / name).read_text()).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


def test_service() -> None:
    service = unit("lora-audit.service")["Service"]
    assert service["Type"] == ["oneshot"]
    assert service["SuccessExitStatus"] == ["10 12 13"]
    assert service["KillSignal"] == ["SIGTERM"]
    assert int(service["TimeoutStopSec"][0]) > RunSettings().drain_seconds + 60
    assert service["User"] == ["lora-audit"]
    assert service["EnvironmentFile"] == ["/etc/lora-audit/environment"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["NoNewPrivileges"] == ["yes"]
    assert len(service["ExecStart"]) == 2
    (environment,) = service["Environment"]
    writable = ("/var/lib/lora-audit/", "/var/cache/lora-audit/")  # StateDirectory, CacheDirectory
    assert all(word.split("=")[1].startswith(writable) for word in environment.split())


def test_timer() -> None:
    timer = configparser.ConfigParser(delimiters="=", strict=True)
    timer.optionxform = str  # type: ignore[assignment,method-assign]
    timer.read(DEPLOY / "lora-audit.timer")
    assert timer["Timer"]["OnCalendar"]
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for name in ("lora-audit.service", "lora-audit.timer"):
        text = (DEPLOY / name).read_text().replace("/opt/lora-audit/bin/lora-audit", shutil.which("true") or "")
        (tmp_path / name).write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "lora-audit" not in done.stderr, done.stderr
