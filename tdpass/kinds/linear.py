"""linear: a matrix product over the last axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.kinds.base import Functions, LayerKind, Sizes, register_kind, some_rows
from tdpass.kinds.transposed_linear import TransposedLinear, may_be_transposed
from tdpass.ops import Ops, V, transposed_linear
from tdpass.site import Extent, Site


@register_kind
class Linear(LayerKind):
    """`y[..., o] = sum_i W[o, i] x[..., i]`, at every position alike.

    Its extents are numbers of positions.
    """

    name = "linear"
    axes = range(1)
    modules = (nn.Linear, TransposedLinear)
    functions: ClassVar[Functions] = {F.linear: nn.Linear, torch.ops.aten.linear.default: nn.Linear}
    arguments: ClassVar[Mapping[str, Any]] = {"bias": None}
    calls = frozenset({F.linear, transposed_linear})

    def examples(self) -> Sequence[Site]:
        return (
            Site("linear", self.name, (24, 36), extents=(((3,), (3,)),)),
            Site("linear_prime", self.name, (13, 17), extents=(((3,), (3,)),)),
        )

    def site(self, module: nn.Module, name: str) -> Site:
        weight: Any = module.weight
        shape = tuple(weight.shape)
        return Site(
            name,
            self.name,
            shape if isinstance(module, nn.Linear) else shape[::-1],
            bias=module.bias is not None,
            itemsize=weight.element_size(),
        )

    def base_of(self, module: nn.Module) -> type[nn.Module] | None:
        return super().base_of(module) or (TransposedLinear if may_be_transposed(module) else None)

    def build(self, cls: type[nn.Module], shape: Sizes, options: Mapping[str, Any]) -> nn.Module:
        return cls(shape[1], shape[0], bias=False, device="meta")

    def input_sizes(self, module: nn.Module, positions: int) -> Sequence[Sizes]:
        features = self.site(module, "").i
        return (positions, features), (2, positions, features)

    def call(self, site: Site, read: Sizes, made: Sizes) -> tuple[Extent, int]:
        return ((1,), (1,)), math.prod(read[:-1])

    def extents(self, extent: Extent, times: int) -> tuple[Extent, ...]:
        return (((times,), (times,)),)

    def typical(self, site: Site) -> Extent:
        return (1,), (1,)

    def sample(self, site: Site, batch: int) -> Sizes:
        ((read, _), *_) = site.extents
        return (batch, *(() if read == (1,) else read), site.i)

    def positions(self, site: Site, axes: range | None = None) -> int:
        return site.out_positions

    def apply(self, ops: Ops[V], x: V, weight: V, bias: V | None, site: Site) -> V:
        return ops.linear(x, weight, bias)

    def reaches(self, site: Site) -> Sequence[tuple[int, int]]:
        return ()

    def rows(
        self, x: Tensor, site: Site, limit: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen = some_rows(rows.shape[0], limit, generator)
        return rows if chosen is None else rows[chosen]

    def output_rows(self, y: Tensor, site: Site) -> Tensor:
        return y.reshape(-1, y.shape[-1])
