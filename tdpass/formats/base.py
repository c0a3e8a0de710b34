"""What a format is: a way to store a weight as factors and to apply those factors without rebuilding it."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdpass.cost import Cost
from tdpass.errors import PlanError
from tdpass.form import Rank
from tdpass.formats.bonds import ORDER_TYPE, Bond
from tdpass.formats.geometry import apply_dense, unit
from tdpass.formats.metric import Metric
from tdpass.ops import Ops, StorageOps, V
from tdpass.registry import Registry
from tdpass.site import Site

_RANGE = 64
Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Guarantee:
    """What is known of the relative error ||W - What|| / ||W|| without forming What."""

    value: float
    kind: Literal["exact", "upper bound"]

    def __str__(self) -> str:
        return f"{'=' if self.kind == 'exact' else '<='} {self.value:.4f}"


class Decomposition(ABC):
    """A weight decomposed once, from which factors of any rank can be read.

    With `rough`, a search may end early: its factors are good enough to compare candidates by, not to keep.
    """

    rough: bool = False

    @abstractmethod
    def factors(self, rank: Rank) -> Factors:
        """Factors at that rank, float64."""

    def refined(self, rank: Rank, factors: Factors) -> Factors:
        """Factors at that rank found from given ones, where finding them is a search."""
        return self.factors(rank)

    def guarantee(self, rank: Rank) -> Guarantee | None:
        """The relative error in the metric it was decomposed in, where theory gives one."""
        return None


class _Scaled(Decomposition):
    """A decomposition of the weight over `2^exponent`.

    Its factors, each of which enters the product once, share that among them.
    """

    def __init__(self, inner: Decomposition, exponent: int) -> None:
        self.inner, self.exponent = inner, exponent

    def factors(self, rank: Rank) -> Factors:
        self.inner.rough = self.rough
        return self._times(self.inner.factors(rank), self.exponent)

    def refined(self, rank: Rank, factors: Factors) -> Factors:
        return self._times(self.inner.refined(rank, self._times(factors, -self.exponent)), self.exponent)

    def guarantee(self, rank: Rank) -> Guarantee | None:
        return self.inner.guarantee(rank)

    def _times(self, factors: Factors, exponent: int) -> Factors:
        each, rest = divmod(exponent, len(factors))
        return {
            name: factor * 2.0 ** (each + (number < rest))
            for number, (name, factor) in enumerate(factors.items())
        }


@dataclass(frozen=True)
class Stage:
    """The last layer of a factor chain: it reads features and its weight is the factor of that name."""

    factor: str
    site: Site


class Format(ABC):
    """One way to factor a weight; a subclass per file, registered with `register_format`.

    Class attributes: `name`, how many spatial `axes` the sites it fits may have, `version` (raised when its
    factors change, so that caches expire), `offered` (whether it is a way to make a single site smaller, to
    be tried where no format is asked for), `exact_at_full_rank` (whether the last of `ranks` reproduces any
    weight), `searched` (whether each rank is a search of its own, so that the planner tries fewer of them on
    large layers), `reader` (the factor that has the site's input channels along its second axis, empty where
    none has), `remainder` (the factor that holds what all others leave of the weight, empty where none does),
    `gives_rows` (whether single rows of the weight can be had without the others, as tables need it).
    """

    name: ClassVar[str]
    axes: ClassVar[range]
    version: ClassVar[int] = 1
    offered: ClassVar[bool] = True
    exact_at_full_rank: ClassVar[bool] = True
    searched: ClassVar[bool] = False
    reader: ClassVar[str] = ""
    remainder: ClassVar[str] = ""
    gives_rows: ClassVar[bool] = False

    def __reduce__(self) -> tuple[Callable[[str, str], Format], tuple[str, str]]:
        # a layer that is copied or pickled goes on with the registered format, whose class may have been made
        # by a decorator and be no attribute of its module
        return _registered, (self.__module__, self.name)

    def fits(self, site: Site) -> bool:
        """Whether the format makes sense for that site."""
        return site.axes in self.axes and site.groups == 1 and (self.gives_rows or not site.table)

    @abstractmethod
    def ranks(self, site: Site) -> Sequence[Rank]:
        """Candidate ranks, cheap to expensive; the last is the largest that makes sense."""

    @abstractmethod
    def decompose(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        """Do the work that all ranks share; `weight` is float64 of the site's shape."""

    @abstractmethod
    def shapes(self, site: Site, rank: Rank) -> dict[str, tuple[int, ...]]:
        """Shape of every factor."""

    @abstractmethod
    def macs(self, site: Site, rank: Rank) -> int:
        """Multiply-adds of the calls that the site's extents tell of."""

    @abstractmethod
    def reconstruct(self, factors: Factors, site: Site) -> Tensor:
        """The dense weight that the factors stand for."""

    @abstractmethod
    def features(self, ops: Ops[V], x: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        """Everything but the last stage; where there is none, the output without bias."""

    def bonds(self, site: Site, count: int) -> Sequence[Bond]:
        """Axes that its factors share of which `tdpass.formats.pivoted` can spare r^2 numbers.

        It can where it has so many factors. In the order in which they are spared: no factor is the partner
        of one that comes after its own.
        """
        return ()

    def orders(self, site: Site, rank: Rank) -> dict[str, int]:
        """Orders of channels that are stored beside the factors, as whole numbers: how many, by name."""
        return {}

    @property
    def chain(self) -> Format:
        """The format of which it stores the factors in another way; most store their own."""
        return self

    @property
    def leading(self) -> Format:
        """The format of the factors beside the remainder; itself where there is none."""
        return self

    def from_chain(self, factors: Factors, site: Site) -> Factors:
        """What it stores for factors of its `chain`, float64, and the orders.

        Raises `NumericalError` where that would lose something.
        """
        return factors

    def to_chain(self, factors: Factors, site: Site) -> Factors:
        """The factors of its `chain` for what it stores."""
        return factors

    def last_stage(self, site: Site, rank: Rank) -> Stage | None:
        """The final linear or convolution layer of the chain, the one that `refit` solves for.

        None where there is none.
        """
        return None

    def apply(self, ops: Ops[V], x: V, f: Mapping[str, V], bias: V | None, site: Site, rank: Rank) -> V:
        """The layer's output from its factors, equal to the dense layer with `reconstruct(factors)`."""
        h = self.features(ops, x, f, site, rank)
        last = self.last_stage(site, rank)
        if last is None:
            return h if bias is None else ops.add(h, ops.reshape(bias, (site.o, *unit(len(site.kernel)))))
        return apply_dense(ops, h, f[last.factor], bias, last.site)

    def rows(self, ops: StorageOps[V], numbers: V, f: Mapping[str, V], site: Site, rank: Rank) -> V:
        """The rows `reconstruct(factors)[numbers]` of a table, along a last axis behind those of `numbers`.

        Raises `PlanError` for a format that must multiply out all of them.
        """
        raise PlanError(
            f"{self.name} cannot give single rows of table {site.name!r}; plan it in a format that fits it"
        )

    def row_macs(self, site: Site, rank: Rank) -> int:
        """Multiply-adds of one of `rows`."""
        return 0

    def factorize(self, weight: Tensor, site: Site, rank: Rank, metric: Metric | None = None) -> Factors:
        """Factors of one rank; deterministic; raises `PlanError` for a rank that does not fit."""
        self.check_rank(site, rank)
        return self.begin(weight, site, metric or Metric()).factors(rank)

    def begin(self, weight: Tensor, site: Site, metric: Metric) -> Decomposition:
        """`decompose` of a weight in a metric, both brought near 1 first where that is needed.

        It is needed where products of their squares would leave the range.
        """
        weight, inputs, outputs = weight.double(), metric.inputs, metric.outputs
        exponents = [_exponent(tensor) for tensor in (weight, inputs, outputs)]
        if max(map(abs, exponents)) <= _RANGE:
            return self.decompose(weight, site, metric)
        shifts = [exponent if abs(exponent) > _RANGE else 0 for exponent in exponents]
        near = Metric(_shifted(inputs, -shifts[1]), _shifted(outputs, -shifts[2]), metric.mean, metric.groups)
        return _Scaled(self.decompose(weight * 2.0 ** -shifts[0], site, near), shifts[0])

    def refine(
        self, weight: Tensor, site: Site, rank: Rank, factors: Factors, metric: Metric | None = None
    ) -> Factors:
        """`factorize` for a format that searches, which goes on from given factors.

        Their error does not grow. A search that begins anew may end in another, poorer local optimum, even
        for a weight that has such factors.
        """
        self.check_rank(site, rank)
        given = {name: factor.to(weight.device, torch.float64) for name, factor in factors.items()}
        return self.begin(weight, site, metric or Metric()).refined(rank, given)

    def check_rank(self, site: Site, rank: Rank) -> None:
        """Raise `PlanError` unless `rank` has the right length and is within the site's limits."""
        top = self.ranks(site)[-1]
        if len(rank) != len(top) or not all(1 <= r <= t for r, t in zip(rank, top, strict=True)):
            raise PlanError(
                f"{self.name} rank {rank} does not fit site {site.name!r} of shape {site.shape}; allowed is "
                f"1 to {top} in each place"
            )

    def cost(self, site: Site, rank: Rank) -> Cost:
        """Stored numbers, multiply-adds and bytes, the bias not counted."""
        params = sum(math.prod(shape) for shape in self.shapes(site, rank).values())
        macs = self.macs(site, rank) + site.lookups * self.row_macs(site, rank) if site.seen else 0
        orders = ORDER_TYPE.itemsize * sum(self.orders(site, rank).values())
        return Cost(params, macs // site.samples, params * site.itemsize + orders)


def _exponent(tensor: Tensor | None) -> int:
    """The power of two just above the largest value; 0 for none, for zeros and for what is not finite."""
    largest = 0.0 if tensor is None or not tensor.numel() else float(tensor.abs().max())
    return math.frexp(largest)[1] if math.isfinite(largest) else 0


def _shifted(tensor: Tensor | None, exponent: int) -> Tensor | None:
    return None if tensor is None else tensor.double() * 2.0**exponent


FORMATS: Registry[Format] = Registry("format")


def register_format(cls: type[Format]) -> type[Format]:
    """Class decorator: make a format known by its `name`."""
    FORMATS.add(cls.name, cls())
    return cls


def _registered(module: str, name: str) -> Format:
    """The format of that name, which importing that module makes known."""
    importlib.import_module(module)
    return FORMATS.get(name)


def offered_formats() -> tuple[str, ...]:
    """Names of the formats that are tried where none is asked for."""
    return tuple(form.name for form in FORMATS if form.offered)


def rank_grid(limit: int, steps: int = 24) -> list[int]:
    """Up to `steps` ranks from 1 to `limit`, both included, evenly spaced but dense at the low end."""
    low = [r for r in (1, 2, 3, 4, 6, 8) if r < limit]
    even = [max(1, round(limit * k / steps)) for k in range(1, steps + 1)]
    return sorted({*low, *even, limit})


def scaled_ranks(limits: Sequence[int], steps: int = 16) -> list[Rank]:
    """Ranks that grow in proportion to `limits`, from 1 everywhere to `limits` itself."""
    return sorted(
        {tuple(max(1, round(limit * k / steps)) for limit in limits) for k in range(1, steps + 1)}
        | {tuple(1 for _ in limits)}
    )
