"""ONNX files that ask for too much, or for what cannot be: each as a function that writes one to a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Write = Callable[[Path], Path]
_FLOAT, _SPARSE_BYTES = TensorProto.FLOAT, 3 << 30
_rng = np.random.default_rng(0)
WEIGHT = numpy_helper.from_array(_rng.standard_normal((8, 8)).astype(np.float32), "w")
KERNEL = numpy_helper.from_array(_rng.standard_normal((4, 2, 3, 3)).astype(np.float32), "w")


def info(name: str, sizes: Sequence[object] | None, kind: int = _FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, sizes)


def model(
    nodes: Sequence[onnx.NodeProto],
    held: Sequence[onnx.TensorProto] = (WEIGHT,),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [info("x", ["N", 8])], [info("y", ["N", 8])], list(held))
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8, functions=list(functions))


def product(output: str = "y", name: str = "") -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "w"], [output], name=name)


def written(make: Callable[[], onnx.ModelProto]) -> Write:
    def write(folder: Path) -> Path:
        path = folder / "m.onnx"
        path.write_bytes(make().SerializeToString())
        return path

    return write


def chain(count: int) -> onnx.ModelProto:
    relus = [
        helper.make_node("Relu", [f"h{index}"], ["y" if index == count - 2 else f"h{index + 1}"])
        for index in range(count - 1)
    ]
    return model([product("h0"), *relus])


def unused(count: int) -> onnx.ModelProto:
    return model(
        [product()],
        [WEIGHT, *(numpy_helper.from_array(np.zeros(1, np.float32), f"u{index}") for index in range(count))],
    )


def doubling(levels: int, *, inside: bool = False) -> onnx.ModelProto:
    """Local functions of which each calls the one below it twice, or in both branches of an If."""
    functions = []
    for level in range(levels):
        below = ("Relu", "") if level == 0 else (f"f{level - 1}", "local")
        calls = [
            helper.make_node(below[0], ["a"], ["m"], domain=below[1]),
            helper.make_node(below[0], ["m"], ["b"], domain=below[1]),
        ]
        if inside:
            branches = [
                helper.make_graph(
                    [helper.make_node(below[0], ["a"], [name], domain=below[1])], name, [], [info(name, None)]
                )
                for name in ("t", "e")
            ]
            flag = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
            calls = [
                flag,
                helper.make_node("If", ["c"], ["b"], then_branch=branches[0], else_branch=branches[1]),
            ]
        functions.append(
            helper.make_function(
                "local",
                f"f{level}",
                ["a"],
                ["b"],
                calls,
                [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
            )
        )
    top = helper.make_node(f"f{levels - 1}", ["h"], ["y"], domain="local")
    return model([product("h"), top], functions=functions)


def loop(condition: str = "copied", limit: int | None = None) -> onnx.ModelProto:
    """A loop that runs for ever, its condition copied, constant, or computed to be true."""
    flag = info("go", [], TensorProto.BOOL)
    ways = {
        "copied": [helper.make_node("Identity", ["go"], ["on"])],
        "constant": [helper.make_node("Constant", [], ["on"], value=numpy_helper.from_array(np.array(True)))],
        "computed": [helper.make_node("GreaterOrEqual", ["i", "zero"], ["on"])],
    }
    body = helper.make_graph(
        [*ways[condition], helper.make_node("Tanh", ["v"], ["made"])],
        "body",
        [info("i", [], TensorProto.INT64), flag, info("v", ["N", 8])],
        [info("on", [], TensorProto.BOOL), info("made", ["N", 8])],
    )
    held = [
        WEIGHT,
        numpy_helper.from_array(np.array(True), "true"),
        numpy_helper.from_array(np.array(0), "zero"),
    ]
    held += [] if limit is None else [numpy_helper.from_array(np.array(limit), "limit")]
    return model(
        [
            product("h"),
            helper.make_node("Loop", ["" if limit is None else "limit", "true", "h"], ["y"], body=body),
        ],
        held,
    )


def typed(entries: int, kind: int = _FLOAT) -> onnx.ModelProto:
    tensor = onnx.TensorProto(name="w", data_type=kind, dims=[8, 8])
    getattr(tensor, helper.tensor_dtype_to_field(kind)).extend([1] * entries)
    return model([product()], [tensor])


def weight_with(value: float) -> onnx.ModelProto:
    numbers = numpy_helper.to_array(WEIGHT).copy()
    numbers[3, 4] = value
    return model([product()], [numpy_helper.from_array(numbers, "w")])


def bias_with(value: float) -> onnx.ModelProto:
    numbers = np.zeros(8, np.float32)
    numbers[2] = value
    return model(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])], [WEIGHT, numpy_helper.from_array(numbers, "b")]
    )


def recurrent_with(value: float) -> onnx.ModelProto:
    held = [numpy_helper.from_array(np.full((1, 32, 8), 0.1, np.float32), name) for name in ("w", "r")]
    numbers = numpy_helper.to_array(held[1]).copy()
    numbers[0, 1, 2] = value
    shape = (
        numpy_helper.from_array(np.array([1, -1, 8]), "as_sequence"),
        numpy_helper.from_array(np.array([-1, 8]), "as_rows"),
    )
    nodes = [
        helper.make_node("Reshape", ["x", "as_sequence"], ["s"]),
        helper.make_node("LSTM", ["s", "w", "r"], ["", "last"], hidden_size=8),
        helper.make_node("Reshape", ["last", "as_rows"], ["y"]),
    ]
    return model(nodes, [held[0], numpy_helper.from_array(numbers, "r"), *shape])


def conv(
    operator: str = "Conv",
    channels: int = 4,
    held: Sequence[onnx.TensorProto] = (KERNEL,),
    **attributes: object,
) -> onnx.ModelProto:
    node = helper.make_node(
        operator, ["x", *(tensor.name for tensor in held)], ["y"], name="conv", **attributes
    )
    graph = helper.make_graph(
        [node], "g", [info("x", [1, channels, 8, 8])], [info("y", ["a", "b", "c", "d"])], list(held)
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def twice(kind: str) -> onnx.ModelProto:
    proto = model([product("h", "one"), helper.make_node("Relu", ["h"], ["y"], name="two")])
    if kind == "node":
        proto.graph.node[1].name = "one"
    else:
        entries = {
            "input": proto.graph.input,
            "output": proto.graph.output,
            "initializer": proto.graph.initializer,
        }[kind]
        entries.append(entries[0])
    return proto


def twice_function() -> onnx.ModelProto:
    proto = doubling(1)
    proto.functions.append(proto.functions[0])
    return proto


def external(shape: tuple[int, int], **entries: str) -> Write:
    """A weight in a data file without content, as large as it has to be."""

    def write(folder: Path) -> Path:
        size = 4 * shape[0] * shape[1]
        with (folder / "m.data").open("wb") as file:
            file.truncate(size)
        tensor = onnx.TensorProto(name="w", data_type=_FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": "m.data", **entries}.items():
            tensor.external_data.add(key=key, value=value)
        graph = helper.make_graph(
            [product()], "g", [info("x", ["N", shape[0]])], [info("y", ["N", shape[1]])], [tensor]
        )
        return written(
            lambda: helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        )(folder)

    return write


def sparse(size: int, head: bytes = b"") -> Write:
    """A file that is a hole but for its first bytes."""

    def write(folder: Path) -> Path:
        path = folder / "m.onnx"
        path.write_bytes(head)
        os.truncate(path, size)
        return path

    return write


def unknown_rank(*, given: bool, made: bool) -> onnx.ModelProto:
    proto = model([product()])
    for value in [*(proto.graph.input if given else ()), *(proto.graph.output if made else ())]:
        value.type.tensor_type.ClearField("shape")
    return proto


REFUSED: dict[str, tuple[Write, str]] = {
    "functions that double": (written(lambda: doubling(60)), "nodes; supported are"),
    "functions that double in branches": (written(lambda: doubling(60, inside=True)), "nodes; supported are"),
    "functions a thousand deep": (written(lambda: doubling(1000)), r"more than 10\^\d+ nodes"),
    "a function defined twice": (written(twice_function), "defines a local function twice"),
    "a loop without end": (written(loop), "would run for ever"),
    "a loop with a constant condition": (written(lambda: loop("constant")), "would run for ever"),
    "a loop of 2^62 rounds": (
        written(lambda: loop(limit=2**62)),
        "would run 4,611,686,018,427,387,904 times",
    ),
    "a chain of 100,000 nodes": (written(lambda: chain(100_000)), "has 100,000 nodes; supported are 12,000"),
    "too many entries": (written(lambda: typed(80)), r"sizes \[8, 8\] holds 80 entries instead of 64"),
    "too few entries": (written(lambda: typed(63)), "holds 63 entries instead of 64"),
    "too many half entries": (
        written(lambda: typed(65, TensorProto.FLOAT16)),
        "holds 65 entries instead of 64",
    ),
    "too few packed entries": (
        written(lambda: typed(16, TensorProto.INT4)),
        "holds 16 entries instead of 32",
    ),
    "a tensor larger than memory": (
        external((1 << 20, 1 << 18)),
        "takes 1,099,511,627,776 bytes, and this machine has",
    ),
    "an offset of 9,000 digits": (external((8, 8), offset="9" * 9000), "which is no place in a file"),
    "a negative offset": (external((8, 8), offset="-4"), "has offset='-4', which is no place in a file"),
    "a length beyond the file": (
        external((8, 8), length=str(10**15)),
        "is said to be 1000000000000000 bytes",
    ),
    "NaN in a weight": (written(lambda: weight_with(np.nan)), "1 of 64 numbers of 'w' are NaN or infinite"),
    "an infinite weight": (
        written(lambda: weight_with(-np.inf)),
        "1 of 64 numbers of 'w' are NaN or infinite",
    ),
    "NaN in a bias": (written(lambda: bias_with(np.nan)), "1 of 8 numbers of 'b' are NaN or infinite"),
    "NaN in a recurrence": (
        written(lambda: recurrent_with(np.nan)),
        "1 of 256 numbers of 'r' are NaN or infinite",
    ),
    "a group that does not divide": (
        written(lambda: conv(group=3)),
        "has group=3, which does not divide the 4 channels",
    ),
    "a group that does not fit": (written(lambda: conv(group=1)), "reads 4 channels, but its weight"),
    "a transposed group": (
        written(lambda: conv("ConvTranspose", channels=6, group=3)),
        "has group=3, which does not divide",
    ),
    "transposed channels": (
        written(lambda: conv("ConvTranspose", channels=6)),
        "reads 6 channels, but its weight",
    ),
    "another kernel": (
        written(lambda: conv(group=2, kernel_shape=[5, 5])),
        r"has kernel_shape=\[5, 5\], but its weight",
    ),
    "an unknown auto_pad": (
        written(lambda: conv(group=2, auto_pad="SAME")),
        "has auto_pad='SAME'; ONNX knows",
    ),
    "a bias of another size": (
        written(lambda: conv(held=(KERNEL, numpy_helper.from_array(np.zeros(3, np.float32), "b")), group=2)),
        r"a bias of sizes \[3\], but makes 4",
    ),
    "two inputs of one name": (written(lambda: twice("input")), "two inputs of the name 'x'"),
    "two outputs of one name": (written(lambda: twice("output")), "two outputs of the name 'y'"),
    "two initializers of one name": (
        written(lambda: twice("initializer")),
        "two initializers of the name 'w'",
    ),
    "a sparse file": (sparse(_SPARSE_BYTES), "a protobuf at most 2,147,483,647"),
    "a sparse file below the limit": (sparse(_SPARSE_BYTES // 2), "it is no protobuf"),
    "a sparse file that begins well": (sparse(_SPARSE_BYTES // 2, b"\x08\x08"), "it is no protobuf"),
    "a part longer than the file": (sparse(1 << 20, b"\x3a\xff\xff\xff\xff\x0f"), "it is cut short"),
    "a file of a million parts": (
        written(lambda: onnx.ModelProto(functions=[onnx.FunctionProto()] * 1_000_000)),
        "more than 100,000 outermost parts",
    ),
}
"""Files that are refused when they are opened and looked at, and what is said of each."""

SERVED: dict[str, Write] = {
    "100,000 unused initializers": written(lambda: unused(100_000)),
    "a chain of 2,000 nodes": written(lambda: chain(2_000)),
    "functions that double a little": written(lambda: doubling(6)),
    "a loop of ten rounds": written(lambda: loop(limit=10)),
    "a loop whose end is not seen": written(lambda: loop("computed")),
    "an input of unknown rank": written(lambda: unknown_rank(given=True, made=False)),
    "an output of unknown rank": written(lambda: unknown_rank(given=False, made=True)),
    "nothing but unknown ranks": written(lambda: unknown_rank(given=True, made=True)),
    "a grouped convolution": written(lambda: conv(group=2)),
    "two nodes of one name": written(lambda: twice("node")),
}
"""Files that are odd, but sound."""
