"""Recurrent layers of low rank: `nn.LSTM` and `nn.GRU` with every weight a product of two thin ones."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tdpass.errors import UnsupportedError, UsageError
from tdpass.kernels import linear_chain
from tdpass.kernels.recurrent import LOW_RANK_GRU, LOW_RANK_LSTM, pack_u, pack_v

_FACTORS = ("input_in", "input_out", "hidden_in", "hidden_out")


class _Packed(NamedTuple):
    """A direction of a layer as the operators take it."""

    versions: tuple[tuple[int, int], ...]
    chain: list[Tensor]
    widths: list[int]
    bias: Tensor | None
    v: Tensor
    u: Tensor
    own_bias: Tensor | None


class LowRankRNN(nn.Module):
    """Layers with `W_ih = A B` and `W_hh = U V`; takes and returns what the dense module does.

    Per layer and direction (suffix `_l0`, `_l0_reverse` and so on, as torch has it) it holds `input_in` = B `[rank, inputs]`,
    `input_out` = A `[gates hidden, rank]`, `hidden_in` = V `[rank, hidden]`, `hidden_out` = U `[gates hidden, rank]` and the two
    biases.  The start is the truncated SVD of each weight.  Where no gradient is wanted it runs on the fused operators, else on
    torch's own layer with the products, so that it trains like any module.
    """

    kind: ClassVar[type[nn.LSTM | nn.GRU]]
    gates: ClassVar[int]

    def __init__(self, dense: nn.LSTM | nn.GRU, input_rank: int, hidden_rank: int) -> None:
        super().__init__()
        if type(dense) is not self.kind:
            raise UsageError(f"{type(self).__name__} is made from nn.{self.kind.__name__}, not from {type(dense).__name__}")
        if dense.proj_size:
            raise UnsupportedError(f"a projection of the hidden state (proj_size={dense.proj_size}) is of low rank already; use a module without")
        self.input_size, self.hidden_size, self.num_layers = dense.input_size, dense.hidden_size, dense.num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = dense.bias, dense.batch_first, dense.dropout, dense.bidirectional
        self.input_rank, self.hidden_rank = input_rank, hidden_rank
        self.suffixes = tuple(f"_l{layer}{end}" for layer in range(self.num_layers) for end in ("", "_reverse")[: 1 + self.bidirectional])
        for suffix in self.suffixes:
            for name, weight, rank in (("input", "weight_ih", input_rank), ("hidden", "weight_hh", hidden_rank)):
                left, right = _factors(getattr(dense, weight + suffix), rank)
                self.register_parameter(f"{name}_in{suffix}", nn.Parameter(right))
                self.register_parameter(f"{name}_out{suffix}", nn.Parameter(left))
            for name in ("bias_ih", "bias_hh"):
                self.register_parameter(name + suffix, nn.Parameter(getattr(dense, name + suffix).detach().clone()) if self.bias else None)
        self._packed: dict[str, _Packed] = {}

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, input_rank={self.input_rank}, hidden_rank={self.hidden_rank}"

    def _names(self, suffix: str) -> list[str]:
        return [name + suffix for name in (*_FACTORS, *(("bias_ih", "bias_hh") if self.bias else ()))]

    def _weights(self) -> list[Tensor]:
        """The dense weights in the order in which torch's layer takes them."""
        found = []
        for suffix in self.suffixes:
            b, a, v, u, *biases = (getattr(self, name) for name in self._names(suffix))
            found += [a @ b, u @ v, *biases]
        return found

    def _pack(self, suffix: str) -> _Packed:
        tensors = [getattr(self, name) for name in self._names(suffix)]
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if suffix not in self._packed or self._packed[suffix].versions != versions:
            b, a, v, u, *biases = (tensor.detach() for tensor in tensors)
            widths = [b.shape[1], b.shape[0], a.shape[0]]
            chain = [stage.pack(weight[:, :, None, None], "channels") for stage, weight in zip(linear_chain.stages_of(widths), (b, a), strict=True)]
            bias, own_bias = self._split(*biases) if biases else (None, None)
            self._packed[suffix] = _Packed(versions, chain, widths, bias, pack_v(v), pack_u(u, self.gates), own_bias)
        return self._packed[suffix]

    def _split(self, bias_ih: Tensor, bias_hh: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is added to the input's part of the gates, and to that of the hidden state."""
        raise NotImplementedError

    def _fused(self, x: Tensor) -> bool:
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in self.parameters()))
        return not (wanted or (self.training and self.dropout) or torch.compiler.is_compiling()) and x.dtype == self.hidden_in_l0.dtype == torch.float32

    def _layers(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All layers on `x[t, n, inputs]`; `state` holds h, and c of an LSTM, as `[layers directions, n, hidden]`."""
        last: list[list[Tensor]] = [[] for _ in state]
        step = 1 + self.bidirectional
        for layer in range(0, len(self.suffixes), step):
            outputs = []
            for k in range(layer, layer + step):
                packed = self._pack(self.suffixes[k])
                pre = linear_chain.LINEAR_CHAIN.call(x, packed.chain, packed.bias, None, packed.widths, "identity")
                op = LOW_RANK_LSTM if self.gates == 4 else LOW_RANK_GRU
                y, *ends = op.call(pre, packed.v, packed.u, packed.own_bias, *(part[k] for part in state), k > layer)
                outputs.append(y)
                for found, end in zip(last, ends, strict=True):
                    found.append(end)
            x = outputs[0] if step == 1 else torch.cat(outputs, 2)
        return x, [torch.stack(found) for found in last]

    def _run(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(x, Tensor):
            raise UnsupportedError(f"{type(self).__name__} takes a tensor, not a {type(x).__name__}; pad the sequences")
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            state = None if state is None else [part.unsqueeze(1) for part in state]
        if state is None:
            zeros = x.new_zeros((len(self.suffixes), x.shape[0 if self.batch_first else 1], self.hidden_size))
            state = [zeros] * (2 if self.gates == 4 else 1)
        if self._fused(x):
            y, ends = self._layers(x.transpose(0, 1) if self.batch_first else x, state)
            y = y.transpose(0, 1) if self.batch_first else y
        else:
            weights, how = self._weights(), (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
            y, *ends = torch.lstm(x, state, weights, *how) if self.gates == 4 else torch.gru(x, state[0], weights, *how)
        if not batched:
            y, ends = y.squeeze(0 if self.batch_first else 1), [end.squeeze(1) for end in ends]
        return y, ends


class LowRankLSTM(LowRankRNN):
    """An `nn.LSTM` of low rank.  See `LowRankRNN`.

    >>> layer = LowRankLSTM(nn.LSTM(32, 64), input_rank=8, hidden_rank=16)
    >>> y, (h, c) = layer(torch.zeros(5, 1, 32))
    """

    kind = nn.LSTM
    gates = 4

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, (h, c) = self._run(x, None if state is None else list(state))
        return y, (h, c)

    def _split(self, bias_ih: Tensor, bias_hh: Tensor) -> tuple[Tensor, Tensor | None]:
        return bias_ih + bias_hh, None


class LowRankGRU(LowRankRNN):
    """An `nn.GRU` of low rank.  See `LowRankRNN`.

    >>> layer = LowRankGRU(nn.GRU(32, 64), input_rank=8, hidden_rank=16)
    >>> y, h = layer(torch.zeros(5, 1, 32))
    """

    kind = nn.GRU
    gates = 3

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, (h,) = self._run(x, None if state is None else [state])
        return y, h

    def _split(self, bias_ih: Tensor, bias_hh: Tensor) -> tuple[Tensor, Tensor | None]:
        return bias_ih, bias_hh


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`left[o, rank] @ right[rank, i]`, the nearest of that rank, its singular values shared evenly."""
    if not 1 <= rank <= min(weight.shape):
        raise UsageError(f"rank {rank} does not fit a weight of shape {tuple(weight.shape)}; it is 1 to {min(weight.shape)}")
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(weight.dtype), (root[:, None] * v[:rank]).to(weight.dtype)
