"""A weight as a choice among forms, whose ranks share one ordered set of factors for each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpass.errors import PlanError
from tdpass.form import DENSE, Form, Rank
from tdpass.formats.base import FORMATS, Format
from tdpass.formats.metric import Metric
from tdpass.formats.multilinear import share_norm
from tdpass.site import Site
from tdpass.training.placement import world


@dataclass
class Draw:
    """What decides a weight at the moment: p = softmax((logits + noise) / temperature).

    With the gradients of the logits only where it is `live`; without them p is a constant to the weights.
    """

    logits: nn.Parameter
    noise: Tensor
    temperature: float = 1.0
    live: bool = False

    def shares(self) -> Tensor:
        """p, one number for each form."""
        logits = self.logits if self.live else self.logits.detach()
        return torch.softmax((logits + self.noise) / self.temperature, 0)


class Choices(nn.Module):
    """W = sum_c p_c W_c as a parametrization of a weight, the candidates W_c its forms; the first is dense.

    A layer is linear in its weight, so that this is the layer whose output is sum_c p_c T_c(x), at the price
    of one dense layer however many candidates there are.  All ranks of a format are the leading parts of one
    set of factors, of the largest ranks: sum_c p_c W_c is then one reconstruction, in which the factor that
    has all ranks is weighed by how much of p reaches each entry.

    `draw` gives p; in evaluation it is the most probable form, and `chosen` fixes one.  Without either it is
    dense.
    """

    def __init__(self, site: Site, forms: Sequence[Form], metric: Metric) -> None:
        super().__init__()
        self.site, self.forms, self.metric = site, (DENSE, *forms), metric
        self.stacks = [
            _Stack.of(site, name, self.forms) for name in dict.fromkeys(form.format for form in forms)
        ]
        self.draw: Draw | None = None
        self.chosen: int | None = None

    def forward(self, dense: Tensor, *factors: Tensor) -> Tensor:
        """The weight of the site's shape."""
        index = self._settled()
        if index is None and self.draw is not None:
            return self.mixed(self.draw.shares(), dense, *factors)
        weight = self.one(index or 0, dense, *factors)
        if world()[1] > 1:  # processes that average gradients wait for those of all parameters
            weight = weight + 0.0 * torch.stack([part.flatten()[0] for part in (dense, *factors)]).sum()
        return weight

    def mixed(self, shares: Tensor, dense: Tensor, *factors: Tensor) -> Tensor:
        """sum_c p_c W_c for these p."""
        weight = shares[0] * dense
        for stack, own in zip(self.stacks, self._by_stack(factors), strict=True):
            weight = weight + stack.weight(shares, own).to(dense)
        return weight

    def one(self, index: int, dense: Tensor, *factors: Tensor) -> Tensor:
        """W_c for that form."""
        form = self.forms[index]
        for stack, own in zip(self.stacks, self._by_stack(factors), strict=True):
            if stack.format == form.format:
                return stack.leading(form.rank, own).to(dense)
        return dense

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The dense weight, and the factors of each format at its largest ranks.

        Those that matter most in the metric come first.  Factors of a format begin at equal norms: fitted in a
        metric they may differ a thousandfold, and no one step size would suit them.
        """
        found = [weight.clone()]
        for stack in self.stacks:
            factors = FORMATS.get(stack.format).factorize(
                weight.detach().cpu(), self.site, stack.top, self.metric
            )
            found += [factor.to(weight) for factor in share_norm(*(factors[name] for name in stack.names))]
        return tuple(found)

    def _settled(self) -> int | None:
        if self.chosen is None and self.draw is not None and not self.training:
            return int(self.draw.logits.detach().argmax())
        return self.chosen

    def _by_stack(self, factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        found, begin = [], 0
        for stack in self.stacks:
            found.append(factors[begin : begin + len(stack.names)])
            begin += len(stack.names)
        return found


@dataclass(frozen=True)
class _Stack:
    """The candidates of one format.

    Their places among the forms, and which entries of the factor `carrier` each has.
    """

    site: Site
    format: str
    top: Rank
    names: tuple[str, ...]
    carrier: int
    places: tuple[int, ...]
    reach: Tensor

    @classmethod
    def of(cls, site: Site, format_name: str, forms: Sequence[Form]) -> _Stack:
        """Raises `PlanError` for a format none of whose factors has all its ranks."""
        fmt, places = (
            FORMATS.get(format_name),
            [k for k, form in enumerate(forms) if form.format == format_name],
        )
        top = tuple(max(column) for column in zip(*(forms[k].rank for k in places), strict=True))
        shapes = fmt.shapes(site, top)
        axes = {name: _rank_axes(fmt, site, top, name) for name in shapes}
        carriers = [number for number, found in enumerate(axes.values()) if None not in found]
        if not carriers:
            raise PlanError(
                f"the ranks of format {format_name} lie in several factors; choose among svd, spatial_svd, "
                "tucker2 and their like"
            )
        names = tuple(shapes)
        carrier = names[carriers[0]]
        reach = torch.stack([_reached(shapes[carrier], axes[carrier], forms[k].rank) for k in places])
        return cls(site, format_name, top, names, carriers[0], tuple(places), reach)

    def weight(self, shares: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The sum of this format's candidates, each times its share."""
        own = shares[list(self.places)].reshape(-1, *(1 for _ in self.reach.shape[1:]))
        weighed = [*factors]
        weighed[self.carrier] = weighed[self.carrier] * (own * self.reach.to(own)).sum(0)
        return self._made(weighed)

    def leading(self, rank: Rank, factors: Sequence[Tensor]) -> Tensor:
        """The candidate at that rank."""
        shapes = FORMATS.get(self.format).shapes(self.site, rank)
        return self._made(
            [
                factor[tuple(map(slice, shapes[name]))]
                for name, factor in zip(self.names, factors, strict=True)
            ]
        )

    def _made(self, factors: Sequence[Tensor]) -> Tensor:
        return FORMATS.get(self.format).reconstruct(dict(zip(self.names, factors, strict=True)), self.site)


def _rank_axes(fmt: Format, site: Site, top: Rank, name: str) -> list[int | None]:
    """The axis of a factor that grows with each rank; None where none does."""
    shape, found = fmt.shapes(site, top)[name], list[int | None]()
    for k in range(len(top)):
        grown = fmt.shapes(site, (*top[:k], top[k] + 1, *top[k + 1 :]))[name]
        found.append(next((axis for axis, size in enumerate(grown) if size != shape[axis]), None))
    return found


def _reached(shape: Sequence[int], axes: Sequence[int | None], rank: Rank) -> Tensor:
    """1 at the entries of a factor among the leading ones at that rank, on its axes of rank alone."""
    mask = torch.ones([size if axis in axes else 1 for axis, size in enumerate(shape)])
    for axis, r in zip(axes, rank, strict=True):
        assert axis is not None
        mask.narrow(axis, r, shape[axis] - r).zero_()
    return mask
