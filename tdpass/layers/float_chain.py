"""Layers of factors of bfloat16 or another type of their own, as `linear_chain` or `conv_chain`."""

from __future__ import annotations

from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.formats.lowering import chain_of
from tdpass.layers.factor_chain import LINEAR, NAME, chain
from tdpass.layers.one_operator import EncodedChain
from tdpass.numbers.floating import Floating


class FloatChain(EncodedChain):
    """A layer whose factors are widened once, when they are packed, and not in every call.

    What is packed has the type that the kernel multiplies the input with: pairs of bfloat16 for an input of
    bfloat16 where the machine multiplies such, else single precision.
    """

    operator = NAME

    @staticmethod
    def why_not(layer: Layer) -> str:
        lowered, storage = chain_of(layer), layer.storage
        if lowered is None:
            return f"'{layer.form}' is no chain of convolutions or linear layers"
        if storage.supports or not all(isinstance(each, Floating) for each in storage.numbers.values()):
            return f"'{layer.form}' has a support, or factors that are no floating-point numbers"
        return ""

    def chain_call(self, x: Tensor) -> Tensor:
        held = self.factors()
        factors = [held[name] for name in self.lowered.factors]
        lanes = LINEAR if self.lowered.linear else self.lowered.lanes
        return chain(x, factors, self.bias, self.lowered.integers, self.activation, lanes)
