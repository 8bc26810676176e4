"""What training may not undo: weights that stand still, and weights that move so that their sum does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Held:
    """``still``: where a parameter stands still, by the names of ``network``; ``columns`` and ``rows``: of which
    parameter the last of some input (output) channels moves against the sum of the others.
    """

    network: nn.Module
    still: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: list[tuple[str, list[int]]] = field(default_factory=list)
    rows: list[tuple[str, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = {id(parameter): name for name, parameter in self.network.named_parameters()}

    def hold(self, parameter: torch.Tensor, rows: list[int] | slice, columns: list[int] | slice = slice(None)) -> None:
        """Let these output channels of a parameter stand still (or of a convolution's weights, in these columns)."""
        mask = self.still.setdefault(self._names[id(parameter)], torch.zeros(parameter.shape, dtype=torch.bool))
        part = torch.zeros_like(mask)
        part[rows] = True
        if parameter.dim() > 1:
            only = torch.zeros_like(mask)
            only[:, columns] = True
            part &= only
        mask |= part

    def tie_columns(self, parameter: torch.Tensor, dependents: list[int], reference: int) -> None:
        """Count input channels from the ``reference``: what is added to their weights is taken from its."""
        if dependents:
            self.columns.append((self._names[id(parameter)], [*dependents, reference]))

    def tie_rows(self, parameter: torch.Tensor, dependents: list[int], reference: int) -> None:
        """Let the ``reference`` output channel stay the negated sum of the others, but for what it was at first."""
        if dependents:
            self.rows.append((self._names[id(parameter)], [*dependents, reference]))

    def state_dict(self) -> dict[str, Any]:
        """Plain data to save beside the network's weights."""
        return {"still": self.still, "columns": self.columns, "rows": self.rows}

    @classmethod
    def of(cls, network: nn.Module, state: dict[str, Any]) -> Held:
        """What ``state_dict`` gave, for the same kind of network."""
        return cls(network, state["still"], state["columns"], state["rows"])

    def to(self, device: str) -> Held:
        """Go where the network is."""
        self.still = {name: mask.to(device) for name, mask in self.still.items()}
        return self

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of ``optimizer`` that heeds what is held; gradients are clipped to a length of 1 before."""
        parameters = dict(self.network.named_parameters())
        gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        for name, (*dependents, reference) in self.columns:
            gradients[name][:, dependents] -= gradients[name][:, [reference]]
            gradients[name][:, reference] = 0
        for name, mask in self.still.items():
            gradients[name].masked_fill_(mask, 0)
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        before = {name: parameters[name].clone() for name, _ in (*self.columns, *self.rows)}
        optimizer.step()
        for axis, ties in ((1, self.columns), (0, self.rows)):
            for name, (*dependents, reference) in ties:
                chosen = torch.tensor(dependents, device=parameters[name].device)
                moved = (parameters[name] - before[name]).index_select(axis, chosen).sum(axis)
                parameters[name].select(axis, reference).copy_(before[name].select(axis, reference) - moved)
