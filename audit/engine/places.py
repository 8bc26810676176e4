"""The place of a worker of another process: its own view of the workspace, and its own bench."""

from __future__ import annotations

from dataclasses import dataclass

from audit.bench import Bench
from audit.config import Compile
from audit.devices import default_device
from audit.engine.work import Place
from audit.states import Needs
from audit.workspace import Workspace


@dataclass(frozen=True)
class OpenWorkspace:
    """Opens a worker's place; it travels once a worker. What needs no GPU is given a bench without one."""

    workspace: str
    batch_size: int = 0
    compile: Compile = Compile.off
    device: str | None = None

    def __call__(self, needs: Needs) -> Place:
        """A new place."""
        device = "cpu" if needs is Needs.cpu else self.device or default_device()
        return Place(Workspace(self.workspace), Bench(device, self.batch_size, self.compile))
