"""`lora-audit demo`: the whole flow on the embedded model."""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Annotated

import typer

from audit.cli.common import JsonOption, console, progress_display
from audit.cli.options import configured
from audit.config import Config, Rule
from audit.demo import BASE, FINE_TUNES

log = logging.getLogger(__name__)


class FineTune(StrEnum):
    """The shipped fine-tunes, by their key in FINE_TUNES."""

    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"
    dreambooth = "dreambooth"


@configured("settings.method", "workspace")
def demo(
    config: Config,
    checkpoint: Annotated[FineTune, typer.Option(help="Which shipped fine-tune to audit.")] = FineTune.lora_kohya,
    as_json: JsonOption = False,
) -> None:
    """Audit a checkpoint of the embedded model and open the evidence: recovered training images beside the originals.

    It is asked about the ten or so training pictures, with pictures of the same kind that were not trained on as
    decoys; where none come along, among such pictures, so that a false match would show. A minute or two on two cores.
    """
    from audit import api
    from audit.cli.custody import custody_of
    from audit.cli.scan import finish
    from audit.descriptors.facts import in_words
    from audit.descriptors.registry import descriptor_facts
    from audit.job import Request

    custody = custody_of(config)
    shipped = FINE_TUNES[checkpoint]
    pictures = shipped.pictures
    training = pictures / "train"
    if not as_json:
        log.info("auditing %s: which of the pictures in %s was it trained on?", shipped.path.name, pictures)
    request = Request(
        shipped.path,
        str(BASE),
        captions=[shipped.caption],
        n0=len(list(training.glob("*.png"))),
        settings=config.settings,
    )
    control = pictures / "control"
    if not as_json:
        log.info("which pictures are alike is judged by %s", in_words(descriptor_facts("nano").name))
    decoys = [shipped.background] if shipped.background else []
    if not decoys:
        log.warning("no decoys of its kind come along: what follows is by the fixed threshold, without an error rate")
    with progress_display(console()) as progress:
        result = api.scan(
            request, references=[training] if decoys else [training, control], background=decoys,
            descriptor="nano", workspace=config.workspace,
            rule=Rule.calibrated if decoys else Rule.fixed, training_images=training, control=control,
            custody=custody, progress=progress,
        )  # fmt: skip
    finish(result, as_json)
