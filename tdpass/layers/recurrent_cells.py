"""Open recurrent cells, and the steps that they share with layers of them."""

from __future__ import annotations

from torch import Tensor, nn

from tdpass.errors import UnsupportedError
from tdpass.layers.opening import Opener, linear, register_opener, why_computed

State = Tensor | tuple[Tensor, Tensor]


def lstm_step(pre: Tensor, own: Tensor, state: list[Tensor]) -> list[Tensor]:
    """`h, c` after a step, from the two parts of the gates `i, f, g, o`."""
    i, f, g, o = (pre + own).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


def gru_step(pre: Tensor, own: Tensor, state: list[Tensor]) -> list[Tensor]:
    """`h` after a step, from the two parts of the gates `r, z, n`."""
    r, z, n = pre.chunk(3, 1)
    own_r, own_z, own_n = own.chunk(3, 1)
    fresh = (n + (r + own_r).sigmoid() * own_n).tanh()
    return [fresh + (z + own_z).sigmoid() * (state[0] - fresh)]


def plain_step(pre: Tensor, own: Tensor, nonlinearity: str) -> list[Tensor]:
    """`h` after a step of a cell without gates."""
    total = pre + own
    return [total.tanh() if nonlinearity == "tanh" else total.relu()]


class OpenCell(nn.Module):
    """An `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` that calls two linear layers, `input` and `hidden`.

    Takes and returns what the dense cell does, and holds its very parameters.
    """

    input: nn.Module
    hidden: nn.Module

    def __init__(self, dense: nn.RNNCellBase) -> None:
        super().__init__()
        reason = why_closed(dense)
        if reason:
            raise UnsupportedError(f"{reason}; leave this cell as it is")
        self.input_size, self.hidden_size, self.bias = dense.input_size, dense.hidden_size, dense.bias
        self.nonlinearity = str(getattr(dense, "nonlinearity", ""))
        self.gates = dense.weight_ih.shape[0] // dense.hidden_size
        held = dense._parameters
        for name, end in (("input", "ih"), ("hidden", "hh")):
            weight = held[f"weight_{end}"]
            assert weight is not None
            self.add_module(name, linear(weight, held[f"bias_{end}"]))
        self.train(dense.training)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, gates={self.gates}"

    def forward(self, x: Tensor, state: State | None = None) -> State:
        alone = x.dim() == 1
        rows = x.unsqueeze(0) if alone else x
        given = [state] if isinstance(state, Tensor) else list(state or ())
        held = [part.unsqueeze(0) if part.dim() == 1 else part for part in given]
        held = held or [rows.new_zeros(rows.shape[0], self.hidden_size)] * 2
        pre, own = self.input(rows), self.hidden(held[0])
        made = self._step(pre, own, held)
        made = [part.squeeze(0) for part in made] if alone else made
        return made[0] if len(made) == 1 else (made[0], made[1])

    def _step(self, pre: Tensor, own: Tensor, state: list[Tensor]) -> list[Tensor]:
        if self.nonlinearity:
            return plain_step(pre, own, self.nonlinearity)
        return lstm_step(pre, own, state) if self.gates == len("ifgo") else gru_step(pre, own, state)


def why_closed(module: nn.RNNCellBase) -> str:
    """Why a cell cannot be opened; empty where it can."""
    if type(module) not in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        return f"only the cells of torch.nn are factored, this is {type(module).__name__}"
    return why_computed((module.weight_ih, module.weight_hh))


register_opener(
    Opener(
        (nn.RNNCellBase,),
        OpenCell,
        OpenCell,
        why_closed,
        frozenset({"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}),
        "open_recurrent",
    )
)
