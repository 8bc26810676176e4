"""Which configured base an item of the catalog is audited on: by claims, then, for full weights, by the nearest one.

Where several bases of its family are configured and nothing is claimed, an adapter is not audited: its factors do not
tell its base (docs/models.md), and on another one an audit finds less, which nobody would notice. Distances of full
weights are kept (table ``base_distances``): a base is loaded once for all that lack theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from audit.config import Config
from audit.errors import CheckpointError, ConfigError
from audit.faults import is_of_the_item, reason_of_fault
from audit.job import BaseFacts, facts_of_base
from audit.models.bases import BaseClaim, claims_of, identified, named_in, of_name
from audit.models.families.identify import Family, agree
from audit.models.formats.detect import Format
from audit.workspace import Workspace

if TYPE_CHECKING:
    from audit.bench import Bench
    from audit.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)
TABLE = "base_distances"
MEND = "audit them with 'lora-audit scan ITEM --base SOURCE'"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Decision:
    """The base of a network, as the configuration calls it, or why it has none.

    ``row`` is the one of its rows that tells the base; ``said`` what its audit says of that.
    """

    name: str | None
    row: Mapping[str, Any]
    reason: str = ""
    said: tuple[str, ...] = ()


class Bases:
    """The configured bases, and which of them the networks of a catalog are audited on."""

    def __init__(self, workspace: Workspace, config: Config, bench: Callable[[], Bench]) -> None:
        self.workspace, self.config, self.bench = workspace, config, bench
        self._facts: dict[str, BaseFacts] = {}
        self._families: dict[str, str | None] = {}
        self._distances: dict[str, dict[str, float | None]] = {}  # by identity, then by the base's revision
        self._failed: dict[str, str] = {}  # what could not be measured now, and why

    def facts(self, name: str) -> BaseFacts:
        """The base model that is configured under ``name``."""
        if name not in self._facts:
            source, config = self.config.bases[name], self.config.base_configs.get(name)
            location = self.bench().locate(source, config)
            self._facts[name] = facts_of_base(source, config, location)
        return self._facts[name]

    def measure(self, networks: Mapping[str, Rows]) -> None:
        """Find out how far full weights whose base nothing else says are from the bases that may be theirs."""
        if len(self.config.bases) < 2:
            return
        asked = {identity: names for identity, rows in networks.items() if len(names := self._by_weights(rows)) > 1}
        if not asked:
            return
        for row in self.workspace.rows(
            f"SELECT * FROM {TABLE} WHERE list_contains(?::VARCHAR[], identity)", [list(asked)]
        ):
            self._distances.setdefault(row["identity"], {})[row["base_revision"]] = row["distance"]
        checkpoints: dict[str, Checkpoint] = {}
        for name in self.config.bases:
            wanting = [identity for identity, names in asked.items() if name in names and identity not in self._failed]
            if not wanting:
                continue
            try:
                revision = self.facts(name).revision
            except (CheckpointError, ConfigError) as error:
                self._failed |= dict.fromkeys(wanting, f"the base {name} is not at hand: {str(error)[:250]}")
                continue
            lacking = [identity for identity in wanting if revision not in self._distances.get(identity, {})]
            if lacking:
                self._measure(name, lacking, checkpoints)

    def _measure(self, name: str, identities: Sequence[str], checkpoints: dict[str, Checkpoint]) -> None:
        """Distances of full weights from one base, which is loaded for them."""
        from audit.models.checkpoint import open_checkpoint
        from audit.models.choose import distance
        from crawlers.store import Store

        facts, store, rows = self.facts(name), Store(self.workspace), []
        log.info("measuring how far %d full weights are from the base %s", len(identities), name)
        try:
            base = self.bench().base_at(self.bench().locate(facts.source, facts.config))
        except Exception as error:
            if not is_of_the_item(error):
                raise
            said = f"the base {name} cannot be loaded: {reason_of_fault(error, name, log)}"[:300]
            self._failed |= dict.fromkeys(identities, said)
            return
        for identity in identities:
            reason, found = None, None
            try:
                if identity not in checkpoints:
                    path = store.fetch(identity)
                    if path is None:
                        raise CheckpointError(f"{identity} has no stored file any more")
                    checkpoints[identity] = open_checkpoint(path)
                found = distance(base, checkpoints[identity])
            except CheckpointError as error:
                if identity not in checkpoints:
                    self._failed[identity] = str(error)[:200]
                    continue
                reason = str(error)[:1000]  # of another shape, or it predicts something else
            except Exception as error:
                if not is_of_the_item(error):
                    raise
                self._failed[identity] = reason_of_fault(error, identity, log)[:200]
                continue
            self._distances.setdefault(identity, {})[facts.revision] = found
            rows.append(
                {"identity": identity, "base_revision": facts.revision, "distance": found, "reason": reason,
                 "seen_at": datetime.now(UTC)}
            )  # fmt: skip
        if rows:
            self.workspace.append(TABLE, rows)

    def of(self, identity: str, rows: Rows) -> Decision:
        """The base of a network that is in the catalog as ``rows``; ``measure`` comes first."""
        for row in rows:
            if (name := self._claimed(claims_in(row))) is not None:
                return Decision(name, row)
        family = _family(rows)
        told = next((row for row in rows if _is_known(row)), next((row for row in rows if row["family"]), rows[0]))
        if len(names := self._by_weights(rows)) > 1:
            return self._nearest(identity, names, told)
        several = [name for name in self.config.bases if self._family_of(name) == family]
        if len(several) > 1 and not any(map(_is_known, rows)):
            return Decision(
                None, told,
                f"which of the bases {', '.join(several)} adapters of family {family} were trained on is not claimed, "
                f"and their factors do not tell: {MEND}, or say it in a sidecar",
            )  # fmt: skip
        if family in self.config.bases:
            return Decision(family, told)
        return Decision(None, told, f"no base model is configured for family {family}")

    def _nearest(self, identity: str, names: Sequence[str], told: Mapping[str, Any]) -> Decision:
        """Of full weights that have been measured."""
        from audit.models.choose import nearest

        if identity in self._failed:
            reason = f"which base full weights are nearest to cannot be told now: {self._failed[identity]}"
            return Decision(None, told, reason)
        known = self._distances.get(identity, {})
        found = {name: far for name in names if (far := known.get(self.facts(name).revision)) is not None}
        chosen, said = nearest(found)
        if chosen is not None:
            why = f"no base is claimed: its weights are nearest to {chosen} (relative change: {said})"
            return Decision(chosen, told, said=(why,))
        near = "are about as far from several of" if found else "fit none of"
        return Decision(
            None, told,
            f"full weights {near} the bases {', '.join(names)}, and claim none (the table {TABLE} has the distances): "
            f"{MEND}",
        )  # fmt: skip

    def _claimed(self, claims: Sequence[BaseClaim]) -> str | None:
        """The configured base that a claim names. A hash may be configured itself, or be that of a configured file."""
        for claim in claims:
            if (name := named_in(claim, self.config.bases)) is not None:
                return name
            if claim.by_hash and len(claim.text) == 64:
                found = (name for name in self.config.bases if claim.text.lower() in self._hashes(name))
                if (name := next(found, None)) is not None:
                    return name
        return None

    def _hashes(self, name: str) -> set[str | None]:
        """What a claim may name a configured base by: its revision, and the SHA256 of a denoiser's own file."""
        location = self.bench().locate(self.config.bases[name], self.config.base_configs.get(name))
        return {location.revision, location.file_sha256}

    def _by_weights(self, rows: Rows) -> list[str]:
        """The bases that full weights may be of, where nothing is claimed of theirs; empty for adapters."""
        family = _family(rows)
        if Format(rows[0]["format"]).is_adapter or family == "unknown" or any(map(_is_known, rows)):
            return []
        if any(self._claimed(claims_in(row)) for row in rows):
            return []
        found = ((name, self._family_of(name)) for name in self.config.bases)
        return [name for name, of in found if of is None or of == family or agree(family, of)]

    def _family_of(self, name: str) -> str | None:
        """The family of a configured base, by its name or by what it is; None where that is not known."""
        if name in [*Family]:
            return name
        if name not in self._families:
            try:
                facts = self.facts(name)
                known = identified(facts.name, facts.sha256, facts.source) or of_name(name)
            except (CheckpointError, ConfigError):  # not at hand: it is said where it is used
                known = of_name(name)
            self._families[name] = known.family if known else None
        return self._families[name]


def claims_in(row: Mapping[str, Any]) -> list[BaseClaim]:
    """What is claimed of an item's base, whom to believe most first."""
    from crawlers.items import base_claims_of

    return claims_of({}, [*base_claims_of(dict(row)), (row["base_model"] or "", "")])


def _family(rows: Rows) -> str:
    return next((row["family"] for row in rows if row["family"]), "unknown")


def _is_known(row: Mapping[str, Any]) -> bool:
    """Whether it claims a base that is known, though perhaps not configured: then the page says what is between."""
    return any(claim.known is not None for claim in claims_in(row))
