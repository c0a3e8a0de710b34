"""Factored layers of a torch model: what they are made of, and those that it came with as sites again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tdpass.form import DENSE
from tdpass.formats.layer import Layer
from tdpass.formats.storage import Storage
from tdpass.layers.adaptive import Adaptive
from tdpass.layers.factorized import Factorized
from tdpass.models.torch.modules.in_place import become
from tdpass.models.torch.sites.sites import Matched


def find_factored(model: nn.Module) -> tuple[list[Matched], dict[str, str]]:
    """All factored layers that are sites, and by path why the others are none.

    Layers that share their factors are one site.
    """
    paths: dict[int, list[str]] = {}
    groups: dict[int, list[Factorized]] = {}
    declined: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Factorized):
            continue
        reached = paths.setdefault(id(module), [])
        reached.append(path)
        reason = _why_not(module)
        if reason:
            declined[path] = reason
        elif len(reached) == 1:
            groups.setdefault(id(next(iter(module.factors().values()))), []).append(module)
    return [_matched(layers, [paths[id(layer)] for layer in layers]) for layers in groups.values()], declined


def put_product(matched: Matched) -> None:
    """Let every layer of the site compute with the weight that its factors stand for."""
    for module, own in zip(matched.modules, matched.biases, strict=True):
        assert isinstance(module, Factorized)
        dense = Layer(matched.site, DENSE, {"kernel": matched.weight})
        become(module, Factorized(dense, own, module.padding_mode, module.pads))


def settled(matched: Matched) -> Matched:
    """The site whose dense layer is the narrower one that stands for it."""
    first = matched.modules[0]
    assert isinstance(first, Factorized)
    kernel = first.factors()["kernel"]
    assert isinstance(kernel, nn.Parameter)
    biases = tuple(module.bias for module in matched.modules if isinstance(module, Factorized))
    site = replace(first.site, name=matched.site.name, bias=first.bias is not None)
    return replace(matched, site=site, weight=kernel, biases=biases, transposed=False, as_stored=False)


def _why_not(module: Factorized) -> str:
    if type(module) is not Factorized:
        return f"it runs as one operator ({module.form}); compress before such are made"
    if module.form.narrow:
        return f"it is '{module.form}' already, which goes with its neighbours"
    return ""


def _matched(layers: Sequence[Factorized], paths: Sequence[Sequence[str]]) -> Matched:
    first, biases = layers[0], tuple(layer.bias for layer in layers)
    with torch.no_grad():
        product = first.product()
    trained = first.storage.numbers or any(factor.requires_grad for factor in first.factors().values())
    every = tuple(path for reached in paths for path in reached)
    # a table that is tied to a layer has the layer's name
    name = first.site.name if first.site.name in every else every[0]
    found = Matched(
        site=replace(first.site, name=name, extents=(), samples=1, lookups=0),
        weight=nn.Parameter(product.detach(), requires_grad=bool(trained)),
        modules=tuple(layers),
        paths=every,
        biases=biases,
        as_stored=False,
    )
    return replace(found, site=replace(found.site, bias=found.bias is not None))


def placed_factors(layer: Layer, like: Tensor) -> dict[str, Tensor]:
    """The factors as a module holds them where the dense weight lies.

    Those in number types of their own are no parameters.
    """
    held = {key: factor.to(like.device) for key, factor in layer.factors.items()}
    if layer.form.encoded:
        return held
    trained = {
        key: nn.Parameter(factor.to(like), requires_grad=like.requires_grad)
        for key, factor in held.items()
        if factor.is_floating_point()
    }
    return {**held, **trained}


def storages(module: nn.Module) -> list[Storage]:
    """How factors and orders are stored that are no parameters, shared ones once."""
    layers = (layer for layer in module.modules() if isinstance(layer, Factorized | Adaptive))
    held = (
        (getattr(layer, name), layer.storage)
        for layer in layers
        for name in (*layer.storage.numbers, *layer.storage.orders)[:1]
    )
    return list({id(first): storage for first, storage in held}.values())


def bias_for(own: nn.Parameter | None, bias: Tensor | None, like: Tensor) -> nn.Parameter | None:
    """The bias of a layer that stands for its site's, where it keeps one of its own beside it."""
    if bias is None:
        return own
    placed = bias.to(like)
    return nn.Parameter(
        placed.clone() if own is None else placed + own.detach(), requires_grad=like.requires_grad
    )


def pads_of(module: nn.Module) -> tuple[int, ...]:
    """How a layer pads, as `F.pad` takes it, that does not pad with zeros."""
    if isinstance(module, Factorized):
        return module.pads
    own = getattr(module, "padding_mode", "zeros") != "zeros"
    return tuple(module._reversed_padding_repeated_twice) if own else ()  # type: ignore[arg-type]
