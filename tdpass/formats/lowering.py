"""Lowering: a factored layer as its chain of convolutions or linear layers.

The chain is read off the format's own `apply`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tdpass.formats.geometry import apply_dense
from tdpass.formats.layer import Layer
from tdpass.formats.steps import Activation, NotAChainError, Step, StepRecorder, Weight, steps_of
from tdpass.kernels.conv_chain import MAX_STAGES, MAX_TAPS
from tdpass.kernels.stage import Lanes, Stage, Stages
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
    if layer.site.axes > 2 or not layer.factors:
        return None
    steps = steps_of(layer.site, layer.form, layer.storage, bias=False)
    if steps is None or not 1 <= len(steps) <= MAX_STAGES or any(_turned(step) for step in steps):
        return None
    stages = tuple(map(_stage, steps))
    if any(math.prod(stage.kernel) > MAX_TAPS for stage in stages):
        return None
    return Lowered(stages, layer.site.axes, tuple(step.factor for step in steps))


def stage_of(site: Site) -> Stage | None:
    """The dense layer as one stage, in one or two dimensions; None where it is none."""
    recorder = StepRecorder()
    try:
        apply_dense(recorder, Activation(0), Weight("weight", site.shape), None, site)
    except NotAChainError:
        return None
    (step,) = recorder.steps
    return None if site.axes > 2 or _turned(step) else _stage(step)


def _turned(step: Step) -> bool:
    """Whether it is a transposed convolution, which is no stage."""
    return step.call == "conv_transpose"


def _stage(step: Step) -> Stage:
    """A linear layer or a convolution as a stage."""
    if step.call == "linear":
        return Stage(step.shape[1], step.shape[0])
    stride, padding, dilation, groups = step.geometry
    before, after = zip(*padding, strict=True)
    return Stage(
        step.shape[1] * groups,
        step.shape[0],
        groups,
        _pair(step.shape[2:], 1),
        _pair(stride, 1),
        _pair(before, 0),
        _pair(after, 0),
        _pair(dilation, 1),
    )


def _pair(values: Sequence[int], rest: int) -> tuple[int, int]:
    """(height, width); an axis that is not there has the value of one that does nothing."""
    height, width = (rest, *values)[-2:]
    return height, width
