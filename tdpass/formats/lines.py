"""Dense layers whose stored weight lacks whole outputs or input channels, as the smaller layers they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic

import torch

from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.geometry import apply_dense, unit
from tdpass.formats.storage import Storage
from tdpass.numbers import VALUES
from tdpass.ops import StorageOps, V
from tdpass.site import Site
from tdpass.supports import SUPPORT

_KERNEL = "kernel"
_MOVED = 16  # multiply-adds that take as long as reading and writing one number


@dataclass(frozen=True)
class Lines:
    """What is left of a dense layer: its first axis (0, outputs) or second (1, inputs) has `count` slices.

    Inputs are input channels. `site` is that of the smaller layer.
    """

    axis: int
    count: int
    site: Site


def lines_left(site: Site, form: Form, storage: Storage) -> Lines | None:
    """What a layer stored so shrinks to; None where it is computed with its zeros.

    That is so where its support leaves no outputs or channels out as a whole, and where gathering what is
    left of the input, or putting the outputs in their places, takes longer than what it saves.
    """
    support = storage.supports.get(_KERNEL)
    if form.format != DENSE.format or form.activations or site.groups > 1 or support is None:
        return None
    axis = support.line(site.shape)
    if axis is None:
        return None
    count, (o, i, *kernel) = support.tiles(site.shape), site.shape
    shape = (o, count, *kernel) if axis else (count, i, *kernel)
    saved = site.weights - math.prod(shape)
    moved = 2 * count * math.prod(site.stride) if axis else 2 * o
    return Lines(axis, count, replace(site, shape=shape)) if saved > _MOVED * moved else None


@dataclass(frozen=True)
class Smaller(Generic[V]):
    """A smaller layer, ready to run: its weight, where its channels lie, and which outputs it has.

    Channels are input channels or outputs. `places` holds the indices of what is left, `order` for every
    output that of the smaller layer's answer, `kept` ones for outputs that it makes; the last two of layers
    of fewer outputs alone.
    """

    weight: V
    places: V
    order: V | None = None
    kept: V | None = None


def smaller(
    ops: StorageOps[V], held: Mapping[str, V], storage: Storage, lines: Lines, dtype: torch.dtype
) -> Smaller[V]:
    """The layer that is left, from the parts that are stored."""
    support, shape = storage.supports[_KERNEL], storage.shapes[_KERNEL]
    kept = support.bits_of(ops, held[storage.part_of(_KERNEL, SUPPORT)], shape)
    places = ops.places(kept, lines.count)
    weight = _left(ops, held, storage, lines, places, dtype)
    if lines.axis:
        return Smaller(weight, places)
    wide = ops.reshape(kept, (shape[0], *unit(lines.site.axes)))
    return Smaller(weight, places, ops.order(kept), wide)


def apply_smaller(ops: StorageOps[V], x: V, layer: Smaller[V], bias: V | None, lines: Lines) -> V:
    """The output of a layer that is smaller by `lines`, of as many channels as the whole one makes."""
    along = -1 - lines.site.axes
    if layer.order is None or layer.kept is None:
        return apply_dense(ops, ops.take(x, layer.places, along), layer.weight, bias, lines.site)
    rest = None if bias is None else ops.reshape(bias, (-1, *unit(lines.site.axes)))
    few = None if rest is None else ops.reshape(ops.take(rest, layer.places, along), (lines.count,))
    y = apply_dense(ops, x, layer.weight, few, lines.site)
    return ops.where(layer.kept, ops.take(y, layer.order, along), rest)


def apply_stored(
    ops: StorageOps[V],
    x: V,
    held: Mapping[str, V],
    bias: V | None,
    site: Site,
    form: Form,
    storage: Storage,
    dtype: torch.dtype,
) -> V:
    """The layer's output from its factors as they are stored, in a floating-point type."""
    lines = lines_left(site, form, storage)
    if lines is not None:
        return apply_smaller(ops, x, smaller(ops, held, storage, lines, dtype), bias, lines)
    values = storage.restore(ops, held, dtype)
    return FORMATS.get(form.format).apply(ops, x, values, bias, site, form.rank)


def _left(
    ops: StorageOps[V], held: Mapping[str, V], storage: Storage, lines: Lines, places: V, dtype: torch.dtype
) -> V:
    """The weight of the smaller layer."""
    numbers, shape = storage.numbers[_KERNEL], storage.shapes[_KERNEL]
    parts = {
        part: held[storage.part_of(_KERNEL, part)] for part in numbers.parts(shape, storage.count(_KERNEL))
    }
    values = parts.pop(VALUES)
    beside = numbers.beside_lines(ops, parts, shape, lines.axis, places)
    if beside is None:
        whole = storage.restored(ops, _KERNEL, held, dtype)
        return ops.take(whole, places, lines.axis - len(shape))
    if numbers.floating:
        values = ops.reshape(values, lines.site.shape)
    return numbers.restore(ops, {VALUES: values, **beside}, lines.site.shape, dtype)
