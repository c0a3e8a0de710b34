"""What a model holds and computes, counted without tdpass.

Parameters are counted from the object, products from a run and its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}
STATISTICS = {"BatchNormalization": (3, 4)}
Feed = Mapping[str, np.ndarray]


class _Followed(TorchFunctionMode):
    """While somebody follows them, layers that would run as one operator call their products one by one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def torch_macs(run: Callable[[], object]) -> int:
    """Torch's counter, which knows products and convolutions only, with everything else made of these."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        vector = {torch.ops.aten.mv: lambda matrix, vector, **_: 2 * matrix[0] * matrix[1]}
        with (
            torch.no_grad(),
            _Followed(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=vector) as counter,
        ):
            run()
    finally:
        torch._C._set_mkldnn_enabled(True)
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() // 2


def torch_params(module: nn.Module) -> tuple[int, int]:
    """Numbers and bytes of all parameters, shared ones once."""
    held = list(module.parameters())
    return sum(p.numel() for p in held), sum(p.numel() * p.element_size() for p in held)


def onnx_params(proto: onnx.ModelProto) -> tuple[int, int]:
    """Numbers and bytes of all float tensors with an axis but for running statistics."""
    statistics = {
        node.input[index] for node in proto.graph.node for index in STATISTICS.get(node.op_type, ())
    }
    held = [
        tensor
        for name, tensor in _stored(proto)
        if name not in statistics and tensor.data_type in FLOATS and len(tensor.dims)
    ]
    arrays = [numpy_helper.to_array(tensor) for tensor in held]
    return sum(array.size for array in arrays), sum(array.nbytes for array in arrays)


def onnx_macs(proto: onnx.ModelProto, feeds: Iterable[Feed]) -> int:
    """Products of every MatMul, Gemm, Conv and Einsum in these calls, from the sizes of values in them."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    known = {output.name for output in proto.graph.output}
    made = [name for node in proto.graph.node for name in node.output if name]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in known)
    session = onnx_session(watched)
    names = [output.name for output in session.get_outputs()]
    weights = {name: tuple(tensor.dims) for name, tensor in _stored(proto)}
    total = 0
    for feed in feeds:
        sizes = {**weights, **{name: array.shape for name, array in feed.items()}}
        sizes |= {
            name: array.shape for name, array in zip(names, session.run(names, dict(feed)), strict=True)
        }
        total += sum(_products(node, sizes) for node in proto.graph.node)
    return total


def onnx_session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, each node as it stands."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _stored(proto: onnx.ModelProto) -> list[tuple[str, onnx.TensorProto]]:
    constants = [node for node in proto.graph.node if node.op_type == "Constant"]
    values = [
        (node.output[0], attribute.t)
        for node in constants
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return [*((tensor.name, tensor) for tensor in proto.graph.initializer), *values]


def _products(node: onnx.NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> int:
    inputs, made = [sizes[name] for name in node.input if name], sizes[node.output[0]]
    if node.op_type == "MatMul":
        return math.prod(made) * inputs[0][-1]
    if node.op_type == "Gemm":
        return math.prod(inputs[0]) * made[1]
    if node.op_type == "Conv":
        return math.prod(made) * math.prod(inputs[1][1:])
    return _einsum(node, inputs) if node.op_type == "Einsum" else 0


def _einsum(node: onnx.NodeProto, inputs: list[tuple[int, ...]]) -> int:
    terms = node.attribute[0].s.decode().replace(" ", "").partition("->")[0].split(",")
    lengths = {
        letter: size
        for term, shape in zip(terms, inputs, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    return math.prod(lengths.values())
