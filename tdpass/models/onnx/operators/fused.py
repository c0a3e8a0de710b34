"""The fused operators of the domain com.tdpass.

Their names, and what each computes, said in standard operators. A model holds the latter as a function of its
own, so any runtime can run it; one with the library of fused operators registered runs those instead, for
ONNX Runtime looks for a kernel before it looks into a function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx
import onnx_ir as ir
from typing_extensions import Self

from tdpass.fusing.spec import ChainSpec
from tdpass.kernels.activation import Activation
from tdpass.kernels.native import multiplies_pairs

DOMAIN, VERSION = "com.tdpass", 1
REGISTER = "options.register_custom_ops_library(str(tdpass.onnx_ops_path()))"
"""What a program does with its session's options, for the operators to run and not what they stand for."""
FUNCTIONS_SINCE_IR = 8

_CONV_ATTRIBUTES = {"group": "int", "strides": "ints", "pads": "ints", "dilations": "ints"}
_ACTIVATE = {
    "identity": "{y} = Identity (sum)",
    "relu": "{y} = Relu (sum)",
    "silu": "gate = Sigmoid (sum)  {y} = Mul (sum, gate)",
    "gelu": """
        root = Constant <value = float {{0.70710678}}> ()
        half = Constant <value = float {{0.5}}> ()
        one = Constant <value = float {{1.0}}> ()
        scaled = Mul (sum, root)
        erf = Erf (scaled)
        gate = Add (erf, one)
        gated = Mul (sum, gate)
        {y} = Mul (gated, half)""",
    "clamp": "lifted = Max (sum, low)  {y} = Min (lifted, high)",
}


class Operator(Protocol):
    """An operator of the domain."""

    @property
    def name(self) -> str:
        """Type of the operator, which says all that is not in the attributes."""

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""

    @property
    def attributes(self) -> list[str]:
        """Names of the attributes."""

    @property
    def grain(self) -> float:
        """The step, relative to the largest number, that rounding in the kernel comes to; 0 for none.

        It is what sets it apart from the nodes that it stands for.
        """

    def body(self, opset: int) -> str:
        """What it computes, in standard operators of that opset."""


def function_of(operator: Operator, opset: int) -> ir.Function:
    """The operator in standard operators of that opset."""
    imports = f'"": {opset}, "com.microsoft": 1'
    attributes = f" <{', '.join(operator.attributes)}>" if operator.attributes else ""
    head = (
        f'<domain: "{DOMAIN}", opset_import: [{imports}]> {operator.name}{attributes} '
        f"({', '.join(operator.inputs)}) => ({', '.join(operator.outputs)})"
    )
    parsed = onnx.parser.parse_function(f"{head} {{ {operator.body(opset)} }}")
    if all(node.domain != "com.microsoft" for node in parsed.node):
        del parsed.opset_import[1]
    return ir.serde.deserialize_function(parsed)


def ending(last: str, operands: Sequence[str], activation: str, result: str = "y") -> Iterator[str]:
    """`result = activation(last + operands)`."""
    for operand in operands:
        yield f"with_{operand} = Add ({last}, {operand})"
        last = f"with_{operand}"
    yield _ACTIVATE[_said(activation)].format(y=result).replace("sum", last)


def title(activation: str) -> str:
    """An activation in the name of an operator."""
    said = _said(activation)
    return "" if said == "identity" else said.capitalize()


def bounds(activation: str) -> dict[str, float]:
    """The inputs of an operator that are the ends of a clamp, by name; none for others."""
    said = Activation.read(activation)
    return {"low": said.low, "high": said.high} if _said(activation) == "clamp" else {}


def _said(activation: str) -> str:
    """How names and bodies of operators call an activation."""
    return "relu" if activation == "relu" else Activation.read(activation).function


def conv_attributes(stages: int) -> list[str]:
    """The attributes of Conv for so many stages."""
    return [f"{name}_{k}" for k in range(1, stages + 1) for name in _CONV_ATTRIBUTES]


def layer(linear: bool, k: int) -> str:
    """The operator of the k-th stage, with its attributes."""
    if linear:
        return "MatMul"
    return f"Conv <{', '.join(f'{name}: {kind} = @{name}_{k}' for name, kind in _CONV_ATTRIBUTES.items())}>"


@dataclass(frozen=True)
class FusedOp:
    """`y = activation(layers(x) + bias + residual)` with that many convolutions or products in a row.

    Products are with matrices. Inputs are x, a weight per layer (`[o, i / group, h, w]` as Conv has it, a
    matrix `[i, o]`), then bias, residual and `bounds` where there are such.  With `half` the weights are
    bfloat16, and the kernel may round to that what layers read.
    """

    linear: bool
    stages: int
    bias: bool
    residual: bool
    activation: str
    half: bool = False

    @classmethod
    def of(cls, spec: ChainSpec, *, half: bool = False) -> Self:
        """The operator of a chain."""
        return cls(spec.linear, len(spec.stages), spec.bias, spec.residual, spec.activation, half)

    @property
    def name(self) -> str:
        kind = "Linear" if self.linear else "Conv"
        rest = f"{'Bias' * self.bias}{'Add' * self.residual}{title(self.activation)}"
        return f"{'Bfloat16' * self.half}{kind}Chain{self.stages}{rest}"

    @property
    def inputs(self) -> list[str]:
        weights = [f"w{k}" for k in range(1, self.stages + 1)]
        return ["x", *weights, *["bias"] * self.bias, *["residual"] * self.residual, *bounds(self.activation)]

    @property
    def outputs(self) -> list[str]:
        return ["y"]

    @property
    def attributes(self) -> list[str]:
        """Those of Conv for every stage, and `lanes`, which only the kernel reads."""
        return [*([] if self.linear else conv_attributes(self.stages)), "lanes"]

    @property
    def grain(self) -> float:
        return 2.0**-8 if self.half and multiplies_pairs() else 0.0

    def body(self, opset: int) -> str:
        del opset
        lines, last = [], "x"
        for k in range(1, self.stages + 1):
            weight = f"w{k}"
            if self.half:
                lines.append(f"m{k} = Cast <to: int = {int(ir.DataType.FLOAT)}> (w{k})")
                weight = f"m{k}"
            shift = ", bias" if self.bias and not self.linear and k == self.stages else ""
            lines.append(f"h{k} = {layer(self.linear, k)} ({last}, {weight}{shift})")
            last = f"h{k}"
        added = ["bias"] * (self.bias and self.linear) + ["residual"] * self.residual
        return "\n".join([*lines, *ending(last, added, self.activation)])


def uses_fused_ops(model: ir.Model) -> bool:
    """Whether a model holds nodes of the domain."""
    return any(node.domain == DOMAIN for node in ir.traversal.RecursiveGraphIterator(model.graph))
