"""A factored layer as one operator: the form to deploy in eager torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tdpass.formats.layer import Layer
from tdpass.formats.lowering import lower
from tdpass.kernels.activation import activate
from tdpass.layers.factor_chain import LINEAR, chain
from tdpass.layers.factorized import Factorized
from tdpass.layers.hooks import carry_hooks
from tdpass.layers.one_operator import OneOperator
from tdpass.layers.tracing import is_transformed


class Fused(Factorized):
    """A factored layer that runs as one operator, followed by an activation that it took in.

    Its parameters are those of the factored layer, under the same names; what the kernels read is packed from
    them at the first call and whenever they change.  Where gradients are needed, under autocast, and for
    devices and types that the kernels do not serve, the layers run one by one.  `lanes` None means that they
    always do.
    """

    def __init__(
        self,
        layer: Layer,
        bias: nn.Parameter | None,
        padding_mode: str = "zeros",
        pads: tuple[int, ...] = (),
        activation: str = "identity",
        lanes: str | None = "channels",
    ) -> None:
        super().__init__(layer, bias, padding_mode, pads)
        self.activation = activation
        self.lowered = lower(layer)
        self._stages = [] if self.lowered is None else self.lowered.integers
        self.lanes = LINEAR if lanes is not None and not layer.site.axes else lanes

    @classmethod
    def of(cls, module: Factorized, activation: str = "identity", lanes: str | None = "channels") -> Fused:
        """The fused form of a factored layer, with the very same parameters, mode and hooks."""
        layer = Layer(module.site, module.form, module.factors())
        fused = cls(layer, module.bias, module.padding_mode, module.pads, activation, lanes)
        fused.train(module.training)
        carry_hooks(module, fused)
        return fused

    def forward(self, x: Tensor) -> Tensor:
        held = self.factors()
        if self.lowered is None or self.lanes is None or not self._served(x, held):
            return activate(super().forward(x), self.activation)
        if self.pads:
            x = torch.nn.functional.pad(x, self.pads, mode=self.padding_mode)
        factors = [held[name] for name in self.lowered.factors]
        return chain(x, factors, self.bias, self._stages, self.activation, self.lanes)

    def _served(self, x: Tensor, held: Mapping[str, Tensor]) -> bool:
        trainable = torch.is_grad_enabled() and (x.requires_grad or self.learns)
        # an export is traced with gradients on, and what it gives is for inference
        if trainable and (self.training or not torch.compiler.is_exporting()):
            return False
        plain = not (torch.is_autocast_enabled("cpu") or is_transformed())
        return plain and self.fits(x, [*held.values(), self.bias])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.lanes} lanes, {self.activation}"


@contextmanager
def layer_by_layer(module: nn.Module) -> Iterator[None]:
    """Run the fused layers of a module as the layers that they are made of."""
    lanes = {inner: inner.lanes for inner in module.modules() if isinstance(inner, Fused)}
    together = [inner for inner in module.modules() if isinstance(inner, OneOperator) and not inner.apart]
    for inner in lanes:
        inner.lanes = None
    for call in together:
        call.apart = True
    try:
        yield
    finally:
        for inner, before in lanes.items():
            inner.lanes = before
        for call in together:
            call.apart = False
