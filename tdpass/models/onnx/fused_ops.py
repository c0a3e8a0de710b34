"""The fused operators of the domain com.tdpass.

Their names, and what each computes, said in standard operators. A model holds the latter as a function of its
own, so any runtime can run it; one with the library of fused operators registered runs those instead, for
ONNX Runtime looks for a kernel before it looks into a function.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir
from typing_extensions import Self

from tdpass.fusing.spec import ChainSpec

DOMAIN, VERSION = "com.tdpass", 1
REGISTER = "options.register_custom_ops_library(str(tdpass.onnx_ops_path()))"
"""What a program does with the options of its session, for the operators to run and not what they stand for."""
FUNCTIONS_SINCE_IR = 8

_CONV_ATTRIBUTES = {"group": "int", "strides": "ints", "pads": "ints", "dilations": "ints"}
_ACTIVATE = {
    "identity": "y = Identity (sum)",
    "relu": "y = Relu (sum)",
    "silu": "gate = Sigmoid (sum)  y = Mul (sum, gate)",
    "gelu": """
        root = Constant <value = float {0.70710678}> ()
        half = Constant <value = float {0.5}> ()
        one = Constant <value = float {1.0}> ()
        scaled = Mul (sum, root)
        erf = Erf (scaled)
        gate = Add (erf, one)
        gated = Mul (sum, gate)
        y = Mul (gated, half)""",
}


@dataclass(frozen=True)
class FusedOp:
    """`y = activation(layers(x) + bias + residual)` with that many convolutions, or products with matrices, in a row.

    Inputs are x, a weight per layer (`[o, i / group, h, w]` as Conv has it, a matrix `[i, o]`), then bias and
    residual where there are such.
    """

    linear: bool
    stages: int
    bias: bool
    residual: bool
    activation: str

    @classmethod
    def of(cls, spec: ChainSpec) -> Self:
        """The operator of a chain."""
        return cls(spec.linear, len(spec.stages), spec.bias, spec.residual, spec.activation)

    @property
    def name(self) -> str:
        """Type of the operator."""
        kind = "Linear" if self.linear else "Conv"
        rest = "" if self.activation == "identity" else self.activation.capitalize()
        return f"{kind}Chain{self.stages}{'Bias' * self.bias}{'Add' * self.residual}{rest}"

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return [
            "x",
            *(f"w{k}" for k in range(1, self.stages + 1)),
            *["bias"] * self.bias,
            *["residual"] * self.residual,
        ]

    @property
    def attributes(self) -> list[str]:
        """Names of the attributes: of Conv for every stage, and `lanes`, which only the kernel reads."""
        conv = (
            []
            if self.linear
            else [f"{name}_{k}" for k in range(1, self.stages + 1) for name in _CONV_ATTRIBUTES]
        )
        return [*conv, "lanes"]

    def function(self, opset: int) -> ir.Function:
        """The operator in standard operators of that opset."""
        lines, last = [], "x"
        for k in range(1, self.stages + 1):
            layer = (
                "MatMul"
                if self.linear
                else f"Conv <{', '.join(f'{name}: {kind} = @{name}_{k}' for name, kind in _CONV_ATTRIBUTES.items())}>"
            )
            shift = ", bias" if self.bias and not self.linear and k == self.stages else ""
            lines.append(f"h{k} = {layer} ({last}, w{k}{shift})")
            last = f"h{k}"
        for operand in ["bias"] * (self.bias and self.linear) + ["residual"] * self.residual:
            lines.append(f"with_{operand} = Add ({last}, {operand})")
            last = f"with_{operand}"
        body = "\n".join(lines) + "\n" + _ACTIVATE[self.activation].replace("sum", last)
        head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {self.name} <{", ".join(self.attributes)}> ({", ".join(self.inputs)}) => (y)'
        return ir.serde.deserialize_function(onnx.parser.parse_function(f"{head} {{ {body} }}"))


def uses_fused_ops(model: ir.Model) -> bool:
    """Whether a model holds nodes of the domain."""
    return any(node.domain == DOMAIN for node in ir.traversal.RecursiveGraphIterator(model.graph))
