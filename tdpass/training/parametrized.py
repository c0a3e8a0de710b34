"""Weights trained as something else: parametrizations in a copy of a model, and the dense model again."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdpass.training.placement import bare, whole


@dataclass(frozen=True)
class Parametrized:
    """How one module's weight is made, and the parameters that it is made from."""

    made_by: nn.Module
    originals: tuple[nn.Parameter, ...]

    def weight(self) -> Tensor:
        """The weight; a collective call where the parameters are sharded."""
        made: Tensor = self.made_by(*map(whole, self.originals))
        return made


def with_parametrizations(model: nn.Module, made_by: Mapping[str, Callable[[], nn.Module]]) -> nn.Module:
    """A copy of a model that trains the named modules' weights as these make them.

    Shared weights stay shared.
    """
    network = copy.deepcopy(model)
    weights = {
        module: dict(module.named_parameters(recurse=False)).get("weight") for module in network.modules()
    }
    for name, make in made_by.items():
        module = network.get_submodule(name)
        members = [other for other, weight in weights.items() if other is module or weight is weights[module]]
        for member in members:
            parametrize.register_parametrization(member, "weight", make())
        for member in members:
            if member is not module:
                _lists(member)["weight"] = _lists(module)["weight"]
    return network


def parametrized(network: nn.Module, names: Iterable[str]) -> dict[str, Parametrized]:
    """What stands for the weights of the named modules; raises `AttributeError` for a model without it."""
    plain, found = bare(network), {}
    for name in names:
        held: Any = _lists(plain.get_submodule(name))["weight"]
        found[name] = Parametrized(held[0], tuple(held.parameters(recurse=False)))
    return found


def dense_values(network: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The dense model's parameters and buffers of those names, as the network stands for them."""
    return {name: operator.attrgetter(name)(network).detach().clone() for name in names}


def _lists(module: nn.Module) -> nn.ModuleDict:
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return found
