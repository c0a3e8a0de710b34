"""Copies of models in which modules that hide their products call linear layers instead, which are sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdpass.errors import UsageError
from tdpass.layers.hooks import carry_hooks

Make = Callable[[str, nn.Module], nn.Module | None]


@dataclass(frozen=True)
class Opener:
    """How modules of some classes come to call linear layers.

    `opened` is what they become, by `open`, and in a copy of a model by the function named `verb`;
    `why_closed` says why one cannot ("" where it can). They run by torch functions named in `calls`;
    `leftovers` are attributes that would keep their dense weights.
    """

    dense: tuple[type[nn.Module], ...]
    opened: type[nn.Module]
    open: Callable[[Any], nn.Module]
    why_closed: Callable[[Any], str]
    calls: frozenset[str]
    verb: str
    leftovers: tuple[str, ...] = ()


_OPENERS: list[Opener] = []


def register_opener(opener: Opener) -> Opener:
    """Let modules of its classes be opened."""
    _OPENERS.append(opener)
    return opener


def opener_of(module: nn.Module) -> Opener | None:
    """How a module is opened; None for one that is no such module."""
    return next((opener for opener in _OPENERS if isinstance(module, opener.dense)), None)


def is_opened(module: nn.Module) -> bool:
    """Whether a module is what one became that was opened."""
    return any(isinstance(module, opener.opened) for opener in _OPENERS)


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
                carry_hooks(child, made)
                found[child] = parent._modules[name] = made
    return root["model"]


def why_computed(weights: Iterable[object]) -> str:
    """Why a module that reads these weights cannot be opened; empty where all are parameters."""
    if all(isinstance(weight, nn.Parameter) for weight in weights):
        return ""
    return "its weights are computed from other parameters"


def linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of these very parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer
