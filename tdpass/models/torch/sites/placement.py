"""Factored layers in the modules of a site, and read from there again."""

from __future__ import annotations

from dataclasses import replace

from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.layer import Layer
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.models.torch.modules.in_place import become
from tdpass.models.torch.sites.factored import bias_for, pads_of, placed_factors
from tdpass.models.torch.sites.sites import Matched


def placed_layer(matched: Matched) -> Layer:
    """The layer in a site's modules, with current factors; a bias of a module's own is no part of it."""
    module, own = matched.modules[0], matched.biases[0] if matched.apart else None
    assert isinstance(module, Factorized)
    layer = module.layer()
    if own is None or layer.bias is None:
        return layer
    shift = layer.bias - own.detach()
    return replace(layer, bias=shift if bool(shift.any()) else None)


def _form(matched: Matched) -> Form:
    """The form that the layers of a site are in."""
    first = matched.modules[0]
    return first.form if isinstance(first, Factorized) else DENSE


def place_layer(matched: Matched, layer: Layer) -> None:
    """Put a layer at every use of a site.

    Raises `PlanError` for a shape that does not fit.
    """
    site = layer.form.on(matched.site)
    if layer.site.shape != site.shape:
        raise PlanError(
            f"a layer of shape {layer.site.shape} cannot replace site {matched.site.name!r} of shape "
            f"{matched.site.shape}; plan for this model"
        )
    weight = matched.weight
    form = layer.form.left_of(_form(matched))
    shared = Layer(site, form, placed_factors(layer, weight), floats=weight.dtype)
    biases = {id(own): bias_for(own if matched.apart else None, layer.bias, weight) for own in matched.biases}
    for module, own in zip(matched.modules, matched.biases, strict=True):
        mode = str(getattr(module, "padding_mode", "zeros"))
        new = Factorized(shared, biases[id(own)], mode, pads_of(module))
        if isinstance(module, Fused):  # it may have taken an activation in
            new = Fused.of(new, module.activation, module.lanes)
        become(module, new)
