"""Errors that nobody foresaw, of one item among many: logged with all that is known, recorded with how to find it."""

from __future__ import annotations

import logging
import secrets

from audit.errors import AuditError, BoundaryError, WorkspaceError
from audit.locations import without_credentials
from audit.storable import storable


def is_of_the_item(error: Exception) -> bool:
    """Whether ``error`` may be one item's own: a storage, or a system, that fails would fail for all others too."""
    return not isinstance(error, WorkspaceError | BoundaryError)


def reason_of_fault(error: Exception, what: str, log: logging.Logger) -> str:
    """What to record of an unforeseen ``error`` with ``what``: its class, its words, and a trace id.

    The log has the same id beside the traceback. An error raised on purpose says enough by itself.
    """
    if isinstance(error, AuditError):
        return storable(str(error))[:1000]
    trace = secrets.token_hex(4)
    reason = f"unforeseen {type(error).__name__}: {storable(without_credentials(str(error)))[:200]} (trace {trace})"
    log.error("%s: %s", storable(what)[:300], reason, exc_info=error, extra={"fields": {"trace": trace}})
    return reason
