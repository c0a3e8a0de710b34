"""Projecting the channels between two layers.

Mixtures of the first one's, and what the second makes of them, by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.formats.geometry import apply_dense
from tdpass.formats.metric import Metric, eigenpairs
from tdpass.kinds import kind_of
from tdpass.ops import TorchOps
from tdpass.planner.moments import working
from tdpass.site import Site

STEPS = 80
_RATE = 1e-1
_ROWS = 2**24
_RIDGE = 1e-4
_OPS = TorchOps()


@dataclass(frozen=True)
class Joint:
    """What a joint between two layers is fitted on.

    `made` is what the first layer makes, one tensor per run, `between` what lies between the two, and
    `targets` what the second shall answer, as rows.  `read` is the second layer's site and `outputs` says how
    much its answers matter, as in `Metric`.
    """

    made: Sequence[Tensor]
    between: Callable[[Tensor], Tensor]
    targets: Sequence[Tensor]
    first: Site
    read: Site
    outputs: Tensor | None

    def narrowed(self, count: int) -> Site:
        """The second layer's site where the first makes `count` channels."""
        spread = self.read.i // self.first.o
        return replace(self.read, shape=(self.read.o, spread * count, *self.read.kernel))

    def answers(self, found: Projected) -> list[Tensor]:
        """What the second layer answers to the mixtures."""
        read = self.narrowed(len(found.mix))
        with torch.no_grad():
            return [
                apply_dense(
                    _OPS,
                    self.between(mixed(z, found.mix.to(z), found.shift.to(z), self.first)),
                    found.kernel.to(z),
                    found.bias.to(z),
                    read,
                )
                for z in self.made
            ]


@dataclass(frozen=True)
class Projected:
    """`z -> mix z + shift` after the first layer, and the second layer on what is left.

    Its relative error on what it was fitted on.
    """

    mix: Tensor
    shift: Tensor
    kernel: Tensor
    bias: Tensor
    error: float


def mixed(z: Tensor, mix: Tensor, shift: Tensor, site: Site) -> Tensor:
    """`mix z + shift` over the channels that the site makes."""
    axis = site.channel_axis(z.dim())
    y: Tensor = torch.tensordot(mix, z, dims=([1], [axis]))
    return y.movedim(0, axis) + shift.reshape(-1, *(1 for _ in range(site.axes)))


def principal(joint: Joint, count: int) -> Tensor:
    """The `count` directions `[count, n]` along which what the first layer makes varies most."""
    rows = torch.cat([kind_of(joint.first).output_rows(z, joint.first) for z in joint.made]).double()
    rows = rows - rows.mean(0)
    return eigenpairs(rows.T @ rows)[1][:, -count:].T.flip(0).contiguous()


def selection(channels: Sequence[int], width: int) -> Tensor:
    """The mixtures that are these channels themselves."""
    return torch.eye(width, dtype=torch.float64)[list(channels)]


def solved(joint: Joint, mix: Tensor, shift: Tensor | None = None) -> Projected:
    """The best second layer for given mixtures, in closed form.

    min_{W, b} sum || G^1/2 (W f(mix z + shift) + b - target) ||^2 with a small ridge on W; G does not change
    the solution.
    """
    read = joint.narrowed(len(mix))
    shift = mix.new_zeros(len(mix)) if shift is None else shift
    width = read.weights // read.o
    normal, cross = (
        torch.zeros(width + 1, width + 1, dtype=torch.float64),
        torch.zeros(read.o, width + 1, dtype=torch.float64),
    )
    spread, count = torch.zeros(read.o, read.o, dtype=torch.float64), 0
    for number, (z, target) in enumerate(zip(joint.made, joint.targets, strict=True)):
        h = joint.between(mixed(z, mix.to(z), shift.to(z), joint.first))
        limit = max(4 * width, _ROWS // (width + 1))
        rows = working(kind_of(read).rows(h, read, limit, torch.Generator().manual_seed(number)))
        wanted = (
            target
            if len(target) <= limit
            else target[torch.randperm(len(target), generator=torch.Generator().manual_seed(number))[:limit]]
        )
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        normal += (rows.T @ rows).double()
        cross += (wanted.to(rows).T @ rows).double()
        spread += (wanted.T @ wanted).double()
        count += len(rows)
    ridge = torch.full(
        (width + 1,), _RIDGE * float(normal.diagonal()[:-1].mean()) + 1e-12, dtype=torch.float64
    )
    ridge[-1] = 1e-12
    found = torch.linalg.solve(normal + torch.diag(ridge), cross.T).T
    mean = cross[:, -1:] / count
    weigh = Metric(None, joint.outputs).times_outputs
    left = spread - found @ cross.T - cross @ found.T + found @ normal @ found.T
    whole = spread - count * mean @ mean.T
    error = max(0.0, float(weigh(left).trace())) / max(float(weigh(whole).trace()), 1e-30)
    return Projected(
        mix, shift, found[:, :-1].reshape(read.shape).contiguous(), found[:, -1].contiguous(), error**0.5
    )


def refined(joint: Joint, start: Projected, steps: int = STEPS) -> Projected:
    """Mixtures whose second layer answers better, by gradient steps on both from those given.

    The start where that finds none. The nonlinearity between the two rules out a closed form for the
    mixtures; the second layer is solved for at the end.
    """
    if not steps:
        return start
    read, root = joint.narrowed(len(start.mix)), Metric(None, joint.outputs).output_roots
    dtype = joint.made[0].dtype
    held = [
        value.to(dtype).detach().clone().requires_grad_()
        for value in (start.mix, start.shift, start.kernel, start.bias)
    ]
    mix, shift, kernel, bias = held
    weigh = None if root is None else root[0].to(dtype)
    rates = [_RATE * float(value.detach().square().mean().sqrt()) for value in (mix, shift, kernel, bias)]
    rates[1], rates[3] = rates[0], max(rates[3], rates[2])
    optimizer = torch.optim.Adam(
        [{"params": [value], "lr": rate or _RATE} for value, rate in zip(held, rates, strict=True)]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps + 1
    )
    with torch.enable_grad():
        for step in range(steps):
            z, target = joint.made[step % len(joint.made)], joint.targets[step % len(joint.made)]
            y = apply_dense(_OPS, joint.between(mixed(z, mix, shift, joint.first)), kernel, bias, read)
            gap = kind_of(read).output_rows(y, read) - target.to(dtype)
            loss = (gap if weigh is None else gap @ weigh).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    found = solved(joint, mix.detach().double(), shift.detach().double())
    return found if found.error < start.error else start
