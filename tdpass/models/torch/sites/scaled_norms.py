"""Norms of a torch module whose channels can be scaled.

Columns of the layers that alone read them are scaled the other way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpass.models.abilities import Decline
from tdpass.models.torch.sites.readers import Run
from tdpass.models.torch.sites.sites import Matched
from tdpass.tape import Call, Ref
from tdpass.tape.calls import argument

_NORMS = {"layer_norm": True, "rms_norm": False}  # by whether its fourth argument is a bias


@dataclass(frozen=True)
class _Held:
    """A parameter, the module that holds it and its name there."""

    owner: nn.Module
    name: str
    path: str

    def scale(self, factor: Tensor) -> None:
        tensor = self.owner._parameters[self.name]
        assert tensor is not None
        scaled = (tensor.detach().double() * factor).to(tensor)
        self.owner._parameters[self.name] = nn.Parameter(scaled, requires_grad=tensor.requires_grad)


@dataclass(frozen=True)
class ScaledNorm:
    """A norm of layers over the last axis, and the sites that read it."""

    parameters: tuple[_Held, ...]
    sites: tuple[str, ...]

    def scale(self, scale: Tensor) -> None:
        """Divide what it makes."""
        for held in self.parameters:
            held.scale(1 / scale.to(torch.float64))


def scaled_norms(
    module: nn.Module, sites: Mapping[str, Matched], run: Run, decline: Decline
) -> dict[str, ScaledNorm]:
    """The norms that nothing but dense linear sites reads, by the name of their weight's module."""
    held: dict[int, _Held] = {}
    count: Counter[int] = Counter()
    for path, owner in module.named_modules():
        for name, tensor in owner._parameters.items():
            if tensor is not None:
                held[id(tensor)] = _Held(owner, name, path)
                count[id(tensor)] += 1
    found = {}
    for place, call in enumerate(run.tape.calls):
        tensors = _parameters(call)
        if not tensors or any(id(tensor) not in held for tensor in tensors):
            continue
        norm = ScaledNorm(tuple(held[id(tensor)] for tensor in tensors), _readers(run, call))
        path = norm.parameters[0].path
        shared = any(count[id(tensor)] > 1 or run.readers(tensor) != [place] for tensor in tensors)
        reason = _why_not(norm, sites, run, count, shared=shared)
        if reason:
            decline(path, f"not smoothed: {reason}")
        else:
            found[path] = norm
    return found


def _parameters(call: Call) -> list[Tensor]:
    """Weight and bias of a norm over the last axis, none where it is no such."""
    kind = call.operator
    if kind not in _NORMS or len(argument(call.args, call.kwargs, 1, "normalized_shape")) != 1:
        return []
    weight = argument(call.args, call.kwargs, 2, "weight")
    bias = argument(call.args, call.kwargs, 3, "bias") if _NORMS[kind] else None
    return [] if weight is None else [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]


def _readers(run: Run, call: Call) -> tuple[str, ...]:
    """The sites that read what a call makes; an empty name for anything else that does."""
    number = next(call.writes())
    readers = [run.tape.calls[place] for place in run.tape.readers(number)]
    names = [
        (reader.site or "") if reader.site is not None and reader.args[0] == Ref(number) else ""
        for reader in readers
    ]
    return tuple(dict.fromkeys([*names, *([""] if run.tape.is_output(number) else [])]))


def _why_not(
    norm: ScaledNorm, sites: Mapping[str, Matched], run: Run, count: Mapping[int, int], *, shared: bool
) -> str:
    if shared:
        return "its tensors are also read elsewhere"
    if not norm.sites or not all(name in sites for name in norm.sites):
        return "what it makes is read by more than dense layers"
    for name in norm.sites:
        matched = sites[name]
        alone = len(matched.modules) == 1 and count[id(matched.weight)] == 1
        if not alone or matched.site.table or len(run.tape.site_calls[name]) != 1 or matched.site.axes:
            return f"{name!r}, which reads it, is no linear layer that is called once and shares nothing"
    return ""
