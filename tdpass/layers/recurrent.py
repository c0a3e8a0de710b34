"""Open recurrent layers: `nn.LSTM` and `nn.GRU` whose every matrix product is a linear layer, so a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from tdpass.errors import UnsupportedError, UsageError
from tdpass.kernels import native
from tdpass.kernels.base import Op
from tdpass.kernels.recurrent import LOW_RANK_GRU, LOW_RANK_LSTM
from tdpass.kernels.recurrent_int8 import LOW_RANK_GRU_INT8, LOW_RANK_LSTM_INT8
from tdpass.layers.opening import Opener, linear, opened, register_opener, why_computed
from tdpass.layers.recurrent_cells import OpenCell, gru_step, lstm_step, plain_step
from tdpass.layers.recurrent_cells import why_closed as why_cell_closed
from tdpass.layers.recurrent_encoded import float_cell, integer_cell, is_float_cell, is_integer_cell
from tdpass.layers.recurrent_product import Product, form, is_plain, lead, recorded
from tdpass.layers.tracing import is_transformed

_Direction = Callable[[Tensor, str, list[Tensor], bool], tuple[Tensor, Sequence[Tensor]]]


class OpenRNN(nn.Module):
    """An `nn.LSTM` or `nn.GRU` that calls linear layers.

    Takes and returns what the dense module does, a `PackedSequence` excepted. Per layer and direction (suffix
    `_l0`, `_l0_reverse` and so on, as torch has it) `input` makes the input's part of the gates, `hidden`
    that of the last hidden state, each with its own bias, and with `proj_size` `project` makes the hidden
    state smaller. They hold the very parameters of the dense module; any of them may be replaced by a
    factored layer. Where gradients are wanted torch's own layer runs on the dense weights, each asked for
    once a call, so that it trains as fast; else, where they are faster, the fused operators run on the
    factors. Step by step, every layer called as it is, it runs while it is recorded or exported, and where
    one of the layers is of another kind or has hooks.
    """

    kind: ClassVar[type[nn.RNNBase]]
    operator: ClassVar[Op | None] = None
    integer_operator: ClassVar[Op | None] = None
    gates: ClassVar[int]
    states: ClassVar[int]

    def __init__(self, dense: nn.RNNBase) -> None:
        super().__init__()
        if type(dense) is not self.kind:
            raise UsageError(
                f"{type(self).__name__} is made from nn.{self.kind.__name__}, not from {type(dense).__name__}"
            )
        reason = why_closed(dense)
        if reason:
            raise UnsupportedError(f"{reason}; leave this layer as it is")
        self.input_size, self.hidden_size = dense.input_size, dense.hidden_size
        self.num_layers, self.proj_size = dense.num_layers, dense.proj_size
        self.bias, self.batch_first = dense.bias, dense.batch_first
        self.dropout, self.bidirectional = dense.dropout, dense.bidirectional
        self.suffixes = tuple(
            f"_l{layer}{end}"
            for layer in range(self.num_layers)
            for end in ("", "_reverse")[: 1 + self.bidirectional]
        )
        self._ends = (("input", "ih"), ("hidden", "hh"), ("project", "hr"))[: 2 + bool(self.proj_size)]
        self._names = tuple(name + suffix for suffix in self.suffixes for name, _ in self._ends)
        for suffix in self.suffixes:
            for name, end in self._ends:
                bias = getattr(dense, f"bias_{end}{suffix}", None) if self.bias else None
                self.add_module(name + suffix, linear(getattr(dense, f"weight_{end}{suffix}"), bias))
        self.train(dense.training)
        self._known: dict[str, Product] = {}

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"proj_size={self.proj_size}, batch_first={self.batch_first}, "
            f"dropout={self.dropout}, bidirectional={self.bidirectional}"
        )

    def flatten_parameters(self) -> None:
        """Nothing: there for code that calls it on the dense module."""

    def _run(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(x, Tensor):
            raise UnsupportedError(
                f"{type(self).__name__} takes a tensor, not a {type(x).__name__}; pad the sequences"
            )
        batched, axis = x.dim() == 3, int(self.batch_first)
        if not batched:
            x = x.unsqueeze(1 - axis)
            state = None if state is None else [part.unsqueeze(1) for part in state]
        if state is None:
            lead_sizes = (len(self.suffixes), x.shape[1 - axis])
            widths = (self.proj_size or self.hidden_size, self.hidden_size)[: self.states]
            state = [x.new_zeros((*lead_sizes, width)) for width in widths]
        y, ends = (
            self._layers(x, state, self._by_steps, axis)
            if torch.compiler.is_exporting()
            else self._eager(x, state)
        )
        return (y, ends) if batched else (y.squeeze(1 - axis), [end.squeeze(1) for end in ends])

    @_disable_dynamo  # torch.compiler.disable would import the compiler here and now
    def _eager(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        parts = (x, *state, *self.parameters())
        trained = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        watched = recorded() or is_transformed()
        run = None if trained or watched else self._operators(x)
        if run is not None:
            y, ends = self._layers(x.transpose(0, 1) if self.batch_first else x, state, run, 0)
            return y.transpose(0, 1) if self.batch_first else y, ends
        if watched or not self._plain():
            return self._layers(x, state, self._by_steps, int(self.batch_first))
        products = [self._product(name) for name in self._names]
        biases = [product.bias for product in products]
        weights = [product.weight(trained=trained) for product in products]
        biased = any(bias is not None for bias in biases)
        if biased:
            biases = [
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
        each = len(self._ends)
        flat = [
            tensor
            for k in range(0, len(weights), each)
            for tensor in (*weights[k : k + 2], *biases[k : k + 2], *weights[k + 2 : k + each])
            if tensor is not None
        ]
        how = (biased, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        y, *ends = self._whole(x, state, flat, *how)
        return y, ends

    def _whole(self, x: Tensor, state: list[Tensor], weights: list[Tensor], *how: Any) -> tuple[Tensor, ...]:
        """Torch's own layer on dense weights: all hidden states, and the last of every state."""
        raise NotImplementedError

    def _product(self, name: str) -> Product:
        module = getattr(self, name)
        if (
            name not in self._known
            or self._known[name].module is not module
            or self._known[name].form != form(module)
        ):
            self._known[name] = Product.of(module)
        return self._known[name]

    def _plain(self) -> bool:
        parts = [getattr(self, name) for name in self._names]
        projections = parts[2::3] if self.proj_size else []  # torch's own layer adds no bias to these
        return all(map(is_plain, parts)) and all(part.bias is None for part in projections)

    def _operators(self, x: Tensor) -> _Direction | None:
        """How the fused operators run one direction; None where they do not serve the call, or are slower."""
        if (
            self.operator is None
            or self.proj_size
            or type(x) is not Tensor
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or (self.training and self.dropout)
            or torch.is_autocast_enabled("cpu")
            or native.missing()
        ):
            return None
        hidden = [getattr(self, f"hidden{suffix}") for suffix in self.suffixes]
        if all(map(is_integer_cell, hidden)):
            return partial(self._by_encoded, self.integer_operator, integer_cell)
        if all(map(is_float_cell, hidden)):
            return partial(self._by_encoded, self.operator, float_cell)
        if not self._plain():
            return None
        products, samples = [self._product(name) for name in self._names], x.shape[1 - int(self.batch_first)]
        return self._by_operators if lead(products, samples, self.states) else None

    def _layers(
        self, x: Tensor, state: list[Tensor], run: _Direction, axis: int
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers on x, its steps on `axis`.

        `state` holds h, and c of an LSTM, as `[layers directions, n, hidden]`; with `proj_size`, h has so
        many in place of `hidden`.
        """
        last: list[list[Tensor]] = [[] for _ in state]
        step = 1 + self.bidirectional
        for layer in range(0, len(self.suffixes), step):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for k in range(layer, layer + step):
                y, ends = run(x, self.suffixes[k], [part[k] for part in state], k > layer)
                outputs.append(y)
                for found, end in zip(last, ends, strict=True):
                    found.append(end)
            x = outputs[0] if step == 1 else torch.cat(outputs, 2)
        return x, [torch.stack(found) for found in last]

    def _by_operators(
        self, x: Tensor, suffix: str, state: list[Tensor], reverse: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """One direction of a layer on `x[t, n, inputs]`, without gradients."""
        hidden = self._product("hidden" + suffix)
        assert self.operator is not None
        y, *ends = self.operator.call(
            self._product("input" + suffix)(x), *hidden.cell(self.gates), hidden.bias, *state, reverse
        )
        return y, ends

    def _by_encoded(
        self,
        operator: Op | None,
        cell: Callable[[Any, int], Sequence[Tensor]],
        x: Tensor,
        suffix: str,
        state: list[Tensor],
        reverse: bool,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The same where what is multiplied with the hidden state is encoded, and `cell` packs it."""
        hidden = getattr(self, f"hidden{suffix}")
        assert operator is not None
        y, *ends = operator.call(
            getattr(self, f"input{suffix}")(x), *cell(hidden, self.gates), hidden.bias, *state, reverse
        )
        return y, ends

    def _by_steps(
        self, x: Tensor, suffix: str, state: list[Tensor], reverse: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """One direction of a layer by calls of its two products, on x as the module takes it."""
        axis, hidden = int(self.batch_first), getattr(self, "hidden" + suffix)
        found = []
        parts = getattr(self, "input" + suffix)(x).unbind(axis)
        for part in reversed(parts) if reverse else parts:
            state = self._step(part, hidden(state[0]), state)
            if self.proj_size:
                state = [getattr(self, "project" + suffix)(state[0]), *state[1:]]
            found.append(state[0])
        return torch.stack(found[::-1] if reverse else found, axis), state

    def _step(self, pre: Tensor, own: Tensor, state: list[Tensor]) -> list[Tensor]:
        """The next state from the two parts of the gates."""
        raise NotImplementedError


class OpenLSTM(OpenRNN):
    """An `nn.LSTM` that calls linear layers.  See `OpenRNN`.

    >>> y, (h, c) = OpenLSTM(nn.LSTM(32, 64))(torch.zeros(5, 1, 32))
    """

    kind, operator, integer_operator, gates, states = nn.LSTM, LOW_RANK_LSTM, LOW_RANK_LSTM_INT8, 4, 2

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, (h, c) = self._run(x, None if state is None else list(state))
        return y, (h, c)

    def _whole(self, x: Tensor, state: list[Tensor], weights: list[Tensor], *how: Any) -> tuple[Tensor, ...]:
        return torch.lstm(x, state, weights, *how)

    def _step(self, pre: Tensor, own: Tensor, state: list[Tensor]) -> list[Tensor]:
        return lstm_step(pre, own, state)


class OpenGRU(OpenRNN):
    """An `nn.GRU` that calls linear layers.  See `OpenRNN`.

    >>> y, h = OpenGRU(nn.GRU(32, 64))(torch.zeros(5, 1, 32))
    """

    kind, operator, integer_operator, gates, states = nn.GRU, LOW_RANK_GRU, LOW_RANK_GRU_INT8, 3, 1

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, (h,) = self._run(x, None if state is None else [state])
        return y, h

    def _whole(self, x: Tensor, state: list[Tensor], weights: list[Tensor], *how: Any) -> tuple[Tensor, ...]:
        return torch.gru(x, state[0], weights, *how)

    def _step(self, pre: Tensor, own: Tensor, state: list[Tensor]) -> list[Tensor]:
        return gru_step(pre, own, state)


class OpenElman(OpenRNN):
    """An `nn.RNN` that calls linear layers.  See `OpenRNN`; there is no fused operator of it.

    >>> y, h = OpenElman(nn.RNN(32, 64))(torch.zeros(5, 1, 32))
    """

    kind, gates, states = nn.RNN, 1, 1

    def __init__(self, dense: nn.RNNBase) -> None:
        super().__init__(dense)
        self.nonlinearity = str(dense.nonlinearity)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, (h,) = self._run(x, None if state is None else [state])
        return y, h

    def _whole(self, x: Tensor, state: list[Tensor], weights: list[Tensor], *how: Any) -> tuple[Tensor, ...]:
        layer = torch.rnn_tanh if self.nonlinearity == "tanh" else torch.rnn_relu
        return layer(x, state[0], weights, *how)

    def _step(self, pre: Tensor, own: Tensor, state: list[Tensor]) -> list[Tensor]:
        return plain_step(pre, own, self.nonlinearity)


_OPEN: dict[type[nn.Module], type[OpenRNN]] = {nn.LSTM: OpenLSTM, nn.GRU: OpenGRU, nn.RNN: OpenElman}


def why_closed(module: nn.RNNBase) -> str:
    """Why that recurrent layer cannot be opened; empty where it can."""
    if type(module) not in _OPEN:
        return f"only nn.LSTM, nn.GRU and nn.RNN are factored, this is {type(module).__name__}"
    return why_computed(getattr(module, name) for names in module._all_weights for name in names)


register_opener(
    Opener(
        (nn.RNNBase,),
        OpenRNN,
        lambda module: _OPEN[type(module)](module),
        why_closed,
        frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"}),
        "open_recurrent",
        ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"),
    )
)


def open_recurrent(model: nn.Module) -> nn.Module:
    """A copy of the model in which every `nn.LSTM`, `nn.GRU`, `nn.RNN` and cell of these calls linear layers.

    So `compress` factors them without the pass `divide`, and training methods can.

    It computes the same from the same parameters; what cannot be opened stays, and
    `open_model(...).declined()` says why.
    """

    def make(_path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.RNNCellBase):
            return None if why_cell_closed(module) else OpenCell(module)
        if not isinstance(module, nn.RNNBase) or why_closed(module):
            return None
        return _OPEN[type(module)](module)

    return opened(model, make, "open_recurrent")
