"""One setting of an adaptive module as an ordinary one."""

from __future__ import annotations

import copy

from torch import nn

from tdpass.layers.adaptive import Adaptive, AdaptiveNorm, dial_of, set_rank, set_width
from tdpass.models.base import Batch
from tdpass.models.torch.in_place import become
from tdpass.models.torch.model import TorchModel


def ordinary(model: nn.Module, width: float, rank: float | None = None) -> nn.Module:
    """A copy of an adaptive model that is an ordinary one of that width and share of the rank: to export, to compress, to deploy.

    By default with all of the rank.  Raises `UsageError` for a width or a share that the model has not.
    """
    return open_setting(model, width, rank).module


def open_setting(
    model: nn.Module, width: float, rank: float | None = None, example: Batch | None = None
) -> TorchModel:
    """The same, opened, and seen running on the example.

    Its sites are those of the narrow layers, factored where these are.
    """
    network = copy.deepcopy(model)
    set_width(network, width)
    set_rank(network, dial_of(network).adaptation.ranks[-1] if rank is None else rank)
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
