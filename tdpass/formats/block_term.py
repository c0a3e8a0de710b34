"""block_term: a layer as a 1x1, a grouped core and a 1x1, which is a sum of small Tucker-2 blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import Rank
from tdpass.formats.alternating import (
    ANEW,
    Limit,
    State,
    alternate,
    normalized,
    solve_gram,
    squared_norm,
    suits_single,
)
from tdpass.formats.base import Decomposition, Factors, Format, Stage, register_format, scaled_ranks
from tdpass.formats.blocks import layout_of
from tdpass.formats.geometry import pointwise
from tdpass.formats.metric import Metric
from tdpass.formats.multilinear import Modes, Whitening, improve_left, left_vectors, share_norm
from tdpass.formats.searched import Searched
from tdpass.formats.spectrum import top_eigenpairs
from tdpass.ops import Ops, V
from tdpass.site import Site

_BLOCKS = (2, 4, 8)
_CORE_PASSES = 2


class _Blocks(Searched):
    def __init__(self, weight: Tensor, site: Site, metric: Metric) -> None:
        self.site, self.layout = site, layout_of(site)
        self.modes = self.layout.modes(site)
        super().__init__(
            weight, metric, self.modes, lambda whitening: _Als(whitening, whitening.tensor(weight))
        )

    def unfolded(self, state: State) -> Tensor:
        return _unfolded(self.modes, state)

    def macs(self, rank: Rank) -> int:
        return self.matrix.numel() * rank[0] * rank[1]

    def order(self) -> Sequence[int]:
        return (1, 2)

    def solved(self, state: State) -> State:
        return (improve_left(self.matrix, state[0], _rows(self.modes, state), self.metric), *state[1:])

    def stored(self, rank: Rank, state: State) -> Factors:
        last, core, first = share_norm(*state)
        stored, shapes = (
            {"first": first, "core": self.layout.pack(core), "last": last},
            self.layout.shapes(self.site, rank),
        )
        return {name: factor.reshape(shapes[name]).contiguous() for name, factor in stored.items()}

    def loaded(self, factors: Factors) -> State:
        return _loaded(factors, self.site)


class _Als:
    """Alternating least squares over a sum of Tucker blocks for a whitened tensor.

    `What[o, p, i] = sum_b a[o, b, s] core[b, s, p, r] c[b, r, i]`.
    """

    def __init__(self, whitening: Whitening, tensor: Tensor) -> None:
        self.whitening, self.tensor = whitening, tensor
        self.unfolded = tensor.flatten(1)
        self.energy = squared_norm(tensor)

    @functools.cached_property
    def single(self) -> _Als:
        """The same in single precision, with caches of its own."""
        return _Als(self.whitening, self.tensor.float())

    def search(self, start: State, limit: Limit = ANEW) -> State:
        """Whitened `last[o, (b s)], core[b, s, p, r], first[(b r), i]`, found from such."""
        macs, norm = self._macs(start[0].shape[1]), self.energy**0.5
        single = self.single.sweep if suits_single(macs, norm) else None
        last, core, first = alternate(start, self.sweep, norm, macs, single, limit)
        return improve_left(self.unfolded, last, _times_first(core, first).flatten(1), Metric()), core, first

    def _macs(self, width: int) -> int:
        return 2 * self.tensor.numel() * width

    def undo(self, state: State) -> State:
        """The factors without the whitening."""
        last, core, first = state
        return (
            self.whitening.undo(last, 0, 0),
            self.whitening.undo(core, 2, 1),
            self.whitening.undo(first, 1, 2),
        )

    @functools.cached_property
    def bases(self) -> tuple[Tensor, Tensor]:
        """Principal directions of the output and the input mode, zeros beyond those that the tensor has."""
        o, _, i = self.tensor.shape
        found = left_vectors(self.unfolded, o), left_vectors(self.tensor.flatten(0, 1).T, i)
        u, v = (F.pad(basis, (0, len(basis) - basis.shape[1])) for basis in found)
        return u, v

    def start(self, rank: Rank) -> State:
        """Tucker-2 blocks taken off one after another, inside the subspaces that hold most of the tensor."""
        b, s, r = rank
        if self.tensor.dtype != torch.float32 and suits_single(self._macs(b * s), self.energy**0.5):
            return self.single.start(rank)
        u, v = self.bases[0][:, : b * s], self.bases[1][:, : b * r]
        rest = _left(u.T, self.tensor @ v)
        lasts, cores, firsts = [], [], []
        for _ in range(b):
            left, core, right = _tucker2(rest, s, r)
            rest = rest - _left(left, core @ right.T)
            lasts.append(u @ left)
            cores.append(core)
            firsts.append((v @ right).T)
        return torch.cat(lasts, 1), torch.stack(cores), torch.cat(firsts)

    def sweep(self, state: State) -> tuple[State, float]:
        """Solve for the last factor, for the first, and for the core block by block.

        The tensor itself is read twice.
        """
        _, core, first = state
        b, s, p, r = core.shape
        rows = _times_first(core, first).flatten(1)
        last, norm = normalized(solve_gram(rows @ rows.T, rows @ self.unfolded.T), 1)
        core = core * norm.reshape(b, s, 1, 1)
        seen, outer = (last @ self.unfolded).reshape(b, s * p, -1), last @ last.T
        flat = core.reshape(b, s * p, r)
        lifted = (outer.reshape(b * s, b, s).transpose(0, 1) @ core.reshape(b, s, p * r)).reshape(
            b, b, s, p, r
        )
        gram = flat.transpose(1, 2) @ lifted.permute(1, 2, 3, 0, 4).reshape(b, s * p, b * r)
        first, norm = normalized(
            solve_gram(gram.reshape(b * r, b * r), (flat.transpose(1, 2) @ seen).reshape(b * r, -1)), 1
        )
        core = core * norm.reshape(b, 1, 1, r)
        wanted = (seen @ first.reshape(b, r, -1).transpose(1, 2)).reshape(b, s, p, r)
        core, energy = _solve_core(
            core, wanted, outer.reshape(b, s, b, s), (first @ first.T).reshape(b, r, b, r)
        )
        error = self.energy + energy - 2 * float((wanted * core).sum())
        return (last.T, core, first), max(0.0, error) ** 0.5


@register_format
class BlockTerm(Format):
    """W[o, i, h, w] = sum_b sum_sr a[o, (b s)] core[b, s, r, h, w] c[(b r), i].

    A 1x1, a convolution in b groups, and a 1x1. Block-term decomposition in b rank-(s, r) terms (De Lathauwer
    2008); rank is (b, s, r).  A linear layer is given a third mode by cutting its input in p equal parts that
    share c: `W[o, (p i)] = sum a[o, (b s)] core[b, (p r), s] c[(b r), i]`; without it the sum would be one
    matrix product, which `svd` stores in less.  Accelerated alternating least squares, then conjugate
    gradients in the metric; a is solved last. One block of full rank would be exact, but that is Tucker-2:
    candidates have two blocks or more.
    """

    name = "block_term"
    axes = range(4)
    version: ClassVar[int] = 2
    searched: ClassVar[bool] = True
    exact_at_full_rank: ClassVar[bool] = False

    def fits(self, site: Site) -> bool:
        return super().fits(site) and layout_of(site).modes(site).shape[1] > 1

    def ranks(self, site: Site) -> Sequence[Rank]:
        o, _, i = layout_of(site).modes(site).shape
        blocks = [b for b in _BLOCKS if b <= min(o, i)] or [1]
        found = {(b, *rank) for b in blocks for rank in scaled_ranks((o // b, i // b), 8)}
        return sorted(
            found,
            key=lambda rank: (sum(math.prod(shape) for shape in self.shapes(site, rank).values()), rank),
        )

    def check_rank(self, site: Site, rank: Rank) -> None:
        o, _, i = layout_of(site).modes(site).shape
        if len(rank) != 3 or min(rank) < 1 or rank[0] * rank[1] > o or rank[0] * rank[2] > i:
            raise PlanError(
                f"{self.name} rank {rank} does not fit site {site.name!r} of shape {site.shape}; "
                f"give (b, s, r), each at least 1, with b * s at most {o} and b * r at most {i}"
            )

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Blocks(weight, site, metric)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        return layout_of(site).shapes(site, rank)

    def macs(self, site: Site, rank: Rank) -> int:
        return layout_of(site).macs(site, rank)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return _unfolded(layout_of(site).modes(site), _loaded(factors, site)).reshape(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        return layout_of(site).features(ops, x, f, site, rank)

    def last_stage(self, site: Site, rank: Rank) -> Stage:
        return Stage("last", pointwise(site.o, rank[0] * rank[1], len(site.kernel), site.name))


def _solve_core(core: Tensor, wanted: Tensor, outer: Tensor, inner: Tensor) -> tuple[Tensor, float]:
    """Gauss-Seidel over the blocks of `sum_q outer[b, q] core[q] inner[q, b] = wanted[b]`.

    The core and its product with the left-hand side.
    """
    b, s, p, r = core.shape
    core = core.clone()

    def image(k: int, among: slice) -> Tensor:
        right = core[among].flatten(1, 2) @ inner[among, :, k]
        return (outer[k, :, among].flatten(1) @ right.reshape(-1, p * r)).reshape(s, p, r)

    energy = 0.0
    for number in range(1, _CORE_PASSES + 1):
        for k in range(b):
            before = image(k, slice(k))
            rest = wanted[k] - before - image(k, slice(k + 1, b))
            half = solve_gram(outer[k, :, k], rest.flatten(1)).reshape(s * p, r)
            core[k] = solve_gram(inner[k, :, k], half.T).T.reshape(s, p, r)
            if number == _CORE_PASSES:  # blocks before this one are final, so every pair is met once
                energy += float(((2 * before + image(k, slice(k, k + 1))) * core[k]).sum())
    return core, energy


def _tucker2(tensor: Tensor, s: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`left[o, s], core[s, p, r], right[i, r]` by one pass of higher-order orthogonal iteration.

    The pass begins from the truncated HOSVD.
    """
    columns = tensor.flatten(0, 1)
    right = top_eigenpairs(columns.T @ columns, r)[1]
    unfolded = (tensor @ right).flatten(1)
    left = top_eigenpairs(unfolded @ unfolded.T, s)[1]
    columns = _left(left.T, tensor).flatten(0, 1)
    right = top_eigenpairs(columns.T @ columns, r)[1]
    return left, _left(left.T, tensor @ right), right


def _left(matrix: Tensor, tensor: Tensor) -> Tensor:
    return (matrix @ tensor.flatten(1)).reshape(len(matrix), *tensor.shape[1:])


def _loaded(factors: Factors, site: Site) -> State:
    """`last[o, (b s)], core[b, s, p, r], first[(b r), i]`."""
    layout = layout_of(site)
    core = layout.unpack(factors["core"], layout.modes(site).shape[1], layout.rank(factors))
    return factors["last"].flatten(1), core, factors["first"].flatten(1)


def _rows(modes: Modes, state: State) -> Tensor:
    """Everything but the last factor, as `[(b s), (i ...)]` in the weight's own order."""
    tensor = _times_first(*state[1:])
    return replace(modes, outs=(len(tensor),)).matrix(tensor)


def _times_first(core: Tensor, first: Tensor) -> Tensor:
    """`[(b s), p, i]`."""
    b, s, p, r = core.shape
    return (core.reshape(b, s * p, r) @ first.reshape(b, r, -1)).reshape(b * s, p, -1)


def _unfolded(modes: Modes, state: State) -> Tensor:
    return state[0] @ _rows(modes, state)
