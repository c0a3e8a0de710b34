"""Weights of layers that are computed from other parameters, as parameters of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tdpass.kinds import is_table, kind_of_module

_Remove = Callable[[nn.Module], object]


def computed(model: nn.Module) -> dict[str, nn.Module]:
    """The layers, by path, a tensor of which a parametrization, norm or pruning mask computes from others."""
    return {path: module for path, module in model.named_modules() if _ways(module)}


def make_plain(model: nn.Module, stored: Container[str] = ()) -> list[str]:
    """Give such layers, in place, the tensors that these come to; returns their paths.

    Left are those that share a parameter with another module, and those of which all tensors are `stored`
    under the names that they have now.
    """
    holders = Counter(id(held) for module in model.modules() for held in module._parameters.values())
    changed = []
    for path, module in computed(model).items():
        own = module.state_dict()
        shared = any(holders[id(held)] > 1 for held in module.parameters())
        if shared or all(f"{path}.{name}".lstrip(".") in stored for name in own):
            continue
        trains = {part: part.training for part in module.modules()}
        for part in trains:  # in training a spectral norm moves on whenever it is asked
            part.training = False
        with torch.no_grad():
            for remove in _ways(module):
                remove(module)
        for part, mode in trains.items():
            part.training = mode
        changed.append(path)
    return changed


def _ways(module: nn.Module) -> list[_Remove]:
    """How each tensor that a layer computes is made a parameter."""
    if kind_of_module(module) is None and not is_table(module):
        return []
    hooks = (_of_hook(hook) for hook in module._forward_pre_hooks.values())
    found = [remove for remove in hooks if remove is not None]
    if parametrize.is_parametrized(module):
        found.append(_remove_parametrizations)
    return found


def _remove_parametrizations(module: nn.Module) -> None:
    """Torch's own removal takes the tensors from the class, which copies of the module share."""
    held: Any = module.parametrizations
    values = {
        name: nn.Parameter(
            getattr(module, name).detach().clone(),
            requires_grad=any(own.requires_grad for own in parts.parameters(recurse=False)),
        )
        for name, parts in held.items()
    }
    object.__setattr__(module, "__class__", type(module).__mro__[1])
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, value)


def _of_hook(hook: object) -> _Remove | None:
    """The same of a hook that computes a tensor before every call, as norms and masks of older code do."""
    if isinstance(hook, WeightNorm):
        return partial(remove_weight_norm, name=hook.name)
    if isinstance(hook, SpectralNorm):
        return partial(remove_spectral_norm, name=hook.name)
    return (
        partial(prune.remove, name=hook._tensor_name) if isinstance(hook, prune.BasePruningMethod) else None
    )
