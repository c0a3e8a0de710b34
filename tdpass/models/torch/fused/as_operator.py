"""Which layers of encoded factors, or of small cores, run faster as one operator, by the table of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.fusing.choose import PLAIN, Calls, kept_seconds, measuring, served
from tdpass.kernels import native
from tdpass.layers.contracted import Contracted
from tdpass.layers.factorized import Factorized
from tdpass.layers.float_chain import FloatChain
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.level_conv import LevelConv
from tdpass.layers.one_operator import OneOperator
from tdpass.layers.sparse import SparseLayer
from tdpass.layers.weight_only import WeightOnly
from tdpass.machine import processor
from tdpass.numbers.floating import Floating
from tdpass.timings import Key, geometry_of

_LEAST = 1 / 0.95  # what is packed is a second copy of the weight


@dataclass(frozen=True)
class AsOperator:
    """A layer as one operator, with the seconds of its calls so and as it is; none where unmeasured."""

    call: OneOperator
    seconds: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        """Seconds that it saves by itself, beyond what its second copy of the weight has to be worth."""
        one, plain = (0.0, math.inf) if self.seconds is None else self.seconds
        return plain - one * _LEAST

    @property
    def why_not(self) -> str:
        """Its times, as a reason."""
        one, plain = self.seconds or (0.0, 0.0)
        return f"{one * 1e6:.0f} us as one operator, {plain * 1e6:.0f} us as it is"


def as_operator(layer: Factorized, inputs: Sequence[Tensor] | None) -> AsOperator | str:
    """The layer as one operator, measured on these inputs (without storage), or why none serves it."""
    kind = call_of(layer)
    reason = kind.why_not(layer.layer()) or _unserved(layer, inputs)
    if reason:
        return reason
    fused = kind.of(layer)
    if inputs is None or not measuring():
        return AsOperator(fused)
    if not inputs:
        return "it is not called when the model runs on the data"
    times = [_times(layer, fused, x) for x in inputs]
    one, plain = (sum(each[way] for each in times) for way in (fused.operator, PLAIN))
    return AsOperator(fused, (one, plain))


def _unserved(layer: Factorized, inputs: Sequence[Tensor] | None) -> str:
    """Why no kernel serves these inputs where the layer is; empty where one does."""
    device = next(iter(layer.factors().values())).device.type
    dtypes = {x.dtype for x in inputs or ()} or {torch.float32}
    return next((reason for dtype in dtypes if (reason := served(device, dtype))), "")


def call_of(layer: Factorized) -> type[OneOperator]:
    """The operator that may serve a layer of encoded factors, or of small cores."""
    if not layer.form.encoded:
        return Contracted
    if layer.form.activations:
        return IntegerChain
    if layer.storage.supports:
        return SparseLayer
    floating = all(isinstance(each, Floating) for each in layer.storage.numbers.values())
    if floating:
        return FloatChain
    return LevelConv if layer.site.axes else WeightOnly


def _times(layer: Factorized, fused: OneOperator, like: Tensor) -> dict[str, float]:
    """Seconds of either way, measured where the table has none.

    The form is part of the key: it says the precision of the factors, and whether the grids of what they read
    are stored or found in every call.
    """
    threads = torch.get_num_threads()
    called = f"{geometry_of(layer.site)} {tuple(like.shape)} strides {like.stride()}"
    keys = {
        way: Key(
            f"{processor()} {native.isa()}",
            f"torch {torch.__version__}, kernels {native.version()}",
            threads,
            int(like.shape[0]),
            str(like.dtype).removeprefix("torch."),
            called if not layer.pads else f"{called} {layer.padding_mode} {layer.pads}",
            f"{layer.form} {way}",
            (),
        )
        for way in (PLAIN, fused.operator)
    }

    def calls() -> Calls:
        x = torch.randn_like(like, device="cpu")
        return {PLAIN: lambda: layer(x), fused.operator: lambda: fused.packed_call(x)}

    return kept_seconds(keys, calls, threads)
