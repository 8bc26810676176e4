"""JSON documents, and the numbers of a configuration."""

from __future__ import annotations

import json
from typing import Any

from audit.models.limits import problem_of
from audit.untrusted.child import Item, RefusedError


def document(item: Item) -> Any:
    """The plain value of a JSON document: bytes in an encoding that JSON has, or ``text``."""
    try:
        return json.loads(item.data.decode("utf-8", "surrogatepass") if item.said.get("text") else item.data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(str(error)) from error


def configuration(item: Item) -> str | None:
    """What a configuration asks for that no real one does; None where there is nothing."""
    return problem_of(document(item))


PARSERS = {"document": document, "configuration": configuration}
