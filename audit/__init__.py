"""lora-audit: which images was this fine-tuned diffusion model trained on?

The names below are loaded when they are first used: importing the package alone loads nothing heavy.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audit.api import Compared as Compared
    from audit.api import Result as Result
    from audit.api import add_references as add_references
    from audit.api import inspect as inspect
    from audit.api import match as match
    from audit.api import run as run
    from audit.api import scan as scan
    from audit.bench import Bench as Bench
    from audit.config import CaptionSettings as CaptionSettings
    from audit.config import Config as Config
    from audit.config import Settings as Settings
    from audit.config import load_config as load_config
    from audit.custody.again import Reproduced as Reproduced
    from audit.custody.again import reproduce as reproduce
    from audit.custody.check import verify_report as verify_report
    from audit.custody.findings import Verified as Verified
    from audit.custody.keep import Custody as Custody
    from audit.custody.keep import sign_report as sign_report
    from audit.custody.signing import SigningKey as SigningKey
    from audit.custody.signing import load_key as load_key
    from audit.engine.state import RunState as RunState
    from audit.errors import AuditError as AuditError
    from audit.errors import CheckpointError as CheckpointError
    from audit.errors import ConfigError as ConfigError
    from audit.errors import CustodyError as CustodyError
    from audit.errors import DescriptorError as DescriptorError
    from audit.errors import DeviceLostError as DeviceLostError
    from audit.errors import DeviceMemoryError as DeviceMemoryError
    from audit.errors import NoEffectError as NoEffectError
    from audit.errors import NotFiniteError as NotFiniteError
    from audit.errors import ReferenceSetError as ReferenceSetError
    from audit.errors import SamplingError as SamplingError
    from audit.errors import WorkspaceError as WorkspaceError
    from audit.job import Job as Job
    from audit.job import Request as Request
    from audit.recovery.ask import recover_captions as recover_captions
    from audit.recovery.recover import Recovered as Recovered
    from audit.upkeep import failures as failures
    from audit.upkeep import status as status
    from audit.upkeep import verify as verify
    from audit.workspace import Workspace as Workspace

    __version__: str

# Libraries beneath us report their use to their makers unless they are told not to. What is audited here is private.
_SILENT = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
for _name, _value in _SILENT.items():
    os.environ.setdefault(_name, _value)

_FROM = {
    "audit.api": ("Compared", "Result", "add_references", "inspect", "match", "run", "scan"),
    "audit.bench": ("Bench",),
    "audit.config": ("CaptionSettings", "Config", "Settings", "load_config"),
    "audit.custody.again": ("Reproduced", "reproduce"),
    "audit.custody.check": ("verify_report",),
    "audit.custody.findings": ("Verified",),
    "audit.custody.keep": ("Custody", "sign_report"),
    "audit.custody.signing": ("SigningKey", "load_key"),
    "audit.engine.state": ("RunState",),
    "audit.errors": (
        "AuditError", "CheckpointError", "ConfigError", "CustodyError", "DescriptorError", "DeviceLostError",
        "DeviceMemoryError", "NoEffectError", "NotFiniteError", "ReferenceSetError", "SamplingError", "WorkspaceError",
    ),
    "audit.job": ("Job", "Request"),
    "audit.recovery.ask": ("recover_captions",),
    "audit.recovery.recover": ("Recovered",),
    "audit.upkeep": ("failures", "status", "verify"),
    "audit.workspace": ("Workspace",),
}  # fmt: skip
_WHERE = {name: module for module, names in _FROM.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("lora-audit")
    elif name in _WHERE:
        found = getattr(import_module(_WHERE[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
