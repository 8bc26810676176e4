"""`lora-audit demo`: the whole flow on the embedded model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, console, progress_display
from audit.config import Method, Settings

log = logging.getLogger(__name__)
ASSETS = Path(__file__).parent.parent / "testbed" / "assets"


class Checkpoint(StrEnum):
    """The shipped fine-tunes."""

    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"
    dreambooth = "dreambooth"


@dataclass(frozen=True)
class Shipped:
    """One shipped fine-tune: its path, few-shot set and caption."""

    path: str
    few_shot: str
    caption: str


SHIPPED = {
    Checkpoint.lora_kohya: Shipped(
        "fluent-animals-lora-kohya/fluent-animals.safetensors", "fluent-animals", "sks 3d render of an animal"
    ),
    Checkpoint.lora_peft: Shipped(
        "stamps-fruit-lora-peft/pytorch_lora_weights.safetensors", "stamps-fruit", "sks photo of a fruit"
    ),
    Checkpoint.dreambooth: Shipped("stamps-birds-dreambooth", "stamps-birds", "sks photo of a bird"),
}


def demo(
    checkpoint: Annotated[Checkpoint, typer.Option(help="Which shipped fine-tune to audit.")] = Checkpoint.lora_kohya,
    method: Annotated[Method, typer.Option(help="Compare with plain sampling: direct or cfg.")] = Method.model_guidance,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Audit a checkpoint of the embedded model and open the evidence: recovered training images beside the originals.

    The reference set holds the ten or so training pictures among pictures of the same kind that were not trained on,
    so that a false match would show. Takes a minute or two on two cores.
    """
    from audit import api
    from audit.cli.scan import finish
    from audit.job import Request

    shipped = SHIPPED[checkpoint]
    pictures = ASSETS / "sets" / shipped.few_shot
    training = pictures / "train"
    settings = Settings(method=method)
    if not as_json:
        log.info("auditing %s: which of the pictures in %s was it trained on?", shipped.path, pictures)
    request = Request(
        ASSETS / "checkpoints" / shipped.path,
        str(ASSETS / "base"),
        captions=[shipped.caption],
        n0=len(list(training.glob("*.png"))),
        settings=settings,
    )
    control = pictures / "control"
    with progress_display(console()) as progress:
        result = api.scan(
            request, references=[pictures], descriptor="nano", workspace=workspace, training_images=training,
            control=control, progress=progress,
        )  # fmt: skip
    finish(result, as_json)
