"""Torch's encoder layers, kept to calling their linear layers instead of reading the weights of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tdpass.layers.adaptive import Adaptive
from tdpass.layers.attention import OpenAttention
from tdpass.layers.factorized import Factorized
from tdpass.models.torch.modules.in_place import watching


def call_layers(model: nn.Module) -> None:
    """Switch off the fused path of every `nn.TransformerEncoderLayer` with a layer of this library in it.

    Nested tensors of encoders of such layers are switched off too. The fused path takes dense weights, which
    a factored layer would rebuild from its factors at every call, those of one matrix, which opened attention
    has not, and whole biases, of which an adaptive layer uses a part.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) or not _opened(module):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # read for the choice of the path alone
        else:
            module.enable_nested_tensor = module.use_nested_tensor = False


def runs_nested(model: nn.Module, run: Callable[[], object]) -> dict[nn.Module, str]:
    """Modules inside encoders that torch runs on nested tensors, and why they stay dense.

    Only the fused path takes nested tensors.
    """
    encoders = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
    ]
    owners = {layer: encoder for encoder in encoders for layer in encoder.layers}
    found: dict[nn.Module, str] = {}

    def see(layer: nn.Module, args: tuple[object, ...]) -> None:
        if args and getattr(args[0], "is_nested", False):
            found.update(
                dict.fromkeys(
                    owners[layer].modules(),
                    "torch runs its encoder on nested tensors, by a path that reads weights",
                )
            )

    if owners:
        with watching(owners, see):
            run()
    return found


def _opened(module: nn.Module) -> bool:
    return any(isinstance(part, Factorized | OpenAttention | Adaptive) for part in module.modules())
