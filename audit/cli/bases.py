"""``--base auto``: of the bases at hand the one that a file wants."""

from __future__ import annotations

import logging
from pathlib import Path

from audit.config import Config

log = logging.getLogger(__name__)
AUTO = "auto"


def chosen(config: Config, file: str | Path, base: str, base_config: str | None) -> tuple[str, str | None]:
    """``base`` and ``base_config``; for auto those of the configured bases that ``file``, or an item, wants.

    Raises ConfigError where it cannot be told.
    """
    if base != AUTO:
        return base, base_config
    from audit.api import is_item
    from audit.models.checkpoint import open_checkpoint
    from audit.models.choose import choose_base

    others: list[tuple[str, str]] = []
    path = Path(file)
    if is_item(path):
        from audit.workspace import Workspace
        from crawlers.catalog import Catalog, OptOuts

        opened = Workspace(config.workspace, create=False)
        entry = Catalog(opened, OptOuts.read(opened, None)).entry(str(file))
        path, others = entry.path, entry.bases
    choice = choose_base(open_checkpoint(path), config.bases, config.base_configs, others)
    log.info("base: %s, for %s", choice.name, choice.why)
    return choice.source, choice.config
