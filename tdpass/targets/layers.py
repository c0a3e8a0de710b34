"""Single layers to be timed: random weights of the right shapes, and something to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tdpass.formats.base import FORMATS, Layer, apply_dense
from tdpass.kinds import kind_of
from tdpass.ops import Ops, TorchOps, V
from tdpass.site import Site
from tdpass.targets.base import DENSE, Variant

_PRUNED = "pruned"


@dataclass(frozen=True)
class DenseLayer:
    """A layer as it is; called like a factored `Layer`."""

    site: Site
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Run it in eager torch."""
        return apply_dense(TorchOps(), x, self.weight, self.bias, self.site)


AnyLayer = DenseLayer | Layer


def make_layer(site: Site, variant: Variant, dtype: torch.dtype) -> AnyLayer:
    """A layer of that variant whose weights are noise, scaled so that activations keep their size; no time depends on more.

    A pruned layer is a dense one with fewer channels.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(shape: Sequence[int]) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator) / math.sqrt(max(1, math.prod(shape[1:])))).to(dtype)

    if variant.format == _PRUNED:
        site = replace(site, shape=(*variant.rank, *site.kernel))
    bias = noise((site.o,)) if site.bias else None
    if variant.format in (DENSE, _PRUNED):
        return DenseLayer(site, noise(site.shape), bias)
    shapes = FORMATS.get(variant.format).shapes(site, variant.rank)
    return Layer(site, variant.format, variant.rank, {name: noise(shape) for name, shape in shapes.items()}, bias)


def weights_of(layer: AnyLayer) -> dict[str, Tensor]:
    """All its tensors by name, the bias among them."""
    weights = {"weight": layer.weight} if isinstance(layer, DenseLayer) else dict(layer.factors)
    return weights if layer.bias is None else {**weights, "bias": layer.bias}


def apply_layer(ops: Ops[V], layer: AnyLayer, x: V, weights: Mapping[str, V]) -> V:
    """The layer's output, from tensors by these names."""
    if isinstance(layer, DenseLayer):
        return apply_dense(ops, x, weights["weight"], weights.get("bias"), layer.site)
    factors = {name: weights[name] for name in layer.factors}
    return FORMATS.get(layer.format).apply(ops, x, factors, weights.get("bias"), layer.site, layer.rank)


def dtype_of(layer: AnyLayer) -> torch.dtype:
    """Floating-point type of the weights."""
    return next(iter(weights_of(layer).values())).dtype


def example_input(layer: AnyLayer, batch: int) -> Tensor:
    """The same random input for every variant of a site: what its first call reads, for `batch` samples."""
    sizes = kind_of(layer.site).sample(layer.site, batch)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(dtype_of(layer))


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor with its channels innermost where it has two spatial axes."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


class LayerModule(nn.Module):
    """A layer as a module, channels innermost, for compilers that treat parameters as constants."""

    def __init__(self, layer: AnyLayer) -> None:
        super().__init__()
        self._layer = layer
        for name, weight in weights_of(layer).items():
            self.register_parameter(name, nn.Parameter(channels_last(weight), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return apply_layer(TorchOps(), self._layer, x, {name: weight for name, weight in self._parameters.items() if weight is not None})
