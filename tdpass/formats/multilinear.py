"""What the formats with three or more tensor modes share.

Views of a weight, whitening per mode, steps in the metric.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdpass.formats.alternating import WORK, State, solve_gram
from tdpass.formats.metric import Metric, symmetric_roots
from tdpass.formats.spectrum import top_eigenpairs

_DAMPING = 1e-6
_STEPS = 8
_PASSES, _STALLED = 10, 0.98


@dataclass(frozen=True)
class Modes:
    """A weight `W[o, i, ...]` seen as a tensor of the modes `outs + ins`, gathered into one axis per core.

    `cores[k]` lists the modes that axis k of the tensor runs over, the first of them slowest.
    """

    outs: tuple[int, ...]
    ins: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of every mode, in the order in which the weight stores them."""
        return self.outs + self.ins

    @property
    def order(self) -> tuple[int, ...]:
        """The modes in the order of the cores."""
        return tuple(mode for core in self.cores for mode in core)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor: one size per core."""
        # lists: torch.compile splits its graph at math.prod of a generator
        return tuple(math.prod([self.sizes[mode] for mode in core]) for core in self.cores)

    def tensor(self, weight: Tensor) -> Tensor:
        """The weight with one axis per core."""
        return weight.reshape(self.sizes).permute(self.order).reshape(self.shape)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, unfolded to `o x (i ...)`, of a tensor with one axis per core."""
        back = tuple(self.order.index(mode) for mode in range(len(self.sizes)))
        return (
            tensor.reshape([self.sizes[mode] for mode in self.order])
            .permute(back)
            .reshape(math.prod(self.outs), math.prod(self.ins))
        )


class Whitened(Protocol):
    """A fit of a whitened weight."""

    def undo(self, state: State) -> State:
        """The factors without the whitening."""


@dataclass(frozen=True)
class Whitening:
    """One symmetric root per mode, so that the whitened tensor's plain norm resembles the metric.

    `G ~ (x)_k G_k` and `C ~ (x)_k C_k`. A product of roots keeps every format over the modes what it is:
    whiten, decompose plainly, undo core by core.  The factors are the marginals (partial traces) of the
    metric, damped so that an input that never fires stays bounded.
    """

    modes: Modes
    roots: tuple[tuple[Tensor, Tensor] | None, ...]

    @classmethod
    def of(cls, metric: Metric, modes: Modes) -> Whitening:
        """The whitening of a metric; that of the plain metric does nothing."""
        return cls(
            modes, (*_marginal_roots(metric.outputs, modes.outs), *_marginal_roots(metric.inputs, modes.ins))
        )

    @classmethod
    def starts(cls, metric: Metric, modes: Modes) -> list[Whitening]:
        """Those of the plain norm and, where it is another, of the metric.

        Fits of both are candidates for the least error.
        """
        return [cls.of(each, modes) for each in ([metric] if metric.plain else [Metric(), metric])]

    def tensor(self, weight: Tensor) -> Tensor:
        """The whitened weight with one axis per core."""
        view = weight.reshape(self.modes.sizes)
        for mode, root in enumerate(self.roots):
            if root is not None:
                view = _along(view, mode, root[0])
        return self.modes.tensor(view)

    def undo(self, factor: Tensor, axis: int, core: int) -> Tensor:
        """Take the whitening of one core back out of the axis of `factor` that runs over its modes."""
        shape, modes = factor.shape, self.modes.cores[core]
        view = factor.reshape(*shape[:axis], *(self.modes.sizes[mode] for mode in modes), *shape[axis + 1 :])
        for place, mode in enumerate(modes):
            root = self.roots[mode]
            if root is not None:
                view = _along(view, axis + place, root[1])
        return view.reshape(shape)


def left_vectors(matrix: Tensor, count: int) -> Tensor:
    """Up to `count` left singular vectors, orthonormal, through the smaller Gram matrix."""
    rows, columns = matrix.shape
    count = min(rows, columns, count)
    if rows <= columns:
        return top_eigenpairs(matrix @ matrix.T, count)[1]
    # The images of the right vectors are the left ones times their singular values; QR keeps those of tiny
    # values orthonormal.
    left: Tensor = torch.linalg.qr(matrix @ top_eigenpairs(matrix.T @ matrix, count)[1])[0]
    return left


def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """`size` as a product of `count` factors of least sum, descending."""
    return _balanced(size, count, size)


# Dynamo warns where it traces into a cache; the decorator that sets this mark imports all of Dynamo, which
# takes seconds.
balanced_factors.__dict__["_dynamo_marked_constant"] = True


