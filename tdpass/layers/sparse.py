"""Layers of mostly zeros as one operator, `sparse_linear` or `sparse_conv2d`, alone or beside a thin product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.formats.lines import lines_left
from tdpass.formats.lowering import chain_of, stage_of
from tdpass.kernels.blocks import pack, pack_thin
from tdpass.kernels.sparse import SPARSE_CONV2D, SPARSE_LINEAR
from tdpass.layers.derived import Recipe, Tensors, derived
from tdpass.layers.image_call import ImageCall, ImageOperator
from tdpass.site import Site

_BLOCKS = 4  # tensors of a weight in blocks; behind them V and U where there is a product
_KERNEL = "kernel"
_VECTOR = 16  # blocks are alike for all calls of fewer positions, and for all others


def _whole(layer: Layer) -> str:
    """The factor that has the shape of the weight."""
    return FORMATS.get(layer.format).remainder or _KERNEL


def _thin(layer: Layer) -> tuple[str, ...]:
    """The factors V and U of the product that stands beside the sparse weight; none where it stands alone."""
    fmt = FORMATS.get(layer.format)
    if not fmt.remainder:
        return ()
    chain = chain_of(replace(layer, form=Form(fmt.leading.name, layer.rank)))
    fits = chain is not None and len(chain.stages) == 2 and chain.stages[1].pointwise
    return chain.factors if chain is not None and fits else ()


@dataclass(frozen=True)
class PackSparse(Recipe[Tensors]):
    """The weight in blocks that suit calls of few positions or many, then the matrices of what is beside it."""

    site: Site
    form: Form
    names: tuple[str, ...]
    positions: int

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        held = dict(zip(self.names, tensors, strict=True))
        layer = Layer(self.site, self.form, held)
        values, thin = layer.values(torch.float32), _thin(layer)
        blocks = pack(values[_whole(layer)].reshape(self.site.shape), positions=self.positions)
        if not thin:
            return tuple(blocks)
        v, u = (values[name].flatten(1) for name in thin)
        return (*blocks, *pack_thin(v, u, blocks))


class SparseCall(ImageCall):
    """How the operators are called for a layer of that geometry, on what `PackSparse` packs."""

    def __call__(self, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, activation: str) -> Tensor:
        blocks, thin = packed[:_BLOCKS], packed[_BLOCKS:]
        operator, shape = (
            (SPARSE_CONV2D, self.stage.integers()) if self.axes else (SPARSE_LINEAR, self.stage.outputs)
        )

        def call(read: Tensor) -> Tensor:
            y: Tensor = operator.call(read, *blocks, bias, None, shape, activation, *thin)
            return y

        return self.on_image(x, call)


class SparseLayer(ImageOperator):
    """A layer with a support as `sparse_linear` or `sparse_conv2d`, from the weights that it keeps.

    The factors of `W = U V + S` are multiplied in the same pass.  Where gradients are wanted, while it is
    traced, compiled or exported, and for types that the kernels do not serve it runs as the layer that it is.
    """

    operator = "sparse"
    calls = SparseCall

    @staticmethod
    def why_not(layer: Layer) -> str:
        site, stage = layer.site, stage_of(layer.site)
        if stage is None or stage.groups > 1:
            return f"'{layer.form}' is no linear layer or convolution of one group in at most two dimensions"
        if _whole(layer) not in layer.storage.supports:
            return f"'{layer.form}' has no weight with a support, alone or beside factors"
        if FORMATS.get(layer.format).remainder and not _thin(layer):
            return (
                f"the factors of '{layer.form}' are no two layers of which the second reads single positions"
            )
        if lines_left(site, layer.form, layer.storage) is not None:
            return f"'{layer.form}' runs as the smaller dense layer that it is"
        return ""

    def packed(self, positions: int) -> Tensors:
        """Blocks of the weight for calls of so many positions, and panels of what stands beside it."""
        held, alike = self.factors(), _VECTOR if positions >= _VECTOR else 1
        return derived(PackSparse(self.site, self.form, tuple(held), alike), tuple(held.values()))

    def packed_call(self, x: Tensor) -> Tensor:
        return self.called(x, self.packed(x.numel() // self.site.i), self.bias, self.activation)
