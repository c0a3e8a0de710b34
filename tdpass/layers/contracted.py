"""Linear layers of several small cores as one operator, `tensor_chain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tdpass.form import Form
from tdpass.formats.contraction import contraction_of
from tdpass.formats.layer import Layer
from tdpass.kernels.tensor_chain import TENSOR_CHAIN
from tdpass.layers.derived import Recipe, derived
from tdpass.layers.one_operator import OneOperator
from tdpass.layers.tracing import is_traced
from tdpass.site import Site


@dataclass(frozen=True)
class PackCores(Recipe[tuple[list[Tensor], list[int]]]):
    """The cores of a layer as the operator takes them, and its steps."""

    site: Site
    form: Form
    names: tuple[str, ...]

    def make(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        contraction = contraction_of(Layer(self.site, self.form, dict(zip(self.names, tensors, strict=True))))
        assert contraction is not None
        steps, packed = contraction
        return [weight.clone() for weight in packed], [value for step in steps for value in step.integers()]


class Contracted(OneOperator):
    """A linear layer of a train, a ring or block terms whose cores are contracted by one operator.

    Where gradients are wanted, while it is traced, compiled or exported, and for types that the kernels do
    not serve it runs as the layer that it is.
    """

    operator = "tensor_chain"

    @staticmethod
    def why_not(layer: Layer) -> str:
        if contraction_of(layer) is None:
            return f"'{layer.form}' is no chain of convolutions or small cores with floating-point weights"
        return ""

    def packed(self) -> tuple[list[Tensor], list[int]]:
        """The cores as the operator takes them, and its steps."""
        held = self.factors()
        return derived(PackCores(self.site, self.form, tuple(held)), tuple(held.values()))

    def packed_call(self, x: Tensor) -> Tensor:
        weights, steps = self.packed()
        y: Tensor = TENSOR_CHAIN.call(x, weights, self.bias, None, steps, self.activation)
        return y

    def serves(self, x: Tensor) -> bool:
        return self.fits(x, [*self.factors().values(), self.bias]) and not is_traced(x)
