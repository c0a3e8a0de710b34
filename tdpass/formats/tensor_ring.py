"""tensor_ring: a closed chain of four cores, two over the input and two over the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.alternating import ANEW, Limit, State, alternate, solve_gram, squared_norm
from tdpass.formats.base import Decomposition, Factors, Format, rank_grid, register_format
from tdpass.formats.bonds import Bond
from tdpass.formats.core_bonds import CoreBond
from tdpass.formats.metric import Metric
from tdpass.formats.multilinear import Modes, Whitening, balanced_factors, left_vectors, share_norm
from tdpass.formats.pivoted import pivotable
from tdpass.formats.searched import Searched
from tdpass.ops import Ops, V
from tdpass.site import Site


class _Ring(Searched):
    def __init__(self, weight: Tensor, site: Site, metric: Metric) -> None:
        self.modes = _modes(site)
        super().__init__(weight, metric, self.modes, lambda whitening: _Als(whitening, weight))

    def unfolded(self, state: State) -> Tensor:
        return self.modes.matrix(_contract(state))

    def macs(self, rank: Rank) -> int:
        return self.matrix.numel() * rank[0] * rank[2]

    def order(self) -> Sequence[int]:
        return (3, 2, 1, 0)

    def stored(self, rank: Rank, state: State) -> Factors:
        return _packed(state)

    def loaded(self, factors: Factors) -> State:
        return _unpacked(factors)


class _Als:
    """Alternating least squares for a whitened weight `X[(i1 i2), (o1 o2)]`.

    Sweeps go over the input's two cores and then the output's.
    """

    def __init__(self, whitening: Whitening, weight: Tensor) -> None:
        self.whitening = whitening
        tensor = whitening.tensor(weight)
        self.sizes = tensor.shape
        self.matrix = tensor.flatten(2).flatten(0, 1)
        self.energy = squared_norm(tensor)

    def search(self, start: State, limit: Limit = ANEW) -> State:
        """Whitened cores `[r, n, s]`, found from such."""
        bonds = start[0].shape[0] * start[2].shape[0]
        return alternate(start, self.sweep, self.energy**0.5, 2 * self.matrix.numel() * bonds, limit=limit)

    def start(self, rank: Rank) -> State:
        """TR-SVD from the cut between input and output, then the cut inside each half.

        The `r0 r2` terms of the first cut close the ring.
        """
        i1, i2, o1, o2 = self.sizes
        r0, r1, r2, r3 = rank
        vectors = left_vectors(self.matrix, r0 * r2)
        right = F.pad(vectors.T @ self.matrix, (0, 0, 0, r0 * r2 - vectors.shape[1]))
        left = F.pad(vectors, (0, r0 * r2 - vectors.shape[1]))
        near = left.reshape(i1, i2, r0, r2).permute(2, 0, 1, 3).reshape(r0 * i1, i2 * r2)
        far = right.reshape(r0, r2, o1, o2).permute(1, 2, 3, 0).reshape(r2 * o1, o2 * r0)
        g1, g2 = _halves(near, r1)
        g3, g4 = _halves(far, r3)
        return g1.reshape(r0, i1, r1), g2.reshape(r1, i2, r2), g3.reshape(r2, o1, r3), g4.reshape(r3, o2, r0)

    def sweep(self, state: State) -> tuple[State, float]:
        """Solve for every core; the weight itself is read twice."""
        g1, g2, g3, g4 = state
        i1, i2, o1, o2 = self.sizes
        far = _pair(g3, g4)
        seen = (self.matrix @ far.flatten(0, 1).flatten(1)).reshape(i1, i2, *far.shape[2:])
        g1, g2, _ = _solve_pair(seen, far, g1, g2)
        near = _pair(g1, g2)
        seen = (self.matrix.T @ near.flatten(0, 1).flatten(1)).reshape(o1, o2, *near.shape[2:])
        g3, g4, reduction = _solve_pair(seen, near, g3, g4)
        return (g1, g2, g3, g4), max(0.0, self.energy - reduction) ** 0.5

    def undo(self, cores: State) -> State:
        """The cores without the whitening."""
        return tuple(self.whitening.undo(core, 1, k) for k, core in enumerate(cores))


@register_format
@pivotable
class TensorRing(Format):
    """W[(o1 o2), (i1 i2)] = tr(G_1[i1] G_2[i2] G_3[o1] G_4[o2]), with G_k[r, n, s] read as r x s matrices.

    Tensor ring (Zhao et al. 2016; for layers, Wang et al. 2018): rank is (r0, r1, r2, r3), the bonds before
    each core, and the bond r0 closes the ring.  TR-SVD start, accelerated alternating least squares, then
    conjugate gradients in the metric.  The cores are stored as the products read them: `[r0, r1, i1]`, `[r2,
    r1, i2]`, `[o1, r3, r2]`, `[o2, r0, r3]`.  Candidate ranks are equal in all places and end where it breaks
    even; the last is not exact.
    """

    name = "tensor_ring"
    axes = range(1)
    version: ClassVar[int] = 2
    searched: ClassVar[bool] = True
    exact_at_full_rank: ClassVar[bool] = False

    def ranks(self, site: Site) -> Sequence[Rank]:
        limit = 1
        while _per_position(site, (limit + 1,) * 4) <= site.weights:
            limit += 1
        return [(r, r, r, r) for r in rank_grid(limit)]

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        return _Ring(weight, site, metric)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        i1, i2, o1, o2 = _modes(site).shape
        r0, r1, r2, r3 = rank
        return {"g1": (r0, r1, i1), "g2": (r2, r1, i2), "g3": (o1, r3, r2), "g4": (o2, r0, r3)}

    def macs(self, site: Site, rank: Rank) -> int:
        return _per_position(site, rank) * site.out_positions

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        return _modes(site).matrix(_contract(_unpacked(factors))).reshape(site.shape)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        i1, i2, o1, o2 = _modes(site).shape
        r0, r1, r2, r3 = rank
        h = ops.permute(ops.reshape(ops.flatten_positions(x, site.i), (-1, i1, i2)), (0, 2, 1))
        h = ops.linear(h, ops.reshape(f["g1"], (r0 * r1, i1)), None)
        h = ops.reshape(ops.permute(ops.reshape(h, (-1, i2, r0, r1)), (0, 2, 3, 1)), (-1, r0, r1 * i2))
        h = ops.linear(h, ops.reshape(f["g2"], (r2, r1 * i2)), None)
        h = ops.linear(h, ops.reshape(f["g3"], (o1 * r3, r2)), None)
        h = ops.reshape(ops.permute(ops.reshape(h, (-1, r0, o1, r3)), (0, 2, 1, 3)), (-1, o1, r0 * r3))
        h = ops.linear(h, ops.reshape(f["g4"], (o2, r0 * r3)), None)
        return ops.restore_positions(ops.reshape(h, (-1, site.o)), x, site.o)

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        """That between input and output, r2; no product makes or reads another one alone."""
        sizes = (-1, -1, _modes(site).shape[1])
        return (CoreBond("g2", "g3", writes=False, at=0, partner_at=2, sizes=sizes, per="g1"),)


def _modes(site: Site) -> Modes:
    """Large input parts first and large output parts last.

    The products in between then run over the small ones.
    """
    return Modes(balanced_factors(site.o, 2)[::-1], balanced_factors(site.i, 2), ((2,), (3,), (0,), (1,)))


def _per_position(site: Site, rank: Rank) -> int:
    _, i2, o1, _ = _modes(site).shape
    r0, r1, r2, r3 = rank
    return r0 * (r1 * site.i + r1 * i2 * r2 + r2 * o1 * r3 + r3 * site.o)


def _packed(cores: State) -> Factors:
    g1, g2, g3, g4 = share_norm(*cores)
    stored = {
        "g1": g1.transpose(1, 2),
        "g2": g2.permute(2, 0, 1),
        "g3": g3.permute(1, 2, 0),
        "g4": g4.permute(1, 2, 0),
    }
    return {name: core.contiguous() for name, core in stored.items()}


def _unpacked(factors: Factors) -> State:
    g1, g2, g3, g4 = (factors[f"g{k}"] for k in (1, 2, 3, 4))
    return g1.transpose(1, 2), g2.permute(1, 2, 0), g3.permute(2, 0, 1), g4.permute(2, 0, 1)


def _pair(first: Tensor, second: Tensor) -> Tensor:
    """Product of two neighbours `[a, m, b]`, `[b, n, c]`, with its open bonds last: `[m, n, a, c]`."""
    product: Tensor = torch.tensordot(first, second, dims=1)
    return product.permute(1, 2, 0, 3)


def _contract(cores: Sequence[Tensor]) -> Tensor:
    """The whole ring, `[i1, i2, o1, o2]`."""
    near, far = _pair(cores[0], cores[1]), _pair(cores[2], cores[3])
    ring: Tensor = torch.tensordot(near, far, dims=([2, 3], [3, 2]))
    return ring


def _halves(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD as two factors, filled with zeros where the rank is more than the matrix has."""
    vectors = left_vectors(matrix, rank)
    vectors = F.pad(vectors, (0, rank - vectors.shape[1]))
    return vectors, vectors.T @ matrix


