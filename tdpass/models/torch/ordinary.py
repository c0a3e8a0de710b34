"""One setting of an adaptive module as an ordinary one."""

from __future__ import annotations

import copy

from torch import nn

from tdpass.layers.adaptive import Adaptive, AdaptiveNorm, dial_of, set_bits, set_rank, set_width
from tdpass.models.base import Batch
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.modules.in_place import become


def ordinary(model: nn.Module, width: float, rank: float | None = None, bits: int | None = None) -> nn.Module:
    """A copy of an adaptive model that is an ordinary one of that setting: to export, to compress, to deploy.

    By default with all of the rank, and with the most bits where the model has bits; its layers are then
    stored in integers.  Raises `UsageError` for a width, a share or bits that the model has not.
    """
    return open_setting(model, width, rank, bits=bits).module


def open_setting(
    model: nn.Module,
    width: float,
    rank: float | None = None,
    example: Batch | None = None,
    bits: int | None = None,
) -> TorchModel:
    """The same, opened, and seen running on the example.

    Its sites are those of the narrow layers, factored and stored as these are.
    """
    network = copy.deepcopy(model)
    set_width(network, width)
    set_rank(network, dial_of(network).adaptation.ranks[-1] if rank is None else rank)
    if bits is not None or dial_of(network).adaptation.bits:
        set_bits(network, dial_of(network).adaptation.bits[-1] if bits is None else bits)
    layers = {}
    for path, module in list(network.named_modules()):
        if isinstance(module, Adaptive):
            layers[path] = module.factored()
        if isinstance(module, Adaptive | AdaptiveNorm):
            become(module, module.plain())
    opened = TorchModel(network, example)
    for path, layer in layers.items():
        if layer is not None:
            opened.replace(path, layer)
    return opened
