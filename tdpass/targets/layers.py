"""Single layers to be timed: random weights of the right shapes, and something to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tdpass.form import Form
from tdpass.formats.bonds import ORDER_TYPE
from tdpass.formats.layer import Layer, storage_of
from tdpass.formats.lines import apply_stored
from tdpass.kinds import kind_of
from tdpass.layers.factorized import Factorized
from tdpass.ops import StorageOps, TorchOps, V
from tdpass.site import Site


def make_layer(site: Site, form: Form, dtype: torch.dtype) -> Layer:
    """A layer of that form whose weights are noise, scaled so that activations keep their size.

    No time depends on more.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(shape: Sequence[int]) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator) / math.sqrt(max(1, math.prod(shape[1:])))).to(
            dtype
        )

    return layer_of(site, form, noise)


def layer_of(site: Site, form: Form, make: Callable[[tuple[int, ...]], Tensor]) -> Layer:
    """A layer of that form whose weights are made by their shapes.

    One that reads no channel has a bias in any case.
    """
    site = form.on(site)
    bias = make((site.o,)) if site.bias or not site.i else None
    plain = replace(form, numbers=(), support="")
    storage = storage_of(site, plain)
    factors = {name: make(shape) for name, shape in storage.shapes.items()}
    orders = {
        name: torch.arange(count - 1, -1, -1, dtype=ORDER_TYPE) for name, count in storage.orders.items()
    }
    return Layer(site, plain, {**factors, **orders}, bias).stored(form)


def weights_of(layer: Layer) -> dict[str, Tensor]:
    """All its tensors by name, the bias among them."""
    return dict(layer.factors) if layer.bias is None else {**layer.factors, "bias": layer.bias}


def apply_layer(ops: StorageOps[V], layer: Layer, x: V, weights: Mapping[str, V]) -> V:
    """The layer's output, from tensors by these names."""
    factors = {name: weights[name] for name in layer.factors}
    bias = weights.get("bias")
    return apply_stored(ops, x, factors, bias, layer.site, layer.form, layer.storage, layer.dtype)


def example_input(layer: Layer, batch: int) -> Tensor:
    """The same random input for every form of a site: what its first call reads, for `batch` samples."""
    sizes = kind_of(layer.site).sample(layer.site, batch)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(layer.dtype)


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor with its channels innermost where it has two spatial axes."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


def factored_module(layer: Layer) -> Factorized:
    """The module that stands for the layer in a model, channels innermost, for inference."""
    bias = None if layer.bias is None else nn.Parameter(layer.bias)
    module = Factorized(layer, bias).eval().requires_grad_(requires_grad=False)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class LayerModule(nn.Module):
    """A layer as a module, channels innermost, for compilers that treat parameters as constants."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer = layer
        for name, weight in weights_of(layer).items():
            self.register_parameter(name, nn.Parameter(channels_last(weight), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return apply_layer(
            TorchOps(),
            self._layer,
            x,
            {name: weight for name, weight in self._parameters.items() if weight is not None},
        )
