"""Steps: a factored layer as dense layers in a row, read off its format's own `apply`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.storage import Storage
from tdpass.ops import Ops, Pads, V
from tdpass.site import Site

Call = Literal["linear", "conv", "conv_transpose"]


@dataclass(frozen=True)
class Step:
    """A layer whose weight is the factor of that name and shape.

    `call` is the method of `Ops`, `geometry` what it is called with after the bias.
    """

    factor: str
    shape: tuple[int, ...]
    call: Call
    geometry: tuple[Any, ...] = ()
    adds_bias: bool = False


Steps = tuple[Step, ...]


def steps_of(site: Site, form: Form, storage: Storage, *, bias: bool) -> Steps | None:
    """The steps of a layer of that form, each reading the one before.

    None where its format does more: where it reshapes, reorders or adds.
    """
    recorder = StepRecorder()
    shapes = {**storage.shapes, **{name: (count,) for name, count in storage.orders.items()}}
    weights = {name: Weight(name, shape) for name, shape in shapes.items()}
    given = _Bias() if bias else None
    try:
        result = FORMATS.get(form.format).apply(recorder, Activation(0), weights, given, site, form.rank)
    except NotAChainError:
        return None
    return tuple(recorder.steps) if result == Activation(len(recorder.steps)) else None


def apply_steps(ops: Ops[V], x: V, f: Mapping[str, V], bias: V | None, steps: Steps) -> V:
    """The output of the last of them."""
    for step in steps:
        call = getattr(ops, step.call)
        x = call(x, f[step.factor], bias if step.adds_bias else None, *step.geometry)
    return x


class NotAChainError(Exception):
    """What was recorded is no row of layers."""


@dataclass(frozen=True)
class Weight:
    """A factor, while steps are recorded."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Activation:
    """What comes out of that many steps."""

    steps: int


@dataclass(frozen=True)
class _Bias:
    """The bias of the layer."""


Value = Weight | Activation | _Bias


@dataclass
class StepRecorder:
    """Operations that only write down dense layers, each reading the one before."""

    steps: list[Step] = field(default_factory=list)

    def linear(self, x: Value, weight: Value, bias: Value | None) -> Value:
        return self._step(x, weight, bias, "linear")

    def conv(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Value:
        return self._step(x, weight, bias, "conv", tuple(stride), padding, tuple(dilation), groups)

    def conv_transpose(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Value:
        return self._step(x, weight, bias, "conv_transpose", tuple(stride), cut, tuple(dilation), groups)

    def _step(self, x: Value, weight: Value, bias: Value | None, call: Call, *geometry: Any) -> Value:
        if x != Activation(len(self.steps)) or not isinstance(weight, Weight):
            raise NotAChainError
        self.steps.append(Step(weight.name, weight.shape, call, geometry, bias is not None))
        return Activation(len(self.steps))

    def _refuse(self, *_: object) -> NoReturn:
        raise NotAChainError

    reshape = permute = take = part = concat = matmul = add = flatten_positions = restore_positions = fill = (
        _refuse
    )
