"""Fit `W[o, a, b] ~ sum_r last[o, r, b] first[r, a]` in a metric: two convolutions in a row.

Spatial SVD has `a = (i, h)`, `b = w`; a 1x1 convolution followed by a k x k one has `a = i`, `b = (h, w)`,
and Tucker-2 is the latter with `last` of low rank.  In the Frobenius norm the optimum is one SVD; in a metric
`last` has a closed form given `first`, and `first` is improved by conjugate gradients, in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tdpass.formats.alternating import factored_gram, solve_factored
from tdpass.formats.metric import Metric
from tdpass.formats.spectrum import WeightedSvd

_SWEEPS = 5
_PLAIN_SWEEPS = 2
_PLAIN_WEIGHTS = 2**18
_STEPS = 6
_WORK = 4e10


@dataclass(frozen=True)
class SharedFit:
    """The problem: `weight[o, a, b]` and the metric with its input axis ordered (a, b)."""

    weight: Tensor
    metric: Metric
    _begun: dict[int, tuple[Tensor, WeightedSvd]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, weight: Tensor, shared: tuple[int, ...], metric: Metric) -> SharedFit:
        """Gather the axes `shared` of `weight[o, i, *kernel]` into a, the others but o into b."""
        rest = tuple(axis for axis in range(1, weight.dim()) if axis not in shared)
        o, a = weight.shape[0], 1
        for axis in shared:
            a *= weight.shape[axis]
        gathered = weight.permute(0, *shared, *rest).reshape(o, a, -1)
        inputs = metric.inputs
        if inputs is not None:
            order = torch.arange(weight[0].numel()).reshape(weight.shape[1:])
            index = order.permute(*(axis - 1 for axis in (*shared, *rest))).reshape(-1)
            inputs = inputs[index] if inputs.dim() == 1 else inputs[index][:, index]
        return cls(gathered, Metric(None if inputs is None else inputs.double(), metric.outputs))

    @cached_property
    def marginal(self) -> Tensor | None:
        """The input metric of `a` alone: C averaged over b."""
        c = self.metric.inputs
        _, a, b = self.weight.shape
        if c is None:
            return None
        return (
            c.reshape(a, b).mean(1)
            if c.dim() == 1
            else c.reshape(a, b, a, b).diagonal(dim1=1, dim2=3).mean(-1)
        )

    @cached_property
    def start(self) -> WeightedSvd:
        """The optimum under the marginal metric, for all ranks.

        The true optimum where the metric is plain.
        """
        o, a, b = self.weight.shape
        roots = self.metric.output_roots
        weighted = self.weight if roots is None else (roots[0] @ self.weight.reshape(o, -1)).reshape(o, a, b)
        return WeightedSvd(weighted.permute(0, 2, 1).reshape(o * b, a), Metric(self.marginal))

    def solve(self, rank: int, core_rank: int | None = None, rough: bool = False) -> tuple[Tensor, Tensor]:
        """`first[r, a]` and `last[o, r, b]`, of rank at most `core_rank` as an `o x (r b)` matrix."""
        return self.solve_split(rank, core_rank, rough)[:2]

    def solve_split(
        self, rank: int, core_rank: int | None, rough: bool = False
    ) -> tuple[Tensor, Tensor, WeightedSvd | None]:
        """As `solve`, with the truncated decomposition of `last` where a core rank below full was asked for.

        `rough` does not improve `first`.
        """
        first, free = self._begin(rank)
        last, split = self._truncated(free, rank, core_rank)
        if rough or (self.metric.plain and core_rank is None):
            return first, last, split
        o, a, b = self.weight.shape
        flat = self.metric.inputs is None or self.metric.inputs.dim() == 1
        step_work = o * a * b * (rank if flat else a * b)
        most = _PLAIN_SWEEPS if self.metric.plain else _SWEEPS
        sweeps = (
            0
            if self.metric.plain and self.weight.numel() > _PLAIN_WEIGHTS
            else max(0, min(most, int(_WORK / (step_work * _STEPS))))
        )
        if sweeps == 0:
            return first, last, split
        error = self._error(first, last)
        for _ in range(sweeps):
            trial = self._normalized(self._improve_first(first, last))
            solved, solved_split = self.solve_last(trial, core_rank)
            improved = self._error(trial, solved)
            if improved < error:
                first, last, split = trial, solved, solved_split
            if improved > 0.999 * error:
                break
            error = improved
        return first, last, split

    def solve_last(self, first: Tensor, core_rank: int | None = None) -> tuple[Tensor, WeightedSvd | None]:
        """The best `last` for a given `first`, and its truncated decomposition where a core rank is asked."""
        return self._truncated(self._free_last(first), len(first), core_rank)

    def _begin(self, rank: int) -> tuple[Tensor, WeightedSvd]:
        """The first `first` and the best free `last` for it, kept for the next core rank.

        Candidates of one rank mostly follow each other.
        """
        if rank not in self._begun:
            first = self._normalized(self.start.factors(rank)[1])
            self._begun.clear()
            self._begun[rank] = first, self._free_last(first)
        return self._begun[rank]

    def _free_last(self, first: Tensor) -> WeightedSvd:
        """The best `last` of any rank, as an `o x (r b)` matrix in the metric that is left of the inputs'."""
        o, a, b = self.weight.shape
        r = first.shape[0]
        if self.metric.inputs is None:
            free = torch.einsum("ra,oab->orb", first, self.weight).reshape(o, r * b)
            return WeightedSvd(free, Metric(None, self.metric.outputs))
        lifted = torch.einsum("ra,bc->rbac", first, torch.eye(b, dtype=first.dtype)).reshape(r * b, a * b)
        seen = self.metric.times_inputs(lifted)
        normal = seen @ lifted.T
        normal.diagonal().add_(float(normal.diagonal().mean()) * 1e-10 + 1e-300)
        free = torch.linalg.solve(normal, seen @ self.weight.reshape(o, -1).T).T
        return WeightedSvd(free, Metric(normal, self.metric.outputs))

    def _truncated(
        self, free: WeightedSvd, r: int, core_rank: int | None
    ) -> tuple[Tensor, WeightedSvd | None]:
        o, _, b = self.weight.shape
        if core_rank is None or core_rank >= free.rank:
            return free.matrix.reshape(o, r, b), None
        left, right = free.factors(core_rank)
        return (left @ right).reshape(o, r, b), free

    def _normalized(self, first: Tensor) -> Tensor:
        """The same row space; orthonormal where C is the identity, so that `last` is a plain projection."""
        if self.metric.inputs is not None:
            return first.contiguous()
        basis: Tensor = torch.linalg.qr(first.T)[0]
        return basis.T.contiguous()

    def _error(self, first: Tensor, last: Tensor) -> float:
        return self.metric.square((self.weight - torch.einsum("orb,ra->oab", last, first)).flatten(1))

    def _gradient(self, residual: Tensor, last: Tensor) -> Tensor:
        o, a, b = self.weight.shape
        weighed = self.metric.times_outputs(self.metric.times_inputs(residual.reshape(o, a * b))).reshape(
            o, a, b
        )
        gradient: Tensor = torch.einsum("oab,orb->ra", weighed, last)
        return gradient

    def _improve_first(self, first: Tensor, last: Tensor) -> Tensor:
        """Preconditioned conjugate gradients on the quadratic in `first`."""
        o, r, b = last.shape
        spread = last.permute(1, 0, 2).reshape(r, o, b)
        weighed = (
            spread
            if self.metric.outputs is None
            else torch.einsum("op,rpb->rob", self.metric.outputs.double(), spread)
        )
        left = spread.reshape(r, -1) @ weighed.reshape(r, -1).T
        left.diagonal().add_(float(left.diagonal().mean()) * 1e-6 + 1e-300)
        left = torch.linalg.inv(left)
        marginal = self.marginal

        def precondition(gradient: Tensor) -> Tensor:
            scaled: Tensor = left @ gradient
            if marginal is None:
                return scaled
            solved: Tensor = (
                scaled / marginal
                if marginal.dim() == 1
                else solve_factored(self._marginal_factor, scaled.T).T
            )
            return solved

        x = first.clone()
        residual = self._gradient(self.weight - torch.einsum("orb,ra->oab", last, x), last)
        z = precondition(residual)
        direction, strength = z, float((residual * z).sum())
        for _ in range(_STEPS):
            if strength <= 1e-30:
                break
            image = self._gradient(torch.einsum("orb,ra->oab", last, direction), last)
            curvature = float((direction * image).sum())
            if curvature <= 0:
                break
            step = strength / curvature
            x = x + step * direction
            residual = residual - step * image
            z = precondition(residual)
            following = float((residual * z).sum())
            direction, strength = z + following / strength * direction, following
        return x

    @cached_property
    def _marginal_factor(self) -> tuple[Tensor, Tensor]:
        assert self.marginal is not None
        return factored_gram(self.marginal)
