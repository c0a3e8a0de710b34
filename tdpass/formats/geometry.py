"""Geometry of the layers that a factored layer is made of."""

from __future__ import annotations

from tdpass.kinds import kind_of, plain_site
from tdpass.ops import Ops, V
from tdpass.site import Site


def apply_dense(ops: Ops[V], x: V, weight: V, bias: V | None, site: Site) -> V:
    """The dense layer of that geometry."""
    return kind_of(site).apply(ops, x, weight, bias, site)


def unit(count: int) -> tuple[int, ...]:
    """`count` ones: stride or dilation of a stage that does not move."""
    return (1,) * count


def no_padding(count: int) -> tuple[tuple[int, int], ...]:
    """No padding on `count` axes."""
    return ((0, 0),) * count


def pointwise(out: int, inputs: int, axes: int, name: str) -> Site:
    """The geometry of a 1x1 convolution on `axes` spatial axes, or of a linear layer for none."""
    return plain_site(name, (out, inputs, *unit(axes)))
