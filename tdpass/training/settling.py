"""Weights put on levels together, as the curvature of the loss has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tdpass.constraints.lattice import Lattice
from tdpass.constraints.levels import UniformLevels
from tdpass.errors import UsageError
from tdpass.training.gauss_newton import gauss_newton
from tdpass.training.held import Held
from tdpass.training.placement import from_owner, placed_like, whole, world
from tdpass.training.terms import State

_SLOPE = 5
LARGEST = 16_384  # unknowns: a matrix of 2 GB in double precision


class Settling(Held):
    """min over W on levels of  g . (W - W0) + (W - W0)^T (H + damping mean(diag H)) (W - W0) / 2,  and a share of them held there.

    H is the Gauss-Newton matrix over all surviving weights and what is not constrained (biases, norms), from the first `samples` of the
    phase; g is the gradient of the loss over five times as many, which it needs as it is small where training has ended, and costs nothing
    but steps: nothing moves meanwhile.  Levels are found by coordinate descent (`Lattice`) with the
    unconstrained ones eliminated; then the `share` of the weights whose move costs least is held on its levels, all other
    unknowns take the values that compensate best, and train on.  Weights held before may change their level.  The damping grows until the
    weights move by no more than half their norm beyond what rounding moves them.

    `weights` are those with levels, `others` what is not constrained, both by parameter name; `plain()` is a copy of the model on
    this process.  Memory: n^2 for n unknowns.  Raises `UsageError` for more than 16,384 of them.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: Callable[[], nn.Module],
        weights: Mapping[str, nn.Parameter],
        levels: Mapping[str, UniformLevels],
        others: Mapping[str, nn.Parameter],
        share: float,
        samples: int = 2000,
        damping: float = 1.0,
    ) -> None:
        super().__init__({**weights, **others})
        loose = [name for name, bound in levels.items() if bound.interval is None]
        if loose:
            raise UsageError(f"levels of {', '.join(loose)} have no interval; freeze them on the weights first")
        self.model, self.plain, self.levels, self.share, self.samples, self.damping = model, plain, dict(levels), share, samples, damping
        self.entries: dict[str, Tensor] = {}
        self.seen, self.bent, self.steps = 0, 0, 0
        self.slope = torch.zeros(0, dtype=torch.float64)
        self.matrix: Tensor | None = None
        self.inputs: tuple[Any, ...] = ()
        self.hook: RemovableHandle | None = None

    def settled(self) -> bool:
        """Whether weights have been put on their levels."""
        return self.seen >= _SLOPE * self.samples

    @torch.no_grad()
    def begin_round(self, progress: float) -> None:
        if not self.entries:
            self._find_entries()
            self.slope = torch.zeros(sum(index.numel() for index in self.entries.values()), dtype=torch.float64)
            self.values = {name: weight.detach().clone() for name, weight in self.weights.items()}
            self.masks = {name: torch.ones_like(weight, dtype=torch.bool, requires_grad=False) for name, weight in self.weights.items()}
        if not self.settled() and self.hook is None:
            self.hook = self.model.register_forward_pre_hook(self._see)

    def _find_entries(self) -> None:
        for name, weight in self.weights.items():
            full = whole(weight.detach()).reshape(-1)
            self.entries[name] = full.nonzero().flatten() if name in self.levels else torch.arange(full.numel(), device=full.device)
        size = sum(index.numel() for index in self.entries.values())
        if size > LARGEST:
            raise UsageError(f"levels by curvature have {size:,} unknowns here, at most {LARGEST:,} are solved for; prune harder, or fix levels by nearest")

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs or not all(isinstance(value, Tensor) for value in inputs):
            raise UsageError("levels by curvature need a model that takes tensors by position, samples along axis 0; fix levels by nearest instead")
        if module.training:
            self.inputs = inputs

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        if not self.settled():
            self.steps += 1
            grads = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in self.weights.items()}
            self.slope += torch.cat([_flat(whole(grad), self.entries[name]) for name, grad in grads.items()]).double().cpu()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        super().after_step(optimizer)
        if self.settled() or not self.inputs:
            return
        batch = len(self.inputs[0]) * world()[1]
        if self.bent < self.samples:
            found = gauss_newton(self.plain(), self.inputs, self.entries)
            self.matrix = found if self.matrix is None else self.matrix.add_(found)
            self.bent += batch
        self.seen += batch
        self.inputs = ()
        if self.settled():
            if self.hook is not None:
                self.hook.remove()
                self.hook = None
            self._settle()
            self.matrix = None
            super().after_step(optimizer)

    def _settle(self) -> None:
        assert self.matrix is not None
        if world()[1] > 1:
            dist.all_reduce(self.matrix)
        full = {name: whole(weight.detach()) for name, weight in self.weights.items()}
        start = torch.cat([_flat(value, self.entries[name]) for name, value in full.items()]).double().cpu()
        point, held = start.clone(), torch.zeros(len(start), dtype=torch.bool)
        if world()[0] == 0:
            point, held = self._solve(start, self.matrix.double().cpu() / self.bent, self.slope / self.steps)
        device = self.matrix.device
        point, held = from_owner(point.to(device), 0), from_owner(held.to(device), 0)
        offset = 0
        for name, weight in self.weights.items():
            index, value = self.entries[name], full[name].clone().contiguous()
            mask = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
            inside = slice(offset, offset + index.numel())
            value.view(-1)[index] = point[inside].to(value)
            mask.view(-1)[index] = held[inside]
            if name in self.levels:
                value = torch.where(mask, self.levels[name].project(value), value)
                mask |= value == 0
            offset += index.numel()
            self.values[name], self.masks[name] = placed_like(value, weight), placed_like(mask, weight)
            weight.copy_(self.values[name])

    def _solve(self, start: Tensor, matrix: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """(values of all unknowns, which of them are held)."""
        sizes = [(name, index.numel()) for name, index in self.entries.items()]
        count = sum(size for name, size in sizes if name in self.levels)
        lattice = Lattice(*(torch.cat(parts) for parts in zip(*(self._grid(name, size) for name, size in sizes if name in self.levels), strict=True)))
        levelled, limit = slice(0, count), float(start[:count].norm()) / 2 + float((lattice.nearest(start[:count]) - start[:count]).norm())
        damping = self.damping * (float(matrix.diagonal()[levelled].mean()) or 1.0)
        while True:
            damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
            move, held = self._move(start, damped, slope, lattice, count)
            if float(move[levelled].norm()) <= limit:
                return start + move, held
            damping *= 4  # so far off the quadratic model says nothing

    def _move(self, start: Tensor, matrix: Tensor, slope: Tensor, lattice: Lattice, count: int) -> tuple[Tensor, Tensor]:
        """(change of all unknowns, which of them are held) under a damped matrix; the first `count` have levels."""
        levelled, loose = slice(0, count), slice(count, None)
        freed = torch.linalg.solve(matrix[loose, loose], torch.cat([matrix[loose, levelled], slope[loose, None]], 1))
        reduced, pull = matrix[levelled, levelled] - matrix[levelled, loose] @ freed[:, :-1], slope[levelled] - matrix[levelled, loose] @ freed[:, -1]
        move = torch.zeros_like(start)
        move[levelled] = lattice.descend(reduced, pull, start[levelled]) - start[levelled]
        cost = move[levelled].abs() * matrix.diagonal()[levelled].sqrt()
        held = torch.zeros(len(start), dtype=torch.bool)
        held[cost.argsort(stable=True)[: round(self.share * count)]] = True
        free = ~held
        move[free] = -torch.linalg.solve(matrix[free][:, free], matrix[free][:, held] @ move[held] + slope[free])
        return move, held

    def _grid(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        bound = self.levels[name]
        assert bound.interval is not None
        return torch.full((size,), bound.interval, dtype=torch.float64), torch.full((size,), float(bound.count), dtype=torch.float64)

    def state(self) -> State:
        state = super().state() | {"seen": self.seen, "bent": self.bent, "steps": self.steps, "unknowns": len(self.slope), "slope": self.slope}
        return state if self.matrix is None else state | {"matrix": self.matrix}

    def resume_at(self, facts: Mapping[str, Any]) -> None:
        self.seen, self.bent, self.steps, size = (int(facts[key]) for key in ("seen", "bent", "steps", "unknowns"))
        self.slope = torch.zeros(size, dtype=torch.float64)
        self.matrix = torch.zeros(size, size) if self.seen > 0 and not self.settled() else None

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.slope, self.matrix = state["slope"], state.get("matrix")
        self._find_entries()
        self.begin_round(0.0)


def _flat(value: Tensor, index: Tensor) -> Tensor:
    return value.reshape(-1)[index]
