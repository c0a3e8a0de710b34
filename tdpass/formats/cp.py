"""cp: a convolution as a 1x1, one depthwise convolution per spatial axis, and a 1x1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.alternating import State
from tdpass.formats.base import Decomposition, Factors, Format, Stage, rank_grid, register_format
from tdpass.formats.cp_fit import CpFit, khatri_rao
from tdpass.formats.geometry import apply_dense, no_padding, pointwise, unit
from tdpass.formats.metric import Metric
from tdpass.formats.multilinear import Modes, improve_left
from tdpass.formats.per_group import per_group
from tdpass.formats.searched import Searched
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site

_WIDEST = 3


@dataclass(frozen=True)
class _Depthwise:
    """One depthwise stage: the factor's name and its spatial axes, only one of them wider than 1."""

    name: str
    axes: range
    size: int

    def kernel(self, site: Site) -> tuple[int, ...]:
        return tuple(size if axis in self.axes else 1 for axis, size in enumerate(site.kernel))

    def site(self, site: Site, terms: int) -> Site:
        """The layer of that many channels."""
        stride = tuple(step if axis in self.axes else 1 for axis, step in enumerate(site.stride))
        padding = tuple(pair if axis in self.axes else (0, 0) for axis, pair in enumerate(site.padding))
        dilation = tuple(step if axis in self.axes else 1 for axis, step in enumerate(site.dilation))
        return replace(
            site,
            shape=(terms, 1, *self.kernel(site)),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=terms,
        )


def _stages(site: Site) -> Iterator[_Depthwise]:
    """Axes of kernel size 1 join a wider neighbour.

    Alone they would cost a pass over the data for a scaling.
    """
    wide = [axis for axis, size in enumerate(site.kernel) if size > 1]
    starts = [0, *(axis + 1 for axis in wide[:-1])]
    stops = [*(axis + 1 for axis in wide[:-1]), len(site.kernel)]
    for name, axis, start, stop in zip("cde", wide, starts, stops, strict=False):
        yield _Depthwise(name, range(start, stop), site.kernel[axis])


class _Components(Searched):
    def __init__(self, weight: Tensor, site: Site, metric: Metric) -> None:
        self.site, self.stages = site, tuple(_stages(site))
        sizes = [stage.size for stage in self.stages]
        modes = Modes((site.o,), (site.i, *sizes), tuple((mode,) for mode in range(2 + len(sizes))))
        super().__init__(weight, metric, modes, lambda whitening: CpFit(whitening, whitening.tensor(weight)))

    def unfolded(self, state: State) -> Tensor:
        return _unfolded(state)

    def macs(self, rank: Rank) -> int:
        return self.matrix.numel() * rank[0]

    def order(self) -> Sequence[int]:
        return range(1, 2 + len(self.stages))

    def solved(self, state: State) -> State:
        return (improve_left(self.matrix, state[0], _rows(state), self.metric), *state[1:])

    def stored(self, rank: Rank, state: State) -> Factors:
        (r,) = rank
        a, b, *kernels = _balanced(state)
        ones = unit(len(self.site.kernel))
        stored = {"b": b.T.reshape(r, self.site.i, *ones), "a": a.reshape(self.site.o, r, *ones)}
        stored |= {
            stage.name: k.T.reshape(r, 1, *stage.kernel(self.site))
            for stage, k in zip(self.stages, kernels, strict=True)
        }
        return {name: factor.contiguous() for name, factor in stored.items()}

    def loaded(self, factors: Factors) -> State:
        return _loaded(factors, self.site)


@register_format
@per_group
class Cp(Format):
    """W[o, i, h, w] = sum_r a[o, r] b[i, r] c[h, r] d[w, r]: a 1x1, a depthwise h x 1 and 1 x w, and a 1x1.

    Canonical polyadic decomposition (for convolutions, Lebedev et al. 2015) by accelerated alternating least
    squares, then by conjugate gradients in the metric; a is solved last.  The factors are stored as the
    convolutions read them: b `[r, i, 1, 1]`, c `[r, 1, h, 1]`, d `[r, 1, 1, w]`, a `[o, r, 1, 1]`; one axis
    more has e, one less no d.  Candidate ranks end where it breaks even, or at three times the channels; the
    last is not exact.
    """

    name = "cp"
    axes = range(1, 4)
    version: ClassVar[int] = 2
    searched: ClassVar[bool] = True
    exact_at_full_rank: ClassVar[bool] = False

    def fits(self, site: Site) -> bool:
        return super().fits(site) and max(site.o, site.i) > 1 and any(size > 1 for size in site.kernel)

    def ranks(self, site: Site) -> Sequence[Rank]:
        sizes = [stage.size for stage in _stages(site)]
        terms = min(site.o, site.i) * math.prod(site.kernel)
        pays = site.weights // (site.o + site.i + sum(sizes))
        return [(r,) for r in rank_grid(max(1, min(terms, pays, _WIDEST * max(site.o, site.i))), 16)]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Components(weight, site, metric)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        (r,) = rank
        ones = unit(len(site.kernel))
        depthwise = {stage.name: (r, 1, *stage.kernel(site)) for stage in _stages(site)}
        return {"b": (r, site.i, *ones), **depthwise, "a": (site.o, r, *ones)}

    def macs(self, site: Site, rank: Rank) -> int:
        kind = kind_of(site)
        depthwise = sum(stage.size * kind.positions(site, stage.axes) for stage in _stages(site))
        return rank[0] * (site.i * site.in_positions + depthwise + site.o * site.out_positions)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return _unfolded(_loaded(factors, site)).reshape(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        axes = len(site.kernel)
        h = ops.conv(x, f["b"], None, unit(axes), no_padding(axes), unit(axes))
        for stage in _stages(site):
            h = apply_dense(ops, h, f[stage.name], None, stage.site(site, rank[0]))
        return h

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("a", pointwise(site.o, rank[0], len(site.kernel), site.name))


def _loaded(factors: Factors, site: Site) -> State:
    """Factors as columns: `a[o, r], b[i, r], c[h, r], ...`."""
    kernels = (factors[stage.name].reshape(-1, stage.size).T for stage in _stages(site))
    return (factors["a"].flatten(1), factors["b"].flatten(1).T, *kernels)


def _rows(state: State) -> Tensor:
    """Everything but a, as `[r, (i h w)]`."""
    return khatri_rao(state[1:]).T


def _unfolded(state: State) -> Tensor:
    return state[0] @ _rows(state)


def _balanced(state: State) -> State:
    """Share each component's norm equally among its factors, so that no factor overflows a short format."""
    norms = [factor.norm(dim=0) for factor in state]
    share = torch.stack(norms).log().mean(0).exp()
    return tuple(factor / norm.clamp_min(1e-150) * share for factor, norm in zip(state, norms, strict=True))
