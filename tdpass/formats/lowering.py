"""Lowering: a factored layer as its chain of convolutions or linear layers.

The chain is read off the format's own `apply`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from torch import Tensor

from tdpass.formats.base import FORMATS
from tdpass.formats.geometry import apply_dense
from tdpass.formats.layer import Layer
from tdpass.kernels.conv_chain import MAX_STAGES, MAX_TAPS
from tdpass.kernels.stage import Lanes, Stage, Stages
from tdpass.ops import Pads
from tdpass.site import Site

_LANES = 16


@dataclass(frozen=True)
class Lowered(Stages):
    """The stages of a layer, and the factor that is each one's weight, named."""

    factors: tuple[str, ...]

    @property
    def lanes(self) -> Lanes:
        """Vectors of channels where every width fills them, else of pixels, which need steps 1, 2 and 4."""
        fills = all(stage.outputs % _LANES == 0 for stage in self.stages)
        steps = all(stage.stride[1] in (1, 2, 4) for stage in self.stages)
        return "channels" if self.linear or fills or not steps else "pixels"

    def pack(self, layer: Layer, lanes: Lanes) -> list[Tensor]:
        """The factors of a layer as the kernels take them."""
        return [
            stage.pack(layer.factors[name].reshape(stage.shape), lanes)
            for stage, name in zip(self.stages, self.factors, strict=True)
        ]


def lower(layer: Layer) -> Lowered | None:
    """The layer as a chain of at most six stages of floating-point weights, in one or two dimensions.

    None where its format does more than convolve.
    """
    return None if layer.form.encoded else chain_of(layer)


def chain_of(layer: Layer) -> Lowered | None:
    """The same for factors however they are stored."""
    site, storage = layer.site, layer.storage
    if site.axes > 2 or not layer.factors:
        return None
    recorder = _Recorder()
    shapes = {**storage.shapes, **{name: (count,) for name, count in storage.orders.items()}}
    weights = {name: _Weight(name, shape) for name, shape in shapes.items()}
    try:
        result = FORMATS.get(layer.format).apply(recorder, _Activation(0), weights, None, site, layer.rank)
    except _NotAChainError:
        return None
    stages = tuple(recorder.stages)
    if (
        result != _Activation(len(stages))
        or not 1 <= len(stages) <= MAX_STAGES
        or any(math.prod(stage.kernel) > MAX_TAPS for stage in stages)
    ):
        return None
    return Lowered(stages, site.axes, tuple(recorder.factors))


def stage_of(site: Site) -> Stage | None:
    """The dense layer as one stage, in one or two dimensions; None where it is none."""
    recorder = _Recorder()
    try:
        apply_dense(recorder, _Activation(0), _Weight("weight", site.shape), None, site)
    except _NotAChainError:
        return None
    return recorder.stages[0] if site.axes <= 2 else None


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Activation:
    """What comes out of that many stages."""

    stages: int


_Value = _Weight | _Activation


class _NotAChainError(Exception):
    """The format reshapes, reorders or adds."""


@dataclass
class _Recorder:
    """Operations that only write down convolutions and linear layers, each reading the one before."""

    stages: list[Stage] = field(default_factory=list)
    factors: list[str] = field(default_factory=list)

    def linear(self, x: _Value, weight: _Value, bias: _Value | None) -> _Value:
        return self._stage(x, weight, bias, lambda shape: Stage(shape[1], shape[0]))

    def conv(
        self,
        x: _Value,
        weight: _Value,
        bias: _Value | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> _Value:
        def make(shape: tuple[int, ...]) -> Stage:
            before, after = zip(*padding, strict=True)
            return Stage(
                shape[1] * groups,
                shape[0],
                groups,
                _pair(shape[2:], 1),
                _pair(stride, 1),
                _pair(before, 0),
                _pair(after, 0),
                _pair(dilation, 1),
            )

        return self._stage(x, weight, bias, make)

    def _stage(
        self, x: _Value, weight: _Value, bias: _Value | None, make: Callable[[tuple[int, ...]], Stage]
    ) -> _Value:
        if x != _Activation(len(self.stages)) or not isinstance(weight, _Weight) or bias is not None:
            raise _NotAChainError
        self.stages.append(make(weight.shape))
        self.factors.append(weight.name)
        return _Activation(len(self.stages))

    def _refuse(self, *_: object) -> NoReturn:
        raise _NotAChainError

    conv_transpose = reshape = permute = take = part = concat = matmul = add = flatten_positions = (
        restore_positions
    ) = fill = _refuse


def _pair(values: Sequence[int], rest: int) -> tuple[int, int]:
    """(height, width); an axis that is not there has the value of one that does nothing."""
    height, width = (rest, *values)[-2:]
    return height, width
