"""`low_rank_lstm` and `low_rank_gru`: a whole sequence through a cell of low rank.

Its hidden-to-hidden matrix is a product of two thin ones.

The input's part of the gates is one matrix product over all steps and comes ready, `pre`; gates are in
torch's order.
"""

from __future__ import annotations

from ctypes import Structure, byref

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.kernels import native
from tdpass.kernels.base import Op, implements, register_op
from tdpass.products import by_rows

LSTM_SCHEMA = (
    "(Tensor pre, Tensor v, Tensor u, Tensor? bias, Tensor h0, Tensor c0, bool reverse)"
    " -> (Tensor, Tensor, Tensor)"
)
GRU_SCHEMA = "(Tensor pre, Tensor v, Tensor u, Tensor? bias, Tensor h0, bool reverse) -> (Tensor, Tensor)"
_PANEL = 16


def pack_v(v: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`v[rank, hidden]` as `[ceil(rank / 16), hidden, 16]`, missing rows zero; float32 or bfloat16."""
    return (
        F.pad(v.to(dtype), (0, 0, 0, -len(v) % _PANEL))
        .reshape(-1, _PANEL, v.shape[1])
        .transpose(1, 2)
        .contiguous()
    )


def pack_u(u: Tensor, gates: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`u[(gates hidden), rank]` as `[ceil(hidden / 16), rank, gates, 16]`, missing units zero.

    It is float32 or bfloat16.
    """
    per_gate = u.to(dtype).reshape(gates, -1, u.shape[1])
    return (
        F.pad(per_gate, (0, 0, 0, -per_gate.shape[1] % _PANEL))
        .reshape(gates, -1, _PANEL, u.shape[1])
        .permute(1, 3, 0, 2)
        .contiguous()
    )


def _matrix(v: Tensor, u: Tensor, like: Tensor) -> Tensor:
    """`V^T U^T`, `[hidden, (gates hidden)]`."""
    hidden, rank, gates = v.shape[1], u.shape[1], u.shape[2]
    left = v.transpose(1, 2).flatten(0, 1)[:rank]
    right = u.permute(2, 0, 3, 1).flatten(1, 2)[:, :hidden].reshape(gates * hidden, rank)
    return (right.to(like.dtype) @ left.to(like.dtype)).T


def _order(steps: int, *, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def lstm_reference(
    pre: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, h0: Tensor, c0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[t, n, hidden]`, the last one and the last cell state `[n, hidden]`.

    With `i, f, g, o = pre[t] + U V h + bias`: `c = sigmoid(f) c + sigmoid(i) tanh(g)`, `h = sigmoid(o)
    tanh(c)`; `reverse` goes from the last step to the first.
    """
    matrix, h, c = _matrix(v, u, pre), h0, c0
    y = pre.new_empty((*pre.shape[:2], h0.shape[1]))
    for t in _order(len(pre), reverse=reverse):
        gates = pre[t] + h @ matrix + (0 if bias is None else bias)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        y[t] = h = o.sigmoid() * c.tanh()
    return y, h.clone(), c.clone()


def gru_reference(
    pre: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, h0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Hidden states `[t, n, hidden]` and the last one `[n, hidden]`.

    With `r, z, n = pre[t]` and `R, Z, N = U V h + bias`: `h = (1 - k) m + k h`, `k = sigmoid(z + Z)`, `m =
    tanh(n + sigmoid(r + R) N)`.
    """
    matrix, h = _matrix(v, u, pre), h0
    y = pre.new_empty((*pre.shape[:2], h0.shape[1]))
    for t in _order(len(pre), reverse=reverse):
        r, z, n = pre[t].chunk(3, 1)
        own_r, own_z, own_n = (h @ matrix + (0 if bias is None else bias)).chunk(3, 1)
        keep, fresh = (z + own_z).sigmoid(), (n + (r + own_r).sigmoid() * own_n).tanh()
        y[t] = h = fresh + keep * (h - fresh)
    return y, h.clone()


def lstm_fake(
    pre: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, h0: Tensor, c0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides."""
    state = h0.new_empty(h0.shape)
    return pre.new_empty((*pre.shape[:2], h0.shape[1])), state, torch.empty_like(state)


def gru_fake(
    pre: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, h0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Shapes and strides."""
    return pre.new_empty((*pre.shape[:2], h0.shape[1])), h0.new_empty(h0.shape)


def cell_macs(pre: Tensor, hidden: int, rank: int) -> int:
    """Multiply-adds of both factors of the hidden-to-hidden matrix at every step; `pre[t, n, (gates hidden)]`."""
    return by_rows(pre.shape, (rank, hidden), (pre.shape[-1], rank))


def _macs(y: object, pre: Tensor, v: Tensor, u: Tensor, *_: object) -> int:
    """Multiply-adds, of factors packed as `pack_v` and `pack_u` do."""
    return cell_macs(pre, v.shape[1], u.shape[1])


LOW_RANK_LSTM = register_op(Op("low_rank_lstm", LSTM_SCHEMA, lstm_reference, lstm_fake, _macs))
LOW_RANK_GRU = register_op(Op("low_rank_gru", GRU_SCHEMA, gru_reference, gru_fake, _macs))


@implements("low_rank_lstm", "cpu")
def lstm_cpu(
    pre: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, h0: Tensor, c0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ kernel; float32, factors of float32 or bfloat16."""
    y, h, c = pre.new_empty((*pre.shape[:2], h0.shape[1])), copy_of(h0), copy_of(c0)
    return (y, h, c) if _run(pre, v, u, bias, h, c, y, reverse=reverse) else NotImplemented


@implements("low_rank_gru", "cpu")
def gru_cpu(
    pre: Tensor, v: Tensor, u: Tensor, bias: Tensor | None, h0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The C++ kernel; float32, factors of float32 or bfloat16."""
    y, h = pre.new_empty((*pre.shape[:2], h0.shape[1])), copy_of(h0)
    return (y, h) if _run(pre, v, u, bias, h, None, y, reverse=reverse) else NotImplemented


def copy_of(state: Tensor) -> Tensor:
    """A state of its own for the kernel to go on from."""
    return state.clone(memory_format=torch.contiguous_format)


def _run(
    pre: Tensor,
    v: Tensor,
    u: Tensor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    y: Tensor,
    *,
    reverse: bool,
) -> bool:
    library = native.library()
    if (pre.dim(), h.dim(), v.dim(), u.dim()) != (3, 2, 3, 4):
        return False
    if pre.stride(2) != 1:
        pre = pre.contiguous()
    _, batch, hidden = y.shape
    (groups, rank, gates, lanes), panels = u.shape, v.shape[0]
    state = [h] if c is None else [h, c]
    if library is None or any(tensor.dtype != torch.float32 for tensor in (pre, *state)):
        return False
    right = (
        gates == (3 if c is None else 4)
        and pre.shape[2] == gates * hidden
        and (bias is None or bias.shape == (gates * hidden,))
    )
    right = (
        right
        and all(tensor.shape == (batch, hidden) for tensor in state)
        and lanes == _PANEL
        and groups == -(-hidden // _PANEL)
    )
    if not right or v.shape != (-(-rank // _PANEL), hidden, _PANEL) or panels == 0:
        return False
    if y.numel() == 0:
        return True
    dtype = torch.bfloat16 if v.dtype == u.dtype == torch.bfloat16 else torch.float32
    v, u = v.to(dtype).contiguous(), u.to(dtype).contiguous()
    shift = None if bias is None else bias.float().contiguous()
    call = cell_call(pre, shift, h, c, y, rank, reverse=reverse)
    call.dtype, call.v, call.u = native.DTYPES[dtype], v.data_ptr(), u.data_ptr()
    status: int = library.tdpass_recurrent(byref(call), None)
    return status == 0


def cell_call(
    pre: Tensor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    y: Tensor,
    rank: int,
    *,
    reverse: bool,
) -> Structure:
    """What the kernels take of a sequence, but for the factors.

    Lends the tensors, of which `pre` lies together along its last axis.
    """
    steps, batch, hidden = y.shape
    back, item = (steps - 1 if reverse else 0), pre.element_size()
    sign = -1 if reverse else 1
    return native.CCell(
        3 if c is None else 4,
        steps,
        batch,
        hidden,
        rank,
        native.DTYPES[torch.float32],
        pre.data_ptr() + back * pre.stride(0) * item,
        sign * pre.stride(0),
        pre.stride(1),
        None,
        None,
        None if bias is None else bias.data_ptr(),
        h.data_ptr(),
        None if c is None else c.data_ptr(),
        y.data_ptr() + back * y.stride(0) * item,
        sign * y.stride(0),
        y.stride(1),
    )
