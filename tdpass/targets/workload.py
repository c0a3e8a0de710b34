"""Workloads: the matrix products that a layer is, in any format.

They are recorded while its own `apply` runs without data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tdpass.form import Form
from tdpass.formats.layer import Layer, storage_of
from tdpass.kinds import kind_of
from tdpass.ops import Pads, TorchOps
from tdpass.site import Site
from tdpass.supports.base import Support, matrix_of
from tdpass.targets.layers import apply_layer, layer_of, weights_of


@dataclass(frozen=True)
class Product:
    """`count` products `[rows, depth] @ [depth, columns]` with weights on the right.

    `read` and `made` count the numbers of the activations that it reads and makes once: those of a
    convolution are fewer than count * rows * depth.  `bits` are those of a weight, 0 where it has as many as
    the machine gives it.
    """

    rows: int
    depth: int
    columns: int
    count: int
    read: int
    made: int
    bits: int = 0

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

    On tensors without data they compute shapes only.  What they answer is detached, so that the graph of a
    matrix leads to the factors that it was made of and no further.
    """

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.matrices: list[Tensor] = []

    def _record(self, product: Product, matrices: Tensor, y: Tensor) -> Tensor:
        self.products.append(product)
        self.matrices.append(matrices)
        return y.detach()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = super().linear(x, weight, bias)
        columns, depth = weight.shape
        product = Product(x.numel() // depth, depth, columns, 1, x.numel(), y.numel())
        return self._record(product, as_matrices(weight, 1), y)

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
        product = Product(y.numel() // outputs, depth, outputs // groups, groups, x.numel(), y.numel())
        return self._record(product, as_matrices(weight, groups), y)

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
        product = Product(x.numel() // inputs, inputs // groups, columns, groups, x.numel(), y.numel())
        parts = weight.reshape(groups, -1, inputs // groups, math.prod(weight.shape[2:]))
        return self._record(product, parts.transpose(1, 2).reshape(groups, inputs // groups, columns), y)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        y = super().matmul(a, b)
        (rows, depth), columns = a.shape[-2:], b.shape[-1]
        batches = y.numel() // (rows * columns)
        if b.dim() == 2:  # one matrix on the right of all
            return self._record(Product(batches * rows, depth, columns, 1, a.numel(), y.numel()), b[None], y)
        if a.dim() == 2:  # one on the left of all: the transposed product
            return self._record(
                Product(batches * columns, depth, rows, 1, b.numel(), y.numel()), a.T[None], y
            )
        product = Product(rows, depth, columns, batches, a.numel(), y.numel())
        return self._record(product, b.reshape(-1, depth, columns), y)


def products_of(site: Site, form: Form, batch: int = 1) -> tuple[Product, ...]:
    """The products of one call of the layer for `batch` samples, as its first extent tells.

    None for what computes nothing.  Rows and columns of a factor that its support leaves out throughout are
    not computed, as if those left were the first; entries left out here and there are.
    """
    return _products_of(replace(site, name="", extents=site.extents[:1], samples=1), form, batch)


def as_matrices(weight: Tensor, groups: int) -> Tensor:
    """The weight of a layer or a convolution as it stands on the right of its products.

    It is `[o, i / groups, *kernel]` and becomes `[groups, depth, columns]`.
    """
    return weight.reshape(groups, weight.shape[0] // groups, -1).mT


def matrices_of(layer: Layer) -> list[tuple[Product, Tensor]]:
    """The products of one call of a layer for one sample, with the weights on the right of each.

    These are `[count, depth, columns]`.
    """
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
    plain, storage = replace(form, numbers=(), support=""), storage_of(site, form)
    layer = layer_of(site, plain, lambda shape: torch.empty(shape, device="meta"))
    x = torch.empty(kind_of(layer.site).sample(layer.site, batch), device="meta")
    recorder, weights = _Recorder(), weights_of(layer)
    with torch.inference_mode(mode=False), torch.enable_grad():
        for name in storage.shapes:
            weights[name] = weights[name].detach().requires_grad_()
        apply_layer(recorder, layer, x, weights)
    bits = {
        id(weights[name]): 0 if numbers.floating else numbers.bits
        for name, numbers in storage.numbers.items()
    }
    found = [
        replace(product, bits=_bits(matrix, bits))
        for product, matrix in zip(recorder.products, recorder.matrices, strict=True)
    ]
    masks = {name: _lines_left(support, storage.shapes[name]) for name, support in storage.supports.items()}
    if all(bool(mask.all()) for mask in masks.values()):
        return tuple(found)
    small = replace(site, extents=(kind_of(site).typical(site),))
    ones = layer_of(small, plain, torch.ones)
    kept = matrices_of(replace(ones, factors={**ones.factors, **masks}))
    return tuple(
        part
        for product, (_, left) in zip(found, kept, strict=True)
        for part in _parts_left(product, left != 0)
    )


def _bits(matrix: Tensor, bits: Mapping[int, int]) -> int:
    """Those of the factor that a matrix is; 0 where it was computed from several."""
    factors = {id(leaf) for leaf in _leaves(matrix)}
    return bits.get(factors.pop(), 0) if len(factors) == 1 else 0


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that its graph begins with."""
    nodes = [get_gradient_edge(tensor).node] if tensor.requires_grad else []
    while nodes:
        node = nodes.pop()
        nodes += [each for each, _ in node.next_functions if each is not None]
        yield from (leaf for leaf in [getattr(node, "variable", None)] if leaf is not None)


def _lines_left(support: Support, shape: tuple[int, ...]) -> Tensor:
    """Ones in the first rows and columns of a factor, as many as its support leaves."""
    (rows, columns), mask = support.lines(shape), torch.zeros(matrix_of(shape))
    mask[:rows, :columns] = 1
    return mask.reshape(shape)


def _parts_left(product: Product, kept: Tensor) -> list[Product]:
    """The product without the rows and columns of its matrices `[count, depth, columns]` that are empty."""
    sizes = Counter(zip(kept.any(2).sum(1).tolist(), kept.any(1).sum(1).tolist(), strict=True))
    return [
        replace(
            product,
            depth=depth,
            columns=columns,
            count=count,
            read=product.read * count // product.count,
            made=product.rows * columns * count,
        )
        for (depth, columns), count in sizes.items()
        if depth and columns
    ]
