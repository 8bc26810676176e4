"""Every error this project raises on purpose. A message says what is wrong, in which file, and the mend."""

from __future__ import annotations

from datetime import datetime

from audit.locations import without_credentials
from audit.states import ItemState


class AuditError(Exception):
    """Something a user can mend; the command line prints the message and exits with 2.

    A message is shown, recorded and logged: URLs in it have no credentials.
    """

    def __init__(self, *said: object) -> None:
        super().__init__(*(without_credentials(one) if isinstance(one, str) else one for one in said))


class ConfigError(AuditError):
    """A configuration file, variable or option that says something that cannot be."""


class CheckpointError(AuditError):
    """A checkpoint or base model file that cannot be read, is not safe to read, or does not fit."""


class NotRecoverableError(CheckpointError):
    """Captions of such a model are not recovered."""


class NoEffectError(CheckpointError):
    """The checkpoint was read but changes nothing in the network: there is nothing to extract from."""


class ReferenceSetError(AuditError):
    """A reference set that does not exist, is empty, or was described by another descriptor."""


class DescriptorError(AuditError):
    """A descriptor that is missing, is not the pinned file, or has no working package."""


class WorkspaceError(AuditError):
    """A workspace that cannot be opened, written or understood."""


class CustodyError(AuditError):
    """A manifest, a signature or a key that cannot be read, or is not what it has to be."""


class SamplingError(AuditError):
    """Sampling that cannot go on."""


class NotFiniteError(SamplingError):
    """A network that answers with NaN or infinity: in half precision perhaps an overflow, else a broken checkpoint."""


class DeviceMemoryError(AuditError):
    """Something that does not fit into a device's memory, even one image or one network at a time."""


class DeviceLostError(AuditError):
    """A device that this process cannot use any more. No checkpoint is to blame, and none is counted."""


class CrawlError(AuditError):
    """A crawl that cannot start or go on: a refused host, a missing token, a source that does not answer."""


class StudyError(AuditError):
    """A study file, a few-shot set or a factor of it that says something that cannot be."""


class BoundaryError(AuditError):
    """The processes that parse strangers' files cannot be started. No file is to blame."""


class FetchError(AuditError):
    """One item that cannot be had. ``state`` is what the catalog records: failed (worth another try), refused, gone.

    ``wait`` is how many seconds the source wants to be left alone, None where asking again is of no use now. ``status``
    is that of HTTP, where there was an answer; ``until`` the date from which that answer says it can be had.
    """

    def __init__(
        self,
        message: str,
        state: ItemState = ItemState.failed,
        wait: float | None = None,
        status: int | None = None,
        until: datetime | None = None,
    ) -> None:
        super().__init__(message)
        self.state, self.wait, self.status, self.until = state, wait, status, until


class PausedError(FetchError):
    """The source wants none of our requests for a while, of whatever item: a quota is used up, a region is shut out."""


class BrokeOffError(FetchError):
    """An answer that ended before it was whole: asking again is of use, and a download goes on where it was."""
