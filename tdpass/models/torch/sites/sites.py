"""Which torch modules are sites, and why the others are not."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize

import tdpass.layers.attention
import tdpass.layers.bilinear
import tdpass.layers.embedding_bag
import tdpass.layers.recurrent  # noqa: F401 - these register what can be opened
from tdpass.kinds import PRODUCT, LayerKind, TransposedLinear, is_table, kind_of, kind_of_module, why_no_table
from tdpass.layers.factorized import Factorized
from tdpass.layers.opening import opener_of
from tdpass.models.torch.modules.in_place import can_become
from tdpass.models.torch.modules.quantized import why_quantized
from tdpass.models.torch.modules.same_forward import computes_as
from tdpass.site import Site


@dataclass(frozen=True)
class Matched:
    """The modules that share one weight.

    `paths` are all names under which they are reached, `biases` those they came with. The site has a bias
    where all of them have the same; biases that differ stay with their modules. The weight is as they store
    it, `transposed` where that is `[i, o]`; unless `as_stored` it is `[o, i / groups, *kernel]`.
    """

    site: Site
    weight: nn.Parameter
    modules: tuple[nn.Module, ...]
    paths: tuple[str, ...]
    biases: tuple[nn.Parameter | None, ...]
    transposed: bool = False
    as_stored: bool = True

    @property
    def apart(self) -> bool:
        """Whether the biases are no part of the site."""
        return any(bias is not self.biases[0] for bias in self.biases)

    @property
    def bias(self) -> nn.Parameter | None:
        """The site's bias."""
        return None if self.apart else self.biases[0]

    def dense(self) -> Tensor:
        """The weight as `[o, i, *kernel]`."""
        return self.stored(self.weight.detach())

    def stored(self, dense: Tensor) -> Tensor:
        """A weight `[o, i, *kernel]` as the modules hold it, and the other way round."""
        if not self.as_stored:
            return dense
        turned = dense.t() if self.transposed else kind_of(self.site).turned(dense, self.site.groups)
        return dense if turned is dense else turned.contiguous()

    def copy(self, memo: dict[int, Any]) -> Matched:
        """The same of a copy of the model that was made with `memo`."""
        weight, modules, biases = copy.deepcopy((self.weight, self.modules, self.biases), memo)
        return replace(self, weight=weight, modules=modules, biases=biases)


_POSITIONS = 5


def find_sites(model: nn.Module) -> tuple[list[Matched], dict[str, str]]:
    """All sites of a model, and the reason for every other module that holds a weight of two or more axes."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = module
        paths.setdefault(id(module), []).append(path)
    attention = {
        id(child)
        for module in modules.values()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
        if child is not module
    }
    declined: dict[str, str] = {}
    hidden: set[int] = set()
    for key, module in modules.items():
        if parametrize.is_parametrized(module):
            hidden.update(id(inner) for inner in module.modules())
            declined[paths[key][0]] = (
                "its weight is parametrized, and shares a parameter with another module, or was not made "
                "plain yet: before training, torch.nn.utils.parametrize.remove_parametrizations does that"
            )
    groups: dict[int, list[nn.Module]] = {}
    for key, module in modules.items():
        quantized = why_quantized(module)
        if quantized:
            declined[paths[key][0]] = quantized
            continue
        if key in hidden or not _holds_matrix(module):
            continue
        reason = (
            "it belongs to an attention module that reads it by attribute"
            if key in attention
            else _reason(module)
        )
        if reason is None:
            groups.setdefault(id(module.weight), []).append(module)
        else:
            declined[paths[key][0]] = reason
    found: list[Matched] = []
    holders = _holders(modules.values())
    for weight, holding in groups.items():
        members = sorted(holding, key=is_table)  # exporters name what is shared after the layer
        name = paths[id(members[0])][0]
        sites = [_site(member, name) for member in members]
        if holders[weight] != {id(member) for member in members}:
            declined[name] = "its weight is shared with a layer that needs it dense"
        elif (
            any(site.geometry() != sites[0].geometry() for site in sites)
            or len({_is_transposed(member) for member in members}) > 1
        ):
            declined[name] = "its weight is shared by layers of different geometry"
        else:
            reached = tuple(path for member in members for path in paths[id(member)])
            biases = tuple(member._parameters.get("bias") for member in members)
            transposed = _is_transposed(members[0])
            matched = Matched(
                sites[0],
                members[0].weight,  # type: ignore[arg-type]
                tuple(members),
                reached,
                biases,
                transposed,
            )
            table = any(site.table for site in sites)
            found.append(replace(matched, site=replace(sites[0], bias=matched.bias is not None, table=table)))
    return found, declined


def _holders(modules: Iterable[nn.Module]) -> dict[int, set[int]]:
    """Which modules hold each parameter."""
    holders: dict[int, set[int]] = {}
    for module in modules:
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    return holders


def _site(module: nn.Module, name: str) -> Site:
    if not is_table(module):
        return _kind(module).site(module, name)
    weight: Any = module.weight
    return Site(name, PRODUCT, tuple(weight.shape), itemsize=weight.element_size(), table=True)


def _is_transposed(module: nn.Module) -> bool:
    return not is_table(module) and _base(module) is TransposedLinear


def _base(module: nn.Module) -> type[nn.Module]:
    base = _kind(module).base_of(module)
    assert base is not None
    return base


def _kind(module: nn.Module) -> LayerKind:
    kind = kind_of_module(module)
    assert kind is not None
    return kind


def _holds_matrix(module: nn.Module) -> bool:
    """Whether one of the module's own parameters may multiply what it reads."""
    held = list(module.parameters(recurse=False))
    if kind_of_module(module) is None and opener_of(module) is None and not is_table(module):
        return any(_long_axes(parameter) > 1 for parameter in held)  # a token or a scale is no matrix
    return any(parameter.dim() > 1 for parameter in held)


