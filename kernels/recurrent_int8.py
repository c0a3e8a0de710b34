"""`low_rank_lstm_int8` and `low_rank_gru_int8`: low-rank recurrent cells in whole numbers.

They are the cells of `low_rank_lstm` and `low_rank_gru`.

Both factors of the hidden-to-hidden matrix are int8; the state and what lies between the factors are put on
grids of their own, one per sample and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.grid import MIDDLE, own_grid
from tdpass.kernels.int8_factor import Int8Factor, check_factors, pack_codes, pack_weight
from tdpass.kernels.recurrent import cell_call, cell_macs, copy_of
from tdpass.kernels.stage import Stage, checked

_FACTORS = "Tensor v, Tensor v_scale, Tensor v_total, Tensor u, Tensor u_scale, Tensor u_total"
LSTM_SCHEMA = (
    f"(Tensor pre, {_FACTORS}, Tensor? bias, Tensor h0, Tensor c0, bool reverse) -> (Tensor, Tensor, Tensor)"
)
GRU_SCHEMA = f"(Tensor pre, {_FACTORS}, Tensor? bias, Tensor h0, bool reverse) -> (Tensor, Tensor)"
_PANEL, _TOGETHER = 16, 4
Int8Codes = tuple[Tensor, Tensor]


def pack_v(v: Tensor) -> Int8Factor:
    """`v[rank, hidden]` rounded to int8 by row, packed as a stage of an int8 chain."""
    return pack_weight(_stage(*v.shape), v[:, :, None, None])


def pack_u(u: Tensor, gates: int) -> Int8Factor:
    """`u[(gates hidden), rank]` in int8 by row, as `[ceil(hidden / 16), ceil(rank / 4), gates, 16, 4]`."""
    flat = pack_weight(_stage(*u.shape), u[:, :, None, None])
    codes = _stage(*u.shape).unpack(flat.weight, "quads")[:, :, 0, 0]
    return flat._replace(weight=_by_gate(codes, gates))


def pack_cell(v: Int8Codes, u: Int8Codes, gates: int) -> tuple[Tensor, ...]:
    """Whole numbers `v[rank, hidden]` and `u[(gates hidden), rank]`, scales by row, as cells take them."""
    packed_v, packed_u = (
        pack_codes(_stage(*codes.shape), codes[:, :, None, None], scale) for codes, scale in (v, u)
    )
    return (*packed_v, *packed_u._replace(weight=_by_gate(u[0], gates)))


def _stage(outputs: int, inputs: int) -> Stage:
    return checked(Stage(inputs, outputs))


def _by_gate(codes: Tensor, gates: int) -> Tensor:
    per_gate = codes.reshape(gates, -1, codes.shape[1])
    hidden, rank = per_gate.shape[1:]
    padded = F.pad(per_gate, (0, -rank % _TOGETHER, 0, -hidden % _PANEL))
    split = padded.reshape(gates, -1, _PANEL, padded.shape[2] // _TOGETHER, _TOGETHER)
    return split.permute(1, 3, 0, 2, 4).contiguous()


def shape_of_u(hidden: int, rank: int, gates: int) -> tuple[int, ...]:
    """Shape of the packed factor U."""
    return (-(-hidden // _PANEL), -(-rank // _TOGETHER), gates, _PANEL, _TOGETHER)


class _Recurrence:
    """`U V h` in whole numbers, `[n, (gates hidden)]`."""

    def __init__(self, v: Int8Factor, u: Int8Factor, h: Tensor, gates: int) -> None:
        hidden, rank = h.shape[1], len(v.scale)
        stage = _stage(rank, hidden)
        check_factors([stage], *([part] for part in v))
        if tuple(u.weight.shape) != shape_of_u(hidden, rank, gates) or any(
            tuple(part.shape) != (gates * hidden,) for part in (u.scale, u.total)
        ):
            raise KernelError(
                f"the cell takes U packed as {shape_of_u(hidden, rank, gates)} with {gates * hidden} scales "
                f"and totals, not {tuple(u.weight.shape)}, {tuple(u.scale.shape)} and {tuple(u.total.shape)}"
            )
        rows = u.weight.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :hidden, :rank]
        self._factors = (
            (stage.unpack(v.weight, "quads")[:, :, 0, 0].double(), v.scale.float(), v.total),
            (rows.flatten(0, 1).double(), u.scale.float(), u.total),
        )

    def __call__(self, h: Tensor) -> Tensor:
        for weight, scale, total in self._factors:
            codes, own = own_grid(h, 1)
            products = F.linear(codes.double(), weight) - MIDDLE * total.double()
            wrapped = (products + 2.0**31).remainder(2.0**32) - 2.0**31
            h = wrapped.float() * scale * own
        return h


def lstm_reference(
    pre: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_total: Tensor,
    u: Tensor,
    u_scale: Tensor,
    u_total: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`low_rank_lstm` with `U V h` in whole numbers, everything else in float32."""
    matrix = _Recurrence(Int8Factor(v, v_scale, v_total), Int8Factor(u, u_scale, u_total), h0, 4)
    h, c, y = h0.float(), c0.float(), pre.new_empty((*pre.shape[:2], h0.shape[1]))
    for t in _order(len(pre), reverse=reverse):
        gates = pre[t].float() + (matrix(h) + (0 if bias is None else bias.float()))
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        y[t] = h
    return y, h.to(pre.dtype).clone(), c.to(pre.dtype).clone()


