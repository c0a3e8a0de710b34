"""Layers of encoded factors that run as one operator, from what is packed of their parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tdpass.formats.layer import Layer
from tdpass.formats.lowering import chain_of
from tdpass.kernels.activation import activate
from tdpass.layers.factorized import Factorized
from tdpass.layers.hooks import carry_hooks
from tdpass.layers.tracing import is_transformed


class OneOperator(Factorized, ABC):
    """A factored layer as one operator where that serves the call; else it runs as it is.

    `operator` names what it is measured under, `activation` what it ends with, which it took in from the
    model. With `apart` set it always runs as it is, with `in_graphs` everywhere but in a graph that is
    compiled or exported.
    """

    operator: ClassVar[str]
    activation = "identity"
    apart = False
    in_graphs = False

    @classmethod
    def of(cls, module: Factorized) -> Self:
        """The same layer with the very same tensors, mode and hooks."""
        layer = Layer(module.site, module.form, module.factors())
        made = cls(layer, module.bias, module.padding_mode, module.pads)
        made.train(module.training)
        carry_hooks(module, made)
        return made

    @staticmethod
    @abstractmethod
    def why_not(layer: Layer) -> str:
        """Why the operator does not serve a layer; empty where it does."""

    @abstractmethod
    def packed_call(self, x: Tensor) -> Tensor:
        """The operator on this input, and the activation."""

    @abstractmethod
    def serves(self, x: Tensor) -> bool:
        """Whether the operator takes this input, gradients aside."""

    def forward(self, x: Tensor) -> Tensor:
        alone = self.apart or (self.in_graphs and not torch.compiler.is_compiling())
        if alone or not (self._inference(x) and self.serves(x)):
            return activate(super().forward(x), self.activation)
        return self.packed_call(x)

    def extra_repr(self) -> str:
        ends = self.activation == "identity"
        return super().extra_repr() if ends else f"{super().extra_repr()}, {self.activation}"

    def _inference(self, x: Tensor) -> bool:
        if torch.is_autocast_enabled(x.device.type) or is_transformed():
            return False
        # an export is traced with gradients on, and what it gives is for inference
        exported = torch.compiler.is_exporting() and not self.training
        return exported or not (torch.is_grad_enabled() and (x.requires_grad or self.learns))


class EncodedChain(OneOperator, ABC):
    """One of encoded factors whose format is a chain of convolutions or linear layers, `lowered`."""

    def __init__(
        self, layer: Layer, bias: nn.Parameter | None, padding_mode: str = "zeros", pads: tuple[int, ...] = ()
    ) -> None:
        super().__init__(layer, bias, padding_mode, pads)
        lowered = chain_of(layer)
        assert lowered is not None
        self.lowered = lowered

    @abstractmethod
    def chain_call(self, x: Tensor) -> Tensor:
        """The operator on an input that is padded as it needs."""

    def packed_call(self, x: Tensor) -> Tensor:
        return self.chain_call(
            torch.nn.functional.pad(x, self.pads, mode=self.padding_mode) if self.pads else x
        )

    def serves(self, x: Tensor) -> bool:
        return self.fits(x, [self.bias])