def _long_axes(parameter: Tensor) -> int:
    return sum(size > 1 for size in parameter.shape)


def _reason(module: nn.Module) -> str | None:
    """Why a module that holds a matrix is not a site; None for one that is."""
    opener = opener_of(module)
    if opener is not None:
        return opener.why_closed(module) or (
            f"the pass 'divide' opens it, before training tdpass.{opener.verb}(model)"
        )
    if is_table(module):
        return why_no_table(module) or _reason_of_weight(module) or _why_unchanged(module)
    if kind_of_module(module) is None:
        return _reason_of_others(module)
    return _reason_of_weight(module) or _reason_of_class(module)


def _reason_of_others(module: nn.Module) -> str:
    """What to do about a module of no kind."""
    stacked = next(
        (name for name, held in module.named_parameters(recurse=False) if _long_axes(held) > 2), None
    )
    if stacked is None and (type(module) is nn.Module or isinstance(module, GraphModule)):
        return "what the graph reads its weight by is no layer (an embedding, a recurrence, a formula)"
    if stacked is None:
        return (
            f"{type(module).__name__} holds a weight but is no Linear or Conv; torch.export it to "
            "reach functional layers"
        )
    advice = (
        "make an nn.Linear of each (experts: an nn.ModuleList of them) and call those that a sample needs"
    )
    return f"{stacked!r} holds several matrices as one parameter; {advice}"


def _reason_of_weight(module: nn.Module) -> str | None:
    weight: Any = module.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialized; run the model once"
    if not isinstance(weight, nn.Parameter):
        return (
            "a hook computes its weight (a pruning mask, weight_norm); make it a parameter by "
            "prune.remove or remove_weight_norm first"
        )
    if weight.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return f"its weight is of type {weight.dtype}"
    if 0 in weight.shape:
        return "its weight is empty"
    return None if is_table(module) else _kind(module).why_not(module)


def _why_unchanged(module: nn.Module) -> str | None:
    if can_become(module, Factorized):
        return None
    return f"{type(module).__name__} has __slots__, so it cannot become a factored layer"


def _reason_of_class(module: nn.Module) -> str | None:
    """Why a linear layer or convolution is more than that, or cannot be changed in place."""
    name = type(module).__name__
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if not {*module._parameters} <= {"weight", "bias"} or module._buffers or module._modules:
        return f"{name} holds more than a weight and a bias"
    if unchanged := _why_unchanged(module):
        return unchanged
    if computes_as(module, _base(module), _kind(module).input_sizes(module, _POSITIONS)):
        return None
    return f"{name} overrides forward" if isinstance(module, _base(module)) else _reason_of_others(module)
