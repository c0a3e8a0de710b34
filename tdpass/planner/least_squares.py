"""The last factor of a layer by least squares.

What it reads, what it is to answer, and the factor that does so best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.kinds import kind_of
from tdpass.ops import TorchOps
from tdpass.planner.lockstep import Moment
from tdpass.planner.moments import centered, working
from tdpass.site import Site

_OPS = TorchOps()
_ROWS_PER_CALL = 2**24


def answers(layer: Layer, moments: Sequence[Moment]) -> bool:
    """Whether the layer makes all channels of what it should answer, from what it reads."""
    site = layer.site
    return site.i > 0 and all(
        moment.target.shape[site.channel_axis(moment.target.dim())] == site.o for moment in moments
    )


@dataclass(frozen=True)
class Sums:
    """Second moments, per row and by group, of what the last factor reads, with a one behind it.

    And those of that with what the layer is to answer.
    """

    normal: Tensor
    cross: Tensor

    @classmethod
    def of(cls, layer: Layer, site: Site, moments: Sequence[Moment]) -> Sums:
        """Those of a layer whose last factor is a layer of that geometry."""
        groups, width = site.groups, site.weights // site.o + 1
        normal = torch.zeros(groups, width, width, dtype=torch.float64)
        cross = torch.zeros(groups, site.o // groups, width, dtype=torch.float64)
        rows = 0
        generator = torch.Generator()
        with torch.no_grad():
            for moment in moments:
                z = FORMATS.get(layer.format).features(
                    _OPS, moment.x.to(layer.dtype), layer.factors, layer.site, layer.rank
                )
                limit = max(4 * width, _ROWS_PER_CALL // (groups * width))
                features = working(kind_of(site).rows(z, site, limit, generator.manual_seed(rows)))
                targets = working(
                    _same_rows(
                        kind_of(layer.site).output_rows(moment.target, layer.site),
                        limit,
                        generator.manual_seed(rows),
                    )
                )
                for group, (read, wanted) in enumerate(
                    zip(features.chunk(groups, 1), targets.chunk(groups, 1), strict=True)
                ):
                    with_one = _with_one(read)
                    normal[group] += (with_one.T @ with_one).double()
                    cross[group] += (wanted.T @ with_one).double()
                rows += features.shape[0]
        return cls(normal / rows, cross / rows)

    @property
    def means(self) -> Tensor:
        """What is read on average, `[groups, d]`."""
        return self.normal[:, -1, :-1]

    @property
    def covariance(self) -> Tensor:
        """`[groups, d, d]` of what is read."""
        return centered(self.normal[:, :-1, :-1], self.means)

    def offsets(self, weight: Tensor) -> Tensor:
        """The bias with which a last factor, as a matrix, answers on average what it is to."""
        parts = weight.reshape(len(self.normal), -1, weight.shape[1])
        return (self.cross[:, :, -1] - (parts @ self.means[:, :, None])[:, :, 0]).reshape(-1)


def least_squares(
    layer: Layer, factor: str, sums: Sums, ridge: float, *, bias: bool
) -> tuple[Tensor, Tensor]:
    """The last factor as a matrix, and the bias, that answer best what the layer is to, in float64.

    The bias is zero where there shall be none.
    """
    current, groups = layer.factors[factor], len(sums.normal)
    offset = torch.zeros(current.shape[0]) if layer.bias is None else layer.bias
    before = torch.cat([current.double().flatten(1), offset.double()[:, None]], 1).chunk(groups)
    found = [
        _pulled(sums.normal[group], sums.cross[group], before[group], ridge, bias=bias)
        for group in range(groups)
    ]
    solved = torch.cat(found)
    width = current[0].numel()
    return solved[:, :width], solved[:, -1] if bias else torch.zeros(len(solved), dtype=torch.float64)


def _pulled(normal: Tensor, cross: Tensor, before: Tensor, ridge: float, *, bias: bool) -> Tensor:
    """Least squares for weight and, as the last column, bias; pulled towards what they were."""
    width = len(normal)
    pull = torch.full((width,), ridge * float(normal.diagonal()[:-1].mean()) + 1e-12, dtype=torch.float64)
    if bias:
        pull[-1] = 1e-12
    else:
        normal, cross, before, pull = normal[:-1, :-1], cross[:, :-1], before[:, :-1], pull[:-1]
    solved: Tensor = torch.linalg.solve(normal + torch.diag(pull), (cross + before * pull).T).T
    return solved


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)


def _same_rows(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """The subset that `rows` drew with the same limit and seed."""
    return (
        rows if rows.shape[0] <= limit else rows[torch.randperm(rows.shape[0], generator=generator)[:limit]]
    )
