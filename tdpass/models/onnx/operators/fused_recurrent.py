"""The operators of the domain com.tdpass that take a sequence through a recurrent cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from tdpass.models.onnx.operators.fused_integers import product_by_row, rounded_anew

_OUTPUTS_COUNTED = 18
_LSTM = """
    i = Sigmoid (i_sum)  f = Sigmoid (f_sum)  g = Tanh (g_sum)  o = Sigmoid (o_sum)
    kept = Mul (f, c)  fresh = Mul (i, g)  c_next = Add (kept, fresh)
    bounded = Tanh (c_next)  h_next = Mul (o, bounded)"""
_GRU = """
    r_sum = Add (r, own_r)  z_sum = Add (z, own_z)  reset = Sigmoid (r_sum)  keep = Sigmoid (z_sum)
    again = Mul (reset, own_n)  n_sum = Add (n, again)  fresh = Tanh (n_sum)
    change = Sub (h, fresh)  kept = Mul (keep, change)  h_next = Add (fresh, kept)"""


Numbers = Literal["float", "bfloat16", "weight only", "int8"]
_PREFIXES: dict[Numbers, str] = {
    "float": "",
    "bfloat16": "Bfloat16",
    "weight only": "WeightOnly",
    "int8": "Int8",
}
_SCALED: tuple[Numbers, ...] = ("weight only", "int8")


@dataclass(frozen=True)
class LowRankCellOp:
    """A sequence through an LSTM or GRU whose hidden-to-hidden matrix is a product of two.

    Inputs are pre `[t, n, gates hidden]`, what the input adds to the gates in torch's order; v `[hidden, r]`
    and u `[r, gates hidden]`, of float32, of bfloat16, or of int8 and each followed by its scales, one per
    column, as `numbers` say; the bias of the product; the states.  Outputs are all hidden states and the last
    of every state.  With `int8` numbers what either factor reads is rounded to 127 steps of its largest
    number, sample by sample.
    """

    gates: int
    reverse: bool
    numbers: Numbers

    @property
    def states(self) -> list[str]:
        """Names of the states."""
        return ["h", "c"][: self.gates - 2]

    @property
    def name(self) -> str:
        kind = "Lstm" if self.gates == 4 else "Gru"
        return f"{_PREFIXES[self.numbers]}LowRank{kind}{'Reverse' * self.reverse}"

    @property
    def inputs(self) -> list[str]:
        factors = ["v", "v_scale", "u", "u_scale"] if self.numbers in _SCALED else ["v", "u"]
        return ["pre", *factors, "bias", *(f"{state}_first" for state in self.states)]

    @property
    def outputs(self) -> list[str]:
        return ["y", *(f"{state}_last" for state in self.states)]

    @property
    def attributes(self) -> list[str]:
        return []

    @property
    def grain(self) -> float:
        return rounded_anew(2) if self.numbers == "int8" else 0.0

    def body(self, opset: int) -> str:
        def typed(axis: str, *names: str) -> str:
            return ", ".join(f"float[N, {axis}] {name}" for name in names)

        ways = ", scan_input_directions: ints = [1], scan_output_directions: ints = [1]" * self.reverse
        after = [f"{state}_next" for state in self.states]
        steps = "\n".join(self._step(opset))
        body = (
            f"step ({typed('H', *self.states)}, {typed('G', 'part')}) => ({typed('H', *after, 'seen')}) "
            f"{{ {steps} seen = Identity (h_next) }}"
        )
        read = ", ".join(self.inputs[-len(self.states) :])
        made = ", ".join([*self.outputs[1:], "y"])
        before = "\n".join(self._matrices())
        return f"{before} {made} = Scan <num_scan_inputs: int = 1{ways}, body: graph = {body}> ({read}, pre)"

    def _matrices(self) -> Iterator[str]:
        """Factors as steps read them, where that is not how they are stored."""
        for factor in "vu":
            if self.numbers == "weight only":
                yield f"matrix_{factor} = DequantizeLinear <axis: int = 1> ({factor}, {factor}_scale)"
            elif self.numbers != "float":
                yield f"matrix_{factor} = Cast <to: int = {int(ir.DataType.FLOAT)}> ({factor})"

    def _step(self, opset: int) -> Iterator[str]:
        for factor, read, made in (("v", "h", "thin"), ("u", "thin", "wide")):
            matrix = factor if self.numbers == "float" else f"matrix_{factor}"
            if self.numbers == "int8":
                yield from product_by_row(factor, read, made, opset)
            else:
                yield f"{made} = MatMul ({read}, {matrix})"
        yield "own = Add (wide, bias)"
        counted = f", num_outputs: int = {self.gates}" if opset >= _OUTPUTS_COUNTED else ""
        split = f"Split <axis: int = -1{counted}>"
        if self.gates == 4:
            yield f"total = Add (part, own)  i_sum, f_sum, g_sum, o_sum = {split} (total) {_LSTM}"
        else:
            yield f"r, z, n = {split} (part)  own_r, own_z, own_n = {split} (own) {_GRU}"