def _solve_pair(seen: Tensor, rest: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, float]:
    """Least squares for `first[a, m, b]`, then for `second[b, n, c]`.

    And by how much their product lowers the squared error. `rest[x, y, c, a]` is the other half of the ring
    and `seen[m, n, c, a]` the weight times it, so neither solve reads the weight.
    """
    open_bonds = rest.flatten(0, 1).flatten(1)
    outer = (open_bonds.T @ open_bonds).reshape(*rest.shape[2:], *rest.shape[2:])
    gram = torch.einsum("bcBC,caCA->abAB", _bonds(second), outer)
    a, m, b = first.shape
    solved = solve_gram(
        gram.reshape(a * b, a * b), torch.einsum("mnca,bnc->abm", seen, second).reshape(a * b, m)
    )
    first = solved.reshape(a, b, m).transpose(1, 2)
    first = first / first.norm().clamp_min(1e-150)
    _, n, c = second.shape
    wanted = torch.einsum("mnca,amb->bcn", seen, first).reshape(b * c, n)
    gram = torch.einsum("abAB,caCA->bcBC", _bonds(first), outer).reshape(b * c, b * c)
    solved = solve_gram(gram, wanted)
    reduction = float(((2 * wanted - gram @ solved) * solved).sum())
    return first, solved.reshape(b, c, n).transpose(1, 2), reduction


def _bonds(core: Tensor) -> Tensor:
    """`sum_n G[a, n, b] G[A, n, B]` as `[a, b, A, B]`."""
    a, n, b = core.shape
    flat = core.transpose(1, 2).reshape(a * b, n)
    return (flat @ flat.T).reshape(a, b, a, b)
