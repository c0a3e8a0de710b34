"""How `tensor_train` cuts a weight into cores, stores them and applies them.

Linear layers, convolutions, convolutions with split channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tdpass.form import Rank
from tdpass.formats.alternating import State
from tdpass.formats.base import Factors, Stage
from tdpass.formats.bonds import Bond
from tdpass.formats.core_bonds import CoreBond, SliceBond
from tdpass.formats.geometry import apply_dense, no_padding, pointwise, unit
from tdpass.formats.multilinear import Modes, balanced_factors
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site


@dataclass(frozen=True)
class Train(ABC):
    """How a weight is cut into a train of cores `G_k[r_k-1, n_k, r_k]`, how it is stored and applied."""

    site: Site
    cuts: int

    @property
    @abstractmethod
    def modes(self) -> Modes:
        """The weight as a tensor with one axis per core."""

    @abstractmethod
    def shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        """Shape of every stored core."""

    @abstractmethod
    def macs(self, rank: Rank) -> int:
        """Multiply-adds per sample."""

    @property
    @abstractmethod
    def bonds(self) -> tuple[Bond, ...]:
        """The axes that its cores share, as `Format.bonds`."""

    @abstractmethod
    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], rank: Rank) -> V:
        """Everything but the last stage."""

    def last_stage(self, rank: Rank) -> Stage | None:
        """The final layer, where the last core is one."""
        return None

    @property
    def limits(self) -> Rank:
        """Ranks at which the train is exact."""
        n = self.modes.shape
        return tuple(min(math.prod(n[:k]), math.prod(n[k:])) for k in range(1, self.cuts + 1))

    @abstractmethod
    def pack(self, cores: State) -> Factors:
        """The stored form of the cores."""

    @abstractmethod
    def unpack(self, factors: Factors) -> State:
        """The cores of their stored form."""


class LinearTrain(Train):
    """TT-matrix: `W[(o1 .. od), (i1 .. id)] = G_1[o1, i1] ... G_d[od, id]`.

    Core k is stored as `[r, o_k, i_k, s]` (Novikov et al. 2015).
    """

    @property
    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Factors of o, descending, and of i, ascending: little is large while much of the input is left."""
        return balanced_factors(self.site.o, self.cuts + 1), balanced_factors(self.site.i, self.cuts + 1)[
            ::-1
        ]

    @property
    def modes(self) -> Modes:
        o, i = self.parts
        return Modes(o, i, tuple((k, k + len(o)) for k in range(len(o))))

    def shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        ends = (1, *rank, 1)
        return {
            f"g{k + 1}": (ends[k], o, i, ends[k + 1])
            for k, (o, i) in enumerate(zip(*self.parts, strict=True))
        }

    def pack(self, cores: State) -> Factors:
        stored = zip(cores, *self.parts, strict=True)
        return {
            f"g{k + 1}": core.reshape(core.shape[0], o, i, core.shape[2])
            for k, (core, o, i) in enumerate(stored)
        }

    def unpack(self, factors: Factors) -> State:
        return tuple(factors[f"g{k + 1}"].flatten(1, 2) for k in range(self.cuts + 1))

    @property
    def bonds(self) -> tuple[Bond, ...]:
        """Each core but the first makes its bond times a part of the output, so a slice spares all it can."""
        o, i = self.parts
        return tuple(
            SliceBond(
                f"g{k + 1}",
                f"g{k}",
                writes=False,
                at=0,
                partner_at=3,
                sizes=(-1, o[k], i[k], -1),
                repeats=math.prod(o[k + 1 :]) * math.prod(i[:k]),
                mode=1,
            )
            for k in reversed(range(1, len(o)))
        )

    def macs(self, rank: Rank) -> int:
        o, i = self.parts
        per_position = sum(
            math.prod(o[k + 1 :]) * math.prod(i[:k]) * math.prod(shape)
            for k, shape in enumerate(self.shapes(rank).values())
        )
        return per_position * self.site.out_positions

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], rank: Rank) -> V:
        """From the last core to the first.

        A value is `[n, outputs so far, inputs left, (i_k s)]` before core k.
        """
        o, i = self.parts
        ends = (1, *rank, 1)
        h = ops.reshape(ops.flatten_positions(x, self.site.i), (-1, 1, math.prod(i[:-1]), i[-1]))
        for k in reversed(range(len(o))):
            done, left = math.prod(o[k + 1 :]), math.prod(i[:k])
            h = ops.linear(h, ops.reshape(f[f"g{k + 1}"], (ends[k] * o[k], i[k] * ends[k + 1])), None)
            if k > 0:
                h = ops.permute(
                    ops.reshape(h, (-1, done, left // i[k - 1], i[k - 1] * ends[k], o[k])), (0, 4, 1, 2, 3)
                )
                h = ops.reshape(h, (-1, o[k] * done, left // i[k - 1], i[k - 1] * ends[k]))
        h = ops.reshape(
            ops.permute(ops.reshape(h, (-1, math.prod(o[1:]), o[0])), (0, 2, 1)), (-1, self.site.o)
        )
        return ops.restore_positions(h, x, self.site.o)


class ConvTrain(Train):
    """`W[o, i, h, w] = G_1[i] G_2[h w] G_3[o]`.

    Three convolutions, stored as `[r, i, 1, 1]`, `[s, r, h, w]`, `[o, s, 1, 1]`.
    """

    @property
    def modes(self) -> Modes:
        return Modes((self.site.o,), (self.site.i, math.prod(self.site.kernel)), ((1,), (2,), (0,)))

    def shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        r, s = rank
        ones = unit(len(self.site.kernel))
        return {
            "first": (r, self.site.i, *ones),
            "core": (s, r, *self.site.kernel),
            "last": (self.site.o, s, *ones),
        }

    def pack(self, cores: State) -> Factors:
        first, core, last = cores
        shapes = self.shapes((first.shape[2], core.shape[2]))
        stored = {"first": first[0].T, "core": core.permute(2, 0, 1), "last": last[:, :, 0].T}
        return {name: factor.reshape(shapes[name]) for name, factor in stored.items()}

    def unpack(self, factors: Factors) -> State:
        first, core, last = (factors[name].flatten(1) for name in ("first", "core", "last"))
        return first.T[None], core.reshape(len(core), len(first), -1).permute(1, 2, 0), last.T[:, :, None]

    @property
    def bonds(self) -> tuple[Bond, ...]:
        return Bond("first", "core", writes=False), Bond("last", "core", writes=True)

    def macs(self, rank: Rank) -> int:
        r, s = rank
        site = self.site
        return r * site.i * site.in_positions + s * (
            r * math.prod(site.kernel) * kind_of(site).positions(site) + site.o * site.out_positions
        )

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], rank: Rank) -> V:
        axes = len(self.site.kernel)
        h = ops.conv(x, f["first"], None, unit(axes), no_padding(axes), unit(axes))
        return apply_dense(
            ops, h, f["core"], None, replace(self.site, shape=(rank[1], rank[0], *self.site.kernel))
        )

    def last_stage(self, rank: Rank) -> Stage:
        return Stage("last", pointwise(self.site.o, rank[1], len(self.site.kernel), self.site.name))


class SplitConvTrain(Train):
    """`W[(o1 .. oa), (i1 .. ia), h, w] = G_1[i1] .. G_a[ia] G[h w] H_1[o1] .. H_a[oa]`.

    As in ADMM-TT (Yin et al. 2021). The core is stored as `[s, r, h, w]` and convolves r channels to s; the
    other cores are matrix products at every position.
    """

    @property
    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Factors of o, ascending, and of i, descending.

        So the products over few channels come while many are left.
        """
        return balanced_factors(self.site.o, self.cuts // 2)[::-1], balanced_factors(
            self.site.i, self.cuts // 2
        )

    @property
    def modes(self) -> Modes:
        o, i = self.parts
        a = len(o)
        return Modes(
            o,
            (*i, math.prod(self.site.kernel)),
            (*((a + k,) for k in range(a + 1)), *((k,) for k in range(a))),
        )

    def shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        o, i = self.parts
        a, ends = len(o), (1, *rank, 1)
        left = {f"in{k + 1}": (ends[k], i[k], ends[k + 1]) for k in range(a)}
        right = {f"out{k + 1}": (ends[a + 1 + k], o[k], ends[a + 2 + k]) for k in range(a)}
        return {**left, "core": (ends[a + 1], ends[a], *self.site.kernel), **right}

    def pack(self, cores: State) -> Factors:
        a = self.cuts // 2
        core = cores[a].permute(2, 0, 1)
        left = {f"in{k + 1}": cores[k] for k in range(a)}
        right = {f"out{k + 1}": cores[a + 1 + k] for k in range(a)}
        return {**left, "core": core.reshape(*core.shape[:2], *self.site.kernel), **right}

    def unpack(self, factors: Factors) -> State:
        a = range(1, self.cuts // 2 + 1)
        return (
            *(factors[f"in{k}"] for k in a),
            factors["core"].flatten(2).permute(1, 2, 0),
            *(factors[f"out{k}"] for k in a),
        )

    @property
    def bonds(self) -> tuple[Bond, ...]:
        """All: the cores of the input read theirs to the core, those of the output write theirs from it."""
        o, i = self.parts
        a = len(o)
        reading = [
            CoreBond(
                f"in{k + 1}",
                f"in{k + 2}" if k + 1 < a else "core",
                writes=False,
                at=2,
                partner_at=0 if k + 1 < a else 1,
                sizes=(-1, i[k], -1),
                repeats=math.prod(i[k + 1 :]),
            )
            for k in range(a)
        ]
        writing = [
            CoreBond(
                f"out{k + 1}",
                f"out{k}" if k else "core",
                writes=True,
                at=0,
                partner_at=2 if k else 0,
                sizes=(-1, o[k], -1),
                repeats=math.prod(o[:k]),
            )
            for k in reversed(range(a))
        ]
        return *reading, *writing

    def macs(self, rank: Rank) -> int:
        o, i = self.parts
        shapes, site = self.shapes(rank), self.site
        before = sum(math.prod(i[k + 1 :]) * math.prod(shapes[f"in{k + 1}"]) for k in range(len(i)))
        after = sum(math.prod(o[:k]) * math.prod(shapes[f"out{k + 1}"]) for k in range(len(o)))
        return (
            before * site.in_positions
            + math.prod(shapes["core"]) * kind_of(site).positions(site)
            + after * site.out_positions
        )

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], rank: Rank) -> V:
        """Channels go last for the matrix products and come back for the convolution and at the end."""
        o, i = self.parts
        a, axes, ends = len(o), len(self.site.kernel), (1, *rank, 1)
        to_last, to_second = (0, *range(2, axes + 2), 1), (0, axes + 1, *range(1, axes + 1))
        seen = ops.permute(x, to_last)
        h, left = ops.flatten_positions(seen, self.site.i), self.site.i
        for k in range(a):
            left //= i[k]
            h = ops.permute(ops.reshape(h, (-1, i[k], left, ends[k])), (0, 2, 3, 1))
            weight = ops.reshape(f[f"in{k + 1}"], (ends[k] * i[k], ends[k + 1]))
            h = ops.matmul(ops.reshape(h, (-1, left, ends[k] * i[k])), weight)
        h = ops.permute(ops.restore_positions(ops.reshape(h, (-1, ends[a])), seen, ends[a]), to_second)
        core = replace(self.site, shape=(ends[a + 1], ends[a], *self.site.kernel))
        seen = ops.permute(apply_dense(ops, h, f["core"], None, core), to_last)
        h = ops.flatten_positions(seen, ends[a + 1])
        for k in range(a):
            r, s = ends[a + 1 + k], ends[a + 2 + k]
            h = ops.matmul(
                ops.reshape(h, (-1, math.prod(o[:k]), r)), ops.reshape(f[f"out{k + 1}"], (r, o[k] * s))
            )
        return ops.permute(
            ops.restore_positions(ops.reshape(h, (-1, self.site.o)), seen, self.site.o), to_second
        )


@dataclass(frozen=True)
class Family:
    """The trains of sites with, or without, spatial axes.

    By how many ranks there may be, and how many are proposed.
    """

    allowed: range
    proposed: tuple[int, ...]
    train: Callable[[Site, int], Train]


_PRODUCTS = Family(range(1, 9), (1, 2), LinearTrain)
_CONVOLUTIONS = Family(
    range(2, 9, 2), (2,), lambda site, cuts: (ConvTrain if cuts == 2 else SplitConvTrain)(site, cuts)
)


def family_of(site: Site) -> Family:
    """The trains of a site: of convolutions where it has spatial axes."""
    return _CONVOLUTIONS if site.axes else _PRODUCTS


def train_of(site: Site, cuts: int) -> Train:
    """The train of a site with that many ranks."""
    return family_of(site).train(site, cuts)
