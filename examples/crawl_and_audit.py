"""The whole flow on this machine: crawl, run, report, query, against a local simulator of Civitai.

    .venv/bin/python examples/crawl_and_audit.py [FOLDER]

It publishes a LoRA of the embedded model on the simulator, crawls it into a workspace, audits it, and asks whether it
was trained on a portfolio, with pictures of its kind that it was not trained on as decoys. Every step is a command that
is printed before it runs. About a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the simulators live beside the tests

from audit.demo import ASSETS, set_folder
from tests.simulators.civitai import Civitai, SimFile, SimModel, SimVersion

DECOYS = Path(__file__).parent.parent / "testbed/controls/fluent-animals/control"
LORA = ASSETS / "checkpoints/fluent-animals-lora-kohya/fluent-animals.safetensors"
MATCHES_FOUND = 10


def lora_audit(*arguments: object, expected: int = 0) -> None:
    """Print and run one command."""
    shown = " ".join(f'"{argument}"' if " " in str(argument) else str(argument) for argument in arguments)
    print(f"\n$ lora-audit {shown}", flush=True)
    command = [sys.executable, "-c", "from audit.cli import main; main()", *map(str, arguments)]
    code = subprocess.run(command, check=False).returncode
    if code != expected:
        raise SystemExit(f"expected exit code {expected}, got {code}")


def main() -> None:
    """Run the flow in the folder that is given, else in a temporary one."""
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="lora-audit-example-"))
    os.environ["LORA_AUDIT_WORKSPACE"] = str(place / "workspace")
    os.environ["CIVITAI_TOKEN"] = "secret-token"
    version = SimVersion(
        id=201,
        name="v1",
        base_model="nano",
        trained_words=["sks 3d render of an animal"],
        files=[SimFile(301, LORA.name, LORA.read_bytes())],
    )
    with Civitai([SimModel(101, "Animals", creator="someone", versions=[version])]) as site:
        lora_audit("crawl", "civitai", "--endpoint", site.url, "--rate", "0", "--dry-run")
        lora_audit("crawl", "civitai", "--endpoint", site.url, "--rate", "0")
    lora_audit("catalog")
    described = ("--descriptor", "nano", "--base", "nano")
    lora_audit("references", "add", "portfolio", set_folder("fluent-animals", "train"), *described)
    lora_audit("references", "add", "unseen", DECOYS, *described, "--kind", "background", "--of", "portfolio")
    lora_audit(
        "run", "--base", f"nano={ASSETS / 'base'}", "--descriptor", "nano", "--references", "portfolio",
        "--set", "settings.images_per_training_image=8", expected=MATCHES_FOUND,
    )  # fmt: skip
    lora_audit("status")
    lora_audit(
        "query",
        "SELECT checkpoint_name, uploader, reference_set, pictures, decoys, p "
        "FROM set_chances JOIN audits USING (audit_id) JOIN checkpoints USING (checkpoint_sha256)",
    )
    for page in sorted((place / "workspace/reports").glob("*.html")):
        print(f"\nreport: {page}")


if __name__ == "__main__":
    main()
