"""A method like BALF (2025): whitened channel SVD, ranks of all layers by one Lagrange multiplier.

Every convolution is factored so.

Built on plain torch from its description: W C^1/2 = U S V^T with C the second moments of the patches that a
layer reads, the first r directions kept as a k x k convolution of r filters and a 1 x 1 one; the error of a
layer is the share of sum S^2 that is left out, and min sum_l error_l(r_l) + lambda sum_l cost_l(r_l) picks
each rank by itself, lambda by bisection.  No labels, no training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar

_DAMPING = 1e-6
_IMAGES = 256
_HALVINGS = 60
_UNIT = 1e6  # multiply-adds


@dataclass(frozen=True)
class _Layer:
    """A convolution's spectrum: `left[o, n] right[n, i k k]` and the share of all energy per direction."""

    conv: nn.Conv2d
    left: Tensor
    right: Tensor
    energies: Tensor
    positions: int

    @property
    def dense(self) -> int:
        """Multiply-adds of the convolution."""
        return self.conv.weight.numel() * self.positions

    def costs(self) -> Tensor:
        """Multiply-adds at every rank from 1; the last place stands for the dense layer."""
        ranks = torch.arange(1, len(self.energies) + 1)
        each = (self.conv.weight[0].numel() + len(self.conv.weight)) * self.positions
        return torch.cat([ranks * each, torch.tensor([self.dense])]).double()

    def errors(self) -> Tensor:
        """The share of the output's energy that is lost at every rank, and by the dense layer."""
        return torch.cat([1 - self.energies.cumsum(0) / self.energies.sum(), torch.zeros(1).double()])

    def factored(self, rank: int) -> nn.Module:
        """The two convolutions."""
        o, i, h, w = self.conv.weight.shape
        first = nn.Conv2d(i, rank, (h, w), self.conv.stride, self.conv.padding, bias=False)
        last = nn.Conv2d(rank, o, 1, bias=self.conv.bias is not None)
        first.weight = nn.Parameter(self.right[:rank].reshape(rank, i, h, w).float().contiguous())
        last.weight = nn.Parameter(self.left[:, :rank].reshape(o, rank, 1, 1).float().contiguous())
        last.bias = self.conv.bias
        return nn.Sequential(first, last)


def balf(name: str, budgets: Sequence[float]) -> Iterator[tuple[float, nn.Module, float]]:
    """The network at each budget, with the seconds that it took."""
    dense = cifar.load_resnet(name)
    start = time.perf_counter()
    layers = _spectra(dense, cifar.calibration()[:_IMAGES])
    full = cifar.macs(dense)
    fixed = full - sum(layer.dense for layer in layers.values())
    for budget in budgets:
        ranks = _ranks(layers, budget * full - fixed)
        model = copy.deepcopy(dense)
        for path, rank in ranks.items():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[path].factored(rank))
        yield budget, model, time.perf_counter() - start


def _spectra(model: nn.Module, images: Tensor) -> dict[str, _Layer]:
    convs = {
        path: part for path, part in model.named_modules() if isinstance(part, nn.Conv2d) and path != "conv1"
    }
    moments: dict[nn.Module, Tensor] = {}
    positions: dict[nn.Module, int] = {}

    def see(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        patches = F.unfold(inputs[0], conv.kernel_size, padding=conv.padding, stride=conv.stride)
        rows = patches.transpose(1, 2).flatten(0, 1)
        moments[conv] = moments.get(conv, 0) + (rows.T @ rows).double()
        positions[conv] = output[0, 0].numel()

    hooks = [conv.register_forward_hook(see) for conv in convs.values()]
    with torch.no_grad():
        for part in images.split(64):
            model(part)
    for hook in hooks:
        hook.remove()
    return {path: _layer(conv, moments[conv], positions[conv]) for path, conv in convs.items()}


def _layer(conv: nn.Conv2d, moment: Tensor, positions: int) -> _Layer:
    damping = _DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    root = torch.linalg.cholesky(moment + damping)
    u, s, v = torch.linalg.svd(conv.weight.detach().double().flatten(1) @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, v, upper=False, left=False)
    return _Layer(conv, u * s, right, s.square(), positions)


def _ranks(layers: Mapping[str, _Layer], limit: float) -> dict[str, int]:
    """The rank of every layer that does not stay dense, within the limit."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        cost = sum(float(layer.costs()[_chosen(layer, price)]) for layer in layers.values())
        low, high = (low, price) if cost <= limit else (price, high)
    chosen = {path: _chosen(layer, high) for path, layer in layers.items()}
    return {path: place + 1 for path, place in chosen.items() if place < len(layers[path].energies)}


def _chosen(layer: _Layer, price: float) -> int:
    """The place of the rank of least `(1 - price) error + price cost`, so that bisection runs over 0 to 1.

    Costs are shares of the largest layer's, as one price counts for all.
    """
    worth = (1 - price) * layer.errors() + price * layer.costs() / _UNIT
    return int(worth.argmin())
