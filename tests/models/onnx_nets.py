"""ONNX networks, small enough to look into, and layers to put into them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import tdpass.formats  # noqa: F401 - fills the registry
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.models.base import Model

RNG = np.random.default_rng(0)


def weight(*shape: int, rng: np.random.Generator = RNG) -> np.ndarray:
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)


def positive(*shape: int, rng: np.random.Generator = RNG) -> np.ndarray:
    return (np.abs(rng.standard_normal(shape)) + 0.5).astype(np.float32)


def node(operator: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        operator, inputs.split(), outputs.split(), name=f"{operator}_{outputs}", **attributes
    )


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    x: tuple[int | str, ...],
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def network() -> onnx.ModelProto:
    """conv, batch-norm, ReLU, pooling, and a linear layer."""
    rng = np.random.default_rng(1)
    nodes = [
        node("Conv", "x conv.weight", "c", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", "c bn.gamma bn.beta bn.mean bn.var", "n", epsilon=1e-3),
        node("Relu", "n", "r"),
        node("GlobalAveragePool", "r", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f fc.weight fc.bias", "y", transB=1),
    ]
    constants = {
        "conv.weight": weight(6, 3, 3, 3, rng=rng),
        "bn.gamma": positive(6, rng=rng),
        "bn.beta": weight(6, rng=rng),
        "bn.mean": weight(6, rng=rng),
        "bn.var": positive(6, rng=rng),
        "fc.weight": weight(5, 6, rng=rng),
        "fc.bias": weight(5, rng=rng),
    }
    proto = model_of(nodes, constants, ("N", 3, 8, 8))
    proto.metadata_props.add(key="author", value="someone")
    proto.doc_string, proto.graph.doc_string, proto.graph.node[2].doc_string = "a model", "a graph", "a node"
    proto.producer_name = "a producer"
    proto.graph.node[2].metadata_props.add(key="origin", value="somewhere")
    return proto


def large_network() -> onnx.ModelProto:
    nodes = [node("MatMul", "x a.weight", "h"), node("Relu", "h", "r"), node("MatMul", "r b.weight")]
    return model_of(nodes, {"a.weight": weight(64, 96), "b.weight": weight(96, 32)}, ("N", "S", 64))


def svd(model: Model, name: str, rank: int, bias: Tensor | None = None) -> Layer:
    site = next(site for site in model.sites() if site.name == name)
    return Layer(
        site,
        Form("svd", (rank,)),
        FORMATS.get("svd").factorize(model.weight(name), site, (rank,)),
        model.bias(name) if bias is None else bias,
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)


def to_onnx(module: nn.Module, x: Tensor) -> onnx.ModelProto:
    """A torch module as the exporter writes it, with an open number of samples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (x,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
        )
    assert program is not None
    return program.model_proto
