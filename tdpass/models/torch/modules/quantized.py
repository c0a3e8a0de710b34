"""Torch modules whose weights are integers already, recognised and made floating-point again.

They are those of torch's own tools or torchao's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.layers.opening import opened

_LAYERS: Mapping[str, type[nn.Module]] = {
    "Linear": nn.Linear, "LinearReLU": nn.Linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    "ConvReLU1d": nn.Conv1d, "ConvReLU2d": nn.Conv2d, "ConvReLU3d": nn.Conv3d,
}  # fmt: skip
_PACKAGE = "torch.ao.nn."
_ADVICE = "compress the floating-point model, or what tdpass.dequantize(model) makes of this one"


def is_foreign(tensor: Tensor) -> bool:
    """Whether a tensor's own class stands for numbers which it does not hold as such, as torchao's do."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "dequantize") and _wraps(tensor)


def why_quantized(module: nn.Module) -> str:
    """Why a module whose weight is quantized stays as it is; empty where it is no such."""
    if type(module).__module__.startswith(_PACKAGE) and callable(getattr(module, "weight", None)):
        return f"its weight is quantized ({_name(module)}); {_ADVICE}"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is not None and is_foreign(weight):
        return f"its weight is a {type(weight).__name__}, which is quantized; {_ADVICE}"
    return ""


def dequantized_module(model: nn.Module) -> nn.Module:
    """A copy of the model with layers of floating-point numbers in place of those with quantized weights.

    Activations that the model rounds, by layers that quantize what they are given, are passed on as they are.
    Raises `UsageError` for anything but an `nn.Module`.
    """
    made = opened(model, _made, "dequantize")
    for module in made.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and is_foreign(tensor):
                plain = tensor.dequantize().detach().float()
                module._parameters[name] = nn.Parameter(plain, requires_grad=plain.is_floating_point())
    return made


def _made(path: str, module: nn.Module) -> nn.Module | None:
    del path
    name = type(module).__name__
    if not type(module).__module__.startswith(_PACKAGE):
        return None
    if name in ("Quantize", "DeQuantize"):
        return nn.Identity()
    if name not in _LAYERS or not callable(getattr(module, "weight", None)):
        return None
    held: Any = module
    weight, bias = held.weight().dequantize(), held.bias()
    layer = _empty(_LAYERS[name], held, bias)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias.dequantize() if bias.is_quantized else bias)
    plain = nn.Sequential(layer, nn.ReLU()) if "ReLU" in name else layer
    return plain.train(module.training)


def _empty(kind: type[nn.Module], held: Any, bias: Tensor | None) -> Any:
    if kind is nn.Linear:
        return nn.Linear(held.in_features, held.out_features, bias is not None)
    window = held.stride, held.padding, held.dilation, held.groups
    return kind(held.in_channels, held.out_channels, held.kernel_size, *window, bias is not None)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}".removeprefix("torch.")


def _wraps(tensor: Tensor) -> bool:
    """Whether what the class holds lies elsewhere, in tensors of its own."""
    return (
        hasattr(type(tensor), "__tensor_flatten__")
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )
