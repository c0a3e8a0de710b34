"""ONNX models whose layers lie in branches, loop bodies and local functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Sizes = Sequence[int | str | None] | None
Node = onnx.NodeProto


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 3


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> Node:
    return helper.make_node(
        operator, inputs.split(), outputs.split(), name=outputs.split(maxsplit=1)[0], **attributes
    )


def value(name: str, kind: int = F, shape: Sizes = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def graph(
    name: str,
    nodes: Sequence[Node],
    outputs: Sequence[onnx.ValueInfoProto],
    inputs: Sequence[onnx.ValueInfoProto] = (),
    **constants: np.ndarray,
) -> GraphProto:
    held = [numpy_helper.from_array(array, key.replace("__", ".")) for key, array in constants.items()]
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), held)


def model(main: GraphProto, functions: Sequence[onnx.FunctionProto] = (), opset: int = 17) -> ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in sorted({f.domain for f in functions})]
    return helper.make_model(main, opset_imports=opsets, ir_version=8, functions=list(functions))


def branches(*, own: bool) -> ModelProto:
    """A layer in each branch of an If, with weights of the branch's own or of the main graph's."""
    held = {"a__weight": weights(8, 6), "b__weight": weights(8, 6, seed=1)}
    one, other = (
        graph(
            key,
            [node("MatMul", f"x {key}.weight", f"{key}_y")],
            [value(f"{key}_y")],
            **({f"{key}__weight": held[f"{key}__weight"]} if own else {}),
        )
        for key in "ab"
    )
    nodes = [
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s zero", "c"),
        node("If", "c", "y", then_branch=one, else_branch=other),
    ]
    zero = {"zero": np.zeros((), np.float32)}
    return model(
        graph("main", nodes, [value("y")], [value("x", shape=["N", 8])], **zero, **({} if own else held))
    )


def all_inside() -> ModelProto:
    """A model whose whole body is inside an If on an input, a convolution with batch-norm in it."""
    norm = {f"n__{part}": abs(weights(6, seed=k)) + 0.5 for k, part in enumerate(("g", "b", "m", "v"))}
    inside = graph(
        "wide",
        [
            node("Conv", "x conv.weight", "h", pads=[1, 1, 1, 1]),
            node("BatchNormalization", "h n.g n.b n.m n.v", "n"),
            node("Relu", "n", "r"),
            node("GlobalAveragePool", "r", "p"),
            node("Flatten", "p", "f"),
            node("Gemm", "f fc.weight fc.bias", "yes", transB=1),
        ],
        [value("yes")],
        conv__weight=weights(6, 3, 3, 3),
        fc__weight=weights(4, 6),
        fc__bias=weights(4),
        **norm,
    )
    refused = graph("narrow", [node("Identity", "none", "no")], [value("no")], none=weights(1, 4))
    nodes = [
        node("Equal", "rate wanted", "c"),
        node("If", "c", "y", then_branch=inside, else_branch=refused),
    ]
    inputs = [value("x", shape=["N", 3, 6, 6]), value("rate", I64, [])]
    return model(graph("main", nodes, [value("y")], inputs, wanted=np.array(16000)))


def loop(rounds: int = 3) -> ModelProto:
    """`h = tanh(h W)` so often, with what every round makes beside the end."""
    body = graph(
        "body",
        [
            node("MatMul", "h cell.weight", "m"),
            node("Tanh", "m", "t"),
            node("Identity", "going", "still"),
            node("Identity", "t", "seen"),
        ],
        [value("still", BOOL, []), value("t"), value("seen")],
        [value("i", I64, []), value("going", BOOL, []), value("h")],
    )
    held = {"cell__weight": weights(8, 8), "most": np.array(rounds), "on": np.array(True)}
    return model(
        graph(
            "main",
            [node("Loop", "most on x", "end all", body=body), node("ReduceSum", "all ax", "sum", keepdims=0),
             node("Add", "end sum", "y")],
            [value("y")], [value("x", shape=["N", 8])], ax=np.array([0]), **held,
        )
    )  # fmt: skip


def scan(*, reverse: bool = False) -> ModelProto:
    """A plain recurrent layer `h = tanh(x U + h W)` over the second axis of x."""
    body = graph(
        "body",
        [
            node("MatMul", "h own.weight", "o"),
            node("MatMul", "e input.weight", "p"),
            node("Add", "o p", "g"),
            node("Tanh", "g", "t"),
            node("Identity", "t", "seen"),
        ],
        [value("t"), value("seen")],
        [value("h", shape=["N", 6]), value("e", shape=["N", 8])],
        input__weight=weights(8, 6),
    )
    back = {"scan_input_directions": [1], "scan_output_directions": [1]} if reverse else {}
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    nodes = [node("Scan", "start x", "end y", num_scan_inputs=1, body=body, **axes, **back)]
    inputs = [value("x", shape=[2, "T", 8])]
    held = {"own__weight": weights(6, 6, seed=1), "start": np.zeros((2, 6), np.float32)}
    return model(graph("main", nodes, [value("y"), value("end")], inputs, **held))


def nested() -> ModelProto:
    """A layer in a branch of an If in the body of a Loop."""
    then = graph("then", [node("MatMul", "h deep.weight", "d")], [value("d")])
    same = graph("same", [node("Identity", "h", "k")], [value("k")])
    body = graph(
        "body",
        [
            node("Equal", "i one", "now"),
            node("If", "now", "n", then_branch=then, else_branch=same),
            node("Identity", "going", "still"),
        ],
        [value("still", BOOL, []), value("n")],
        [value("i", I64, []), value("going", BOOL, []), value("h")],
    )
    held = {"deep__weight": weights(8, 8), "one": np.array(1), "most": np.array(3), "on": np.array(True)}
    return model(
        graph("main", [node("Loop", "most on x", "y", body=body)], [value("y")],
              [value("x", shape=["N", 8])], **held)
    )  # fmt: skip


def functions() -> ModelProto:
    """A local function that is called twice, with a weight that it is given and one that it holds."""
    opset = [helper.make_opsetid("", 17)]
    held = node("Constant", "", "k", value=numpy_helper.from_array(weights(6, 6)))
    inner = helper.make_function("local", "Half", ["a", "w"], ["b"], [node("MatMul", "a w", "b")], opset)
    outer = helper.make_function(
        "local", "Layer", ["a", "w"], ["b"],
        [held, helper.make_node("Half", ["a", "w"], ["h"], domain="local", name="half"),
         node("MatMul", "h k", "b")],
        [*opset, helper.make_opsetid("local", 1)],
    )  # fmt: skip
    calls = [
        helper.make_node("Layer", ["x", "one.weight"], ["h"], domain="local", name="one"),
        helper.make_node("Layer", ["h", "two.weight"], ["y"], domain="local", name="two"),
    ]
    made = {"one__weight": weights(8, 6), "two__weight": weights(6, 6, seed=1)}
    return model(graph("main", calls, [value("y")], [value("x", shape=["N", 8])], **made), [inner, outer])
