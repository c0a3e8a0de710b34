"""How `block_term` lays a weight and its core out.

Grouped convolutions, batched products for linear layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.base import Factors
from tdpass.formats.geometry import apply_dense, no_padding, unit
from tdpass.formats.multilinear import Modes, balanced_factors
from tdpass.kinds import kind_of
from tdpass.ops import Ops, V
from tdpass.site import Site


class Layout(ABC):
    """Where the tensor `[o, p, i]` lies in the weight and in the factors.

    p counts kernel positions, or parts of a linear layer's input.
    """

    @abstractmethod
    def modes(self, site: Site) -> Modes:
        """The view `[o, p, i]` of the weight."""

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        """Shape of every stored factor."""
        b, s, r = rank
        ones = unit(len(site.kernel))
        return {
            "first": (b * r, self.modes(site).shape[2], *ones),
            "core": self.core_shape(site, rank),
            "last": (site.o, b * s, *ones),
        }

    @abstractmethod
    def core_shape(self, site: Site, rank: Rank) -> tuple[int, ...]:
        """Shape of the stored core."""

    @abstractmethod
    def macs(self, site: Site, rank: Rank) -> int:
        """Multiply-adds per sample."""

    @abstractmethod
    def rank(self, factors: Factors) -> Rank:
        """The rank that stored factors have."""

    @abstractmethod
    def pack(self, core: Tensor) -> Tensor:
        """The stored core of `core[b, s, p, r]`."""

    @abstractmethod
    def unpack(self, core: Tensor, positions: int, rank: Rank) -> Tensor:
        """`core[b, s, p, r]` of the stored one."""

    @abstractmethod
    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        """The first layer and the core."""


class Grouped(Layout):
    """Convolution: the core is a grouped convolution of the kernel's size, stored as `[(b s), r, h, w]`."""

    def modes(self, site: Site) -> Modes:
        return Modes((site.o,), (site.i, math.prod(site.kernel)), ((0,), (2,), (1,)))

    def core_shape(self, site: Site, rank: Rank) -> tuple[int, ...]:
        b, s, r = rank
        return (b * s, r, *site.kernel)

    def macs(self, site: Site, rank: Rank) -> int:
        b, s, r = rank
        return b * (
            r * site.i * site.in_positions
            + s * (r * math.prod(site.kernel) * kind_of(site).positions(site) + site.o * site.out_positions)
        )

    def rank(self, factors: Factors) -> Rank:
        r = factors["core"].shape[1]
        b = factors["first"].shape[0] // r
        return (b, factors["last"].shape[1] // b, r)

    def pack(self, core: Tensor) -> Tensor:
        return core.transpose(2, 3).flatten(0, 1)

    def unpack(self, core: Tensor, positions: int, rank: Rank) -> Tensor:
        b, s, r = rank
        return core.reshape(b, s, r, positions).transpose(2, 3)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        axes = len(site.kernel)
        h = ops.conv(x, f["first"], None, unit(axes), no_padding(axes), unit(axes))
        b, s, r = rank
        return apply_dense(ops, h, f["core"], None, replace(site, shape=(b * s, r, *site.kernel), groups=b))


class Batched(Layout):
    """Linear layer: its input is cut in p parts that share the first factor.

    The core is a batched product, stored as `[b, (p r), s]`.
    """

    def modes(self, site: Site) -> Modes:
        return Modes((site.o,), balanced_factors(site.i, 2)[::-1], ((0,), (1,), (2,)))

    def core_shape(self, site: Site, rank: Rank) -> tuple[int, ...]:
        b, s, r = rank
        return (b, self.modes(site).shape[1] * r, s)

    def macs(self, site: Site, rank: Rank) -> int:
        b, s, r = rank
        return b * (r * site.i + s * (r * self.modes(site).shape[1] + site.o)) * site.out_positions

    def rank(self, factors: Factors) -> Rank:
        b, _, s = factors["core"].shape
        return (b, s, factors["first"].shape[0] // b)

    def pack(self, core: Tensor) -> Tensor:
        return core.flatten(2).transpose(1, 2)

    def unpack(self, core: Tensor, positions: int, rank: Rank) -> Tensor:
        b, s, r = rank
        return core.transpose(1, 2).reshape(b, s, positions, r)

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        b, s, r = rank
        _, positions, inputs = self.modes(site).shape
        h = ops.reshape(ops.flatten_positions(x, site.i), (-1, positions, inputs))
        h = ops.permute(ops.reshape(ops.linear(h, f["first"], None), (-1, positions, b, r)), (2, 0, 1, 3))
        h = ops.matmul(ops.reshape(h, (b, -1, positions * r)), f["core"])
        return ops.restore_positions(ops.reshape(ops.permute(h, (1, 0, 2)), (-1, b * s)), x, b * s)


GROUPED, BATCHED = Grouped(), Batched()


def layout_of(site: Site) -> Layout:
    """The layout of a site: grouped where it has spatial axes."""
    return GROUPED if site.axes else BATCHED
