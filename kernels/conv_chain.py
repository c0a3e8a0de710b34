"""`conv_chain`: a low-rank convolution as one operator, what lies between its stages never leaving the cache.

Serves every format whose factors are convolutions: `tucker2` (1x1, k x k, 1x1), `spatial_svd` (k x 1, 1 x k),
`channel_svd`, `input_svd`, `cp` (1x1, two depthwise, 1x1), `block_term` (1x1, grouped, 1x1), `tensor_train`
in three cores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import Array, Structure, addressof, byref, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.flops import conv_macs, of_arguments
from tdpass.kernels.stage import Lanes, Stage, stages_of
from tdpass.ops import padded_convolution

SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor? bias, Tensor? residual, int[] stages, str activation, str lanes)"
    " -> Tensor"
)
MAX_STAGES, MAX_TAPS = 6, 128


def packing(lanes: Lanes, dtype: torch.dtype) -> Lanes:
    """What to pack weights for where x has that type.

    These are channels in pairs if it is bfloat16, which this machine multiplies so, else as asked.
    """
    return "pairs" if lanes == "channels" and dtype == torch.bfloat16 and native.multiplies_pairs() else lanes


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    stages: Sequence[int],
    activation: str,
    lanes: Lanes,
) -> Tensor:
    """`y = activation(C_S ... C_1 x + bias + residual)` with convolutions C_s.

    `weights` packed as `Stage.pack` does.
    """
    h = x
    for stage, packed in zip(stages_of(stages), weights, strict=True):
        pads = tuple(zip(stage.before, stage.after, strict=True))
        weight = stage.unpack(packed, lanes).to(x.dtype)
        h = padded_convolution(h, weight, None, stage.stride, pads, stage.dilation, stage.groups)
    if bias is not None:
        h = h + bias.to(h.dtype)[:, None, None]
    return like_input(activate(h if residual is None else h + residual, activation), x)


def memory_format(x: Tensor) -> torch.memory_format:
    """How an operator's output lies: channels last where x is and nothing else fits it, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def like_input(y: Tensor, x: Tensor) -> Tensor:
    """The tensor y in the memory format of x."""
    return y.contiguous(memory_format=memory_format(x))


def fake(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    stages: Sequence[int],
    activation: str,
    lanes: Lanes,
) -> Tensor:
    """Shape and strides."""
    chain = stages_of(stages)
    if not 0 < len(chain) == len(weights) <= MAX_STAGES:
        raise KernelError(
            f"conv_chain has {len(chain)} stages and {len(weights)} weights; it takes one weight per stage, "
            f"1 to {MAX_STAGES} of them"
        )
    check_activation(activation)
    return empty_output(x, chain)


def empty_output(x: Tensor, chain: Sequence[Stage]) -> Tensor:
    """Memory for what these convolutions make of x."""
    size: Sequence[int | torch.SymInt] = x.shape[2:]
    for stage in chain:
        size = stage.output_size(size)
    return torch.empty(
        (x.shape[0], chain[-1].outputs, *size), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )


CONV_CHAIN = register_op(
    Op("conv_chain", SCHEMA, reference, fake, of_arguments(SCHEMA, conv_macs, "x", "stages"))
)


class _Program(NamedTuple):
    """Stages, as the kernel takes them too, and the shapes and types of their packed weights."""

    stages: tuple[Stage, ...]
    array: Array[Structure]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]


@functools.lru_cache(maxsize=4096)
def native_stages(integers: tuple[int, ...]) -> Array[Structure]:
    """Stages as the kernels take them."""
    stages = stages_of(integers)
    return (native.CStage * len(stages))(*(native.stage(stage.integers()) for stage in stages))


@functools.lru_cache(maxsize=4096)
def _program(integers: tuple[int, ...], lanes: Lanes) -> _Program:
    stages = stages_of(integers)
    return _Program(
        stages,
        native_stages(integers),
        [stage.packed_shape(lanes) for stage in stages],
        [stage.packed_dtype(lanes) for stage in stages],
    )


@implements("conv_chain", "cpu")
def native_cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    stages: Sequence[int],
    activation: str,
    lanes: Lanes,
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside, or with pair lanes sums alone."""
    integers = tuple(stages)
    y = empty_output(x, _program(integers, lanes).stages)
    rest = None if residual is None else residual.expand_as(y)
    done = run_native(x, weights, bias, rest, integers, activation, lanes, y)
    return y if done else NotImplemented


def run_native(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    integers: tuple[int, ...],
    activation: str,
    lanes: Lanes,
    y: Tensor,
) -> bool:
    """Fill `y[n, c, h, w]` by the C++ kernel; False where it does not serve these arguments."""
    library = native.serving(x, residual)
    if library is None or x.dim() != 4 or lanes not in native.LANES:
        return False
    if bias is not None and bias.shape != y.shape[1:2]:
        return False
    program = _program(integers, lanes)
    wanted = program.shapes
    if [weight.shape for weight in weights] != wanted:
        raise KernelError(
            f"a chain of {len(wanted)} stages takes weights packed as {wanted}, not "
            f"{[tuple(weight.shape) for weight in weights]}"
        )
    panels = [weight.to(dtype).contiguous() for weight, dtype in zip(weights, program.dtypes, strict=True)]
    shift = None if bias is None else bias.float().contiguous()
    rest = None if residual is None else native.image(residual)
    pointers = (c_void_p * len(panels))(*(panel.data_ptr() for panel in panels))
    call = native.CChain(
        native.DTYPES[x.dtype],
        native.LANES[lanes],
        len(panels),
        native.activation(activation),
        addressof(program.array),
        addressof(pointers),
        None if shift is None else shift.data_ptr(),
        None if rest is None else addressof(rest),
    )
    status: int = library.tdpass_conv_chain(byref(call), byref(native.image(x)), byref(native.image(y)), None)
    return status == 0
