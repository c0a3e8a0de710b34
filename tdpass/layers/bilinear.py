"""Open bilinear layers: a linear layer of the first input, whose outputs weigh the second."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdpass.errors import UnsupportedError
from tdpass.layers.opening import Opener, linear, opened, register_opener, why_computed


class OpenBilinear(nn.Module):
    """An `nn.Bilinear`, `y_k = a W_k b + c_k`, that calls a linear layer: `y_k = (first(a))_k b + c_k`.

    Takes and returns what the dense module does. `first` holds W as `[outputs * in2, in1]`, and may be
    replaced by a factored layer; the bias stays.
    """

    def __init__(self, dense: nn.Bilinear) -> None:
        super().__init__()
        if reason := why_closed(dense):
            raise UnsupportedError(f"{reason}; leave this layer as it is")
        weight = dense.weight.detach().transpose(1, 2).flatten(0, 1).contiguous()
        self.out_features = dense.out_features
        self.first = linear(nn.Parameter(weight, dense.weight.requires_grad), None)
        self.bias = dense.bias
        self.train(dense.training)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}"

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """`[..., outputs]` of `[..., in1]` and `[..., in2]`."""
        weights = self.first(input1).unflatten(-1, (self.out_features, -1))
        y = torch.matmul(weights, input2.unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias


def why_closed(module: nn.Bilinear) -> str:
    """Why a bilinear layer cannot be opened; empty where it can."""
    if type(module) is not nn.Bilinear:
        return f"only nn.Bilinear itself is opened, this is {type(module).__name__}"
    return why_computed([module.weight])


register_opener(
    Opener((nn.Bilinear,), OpenBilinear, OpenBilinear, why_closed, frozenset({"bilinear"}), "open_bilinear")
)


def open_bilinear(model: nn.Module) -> nn.Module:
    """A copy of the model in which every `nn.Bilinear` calls a linear layer.

    So training can factor it; `compress` does so by itself where that pays. The copy computes the same with
    as many parameters; what cannot be opened stays, and `open_model(...).declined()` says why.
    """

    def make(_path: str, module: nn.Module) -> nn.Module | None:
        return OpenBilinear(module) if isinstance(module, nn.Bilinear) and not why_closed(module) else None

    return opened(model, make, "open_bilinear")
