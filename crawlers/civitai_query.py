"""What Civitai is asked for, and what one answer of its listing is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from crawlers.items import Item, dict_of, text_of
from crawlers.source import asked

ADAPTERS = ("LORA", "LoCon", "DoRA")
PAGE = 100


class Sort(StrEnum):
    """The orders of a listing."""

    newest = "Newest"
    downloaded = "Most Downloaded"
    rated = "Highest Rated"


@dataclass(frozen=True)
class CivitaiQuery:
    """What GET /models is asked for. ``since`` drops versions published before it."""

    query: str | None = asked(None, "Words in the model's name.")
    tag: str | None = asked(None, "Only models with this tag.")
    username: str | None = asked(None, "Only this uploader's.")
    base_models: tuple[str, ...] = asked((), 'Such as "SD 1.5"; repeat for several.', option="base-model")
    types: tuple[str, ...] = asked(ADAPTERS, "LORA, LoCon, DoRA, Checkpoint. Repeat for several.", option="type")
    sort: Sort = asked(Sort.newest, "Newest (ends early when run again), Most Downloaded, Highest Rated.")
    nsfw: bool = asked(False, "Also what the source marks as adult; hidden by default.")
    since: datetime | None = asked(None, "Only what is newer (UTC).")
    families: tuple[str, ...] = asked(
        (), "Only download files whose tensors are those of this family, such as sdxl; told by their header. Repeat.",
        option="family",
    )  # fmt: skip

    def parameters(self) -> list[tuple[str, str]]:
        """The query string, without paging."""
        pairs = [("query", self.query), ("tag", self.tag), ("username", self.username), ("sort", self.sort)]
        found = [(name, value) for name, value in pairs if value]
        found += [("types", value) for value in self.types] + [("baseModels", value) for value in self.base_models]
        return [*found, ("nsfw", "true" if self.nsfw else "false"), ("limit", str(PAGE))]


@dataclass(frozen=True)
class Listed:
    """One answer of the listing: its items, the cursor behind it, what was passed over, and its models' ids."""

    items: list[Item]
    following: str | None
    passed_over: tuple[str, ...]
    models: frozenset[str]


def ids_of(models: list[Any]) -> frozenset[str]:
    """The ids of an answer's models."""
    return frozenset(filter(None, (text_of(dict_of(model).get("id"), 40) for model in models)))
