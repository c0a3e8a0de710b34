"""Weights that grow by columns: what is there stays, and new columns are trained beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdpass.site import Site
from tdpass.training.calls import call
from tdpass.training.loop import Data, Objective
from tdpass.training.parametrized import parametrized, with_parametrizations
from tdpass.training.singular import SingularValues, Triplet

_LOOKED_AT = 8  # batches that tell how much a new column is worth


@dataclass(frozen=True)
class Growth:
    """How the weight of a site grows.

    By `rank` columns, in a format whose matrix is W[o, (i h w)], beside the old U and V. The selector s, over
    all columns, begins as `scale`.
    """

    site: Site
    format: str
    rank: int
    old: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0

    @property
    def column(self) -> int:
        """Numbers in a column of U and one of V together."""
        return self.site.o + self.site.weights // self.site.o


class GrownWeight(SingularValues):
    """W = [U_old U] diag(s) [V_old V]^T as a parametrization of a weight.

    U_old and V_old are fixed, U, V and all of s are trained. Without old columns U, s and V begin as the
    largest singular values of the weight and their vectors. Beside old ones U and V begin as random
    orthonormal columns.
    """

    u_old: Tensor
    v_old: Tensor

    def __init__(self, growth: Growth) -> None:
        super().__init__(growth.site, growth.format)
        self.growth = growth
        rows = growth.site.o
        u_old, v_old = growth.old or (torch.zeros(rows, 0), torch.zeros(growth.site.weights // rows, 0))
        self.register_buffer("u_old", u_old)
        self.register_buffer("v_old", v_old)

    def forward(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        return super().forward(torch.cat([self.u_old, u], 1), s, torch.cat([self.v_old, v], 1))

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What training begins with."""
        rank = self.growth.rank
        if self.growth.old is None:
            u, s, v = super().right_inverse(weight)
            return u[:, :rank].contiguous(), s[:rank].contiguous(), v[:, :rank].contiguous()
        u, v = (_orthonormal(old, rank) for old in (self.u_old, self.v_old))
        return u, weight.new_full((self.u_old.shape[1] + rank,), self.growth.scale), v


def _orthonormal(like: Tensor, columns: int) -> Tensor:
    drawn = torch.randn(len(like), columns, dtype=like.dtype)
    made: Tensor = torch.linalg.qr(drawn).Q.to(like.device)
    return made


def with_columns(model: nn.Module, growths: Mapping[str, Growth]) -> nn.Module:
    """A copy of a model whose named modules' weights grow; shared weights stay shared."""
    return with_parametrizations(
        model, {name: partial(GrownWeight, growth) for name, growth in growths.items()}
    )


def new_columns(network: nn.Module, names: Iterable[str]) -> dict[str, Triplet]:
    """The new columns of each weight, and its selector; raises `AttributeError` for a model without them."""
    found = {}
    for name, layer in parametrized(network, names).items():
        u, s, v = layer.originals
        found[name] = Triplet(u, s, v, layer.weight)
    return found


def ranks_by_fisher(
    network: nn.Module, growths: Mapping[str, Growth], data: Data, objective: Objective
) -> dict[str, int]:
    """How many columns each weight gets, for as many numbers as the growths' own ranks would take.

    A new piece of rank one lowers the loss, to first order, by the square of a singular value of F^-1/2 G,
    with G the gradient at the weight and F the diagonal of the Fisher information in the form a b^T, which
    keeps rank one at rank one (Shazeer, Stern: Adafactor, 2018).  The pieces that lower it most for their
    size are taken.
    """
    room = sum(growth.rank * growth.column for growth in growths.values())
    slopes = _slopes(network, list(growths), data, objective)
    pieces = [
        (gain / growth.column, name) for name, growth in growths.items() for gain in _gains(*slopes[name])
    ]
    found = dict.fromkeys(growths, 0)
    for _, name in sorted(pieces, reverse=True):
        if growths[name].column <= room:
            room -= growths[name].column
            found[name] += 1
    return found


def _gains(slope: Tensor, square: Tensor) -> list[float]:
    """What each new piece is worth, the best first."""
    rows, columns = square.sum(1, keepdim=True), square.sum(0, keepdim=True)
    scale = (square.sum() / (rows * columns).clamp_min(1e-30)).sqrt()
    gains: list[float] = torch.linalg.svdvals((slope * scale).double()).square().tolist()
    return gains


def _slopes(
    network: nn.Module, names: list[str], data: Data, objective: Objective
) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean gradient at each weight as a matrix, and the mean of its square, over the first batches."""
    seen: list[tuple[Tensor, ...]] = []
    for inputs, targets in itertools.islice(data, _LOOKED_AT):
        with parametrize.cached():
            weights: list[Any] = [network.get_submodule(name).weight for name in names]
            seen.append(torch.autograd.grad(objective(call(network, inputs), targets), weights))
    found = {}
    for name, slopes in zip(names, zip(*seen, strict=True), strict=True):
        each = torch.stack([slope.flatten(1) for slope in slopes])
        found[name] = each.mean(0), each.square().mean(0)
    return found
