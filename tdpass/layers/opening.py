"""Copies of models in which modules that keep their products to themselves call linear layers instead, which are sites."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from tdpass.errors import UsageError

Make = Callable[[str, nn.Module], nn.Module | None]


def opened(model: nn.Module, make: Make, verb: str) -> nn.Module:
    """A copy of the model with what `make(path, module)` makes in the place of modules.

    Hooks stay, and what is held twice stays one. `make` answers None for what stays.  Raises `UsageError` for
    anything but an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"{verb} takes an nn.Module, not a {type(model).__name__}")
    root = nn.ModuleDict({"model": copy.deepcopy(model)})
    found: dict[nn.Module, nn.Module] = {}
    for path, parent in list(root.named_modules()):
        for name, child in parent._modules.items():
            if child is None:
                continue
            made = found.get(child) or make(f"{path}.{name}"[len(".model.") - 1 :] if path else "", child)
            if made is not None:
                made._forward_hooks, made._forward_pre_hooks = child._forward_hooks, child._forward_pre_hooks
                found[child] = parent._modules[name] = made
    return root["model"]


def linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of these very parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer
