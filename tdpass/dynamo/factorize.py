"""Factors in place of the dense weights of a graph, as a plan says.

Looked up at every call, never baked in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from tdpass.dynamo.draft import Draft
from tdpass.dynamo.links import GraphLink, read_link
from tdpass.errors import TdpassError
from tdpass.form import Form, Formed
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer, check_form, storage_of
from tdpass.formats.lowering import Lowered, lower
from tdpass.kinds import plain_site
from tdpass.layers.derived import Recipe, Tensors
from tdpass.ops import TorchOps
from tdpass.site import Site

log = logging.getLogger("tdpass.backend")

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: torch.conv1d, 2: torch.conv2d}
Decide = Callable[[str, Tensor], "Form | None"]


@dataclass(frozen=True)
class Factorize(Formed, Recipe[Tensors]):
    """The factors of a weight, in the order of the format's shapes."""

    site: Site
    form: Form

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (weight,) = tensors
        fmt = FORMATS.get(self.format)
        layer = Layer(self.site, self.form, fmt.factorize(weight.detach().cpu(), self.site, self.rank)).to(
            weight.dtype
        )
        return tuple(layer.factors[name].to(weight.device) for name in layer.storage.sizes())


def factorize(draft: Draft, decide: Decide) -> int:
    """Replace linear layers and convolutions by what `decide` says of (module path, weight): a form.

    Returns how many. Weights that several calls share are factored once.  A weight that is stored the other
    way round (`x @ w`), grouped, or whose decision does not fit its shape, is left dense with a logged line.
    """
    stored = draft.stored
    count = 0
    for node in list(draft.graph.nodes):
        link = read_link(node, stored)
        if link is None or not isinstance(draft.value_of(link.weight), nn.Parameter):
            continue
        weight, path = draft.value_of(link.weight), module_path(link.weight)
        decision = decide(path, weight)
        if decision is None:
            continue
        site = _site(link, weight)
        try:
            if link.transposed or link.groups != 1:
                raise TdpassError("its weight is stored the other way round or grouped")
            check_form(site, decision)
            if decision.encoded:
                raise TdpassError(
                    f"the plan stores it as '{decision}', and a compiled graph keeps the weights as they are"
                )
        except TdpassError as error:
            log.warning("%s stays dense: %s", path or node.name, error)
            continue
        _replace(draft, link, Factorize(site, decision))
        count += 1
    return count


def module_path(weight: Node) -> str:
    """The path of the module that holds a weight, as Dynamo knows it; empty where it does not."""
    source = getattr(weight, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return ".".join(re.findall(r"_modules\['([^']*)'\]", str(name() if callable(name) else name)))


def _site(link: GraphLink, weight: Tensor) -> Site:
    plain = plain_site("weight", tuple(weight.shape))
    return replace(
        plain, stride=link.strides, padding=link.pads, dilation=link.dilation, itemsize=weight.element_size()
    )


def _replace(draft: Draft, link: GraphLink, recipe: Factorize) -> None:
    factors = draft.derive(recipe, [link.weight])
    names = list(storage_of(recipe.site, recipe.form).sizes())
    layer = Layer(
        recipe.site,
        recipe.form,
        {name: draft.value_of(node) for name, node in zip(names, factors, strict=True)},
    )
    lowered = lower(layer)
    with draft.graph.inserting_before(link.node):
        if lowered is None or link.axes > 2:
            result = draft.call(_whole(layer), link.x, link.bias, *factors)
        else:
            result = _chain(draft, link, lowered, dict(zip(names, factors, strict=True)))
    draft.replace(link.nodes, result)


def _chain(draft: Draft, link: GraphLink, lowered: Lowered, factors: dict[str, Node]) -> Node:
    """The layers one by one, so that they can be fused."""
    x = link.x
    for index, (stage, name) in enumerate(zip(lowered.stages, lowered.factors, strict=True)):
        bias = link.bias if index + 1 == len(lowered.stages) else None
        if not link.axes:
            x = draft.call(F.linear, x, factors[name], bias)
            continue
        stride, before, after, dilation = (
            list(pair[-link.axes :]) for pair in (stage.stride, stage.before, stage.after, stage.dilation)
        )
        if before != after:
            sizes = [size for pair in reversed(list(zip(before, after, strict=True))) for size in pair]
            x, before = draft.call(F.pad, x, sizes), [0] * link.axes
        x = draft.call(_CONVOLVE[link.axes], x, factors[name], bias, stride, before, dilation, stage.groups)
    return x


def _whole(layer: Layer) -> Callable[..., Tensor]:
    """The layer as one function of the input, the bias and its factors."""
    names = list(layer.factors)

    def factored(x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        values: dict[str, Any] = dict(zip(names, factors, strict=True))
        result: Tensor = FORMATS.get(layer.format).apply(TorchOps(), x, values, bias, layer.site, layer.rank)
        return result

    return factored
