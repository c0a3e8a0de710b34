"""The table of torch functions that stand for ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from tdpass.registry import Registry

Outputs = Tensor | Sequence[Tensor]


class NotServedError(Exception):
    """This form of the operator has no torch function; the runner then uses ONNX Runtime for the node."""


@dataclass(frozen=True)
class Operator:
    """A node as a torch function sees it: attributes, opset version and which outputs are read."""

    name: str
    opset: int
    attributes: Mapping[str, ir.Attr]
    outputs: int = 1

    def integers(self, name: str) -> list[int] | None:
        """A list of integers, None where it is absent."""
        return (
            [int(number) for number in self.attributes[name].as_ints()] if name in self.attributes else None
        )

    def integers_or(self, name: str, given: Tensor | None) -> list[int] | None:
        """Integers that older opsets have as an attribute and newer ones as an input."""
        return numbers(given) if given is not None else self.integers(name)

    def integer(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        return int(self.attributes[name].as_int()) if name in self.attributes else default

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(self.attributes[name].as_float()) if name in self.attributes else default

    def string(self, name: str, default: str = "") -> str:
        """A string attribute."""
        return str(self.attributes[name].as_string()) if name in self.attributes else default

    def only_first_output(self) -> None:
        """Leave the node to ONNX Runtime when another output than the first is read."""
        if self.outputs > 1:
            raise NotServedError


TorchFunction = Callable[..., Outputs]
FUNCTIONS: Registry[TorchFunction] = Registry("torch function for the ONNX operator")


def serves(*operators: str) -> Callable[[TorchFunction], TorchFunction]:
    """Decorator: let a function `f(operator, *inputs)` stand for these operators.

    An absent optional input is None.
    """

    def add(function: TorchFunction) -> TorchFunction:
        for operator in operators:
            FUNCTIONS.add(operator, function)
        return function

    return add


def numbers(tensor: Tensor) -> list[int]:
    """The integers in a tensor of shape or axis numbers, which has one axis or none."""
    listed = tensor.tolist()
    return [int(number) for number in listed] if isinstance(listed, list) else [int(listed)]
