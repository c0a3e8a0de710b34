"""Models of one node of the domain com.tdpass, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from tdpass.models.onnx.operators.fused import DOMAIN, Operator, bounds, function_of

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(0)
OPSET = 17


def numbers(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)


def one_node(
    op: Operator,
    attributes: Mapping[str, object],
    constants: Mapping[str, np.ndarray | onnx.TensorProto],
    inputs: Arrays,
    *,
    open_axis: int = 0,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of one node, one axis of whose inputs is open; the bounds of a clamp are constants."""
    node = helper.make_node(op.name, op.inputs, op.outputs, domain=DOMAIN, **attributes)
    given = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            ["N" if axis == open_axis else size for axis, size in enumerate(array.shape)],
        )
        for name, array in inputs.items()
    ]
    ends = bounds(getattr(op, "activation", "identity"))
    constants = {**constants, **{name: np.float32(end) for name, end in ends.items()}}
    stored = [
        array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(array, name)
        for name, array in constants.items()
    ]
    coded = op.inputs[-1] == "y_zero"
    kind = TensorProto.UINT8 if coded else TensorProto.FLOAT
    rank = next(iter(inputs.values())).ndim  # of what comes first, which y has too; states are matrices
    made = [
        helper.make_tensor_value_info(
            name, kind, [f"{name}_{axis}" for axis in range(rank if name == "y" else 2)]
        )
        for name in op.outputs
    ]
    graph = helper.make_graph([node], "g", given, made, stored)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    model.functions.append(ir.serde.serialize_function(function_of(op, opset)))
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, inputs: Arrays, library: str | None = None, threads: int = 1) -> np.ndarray:
    return opened(model, library, threads).run(None, inputs)[0]


def opened(model: onnx.ModelProto, library: str | None, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(
        np.allclose(a, b, rtol=2e-5, atol=2e-5 * (np.abs(b).max(initial=0) + 1e-6))
    )
