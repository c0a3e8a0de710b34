"""Workloads: the matrix products that a layer is, in any format, recorded while its own `apply` runs without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.kinds import kind_of
from tdpass.ops import Pads, TorchOps
from tdpass.site import Site
from tdpass.targets.layers import apply_layer, layer_of, weights_of


@dataclass(frozen=True)
class Product:
    """`count` products `[rows, depth] @ [depth, columns]` with weights on the right.

    `read` and `made` count the numbers of the activations that it reads and makes once: those of a
    convolution are fewer than count * rows * depth.
    """

    rows: int
    depth: int
    columns: int
    count: int
    read: int
    made: int

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.count * self.rows * self.depth * self.columns

    @property
    def weights(self) -> int:
        """Numbers on the right."""
        return self.count * self.depth * self.columns


class _Recorder(TorchOps):
    """Operations that write down every product and its weights `[count, depth, columns]`.

    On tensors without data they compute shapes only.
    """

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.matrices: list[Tensor] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super().linear(x, weight, bias)
        columns, depth = weight.shape
        self.products.append(Product(x.numel() // depth, depth, columns, 1, x.numel(), y.numel()))
        self.matrices.append(as_matrices(weight, 1))
        return y

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        y = super().conv(x, weight, bias, stride, padding, dilation, groups)
        outputs, depth = weight.shape[0], math.prod(weight.shape[1:])
        self.products.append(
            Product(y.numel() // outputs, depth, outputs // groups, groups, x.numel(), y.numel())
        )
        self.matrices.append(as_matrices(weight, groups))
        return y

    def conv_transpose(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        y = super().conv_transpose(x, weight, bias, stride, cut, dilation, groups)
        inputs, columns = groups * weight.shape[1], weight.shape[0] // groups * math.prod(weight.shape[2:])
        self.products.append(
            Product(x.numel() // inputs, inputs // groups, columns, groups, x.numel(), y.numel())
        )
        parts = weight.reshape(groups, -1, inputs // groups, math.prod(weight.shape[2:]))
        self.matrices.append(parts.transpose(1, 2).reshape(groups, inputs // groups, columns))
        return y

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        y = super().matmul(a, b)
        (rows, depth), columns = a.shape[-2:], b.shape[-1]
        batches = y.numel() // (rows * columns)
        if b.dim() == 2:  # one matrix on the right of all
            self.products.append(Product(batches * rows, depth, columns, 1, a.numel(), y.numel()))
            self.matrices.append(b[None])
        elif a.dim() == 2:  # one on the left of all: the transposed product
            self.products.append(Product(batches * columns, depth, rows, 1, b.numel(), y.numel()))
            self.matrices.append(a.T[None])
        else:
            self.products.append(Product(rows, depth, columns, batches, a.numel(), y.numel()))
            self.matrices.append(b.reshape(-1, depth, columns))
        return y


def products_of(site: Site, form: Form, batch: int = 1) -> tuple[Product, ...]:
    """The products of one call of the layer for `batch` samples, as its first extent tells.

    None for what computes nothing.
    """
    return _products_of(replace(site, name="", extents=site.extents[:1], samples=1), form, batch)


def as_matrices(weight: Tensor, groups: int) -> Tensor:
    """The weight `[o, i / groups, *kernel]` of a layer or a convolution as it stands on the right of its products: `[groups, depth, columns]`."""
    return weight.reshape(groups, weight.shape[0] // groups, -1).mT


def matrices_of(layer: Layer) -> list[tuple[Product, Tensor]]:
    """The products of one call of a layer for one sample, each with the weights on its right, `[count, depth, columns]`."""
    recorder = _Recorder()
    apply_layer(
        recorder,
        layer,
        torch.zeros(kind_of(layer.site).sample(layer.site, 1), dtype=layer.dtype),
        weights_of(layer),
    )
    return list(zip(recorder.products, recorder.matrices, strict=True))


@cache
def _products_of(site: Site, form: Form, batch: int) -> tuple[Product, ...]:
    layer = layer_of(site, form, lambda shape: torch.empty(shape, device="meta"))
    recorder = _Recorder()
    apply_layer(
        recorder,
        layer,
        torch.empty(kind_of(layer.site).sample(layer.site, batch), device="meta"),
        weights_of(layer),
    )
    return tuple(recorder.products)
