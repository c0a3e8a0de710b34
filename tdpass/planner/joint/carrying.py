"""Putting the layers of joint changes into a model, and whether it then answers as it should."""

from __future__ import annotations

from collections.abc import Mapping

from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.formats.layer import Layer
from tdpass.models.abilities import ResizesHeads, SettlesChannels
from tdpass.models.base import Batch, Model
from tdpass.models.streams import HeadChange
from tdpass.planner.joint.base import Variant
from tdpass.planner.trials import gap

ROUNDING = 1e-3  # how far the layers with fewer channels may answer otherwise


def put(model: Model, layers: Mapping[str, Layer], heads: Mapping[str, HeadChange]) -> None:
    """Put layers into a model, and tell it what heads there are."""
    for name, layer in layers.items():
        model.replace(name, layer)
    if heads and isinstance(model, ResizesHeads):
        model.resize_heads(heads)


def carries(model: Model, example: Batch, variant: Variant) -> bool:
    """Whether the model runs with a variant, and answers as with what a recorded run is repeated with."""
    if not variant.heads:
        return True
    if not isinstance(model, ResizesHeads) or not isinstance(model, SettlesChannels):
        return False
    small, whole = model.clone(), model.clone()
    try:
        put(small, variant.layers, variant.heads)
        put(whole, variant.replayed, {})
        return gap(whole.run(example), small.run(example)) <= ROUNDING
    except (InvalidModelError, UnsupportedError):
        return False
