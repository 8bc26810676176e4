"""What a check of a report finds: one sentence a part, and how that part stands to the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from audit.custody.record import keys_of
from audit.states import Agreement

MOST_NAMED = 100  # rows of a table, or pictures of a set, that are named one by one
LATER = ("evaluations",)  # tables to which another question adds rows that this page does not speak of
MOST_SHOWN = 120  # letters of a value

GONE = "this row is not there any more"


@dataclass(frozen=True)
class Finding:
    """One part of a report (a file, a table and the row's key, a setting, a picture), and what is to be said of it."""

    part: str
    state: Agreement
    said: str


@dataclass(frozen=True)
class PageCheck:
    """What was found of one page. ``signed_by`` are the key ids that its envelope claims."""

    page: str
    made: dict[str, Any] | None
    signed_by: list[str]
    findings: list[Finding]


@dataclass(frozen=True)
class Verified:
    """What was found of every page of an audit."""

    audit_id: str
    pages: list[PageCheck]

    def of(self, state: Agreement) -> list[Finding]:
        """The findings of all pages in ``state``."""
        return [one for page in self.pages for one in page.findings if one.state is state]

    @property
    def agrees(self) -> bool:
        """Whether nothing that was looked at differs."""
        return not self.of(Agreement.differs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``lora-audit verify AUDIT --json`` prints them."""
        return {"audit_id": self.audit_id, "agrees": self.agrees, "pages": [asdict(page) for page in self.pages]}


def shown(value: Any) -> str:
    """A value for a sentence, cut."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def named(key: tuple[Any, ...]) -> str:
    """The key of a row, for people: its table and what tells it from others."""
    table, *rest = key
    return f"{table} {' '.join(str(one) for one in rest)}".strip()[: 4 * MOST_SHOWN]


def changed_lines(then: Iterable[str], now: Iterable[str], whole: str) -> list[Finding]:
    """A finding a row that differs between two lists of lines; of a part called ``whole`` where there are too many."""
    gone, come = Counter(then), Counter(now)
    gone, come = gone - come, come - gone
    old, new = dict(keys_of(sorted(gone.elements()))), dict(keys_of(sorted(come.elements())))
    found = [Finding(named(key), Agreement.differs, "this row was changed since") for key in old if key in new]
    found += [Finding(named(key), Agreement.differs, GONE) for key in old if key not in new]
    for key in [key for key in new if key not in old]:
        if key[0] in LATER:
            found.append(Finding(named(key), Agreement.unchecked, "added since: the page does not speak of it"))
        else:
            found.append(Finding(named(key), Agreement.differs, "this row was added since"))
    return cut(found, whole)


def cut(found: Sequence[Finding], whole: str) -> list[Finding]:
    """``found``, of which MOST_NAMED stand for themselves."""
    if len(found) <= MOST_NAMED:
        return list(found)
    more = Finding(whole, found[0].state, f"{len(found) - MOST_NAMED} more of it, {len(found)} together")
    return [*found[:MOST_NAMED], more]


TOLD = "the manifest says {then}, the tables say {now}"


def differences(then: Any, now: Any, part: str, told: str = TOLD) -> Iterator[Finding]:
    """A finding for every leaf in which two plain values differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted({*then, *now}, key=str):
            yield from differences(then.get(name), now.get(name), f"{part}.{name}"[: 4 * MOST_SHOWN], told)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from differences(one, other, f"{part}.{number}", told)
    elif type(then) is not type(now) or then != now:
        yield Finding(part, Agreement.differs, told.format(then=shown(then), now=shown(now)))