def improve_left(weight: Tensor, left: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """The `A` that makes `A @ rows` nearest to `weight` in the metric: `A = W C T^T (T C T^T)^-1`.

    Solved for the step from `left`, so the ridge pulls towards `left` and the error never grows.  G has no
    say: it weighs the residual, and the minimum over A is the same for every G.
    """
    lifted = metric.times_inputs(rows)
    return left + solve_gram(lifted @ rows.T, lifted @ (weight - left @ rows).T).T


def polish(
    weight: Tensor,
    factors: State,
    rebuild: Callable[[State], Tensor],
    metric: Metric,
    order: Sequence[int],
    macs: int,
    work: int = WORK,
) -> State:
    """Alternating conjugate gradients.

    A few steps on one factor after another towards least error in the metric, which never grows. `rebuild`
    gives the unfolded weight of factors, linear in each.  Whitened factors make good coordinates: there the
    metric is near the identity, so few steps do.  `macs` is what `rebuild` takes; beyond `work` multiply-adds
    there are fewer steps.
    """
    o, d = weight.shape
    full = metric.inputs is not None and metric.inputs.dim() == 2
    step = weight.numel() * ((d if full else 1) + (1 if metric.outputs is None else o)) + 3 * macs
    left = min(2 * len(order) * _STEPS, 2 * work // step)
    for k in itertools.cycle(order):
        if left <= 0:
            break
        rebuild_one = functools.partial(_with, rebuild, factors, k)
        factors = (
            *factors[:k],
            _descend(weight, factors[k], rebuild_one, metric, min(left, _STEPS)),
            *factors[k + 1 :],
        )
        left -= _STEPS
    return factors


def polished(
    weight: Tensor, factors: State, rebuild: Callable[[State], Tensor], metric: Metric, macs: int
) -> State:
    """`polish` over all factors as often as it still lowers the squared error by a fiftieth."""
    error, before = metric.square(weight - rebuild(factors)), math.inf
    for _ in range(_PASSES):
        if error >= _STALLED * before:
            break
        factors = polish(weight, factors, rebuild, metric, range(len(factors)), macs)
        error, before = metric.square(weight - rebuild(factors)), error
    return factors


def best_polished(
    weight: Tensor,
    fits: Sequence[Whitened],
    states: Sequence[State],
    unfolded: Callable[[State], Tensor],
    metric: Metric,
    order: Sequence[int],
    macs: int,
    work: int = WORK,
) -> State:
    """The state of least error in the metric, polished in its own whitened coordinates and out of them."""
    errors = [
        metric.square(weight - unfolded(fit.undo(state))) for fit, state in zip(fits, states, strict=True)
    ]
    best = errors.index(min(errors))
    fit = fits[best]
    return fit.undo(
        polish(weight, states[best], lambda state: unfolded(fit.undo(state)), metric, order, macs, work)
    )


def share_norm(*factors: Tensor) -> State:
    """The same product from factors of equal norm, so that none leaves the range of a short number format."""
    norms = [float(factor.norm()) for factor in factors]
    share = math.prod(norms) ** (1 / len(norms))
    return tuple(
        factor * (share / norm) if norm > 0 else factor for factor, norm in zip(factors, norms, strict=True)
    )


def _with(rebuild: Callable[[State], Tensor], factors: State, place: int, factor: Tensor) -> Tensor:
    return rebuild((*factors[:place], factor, *factors[place + 1 :]))


def _descend(
    weight: Tensor, factor: Tensor, rebuild: Callable[[Tensor], Tensor], metric: Metric, steps: int
) -> Tensor:
    value, pullback, *_ = torch.func.vjp(rebuild, factor)
    slope = pullback(_weighed(weight - value, metric))[0]
    direction, size = slope, float(slope.square().sum())
    floor = 1e-24 * size
    for _ in range(steps):
        image = rebuild(direction)
        weighed = _weighed(image, metric)
        curvature = float((image * weighed).sum())
        if size <= floor or curvature <= 0:
            break
        factor = factor + size / curvature * direction
        slope = slope - size / curvature * pullback(weighed)[0]
        size, before = float(slope.square().sum()), size
        direction = slope + size / before * direction
    return factor


def _weighed(matrix: Tensor, metric: Metric) -> Tensor:
    return metric.times_outputs(metric.times_inputs(matrix))


def _along(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    moved: Tensor = torch.tensordot(tensor, matrix, dims=([axis], [1]))
    return moved.movedim(-1, axis)


def _marginal_roots(matrix: Tensor | None, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
    if matrix is None:
        return [None] * len(sizes)
    roots: list[tuple[Tensor, Tensor] | None] = []
    for mode, size in enumerate(sizes):
        marginal = _marginal(matrix.double(), sizes, mode)
        mean = float(marginal.trace()) / size
        roots.append(
            symmetric_roots(marginal / mean + _DAMPING * torch.eye(size, dtype=torch.float64))
            if mean > 0
            else None
        )
    return roots


def _marginal(matrix: Tensor, sizes: tuple[int, ...], mode: int) -> Tensor:
    others = [axis for axis in range(len(sizes)) if axis != mode]
    if matrix.dim() == 1:
        diagonal = matrix.reshape(sizes)
        return torch.diag(diagonal.sum(others) if others else diagonal)
    view = matrix.reshape(sizes + sizes)
    for axis in reversed(others):
        view = view.diagonal(dim1=axis, dim2=axis + view.dim() // 2).sum(-1)
    return view


@functools.cache
def _balanced(size: int, count: int, largest: int) -> tuple[int, ...]:
    if count == 1:
        return (size,) if size <= largest else ()
    options = []
    for factor in range(1, min(size, largest) + 1):
        rest = _balanced(size // factor, count - 1, factor) if size % factor == 0 else ()
        if rest:
            options.append((factor, *rest))
    return min(options, key=lambda factors: (sum(factors), factors), default=())
