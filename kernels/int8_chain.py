"""`conv_chain_int8` and `linear_chain_int8`: the chains of `conv_chain` and `linear_chain` in whole numbers.

Bytes times int8 are summed in 32 bits, exactly; what lies between two stages is put on its grid at once, and
never stored in floating point where that grid is known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.conv_chain import (
    MAX_STAGES,
    like_input,
    memory_format,
    native_stages,
)
from tdpass.kernels.flops import conv_macs, linear_macs, of_arguments
from tdpass.kernels.grid import MIDDLE, Grid, Grids, own_grid, rounded
from tdpass.kernels.int8_factor import check_factors
from tdpass.kernels.linear_chain import positions
from tdpass.kernels.linear_chain import stages_of as linear_stages
from tdpass.kernels.stage import Stage, integers_of, stages_of
from tdpass.ops import padded_convolution

_FACTORS = "Tensor[] weights, Tensor[] scales, Tensor[] totals"
_END = "Tensor? bias, Tensor? residual, float[] grids"
CONV_SCHEMA = f"(Tensor x, {_FACTORS}, {_END}, int[] stages, str activation) -> Tensor"
LINEAR_SCHEMA = f"(Tensor x, {_FACTORS}, {_END}, int[] widths, str activation) -> Tensor"


class _Codes(NamedTuple):
    """Activations on a grid `[n, c, h, w]`: codes, float64, and the scale, of all or of every position."""

    codes: Tensor
    zero: int
    scale: Tensor


def _put_on(grid: Grid, x: Tensor) -> _Codes:
    if grid:
        return _Codes(grid.codes(x).double(), grid.zero, grid.step)
    codes, scale = own_grid(x, 1)
    return _Codes(codes.double(), MIDDLE, scale)


def _products(read: _Codes, stage: Stage, weight: Tensor, total: Tensor) -> Tensor:
    """`sum (code - zero) weight`, whole numbers of 32 bits."""
    shifted = read.codes - read.zero
    pads = tuple(zip(stage.before, stage.after, strict=True))
    dense = stage.unpack(weight, "quads").double()
    size = (len(shifted), stage.outputs, *stage.output_size(shifted.shape[2:]))
    if 0 in size:
        return shifted.new_zeros(size)
    own = dense.flatten(1).sum(1)  # a total that is not this one is added as it is given
    summed = padded_convolution(shifted, dense, None, stage.stride, pads, stage.dilation, stage.groups)
    summed = summed + read.zero * (own - total.double())[:, None, None]
    return (summed + 2.0**31).remainder(2.0**32) - 2.0**31


def _step(read: _Codes, scale: Tensor, products: Tensor, into: Grid) -> _Codes:
    """What the next stage reads."""
    if into and read.scale.dim() == 0:
        factor = read.scale * (1 / into.step)
        steps = products.float() * (factor * scale)[:, None, None]
        return _Codes(rounded(steps, into.zero).double(), into.zero, into.step)
    return _put_on(into, _values(read, scale, products))


def _values(read: _Codes, scale: Tensor, products: Tensor) -> Tensor:
    if read.scale.dim() == 0:
        return products.float() * (read.scale * scale)[:, None, None]
    return products.float() * scale[:, None, None] * read.scale


def _run(
    x: Tensor,
    factors: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Grids,
    chain: Sequence[Stage],
    activation: str,
) -> Tensor:
    """The chain on `x[n, c, h, w]`, in float32 throughout, with every operation rounded by itself."""
    first = grids.reads[0]
    read = _Codes(x.double(), first.zero, first.step) if x.dtype == torch.uint8 else _put_on(first, x.float())
    y = read.codes
    for stage, weight, scale, total, into in zip(chain, *factors, (*grids.reads[1:], None), strict=True):
        products = _products(read, stage, weight, total)
        if into is None:
            y = _values(read, scale.float(), products)
        else:
            read = _step(read, scale.float(), products, into)
    if bias is not None:
        y = y + bias.float()[:, None, None]
    if residual is not None:
        y = y + (grids.residual.values(residual) if grids.residual else residual.float())
    y = activate(y, activation)
    return (grids.output.codes(y) if grids.output else y).to(grids.output_dtype(x))


def check_chain(
    x: Tensor,
    factors: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    residual: Tensor | None,
    grids: Sequence[float],
    chain: Sequence[Stage],
    activation: str,
) -> Grids:
    """The grids; raises `KernelError` for arguments that are no chain."""
    check_activation(activation)
    if not 0 < len(chain) <= MAX_STAGES:
        raise KernelError(f"a chain of {len(chain)} stages is not served; it has 1 to {MAX_STAGES}")
    check_factors(chain, *factors)
    found = Grids.read(grids, len(chain))
    found.check(x, residual)
    for stage, grid in zip(chain, found.reads, strict=True):
        if not grid and not stage.pointwise:
            raise KernelError(f"{stage} reads several positions at once; give the grid that they share")
    return found


def conv_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    stages: Sequence[int],
    activation: str,
) -> Tensor:
    """`y = activation(C_S ... C_1 x + bias + residual)`, what every convolution reads rounded to its grid.

    `weights`, `scales` and `totals` as `int8_factor` packs them, `grids` as `Grids.numbers` gives them.
    """
    chain, factors = stages_of(stages), (weights, scales, totals)
    found = check_chain(x, factors, residual, grids, chain, activation)
    return like_input(_run(x, factors, bias, residual, found, chain, activation), x)


def conv_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    stages: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape and strides."""
    chain = stages_of(stages)
    found = check_chain(x, (weights, scales, totals), residual, grids, chain, activation)
    return empty_output(x, chain, found.output_dtype(x))