def gru_reference(
    pre: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_total: Tensor,
    u: Tensor,
    u_scale: Tensor,
    u_total: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`low_rank_gru` with `U V h` in whole numbers, everything else in float32."""
    matrix = _Recurrence(Int8Factor(v, v_scale, v_total), Int8Factor(u, u_scale, u_total), h0, 3)
    h, y = h0.float(), pre.new_empty((*pre.shape[:2], h0.shape[1]))
    for t in _order(len(pre), reverse=reverse):
        r, z, n = pre[t].float().chunk(3, 1)
        own_r, own_z, own_n = (matrix(h) + (0 if bias is None else bias.float())).chunk(3, 1)
        keep, fresh = (z + own_z).sigmoid(), (n + (r + own_r).sigmoid() * own_n).tanh()
        h = fresh + keep * (h - fresh)
        y[t] = h
    return y, h.to(pre.dtype).clone()


def _order(steps: int, *, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def lstm_fake(
    pre: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_total: Tensor,
    u: Tensor,
    u_scale: Tensor,
    u_total: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides."""
    state = h0.new_empty(h0.shape)
    return pre.new_empty((*pre.shape[:2], h0.shape[1])), state, torch.empty_like(state)


def gru_fake(
    pre: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_total: Tensor,
    u: Tensor,
    u_scale: Tensor,
    u_total: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes and strides."""
    return pre.new_empty((*pre.shape[:2], h0.shape[1])), h0.new_empty(h0.shape)


def _macs(y: Sequence[Tensor], pre: Tensor, v: Tensor, v_scale: Tensor, *_: object) -> int:
    """Multiply-adds; the states that it answers with have the hidden units last."""
    return cell_macs(pre, y[0].shape[-1], v_scale.numel())


LOW_RANK_LSTM_INT8 = register_op(Op("low_rank_lstm_int8", LSTM_SCHEMA, lstm_reference, lstm_fake, _macs))
LOW_RANK_GRU_INT8 = register_op(Op("low_rank_gru_int8", GRU_SCHEMA, gru_reference, gru_fake, _macs))


@implements("low_rank_lstm_int8", "cpu")
def lstm_cpu(
    pre: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_total: Tensor,
    u: Tensor,
    u_scale: Tensor,
    u_total: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ kernel; float32."""
    y, h, c = pre.new_empty((*pre.shape[:2], h0.shape[1])), copy_of(h0), copy_of(c0)
    factors = (Int8Factor(v, v_scale, v_total), Int8Factor(u, u_scale, u_total))
    return (y, h, c) if _run(pre, *factors, bias, h, c, y, reverse=reverse) else NotImplemented


@implements("low_rank_gru_int8", "cpu")
def gru_cpu(
    pre: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_total: Tensor,
    u: Tensor,
    u_scale: Tensor,
    u_total: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; float32."""
    y, h = pre.new_empty((*pre.shape[:2], h0.shape[1])), copy_of(h0)
    factors = (Int8Factor(v, v_scale, v_total), Int8Factor(u, u_scale, u_total))
    return (y, h) if _run(pre, *factors, bias, h, None, y, reverse=reverse) else NotImplemented


def _run(
    pre: Tensor,
    v: Int8Factor,
    u: Int8Factor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    y: Tensor,
    *,
    reverse: bool,
) -> bool:
    library, state, gates = native.library(), [h] if c is None else [h, c], 3 if c is None else 4
    if library is None or pre.dim() != 3 or any(part.dtype != torch.float32 for part in (pre, *state)):
        return False
    if any(factor.weight.dtype != torch.int8 or factor.total.dtype != torch.int32 for factor in (v, u)):
        return False
    _, batch, hidden = y.shape
    rank, wide = v.scale.numel(), (gates * hidden,)
    shapes = [
        (pre, (*y.shape[:2], *wide)),
        *((each, (batch, hidden)) for each in state),
        (v.weight, checked(Stage(hidden, max(rank, 1))).packed_shape("quads") if hidden else ()),
        *((part, (rank,)) for part in v[1:]),
        (u.weight, shape_of_u(hidden, rank, gates)),
        *((part, wide) for part in u[1:]),
        *(() if bias is None else ((bias, wide),)),
    ]
    if rank == 0 or any(tuple(tensor.shape) != shape for tensor, shape in shapes):
        return False
    if y.numel() == 0:
        return True
    if pre.stride(2) != 1:
        pre = pre.contiguous()
    parts = [
        [factor.weight.contiguous(), factor.scale.float().contiguous(), factor.total.contiguous()]
        for factor in (v, u)
    ]
    shift = None if bias is None else bias.float().contiguous()
    call = native.CInt8Cell(
        cell_call(pre, shift, h, c, y, rank, reverse=reverse),
        *(factor[place].data_ptr() for place in range(3) for factor in parts),
    )
    status: int = library.tdpass_recurrent_int8(byref(call), None)
    return status == 0
