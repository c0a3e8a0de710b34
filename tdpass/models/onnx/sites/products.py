"""Counting the multiply-adds of an ONNX model.

They are those of every node that ONNX Runtime executes, in branches, loops and functions too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.graph.functions import FUNCTIONS
from tdpass.models.onnx.operators.session import traced
from tdpass.models.onnx.sites.matchers import operator_name
from tdpass.products import Counted, Counter, by_rows, convolution
from tdpass.registry import Registry

Sizes = tuple[int, ...]
Count = Callable[[Sequence[Sizes], Sizes], int]

PRODUCTS: Registry[Count] = Registry("ONNX operator with products")
"""Multiply-adds of operators by type, from the sizes of their inputs present and of their first output."""

_STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_EINSUM = "tdpass-einsum:"
_NO_PRODUCTS = frozenset(
    {
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "EmbedLayerNormalization",
        "QuantizeLinear",
        "DequantizeLinear",
        "QLinearAdd",
        "QLinearMul",
    }
    | {
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearGlobalAveragePool",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearSoftmax",
        "Pad",
        "GatherND",
    }
)


def _counts(*types: str) -> Callable[[Count], Count]:
    def register(count: Count) -> Count:
        for name in types:
            PRODUCTS.add(name, count)
        return count

    return register


@_counts(
    "MatMul",
    "MatMulInteger",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulNBits",
    "MatMulFpQ4",
    "MatMulBnb4",
)
def _matmul(inputs: Sequence[Sizes], y: Sizes) -> int:
    return math.prod(y) * inputs[0][-1]


@_counts("FusedMatMul", "TransposeMatMul")
def _matmul_transposed(inputs: Sequence[Sizes], y: Sizes) -> int:
    return math.prod(y) * math.prod(inputs[0][-2:]) // max(y[-2], 1)


@_counts("Gemm", "FusedGemm", "QGemm")
def _gemm(inputs: Sequence[Sizes], y: Sizes) -> int:
    return y[1] * math.prod(inputs[0])


@_counts("Conv", "ConvInteger", "FusedConv", "NhwcFusedConv")
def _conv(inputs: Sequence[Sizes], y: Sizes) -> int:
    return convolution(inputs[0], inputs[1], y)


@_counts("QLinearConv")
def _quantized_conv(inputs: Sequence[Sizes], y: Sizes) -> int:
    return convolution(inputs[0], inputs[3], y)


@_counts("ConvTranspose")
def _conv_transpose(inputs: Sequence[Sizes], y: Sizes) -> int:
    return convolution(inputs[0], inputs[1], y, transposed=True)


@_counts("DeformConv")
def _deformable(inputs: Sequence[Sizes], y: Sizes) -> int:
    return convolution(inputs[0], inputs[1], y)


@_counts("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
def _recurrent(inputs: Sequence[Sizes], y: Sizes) -> int:
    return by_rows(inputs[0], inputs[1], inputs[2])


@_counts("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention")
def _attention(inputs: Sequence[Sizes], y: Sizes) -> int:
    query, key = inputs[0], inputs[1]
    if (
        len(key) == 2
    ):  # the operator also projects its input, by a weight for queries, keys and values together
        width = (key[1] - y[-1]) // 2
        return math.prod(query[:-1]) * (math.prod(key) + query[-2] * (width + y[-1]))
    return (math.prod(query) + math.prod(y)) * key[-2]


def count_products(model: ir.Model, inputs: Mapping[str, Tensor]) -> Counted:
    """Multiply-adds of one call; raises `InvalidModelError` where ONNX Runtime fails."""
    named = model.clone()
    for number, node in enumerate(_nodes(named)):
        if node.op_type == "Einsum":
            node.name = f"{_EINSUM}{node.attributes['equation'].as_string()}:{number}"
    macs = sum(_products_of(event) for event in traced(named, inputs))
    return Counted(macs, _unseen(model))


def _products_of(event: Mapping[str, Any]) -> int:
    kind, facts = event["args"]["op_name"], event["args"]
    inputs, outputs = _sizes(facts["input_type_shape"]), _sizes(facts["output_type_shape"])
    if kind == "Einsum":
        return _einsum(event["name"].partition(_EINSUM)[2].partition(":")[0], inputs)
    return PRODUCTS.get(kind)(inputs, outputs[0]) if kind in PRODUCTS and outputs else 0


def _sizes(described: Sequence[Mapping[str, Sequence[int]]]) -> list[Sizes]:
    return [tuple(sizes) for value in described for sizes in value.values()]


def _einsum(equation: str, inputs: Sequence[Sizes]) -> int:
    counter = Counter()
    with counter:
        torch.einsum(equation, *(torch.empty(sizes, device="meta") for sizes in inputs))
    return counter.macs


def _nodes(model: ir.Model) -> list[ir.Node]:
    found = [*ir.traversal.RecursiveGraphIterator(model.graph)]
    return found + [node for function in model.functions.values() for node in function.all_nodes()]


def _unseen(model: ir.Model) -> tuple[str, ...]:
    """Operators of other domains of which it is not known what they compute."""
    functions = {(function.domain, function.name) for function in model.functions.values()}
    others = [
        node
        for node in _nodes(model)
        if node.domain not in _STANDARD and (node.domain, node.op_type) not in functions
    ]
    known = {*PRODUCTS.names(), "Einsum", *_NO_PRODUCTS}
    return tuple(
        dict.fromkeys(
            f"{node.domain}::{node.op_type}"
            for node in others
            if node.op_type not in known and operator_name(node) not in FUNCTIONS
        )
    )
