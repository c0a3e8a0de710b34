"""Formats of grouped convolutions.

The same format for every group, its factors stacked, its layers grouped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from tdpass.form import Rank
from tdpass.formats.base import Decomposition, Factors, Format, Guarantee, Stage
from tdpass.formats.bonds import Bond
from tdpass.formats.metric import Metric
from tdpass.ops import Ops, Pads, V
from tdpass.site import Site

_FACTS = (
    "name",
    "axes",
    "version",
    "offered",
    "exact_at_full_rank",
    "searched",
    "reader",
    "__doc__",
    "__module__",
)


class PerGroup(Format):
    """A format whose layers are all convolutions, on sites of any number of groups.

    Each group is a site of its own with `1 / groups` of the outputs, and all have one rank.  Factors of the
    groups are stacked along their first axis, which every layer of the chain writes: with `groups` times its
    groups it then computes what the chains of the groups would, side by side.
    """

    inner: ClassVar[Format]

    def fits(self, site: Site) -> bool:
        return self.inner.fits(_one(site))

    def ranks(self, site: Site) -> Sequence[Rank]:
        return self.inner.ranks(_one(site))

    def check_rank(self, site: Site, rank: Rank) -> None:
        self.inner.check_rank(_one(site), rank)

    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        if site.groups == 1:
            return self.inner.decompose(weight, site, metric)
        return _Stacked(self.inner, weight, site, metric)

    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        shapes = self.inner.shapes(_one(site), rank)
        return {name: (site.groups * first, *rest) for name, (first, *rest) in shapes.items()}

    def macs(self, site: Site, rank: Rank) -> int:
        return site.groups * self.inner.macs(_one(site), rank)

    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        one = _one(site)
        return torch.cat([self.inner.reconstruct(each, one) for each in _parts(factors, site.groups)])

    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        inside: Ops[V] = ops if site.groups == 1 else _SideBySide(ops, site.groups)
        return self.inner.features(inside, x, f, _one(site), rank)

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        return self.inner.bonds(site, count) if site.groups == 1 else ()

    def last_stage(self, site: Site, rank: Rank) -> Stage | None:
        stage = self.inner.last_stage(_one(site), rank)
        if stage is None or site.groups == 1:
            return stage
        outputs, *rest = stage.site.shape
        return Stage(
            stage.factor,
            replace(stage.site, shape=(site.groups * outputs, *rest), groups=site.groups * stage.site.groups),
        )


def per_group(cls: type[Format]) -> type[Format]:
    """Class decorator: the format on sites of any number of groups."""
    return type(cls.__name__, (PerGroup,), {**{fact: getattr(cls, fact) for fact in _FACTS}, "inner": cls()})


def _one(site: Site) -> Site:
    """The site of a single group."""
    return replace(site, shape=(site.o // site.groups, *site.shape[1:]), groups=1)


def _parts(factors: Factors, groups: int) -> list[Factors]:
    """The factors of each group."""
    cut = {name: factor.chunk(groups) for name, factor in factors.items()}
    return [{name: parts[group] for name, parts in cut.items()} for group in range(groups)]


class _Stacked(Decomposition):
    """The decompositions of all groups; their errors are weighed by the norms of the groups in the metric."""

    def __init__(self, inner: Format, weight: Tensor, site: Site, metric: Metric) -> None:
        one, weights = _one(site), weight.chunk(site.groups)
        metrics = [metric.of_group(group) for group in range(site.groups)]
        self.groups = [inner.begin(part, one, own) for part, own in zip(weights, metrics, strict=True)]
        self.squares = [own.square(part.flatten(1)) for part, own in zip(weights, metrics, strict=True)]

    def factors(self, rank: Rank) -> Factors:
        return self._stacked([self._each(group).factors(rank) for group in range(len(self.groups))])

    def refined(self, rank: Rank, factors: Factors) -> Factors:
        parts = _parts(factors, len(self.groups))
        return self._stacked([self._each(group).refined(rank, part) for group, part in enumerate(parts)])

    def guarantee(self, rank: Rank) -> Guarantee | None:
        found = [group.guarantee(rank) for group in self.groups]
        known = [guarantee for guarantee in found if guarantee is not None]
        whole = sum(self.squares)
        if len(known) < len(found):
            return None
        error = sum(
            guarantee.value**2 * square for guarantee, square in zip(known, self.squares, strict=True)
        )
        kinds = {guarantee.kind for guarantee in known}
        return Guarantee(
            math.sqrt(error / whole) if whole > 0 else 0.0, kinds.pop() if len(kinds) == 1 else "upper bound"
        )

    def _each(self, group: int) -> Decomposition:
        self.groups[group].rough = self.rough
        return self.groups[group]

    @staticmethod
    def _stacked(parts: Sequence[Factors]) -> Factors:
        return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


class _SideBySide(Ops[V]):
    """Convolutions of all groups at once."""

    def __init__(self, ops: Ops[V], groups: int) -> None:
        self.ops, self.times = ops, groups

    def conv(
        self,
        x: V,
        weight: V,
        bias: V | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> V:
        return self.ops.conv(x, weight, bias, stride, padding, dilation, self.times * groups)

    def conv_transpose(
        self,
        x: V,
        weight: V,
        bias: V | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> V:
        return self.ops.conv_transpose(x, weight, bias, stride, cut, dilation, self.times * groups)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("a format that is used per group must be made of convolutions")

    linear = reshape = permute = take = part = concat = matmul = add = flatten_positions = (
        restore_positions
    ) = fill = _refuse