def empty_output(x: Tensor, chain: Sequence[Stage], dtype: torch.dtype) -> Tensor:
    """The output of a chain, to be filled."""
    size: Sequence[int | torch.SymInt] = x.shape[2:]
    for stage in chain:
        size = stage.output_size(size)
    shape = (x.shape[0], chain[-1].outputs, *size)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))


def linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """The same on the last axis of x, with matrices `[widths[k + 1], widths[k]]`."""
    chain, factors = linear_stages(widths), (weights, scales, totals)
    found = check_chain(x, factors, residual, grids, chain, activation)
    shape = (*x.shape[:-1], widths[-1])
    rest = None if residual is None else _image(residual.expand(shape))
    y = _run(_image(x), factors, bias, rest, found, chain, activation)
    return y.reshape(shape)


def _image(x: Tensor) -> Tensor:
    """`x[..., c]` as `[positions, c, 1, 1]`."""
    return x.reshape(-1, x.shape[-1])[:, :, None, None]


def linear_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape and strides."""
    found = check_chain(x, (weights, scales, totals), residual, grids, linear_stages(widths), activation)
    return x.new_empty((*x.shape[:-1], widths[-1]), dtype=found.output_dtype(x))


CONV_CHAIN_INT8 = register_op(
    Op(
        "conv_chain_int8",
        CONV_SCHEMA,
        conv_reference,
        conv_fake,
        of_arguments(CONV_SCHEMA, conv_macs, "x", "stages"),
    )
)
LINEAR_CHAIN_INT8 = register_op(
    Op(
        "linear_chain_int8",
        LINEAR_SCHEMA,
        linear_reference,
        linear_fake,
        of_arguments(LINEAR_SCHEMA, linear_macs, "x", "widths"),
    )
)


@implements("conv_chain_int8", "cpu")
def conv_cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    stages: Sequence[int],
    activation: str,
) -> Tensor:
    """The C++ kernel; x in float32, bfloat16 or bytes."""
    chain, factors = stages_of(stages), (weights, scales, totals)
    found = check_chain(x, factors, residual, grids, chain, activation)
    y = empty_output(x, chain, found.output_dtype(x))
    rest = None if residual is None else residual.expand_as(y)
    done = _run_native(x, factors, bias, rest, found, tuple(stages), activation, y)
    return y if done else NotImplemented


@implements("linear_chain_int8", "cpu")
def linear_cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Sequence[float],
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    """The C++ kernel; x in float32, bfloat16 or bytes."""
    chain, factors = linear_stages(widths), (weights, scales, totals)
    found = check_chain(x, factors, residual, grids, chain, activation)
    y = x.new_empty((*x.shape[:-1], widths[-1]), dtype=found.output_dtype(x))
    rest = None if residual is None else positions(residual.expand_as(y))
    integers = tuple(integers_of(chain))
    done = _run_native(positions(x), factors, bias, rest, found, integers, activation, positions(y))
    return y if done else NotImplemented


def _run_native(
    x: Tensor,
    factors: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    bias: Tensor | None,
    residual: Tensor | None,
    grids: Grids,
    integers: tuple[int, ...],
    activation: str,
    y: Tensor,
) -> bool:
    """Fill `y[n, c, h, w]`; False where the kernel does not serve these arguments."""
    library = native.library()
    floats = torch.float32 if x.dtype == torch.uint8 else x.dtype
    wanted = torch.uint8 if grids.residual else floats
    if library is None or floats not in native.DTYPES or x.dim() != 4:
        return False
    if (residual is not None and residual.dtype != wanted) or (
        bias is not None and bias.shape != y.shape[1:2]
    ):
        return False
    types = (torch.int8, torch.float32, torch.int32)
    if any(part.dtype != dtype for parts, dtype in zip(factors, types, strict=True) for part in parts):
        return False
    kept = [[part.contiguous() for part in parts] for parts in factors]
    weights, scales, totals = (
        (c_void_p * len(parts))(*(part.data_ptr() for part in parts)) for parts in kept
    )
    numbers = (native.CGrid * (len(weights) + 2))(*(native.CGrid(grid.scale, grid.zero) for grid in grids))
    shift = None if bias is None else bias.float().contiguous()
    rest = None if residual is None else native.image(residual)
    chain = native.CChain(
        native.DTYPES.get(x.dtype, native.UINT8),
        native.LANES["quads"],
        len(weights),
        native.activation(activation),
        addressof(native_stages(integers)),
        addressof(weights),
        None if shift is None else shift.data_ptr(),
        None if rest is None else addressof(rest),
    )
    call = native.CInt8Chain(chain, addressof(scales), addressof(totals), addressof(numbers))
    status: int = library.tdpass_conv_chain_int8(
        byref(call), byref(native.image(x)), byref(native.image(y)), None
    )
    return status == 0
