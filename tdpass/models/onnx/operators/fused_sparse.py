"""The operators of the domain com.tdpass for one layer whose weight is mostly zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tdpass.models.onnx.operators.fused import bounds, conv_attributes, ending, layer, title


@dataclass(frozen=True)
class SparseOp:
    """`y = activation(W x + bias + residual)` with a weight W of mostly zeros.

    Inputs are x, W (`[o, i, h, w]` as Conv has it, a matrix `[o, i]`), then bias, residual and `bounds` where
    there are such.  What is read has its zeros: the kernel leaves them out once it knows the weight.
    """

    linear: bool
    bias: bool
    residual: bool
    activation: str
    grain: ClassVar[float] = 0.0

    @property
    def name(self) -> str:
        rest = f"{'Bias' * self.bias}{'Add' * self.residual}{title(self.activation)}"
        return f"Sparse{'Linear' if self.linear else 'Conv'}{rest}"

    @property
    def inputs(self) -> list[str]:
        added = ["bias"] * self.bias + ["residual"] * self.residual
        return ["x", "w", *added, *bounds(self.activation)]

    @property
    def outputs(self) -> list[str]:
        return ["y"]

    @property
    def attributes(self) -> list[str]:
        """Those of Conv."""
        return [] if self.linear else conv_attributes(1)

    def body(self, opset: int) -> str:
        del opset
        lines = [f"h = {layer(self.linear, 1)} (x, w{', bias' * self.bias})"]
        if self.linear:
            lines = ["columns = Transpose <perm: ints = [1, 0]> (w)", "h = MatMul (x, columns)"]
        added = ["bias"] * (self.bias and self.linear) + ["residual"] * self.residual
        return "\n".join([*lines, *ending("h", added, self.activation)])
