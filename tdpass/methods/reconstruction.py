"""Each layer's answers kept near the dense model's while the channels that it reads are projected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from tdpass.formats.geometry import apply_dense
from tdpass.kinds import kind_of
from tdpass.ops import TorchOps
from tdpass.planner.projection import Joint, mixed
from tdpass.training.placement import placed_like, whole
from tdpass.training.stiefel import Polar, Projection
from tdpass.training.terms import State, Term

_OPS = TorchOps()
_PARTS = 8
_LEAST = 1e-6


@dataclass(frozen=True)
class Supervised:
    """A joint with the projection that is trained in it, and the weight and bias of the layer behind it."""

    joint: Joint
    projection: Projection
    kernel: Tensor
    bias: Tensor | None

    @property
    def varies(self) -> bool:
        """Whether the layer's answers differ from their mean at all; else there is nothing to be held to."""
        targets = torch.cat(list(self.joint.targets)).double()
        return float((targets - targets.mean(0)).square().mean()) > _LEAST * float(targets.square().mean())


class Reconstruction(Term):
    """Adds the gradient of  strength * ||Y - Y(P)||^2 / ||Y||^2  for the layer behind each projection.

    Y is less its mean. What the layer before makes is the dense model's on the calibration data, an eighth of
    it in turn at every step, so that every layer is supervised by itself.  A layer whose answers do not vary
    there is not.
    """

    def __init__(self, joints: Mapping[str, Supervised], strength: float) -> None:
        self.joints = {name: supervised for name, supervised in joints.items() if supervised.varies}
        self.strength, self.step = strength, 0
        self.found = dict.fromkeys(joints, 0.0)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        for name, supervised in self.joints.items():
            projection = supervised.projection
            if projection.q.grad is None or not self.strength:
                continue
            held = [
                whole(value.detach()).clone().requires_grad_() for value in (projection.q, projection.shift)
            ]
            with torch.enable_grad():
                loss = self._gap(supervised, *held)
                slopes = torch.autograd.grad(loss, held)
            self.found[name] = float(loss.detach()) ** 0.5
            for value, slope in zip((projection.q, projection.shift), slopes, strict=True):
                if value.grad is not None:
                    value.grad.add_(placed_like(slope, value.grad), alpha=self.strength)
        self.step += 1

    def _gap(self, supervised: Supervised, q: Tensor, shift: Tensor) -> Tensor:
        joint, kernel, bias = supervised.joint, supervised.kernel, supervised.bias
        p: Tensor = Polar.apply(q)  # type: ignore[no-untyped-call]
        read, spread = joint.narrowed(p.shape[1]), joint.read.i // joint.first.o
        part, number = self.step % _PARTS, self.step // _PARTS % len(joint.made)
        z = joint.made[number].to(q)
        chosen = slice(
            part * len(z) // _PARTS, max((part + 1) * len(z) // _PARTS, part * len(z) // _PARTS + 1)
        )
        o, _, *kernels = joint.read.shape
        narrow = (
            torch.tensordot(kernel.to(q).reshape(o, -1, spread, *kernels), p, dims=([1], [0]))
            .movedim(-1, 1)
            .reshape(read.shape)
        )
        y = apply_dense(
            _OPS,
            joint.between(mixed(z[chosen], p.T, shift, joint.first)),
            narrow,
            None if bias is None else bias.to(q),
            read,
        )
        wanted = joint.targets[number].to(q)
        rows = len(wanted) // len(z)
        target = wanted[chosen.start * rows : chosen.stop * rows]
        spreads = (wanted - wanted.mean(0)).square().mean().clamp_min(1e-12)
        return (kind_of(read).output_rows(y, read) - target).square().mean() / spreads

    def residuals(self) -> Mapping[str, float]:
        return dict(self.found)

    def state(self) -> State:
        return {"step": self.step}

    def load_state(self, state: Mapping[str, object]) -> None:
        self.step = int(str(state["step"]))
