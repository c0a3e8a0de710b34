"""Weights trained as their singular values and vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdpass.formats.base import FORMATS
from tdpass.site import Site
from tdpass.training.parametrized import parametrized, with_parametrizations
from tdpass.training.placement import placed_like, whole
from tdpass.training.terms import Term


class SingularValues(nn.Module):
    """W from U[m, r], s[r], V[n, r] as a parametrization of a weight (`torch.nn.utils.parametrize`).

    U diag(s) V^T is the matrix whose rank a format of two factors has, the first `V^T` and the last
    `U diag(s)`; r is full at first.  No root of s is taken, whose gradient would not be finite at 0.
    """

    def __init__(self, site: Site, format_name: str) -> None:
        super().__init__()
        self.site, self.format = site, FORMATS.get(format_name)
        one, two = self.format.shapes(site, (1,)), self.format.shapes(site, (2,))
        self.first, self.last = one
        self._axis = {
            name: next(k for k, size in enumerate(two[name]) if size != shape[k])
            for name, shape in one.items()
        }
        self._rest = {
            name: (*shape[: self._axis[name]], *shape[self._axis[name] + 1 :]) for name, shape in one.items()
        }
        self.full = min(torch.Size(rest).numel() for rest in self._rest.values())

    def forward(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        factors = {self.first: self._folded(self.first, v), self.last: self._folded(self.last, u * s)}
        return self.format.reconstruct(factors, self.site)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition of a weight, in its own precision."""
        factors = self.format.factorize(weight.double(), self.site, (self.full,))
        v, v_rest = torch.linalg.qr(self._unfolded(self.first, factors[self.first]))
        u, u_rest = torch.linalg.qr(self._unfolded(self.last, factors[self.last]))
        left, s, right = torch.linalg.svd(u_rest @ v_rest.T)
        return (u @ left).to(weight), s.to(weight), (v @ right.T).to(weight)

    def _folded(self, name: str, matrix: Tensor) -> Tensor:
        return matrix.reshape(*self._rest[name], matrix.shape[1]).movedim(-1, self._axis[name])

    def _unfolded(self, name: str, factor: Tensor) -> Tensor:
        return factor.movedim(self._axis[name], -1).reshape(-1, factor.shape[self._axis[name]])


@dataclass(frozen=True)
class Triplet:
    """U, s and V of one layer, and how its weight comes of them."""

    u: nn.Parameter
    s: nn.Parameter
    v: nn.Parameter
    weight: Callable[[], Tensor]

    def keep(self, rank: int) -> None:
        """Put all but the `rank` largest singular values at zero."""
        values = whole(self.s.detach()).abs()
        mask = torch.zeros_like(values).scatter_(0, values.argsort(descending=True, stable=True)[:rank], 1.0)
        with torch.no_grad():
            self.s.mul_(placed_like(mask, self.s))

    def rank(self, energy: float) -> int:
        """The least rank, of at least one, that leaves out at most that share of the sum of squares."""
        squares = whole(self.s.detach()).double().square().sort(descending=True).values
        left_out = squares.flip(0).cumsum(0).flip(0)
        return max(1, int((left_out > energy * squares.sum()).sum()))


def with_singular_values(model: nn.Module, formats: Mapping[str, tuple[Site, str]]) -> nn.Module:
    """A copy of a model that trains U, s and V of the named modules' weights; shared weights stay shared."""
    return with_parametrizations(
        model, {name: partial(SingularValues, *found) for name, found in formats.items()}
    )


def triplets(network: nn.Module, names: Iterable[str]) -> dict[str, Triplet]:
    """U, s and V of the named modules; raises `AttributeError` for a model without them."""
    layers = parametrized(network, names)
    parts = {name: layer.originals for name, layer in layers.items()}
    return {name: Triplet(u, s, v, layers[name].weight) for name, (u, s, v) in parts.items()}


class Orthogonal(Term):
    """Adds the gradient of  strength * (||U^T U - I||^2 + ||V^T V - I||^2) / r^2  for each layer."""

    def __init__(self, layers: Mapping[str, Triplet], strength: float) -> None:
        self.layers, self.strength = dict(layers), strength

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        for layer in self.layers.values():
            rank = layer.s.numel()
            for factor in (layer.u, layer.v):
                if factor.grad is not None:
                    held = whole(factor.detach())
                    slope = placed_like(held @ _off(held), factor)
                    factor.grad.add_(slope, alpha=4 * self.strength / rank**2)

    @torch.no_grad()
    def residuals(self) -> Mapping[str, float]:
        """The root mean square of ||U^T U - I|| and ||V^T V - I||, over ||I||."""
        found = {}
        for name, layer in self.layers.items():
            gaps = sum(float(_off(whole(factor)).square().sum()) for factor in (layer.u, layer.v))
            found[name] = (gaps / (2 * layer.s.numel())) ** 0.5
        return found


def _off(factor: Tensor) -> Tensor:
    """F^T F - I."""
    gram: Tensor = factor.T @ factor
    return gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def hoyer(s: Tensor) -> Tensor:
    """||s||_1 / ||s||_2 (Hoyer 2004): it falls with the number of values that matter, at any scale."""
    length: Tensor = torch.linalg.vector_norm(s).clamp_min(torch.finfo(s.dtype).tiny ** 0.25)
    return s.abs().sum() / length


def hoyer_square(s: Tensor) -> Tensor:
    """||s||_1^2 / ||s||_2^2 (Yang, Wen, Li 2020): `hoyer`, with a steeper slope where there are many."""
    return hoyer(s) ** 2


def lasso(s: Tensor) -> Tensor:
    """||s||_1."""
    return s.abs().sum()


SPARSITY: dict[str, Callable[[Tensor], Tensor]] = {"hoyer": hoyer, "hoyer-square": hoyer_square, "l1": lasso}


class FewValues(Term):
    """Adds the gradient of  strength * R(s)  for each layer, R one of `SPARSITY`; that of |s| at 0 is 0."""

    def __init__(self, layers: Mapping[str, Triplet], sparsity: str, strength: float) -> None:
        self.layers, self.measure, self.strength = dict(layers), SPARSITY[sparsity], strength

    def before_step(self, optimizer: Optimizer) -> None:
        for layer in self.layers.values():
            if layer.s.grad is not None:
                with torch.enable_grad():
                    values = whole(layer.s.detach()).requires_grad_()
                    (slope,) = torch.autograd.grad(self.measure(values), values)
                with torch.no_grad():
                    layer.s.grad.add_(placed_like(slope, layer.s), alpha=self.strength)
