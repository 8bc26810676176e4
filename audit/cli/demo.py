"""`lora-audit demo`: the whole flow on the embedded model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from audit.cli.common import JsonOption
from audit.cli.options import configured
from audit.config import Config

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


@configured("settings.method", "workspace")
def demo(
    config: Config,
    checkpoint: Annotated[Checkpoint, typer.Option(help="Which shipped fine-tune to audit.")] = Checkpoint.lora_kohya,
    as_json: JsonOption = False,
) -> None:
    """Audit a checkpoint of the embedded model and open the evidence: recovered training images beside the originals.

    The reference set holds the ten or so training pictures among pictures of the same kind that were not trained on,
    so that a false match would show. Takes a minute or two on two cores.
    """
    from audit.cli.scan import finish, run_scan
    from audit.engine.plan import Request

    shipped = SHIPPED[checkpoint]
    pictures = ASSETS / "sets" / shipped.few_shot
    training = pictures / "train"
    if not as_json:
        log.info("auditing %s: which of the pictures in %s was it trained on?", shipped.path, pictures)
    request = Request(
        ASSETS / "checkpoints" / shipped.path,
        str(ASSETS / "base"),
        captions=[shipped.caption],
        n0=len(list(training.glob("*.png"))),
        settings=config.settings,
    )
    control = pictures / "control"
    result = run_scan(request, [str(pictures)], "nano", config.workspace, training_images=training, control=control)
    finish(result, as_json)
