"""Products with matrices and kernels of integers that make bytes of what they read in every call.

DynamicQuantizeLinear, MatMulInteger or ConvInteger, Cast, and Mul by the product of the two scales: what
`quantize_dynamic` of ONNX Runtime writes, and tdpass for layers of int8 in dynamic ranges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.graph.activations import other, sole_reader
from tdpass.models.onnx.graph.folding import folded, number_sources
from tdpass.models.onnx.graph.stored_integers import Integers
from tdpass.models.onnx.graph.tensors import constant, held, sizes, to_torch
from tdpass.models.onnx.sites.weight_use import Slot

CODER = "DynamicQuantizeLinear"
PLAIN = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
"""The operators on numbers that those on integers stand for."""
_CONTRIB = "com.microsoft"
_MOST, _LEAST = 127, -128


@dataclass(frozen=True)
class DynamicProduct:
    """`y = (codes of x - zero of x) (codes - zeros) step scale`, all but x and its grid constants.

    `node` multiplies, `nodes` are all that nothing else reads, the last of which makes y.
    """

    node: ir.Node
    coder: ir.Node
    scale: ir.Value
    nodes: tuple[ir.Node, ...]

    @classmethod
    def of(cls, node: ir.Node) -> DynamicProduct | None:
        """That of a node that multiplies integers; None for any other."""
        if node.domain or node.op_type not in PLAIN:
            return None
        cast = sole_reader(node.outputs[0], "Cast")
        last = None if cast is None else sole_reader(cast.outputs[0], "Mul")
        return None if last is None else cls.ending(last)

    @classmethod
    def ending(cls, last: ir.Node) -> DynamicProduct | None:
        """That whose numbers this Mul makes; None for any other."""
        makers = {
            maker.op_type: maker
            for value in last.inputs
            if value is not None and (maker := value.producer()) is not None and not maker.domain
        }
        cast, scaling = makers.get("Cast"), makers.get("Mul")
        if last.domain or cast is None or scaling is None or cast.inputs[0] is None:
            return None
        node = cast.inputs[0].producer()
        if node is None or node.domain or node.op_type not in PLAIN or node.inputs[0] is None:
            return None
        coder, floats = node.inputs[0].producer(), ir.DataType.FLOAT
        if coder is None or coder.op_type != CODER or cast.attributes.get_int("to", 0) != floats:
            return None
        codes, step, middle = coder.outputs
        scale = other(scaling, step) if step in scaling.inputs else None
        if scale is None or list(node.inputs[::2]) != [codes, middle] or not _fits(node, scale):
            return None
        inside = {node, scaling, last}
        own = [made for made in (coder, scaling) if made.graph is node.graph and _only_read(made, inside)]
        return cls(node, coder, scale, (*own[:1], node, *own[1:], cast, last))

    @property
    def last(self) -> ir.Node:
        """The node that makes y."""
        return self.nodes[-1]

    @property
    def x(self) -> Slot:
        """Where the numbers are read that bytes are made of."""
        return Slot(self.coder, 0)

    @property
    def weight(self) -> ir.Value:
        """The constant that the codes are."""
        return Slot(self.node, 1).value

    @property
    def whole(self) -> Tensor:
        """`codes - zeros` as the product reads them, whole numbers of 16 bits."""
        codes, zero = to_torch(held(self.weight)).to(torch.int16), _optional(self.node, 3)
        return codes if zero is None else codes - self._along(to_torch(held(zero)).to(torch.int16))

    def numbers(self) -> Tensor:
        """What they stand for."""
        return (self.whole.double() * self._along(to_torch(held(self.scale)).double())).float()

    @property
    def integers(self) -> Integers | None:
        """The same as int8 with a scale each; None where they are no such."""
        whole, scale = self.whole, self._along(to_torch(held(self.scale)))
        if int(whole.max()) > _MOST or int(whole.min()) < _LEAST:
            return None
        return Integers(self.weight, self.scale, whole.to(torch.int8), torch.broadcast_to(scale, whole.shape))

    def _along(self, beside: Tensor) -> Tensor:
        """Numbers by output channel, or one for all, beside the weight."""
        rest = (1,) * (len(sizes(held(self.weight))) - 1)
        return beside.reshape(-1, *rest) if self.node.op_type == "ConvInteger" else beside.reshape(-1)


@dataclass(frozen=True)
class _Alone:
    """Where a node of ONNX Runtime that is such a product by itself has what it reads.

    `operator` is the one on numbers, of that domain, `rest` what it reads behind the weight; `weight` are
    scale and zero point of the weight, `read` those of x where the node is given bytes.
    """

    domain: str
    operator: str
    weight: tuple[int, int]
    read: tuple[int, int] | None = None
    rest: tuple[int, ...] = ()
    bias: int | None = None


_ALONE = {
    "DynamicQuantizeMatMul": _Alone("", "MatMul", (2, 3), bias=4),
    "MatMulIntegerToFloat": _Alone("", "MatMul", (3, 5), (2, 4), bias=6),
    "QAttention": _Alone(_CONTRIB, "Attention", (4, 7), (3, 6), rest=(2, 5, 8)),
}
DYNAMIC = (*PLAIN, *(f"{_CONTRIB}::{name}" for name in _ALONE))
"""The operators that may be such products."""


@dataclass(frozen=True)
class FloatProduct:
    """A product on numbers, of that domain, in the place of `nodes`; `like` has its name and attributes.

    `make` makes the numbers that the weight stands for.
    """

    nodes: tuple[ir.Node, ...]
    like: ir.Node
    domain: str
    operator: str
    x: ir.Value
    weight: ir.Value
    make: Callable[[], Tensor]
    rest: tuple[ir.Value | None, ...] = ()
    bias: ir.Value | None = None


def is_dynamic(node: ir.Node) -> bool:
    """Whether it is such a product, of a constant weight."""
    return float_product(node) is not None


def float_product(node: ir.Node) -> FloatProduct | None:
    """The product on numbers that a product of bytes made in every call stands for; None for any other node."""
    if node.domain == _CONTRIB and node.op_type in _ALONE:
        return _of_one_node(node, _ALONE[node.op_type])
    found = DynamicProduct.of(node)
    if found is None:
        return None
    add, rest = _bias_behind(found) if node.op_type == "ConvInteger" else ((), ())
    nodes, x = (*found.nodes, *add), found.x.value
    return FloatProduct(nodes, node, "", PLAIN[node.op_type], x, found.weight, found.numbers, rest)


def _bias_behind(found: DynamicProduct) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...]]:
    """The sum with one constant by channel that alone reads a convolution, and that constant."""
    shape = sizes(held(found.weight))
    behind = by_channel(found.last.outputs[0], shape[0], len(shape) - 2)
    if behind is None:
        return (), ()
    add, slot = behind
    whole = [source for source in number_sources(slot.value) if sizes(held(source)) == shape[:1]]
    return ((add,), (whole[0],)) if whole else ((), ())


def by_channel(y: ir.Value, outputs: int, axes: int) -> tuple[ir.Node, Slot] | None:
    """The sum of an image or signal, which nothing else reads, and a constant by channel; where that is."""
    add = sole_reader(y, "Add")
    operand = None if add is None else other(add, y)
    tensor = folded(operand)
    if add is None or operand is None or tensor is None or tensor.size != outputs:
        return None
    fits = one_each(sizes(tensor), outputs, axes) and len(set(number_sources(operand))) == 1
    return (add, Slot(add, add.inputs.index(operand))) if fits else None


def _of_one_node(node: ir.Node, places: _Alone) -> FloatProduct | None:
    x, weight = node.inputs[:2]
    scale, zero = (_optional(node, place) for place in places.weight)
    steps, codes = constant(scale), constant(weight)
    points = constant(zero)
    if weight is None or steps is None or codes is None or (zero is not None and points is None):
        return None
    beside = [tensor for tensor in (steps, points) if tensor is not None]
    if not all(one_each(sizes(tensor), sizes(codes)[-1], 0) for tensor in beside):
        return None
    if places.read is not None:
        x = _rounded(node, places.read)
    make, rest = partial(_numbers, codes, steps, points), [_optional(node, place) for place in places.rest]
    while rest and rest[-1] is None:
        rest.pop()
    bias = None if places.bias is None else _optional(node, places.bias)
    if x is None:
        return None
    return FloatProduct((node,), node, places.domain, places.operator, x, weight, make, tuple(rest), bias)


def _numbers(codes: ir.TensorProtocol, steps: ir.TensorProtocol, zeros: ir.TensorProtocol | None) -> Tensor:
    shift = 0.0 if zeros is None else to_torch(zeros).double()
    return ((to_torch(codes).double() - shift) * to_torch(steps).double()).float()


def _rounded(node: ir.Node, read: tuple[int, int]) -> ir.Value | None:
    """The numbers that the bytes which a node is given were made of, on their own range."""
    codes = node.inputs[0]
    coder = None if codes is None else codes.producer()
    if coder is None or coder.op_type != CODER:
        return None
    given = [codes, *(_optional(node, place) for place in read)]
    return coder.inputs[0] if given == list(coder.outputs) else None


def _only_read(node: ir.Node, inside: Container[ir.Node]) -> bool:
    """Whether nothing but these nodes reads what it makes."""
    return all(use.node in inside for output in node.outputs for use in output.uses())


def _optional(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _fits(node: ir.Node, scale: ir.Value) -> bool:
    """Whether weight, scale and zero point are constants with one number for all or for every output."""
    weight, zero = constant(node.inputs[1]), _optional(node, 3)
    if weight is None or len(sizes(weight)) < 2:
        return False
    axes = len(sizes(weight)) - 2 if node.op_type == "ConvInteger" else 0
    outputs = sizes(weight)[0 if node.op_type == "ConvInteger" else -1]
    beside = [(constant(scale), axes), *(() if zero is None else ((constant(zero), 0),))]
    return all(tensor is not None and one_each(sizes(tensor), outputs, after) for tensor, after in beside)


def one_each(shape: tuple[int, ...], outputs: int, after: int) -> bool:
    """Whether there is one number, or `outputs` of them along the axis that has so many axes of one after it."""
    count = math.prod(shape)
    return count == 1 or (
        count == outputs and len(shape) > after and shape[len(shape) - 1 - after] == outputs
    )
