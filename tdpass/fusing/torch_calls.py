"""How a chain is called in torch: as one operator, and layer by layer in the library that inductor calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.fusing.choose import LANES, PLAIN, Calls, Trial
from tdpass.fusing.spec import ChainCall, Layout
from tdpass.kernels import base
from tdpass.kernels.activation import activate
from tdpass.kernels.conv_chain import CONV_CHAIN, packing
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import Stage
from tdpass.ops import padded_convolution

FORMATS_OF: dict[Layout, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


def in_torch(call: ChainCall) -> Trial[ChainCall]:
    """The chain in torch: the operator as dispatched, the layers in eager torch, channels last."""
    called = "from Python" if "conv_chain" not in base.compiled() else "in C++"
    return Trial(
        call,
        f"torch {torch.__version__}, called {called}",
        torch.get_num_threads(),
        functools.partial(_calls, call),
    )


def _calls(call: ChainCall) -> Calls:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(math.sqrt(shape[-1])).to(call.dtype)

    spec = call.spec
    weights = [noise(*stage.shape) for stage in spec.stages]
    bias = noise(spec.stages[-1].outputs) if spec.bias else None
    if not spec.linear:
        x = noise(*call.size)
        return convolutions(call, x.unsqueeze(2) if spec.axes == 1 else x, weights, bias)
    x, flat = noise(*call.size), [weight.flatten(1) for weight in weights]
    residual = noise(*call.output_size) if spec.residual else None
    packed = [
        stage.pack(weight, packing("channels", call.dtype))
        for stage, weight in zip(spec.stages, weights, strict=True)
    ]
    return {
        PLAIN: lambda: _finish(
            F.linear(functools.reduce(F.linear, flat[:-1], x), flat[-1], bias), residual, spec.activation
        ),
        "channels": functools.partial(
            LINEAR_CHAIN.call, x, packed, bias, residual, spec.widths, spec.activation
        ),
    }


def convolutions(call: ChainCall, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Calls:
    """A chain of convolutions with these weights, in every way; a signal is an image of one row."""
    spec = call.spec
    last = x.contiguous(memory_format=torch.channels_last)
    laid = x.contiguous(memory_format=FORMATS_OF[call.layout])
    plain = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    rest = plain_chain(last, spec.stages, plain, None).clone() if spec.residual else None
    residual = None if rest is None else rest.contiguous(memory_format=FORMATS_OF[call.layout])
    ahead = laid_out(spec.stages, weights, x.shape) if call.frozen else None
    relu = rest is None and spec.activation == "relu"
    after = "identity" if relu else spec.activation

    def layer_by_layer() -> Tensor:
        return _finish(plain_chain(last, spec.stages, plain, bias), rest, spec.activation)

    def laid_out_before() -> Tensor:
        return _finish(frozen_chain(last, spec.stages, ahead or (), bias, relu), rest, after)

    calls: dict[str, Callable[[], Tensor]] = {PLAIN: layer_by_layer if ahead is None else laid_out_before}
    for family in LANES:
        lanes = packing(family, call.dtype)
        packed = [stage.pack(weight, lanes) for stage, weight in zip(spec.stages, weights, strict=True)]
        calls[family] = functools.partial(
            CONV_CHAIN.call, laid, packed, bias, residual, spec.integers, spec.activation, lanes
        )
    return calls


def _finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return activate(y if residual is None else y + residual, activation)


def plain_chain(x: Tensor, stages: Sequence[Stage], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolutions whose weights are laid out at every call; the bias is that of the last."""
    for index, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        shift = bias if index + 1 == len(stages) else None
        if stage.before == stage.after:
            x = F.conv2d(x, weight, shift, stage.stride, stage.before, stage.dilation, stage.groups)
        else:
            pads = tuple(zip(stage.before, stage.after, strict=True))
            x = padded_convolution(x, weight, shift, stage.stride, pads, stage.dilation, stage.groups)
    return x


def laid_out(stages: Sequence[Stage], weights: Sequence[Tensor], size: Sequence[int]) -> list[Tensor] | None:
    """The weights as inductor lays out constants for an input of that size; None where it does not."""
    if not torch._C._has_mkldnn or any(stage.before != stage.after for stage in stages):
        return None
    made, size = [], list(size)
    try:
        for stage, weight in zip(stages, weights, strict=True):
            made.append(
                torch.ops.mkldnn._reorder_convolution_weight(
                    weight, stage.before, stage.stride, stage.dilation, stage.groups, size
                )
            )
            size = [size[0], stage.outputs, *stage.output_size(size[2:])]  # type: ignore[list-item]
    except (AttributeError, RuntimeError):  # inductor's own operators: another version of torch may lack them
        return None
    return made


def frozen_chain(
    x: Tensor, stages: Sequence[Stage], weights: Sequence[Tensor], bias: Tensor | None, relu: bool
) -> Tensor:
    """The same with weights `laid_out` before, and relu after the last."""
    for index, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        last = index + 1 == len(stages)
        after = "relu" if relu and last else "none"
        x = torch.ops.mkldnn._convolution_pointwise(
            x,
            weight,
            bias if last else None,
            stage.before,
            stage.stride,
            stage.dilation,
            stage.groups,
            after,
            [],
            "",
        )
    return x
