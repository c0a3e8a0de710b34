"""Random ONNX graphs: small, and written in the many ways in which exporters and people write layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import onnx
import torch
from nets import Case
from onnx import TensorProto, helper, numpy_helper

Sizes = tuple[int, ...]
OPSET = 17
TYPES = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64, TensorProto.FLOAT16: np.float16}


@dataclass(frozen=True)
class Value:
    """A value of the graph: name, sizes with -1 where the samples lie, and the axis of its channels."""

    name: str
    sizes: Sizes
    channel: int

    @property
    def channels(self) -> int:
        return self.sizes[self.channel]

    @property
    def last(self) -> bool:
        """Whether the channels lie along the last axis and the samples do not."""
        return self.channel == len(self.sizes) - 1

    @property
    def is_image(self) -> bool:
        """Whether a convolution can read it."""
        return self.channel == 1 and len(self.sizes) > 2 and self.sizes[0] == -1


@dataclass
class Draft:
    """A graph that is being written."""

    rng: Random
    dtype: int
    numbers: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def op(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{kind}_{name}", **attributes))
        return name

    def hold(self, array: np.ndarray) -> str:
        """A constant: an initializer, or now and then a Constant node."""
        array = np.ascontiguousarray(array, TYPES[self.dtype])
        if self.rng.random() < 0.15:
            return self.op("Constant", [], value=numpy_helper.from_array(array))
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def matrix(self, rows: int, columns: int) -> np.ndarray:
        """A matrix of decaying spectrum."""
        u, s, v = np.linalg.svd(self.numbers.normal(size=(rows, columns)), full_matrices=False)
        return (u * np.exp(-np.arange(len(s)) * 4 / len(s))) @ v * 2

    def kernel(self, *sizes: int) -> np.ndarray:
        return self.matrix(sizes[0], int(np.prod(sizes[1:]))).reshape(sizes)

    def vector(self, *sizes: int) -> np.ndarray:
        return 0.3 * self.numbers.normal(size=sizes)

    def width(self) -> int:
        return self.rng.choice((8, 12, 16))


def _swapped(x: Value, axis: int, size: int, name: str) -> Value:
    return Value(name, (*x.sizes[:axis], size, *x.sizes[axis + 1 :]), x.channel)


def matmul(g: Draft, x: Value) -> Value:
    """`x @ W`, perhaps with a bias of its rank, added on either side."""
    out = g.width()
    y = g.op("MatMul", [x.name, g.hold(g.matrix(x.channels, out))])
    shape = g.rng.choice((None, (out,), (1, out), (1,) * (len(x.sizes) - 1) + (out,), ()))
    if shape is not None:
        pair = [y, g.hold(g.vector(*shape))]
        y = g.op("Add", pair if g.rng.random() < 0.5 else pair[::-1])
    return _swapped(x, x.channel, out, y)


def left_matmul(g: Draft, x: Value) -> Value:
    """`W @ x`: over the axis before the last."""
    axis, out = len(x.sizes) - 2, g.width()
    y = g.op("MatMul", [g.hold(g.matrix(out, x.sizes[axis])), x.name])
    if g.rng.random() < 0.5:
        y = g.op("Add", [y, g.hold(g.vector(out, 1))])
    return _swapped(x, axis, out, y)


def gemm(g: Draft, x: Value) -> Value:
    """`alpha A' B' + beta C` with every transposition and with a C that need be no bias."""
    out, attributes = g.width(), {"alpha": g.rng.choice((1.0, 0.5)), "beta": g.rng.choice((1.0, 2.0))}
    weight, flips = g.matrix(x.channels, out), [g.rng.random() < 0.4, g.rng.random() < 0.5]
    data = g.op("Transpose", [x.name], perm=[1, 0]) if flips[0] else x.name
    inputs = [data, g.hold(weight.T if flips[1] else weight)]
    third = g.rng.choice(("none", "vector", "row", "one", "scalar", "column of one", "data"))
    shapes = {"vector": (out,), "row": (1, out), "one": (1,), "scalar": (), "column of one": (1, 1)}
    if third in shapes:
        inputs.append(g.hold(g.vector(*shapes[third])))
    if third == "data":
        inputs.append(g.op("MatMul", [x.name, g.hold(g.matrix(x.channels, out))]))
    g.said.append(f"C {third}, alpha {attributes['alpha']}, beta {attributes['beta']}, flips {flips}")
    return _swapped(x, 1, out, g.op("Gemm", inputs, transA=int(flips[0]), transB=int(flips[1]), **attributes))


def left_gemm(g: Draft, x: Value) -> Value:
    """`W x' + C` with C a column, and back."""
    out, flips = g.width(), [g.rng.random() < 0.5, g.rng.random() < 0.5]
    weight = g.matrix(out, x.channels)
    data = x.name if flips[1] else g.op("Transpose", [x.name], perm=[1, 0])
    inputs = [g.hold(weight.T if flips[0] else weight), data]
    if g.rng.random() < 0.7:
        inputs.append(g.hold(g.vector(out, 1)))
    y = g.op("Gemm", inputs, transA=int(flips[0]), transB=int(flips[1]))
    return _swapped(x, 1, out, g.op("Transpose", [y], perm=[1, 0]))


def conv(g: Draft, x: Value) -> Value:
    """A convolution of one or two axes: any padding, stride, dilation and groups."""
    axes, out = len(x.sizes) - 2, g.width()
    groups = 4 if x.channels % 4 == 0 and g.rng.random() < 0.15 else 1
    kernel = tuple(g.rng.choice((1, 2, 3, 3)) for _ in range(axes))
    stride = tuple(g.rng.choice((1, 1, 2)) for _ in range(axes))
    inputs = [x.name, g.hold(g.kernel(out, x.channels // groups, *kernel))]
    if g.rng.random() < 0.5:
        inputs.append(g.hold(g.vector(out)))
    mode, attributes = (
        g.rng.choice(("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET", "NOTSET")),
        {"strides": stride, "group": groups},
    )
    if mode == "NOTSET":
        dilation = tuple(g.rng.choice((1, 1, 2)) for _ in range(axes))
        reach = [1 + d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = [g.rng.choice((0, r // 2, r - 1)) for r in reach]
        after = [r - 1 - b for r, b in zip(reach, before, strict=True)]
        attributes |= {"dilations": dilation, "pads": (*before, *after)}
        sizes = [(size - 1) // s + 1 for size, s in zip(x.sizes[2:], stride, strict=True)]
    else:
        attributes |= {"auto_pad": mode}
        lost = [0 if mode != "VALID" else k - 1 for k in kernel]
        sizes = [(size - less - 1) // s + 1 for size, less, s in zip(x.sizes[2:], lost, stride, strict=True)]
    g.said.append(f"{mode}, kernel {kernel}, strides {stride}, groups {groups}")
    return Value(g.op("Conv", inputs, **attributes), (-1, out, *sizes), 1)


def norm(g: Draft, x: Value) -> Value:
    """A batch-norm, on axis 1 wherever the channels lie."""
    width = x.sizes[1]
    numbers = [0.5 + g.numbers.random(width), g.vector(width), g.vector(width), 0.5 + g.numbers.random(width)]
    name = g.op(
        "BatchNormalization",
        [x.name, *(g.hold(array) for array in numbers)],
        epsilon=g.rng.choice((1e-5, 1e-3)),
    )
    return Value(name, x.sizes, x.channel)


def activation(g: Draft, x: Value) -> Value:
    kind = g.rng.choice(("Relu", "Tanh", "Sigmoid", "LeakyRelu", "Swish"))
    name = g.op("Mul", [x.name, g.op("Sigmoid", [x.name])]) if kind == "Swish" else g.op(kind, [x.name])
    return Value(name, x.sizes, x.channel)


def residual(g: Draft, x: Value) -> Value:
    """A layer and back, and the sum."""
    inner = activation(g, layer(g, x)) if x.last else x
    if not x.last or inner.sizes[:-1] != x.sizes[:-1]:
        return Value(g.op("Add", [x.name, activation(g, x).name]), x.sizes, x.channel)
    back = g.op("MatMul", [inner.name, g.hold(g.matrix(inner.channels, x.channels))])
    return Value(g.op("Add", [x.name, back]), x.sizes, x.channel)


def shared(g: Draft, x: Value) -> Value:
    """One initializer with two readers: layers, its own transpose, or a sum of its squares."""
    c = x.channels
    held, way = g.hold(g.matrix(c, c)), g.rng.choice(("twice", "transposed", "measured", "gemm"))
    g.said.append(way)
    y = g.op("Tanh", [g.op("MatMul", [x.name, held])])
    if way == "measured":
        return Value(
            g.op("Mul", [y, g.op("ReduceMean", [g.op("Mul", [held, held])], keepdims=0)]), x.sizes, x.channel
        )
    if way == "gemm" and len(x.sizes) == 2:
        return Value(g.op("Gemm", [y, held], transB=1), x.sizes, x.channel)
    again = g.op("Transpose", [held], perm=[1, 0]) if way == "transposed" else held
    return Value(g.op("MatMul", [y, again]), x.sizes, x.channel)


def turn(g: Draft, x: Value) -> Value:
    """Other axes."""
    if len(x.sizes) == 2:
        return x
    if len(x.sizes) == 4:
        if x.channel == 1 and g.rng.random() < 0.6:
            return Value(g.op("Flatten", [g.op("GlobalAveragePool", [x.name])]), x.sizes[:2], 1)
        perm = (0, 2, 3, 1) if x.channel == 1 else (0, 3, 1, 2)
        return Value(
            g.op("Transpose", [x.name], perm=perm), tuple(x.sizes[axis] for axis in perm), 4 - x.channel
        )
    if x.sizes[0] != -1 or g.rng.random() < 0.4:
        axis = 0 if x.sizes[0] != -1 else 3 - x.channel
        return Value(g.op("ReduceMean", [x.name], axes=[axis], keepdims=0), (-1, x.channels), 1)
    return Value(g.op("Transpose", [x.name], perm=[0, 2, 1]), (-1, x.sizes[2], x.sizes[1]), 3 - x.channel)


def layer(g: Draft, x: Value) -> Value:
    """A layer that these axes allow."""
    ways: list[Callable[[Draft, Value], Value]] = []
    if x.is_image:
        ways += [conv, conv]
    if x.last:
        ways += [gemm, gemm, left_gemm, matmul] if len(x.sizes) == 2 else [matmul, matmul]
    if len(x.sizes) > 2 and x.sizes[-2] != -1:
        ways += [left_matmul]
    way = g.rng.choice(ways)
    g.said.append(way.__name__)
    return way(g, x)


def layer_and_norm(g: Draft, x: Value) -> Value:
    y = layer(g, x)
    return activation(g, norm(g, y) if y.sizes[1] != -1 else y)


INPUTS: dict[str, Value] = {
    "row": Value("x", (-1, 12), 1),
    "rows": Value("x", (-1, 6, 12), 2),
    "time first": Value("x", (6, -1, 12), 2),
    "line": Value("x", (-1, 6, 9), 1),
    "image": Value("x", (-1, 4, 9, 8), 1),
    "grid": Value("x", (-1, 3, 2, 12), 3),
}


def graph(rng: Random) -> Case:
    """A graph with data.

    Raises nothing, but ONNX Runtime may refuse it (some types have no kernels there).
    """
    dtype = rng.choice(
        (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
    )
    g = Draft(rng, dtype, np.random.default_rng(rng.randrange(2**31)))
    kind = rng.choice([kind for kind, x in INPUTS.items() if dtype != TensorProto.DOUBLE or not x.is_image])
    x = INPUTS[kind]
    y, hidden = x, []
    for _ in range(rng.choice((1, 2, 3, 4))):
        ways = [
            layer,
            layer_and_norm,
            layer_and_norm,
            activation,
            residual,
            turn,
            *([shared] if y.last else []),
            *([norm] if y.sizes[1] != -1 else []),
        ]
        way = rng.choice(ways)
        g.said.append(way.__name__)
        y = way(g, y)
        hidden.append(y)
    y = layer(g, y)
    outputs = [Value(g.op("Softmax", [y.name], axis=-1), y.sizes, y.channel) if rng.random() < 0.3 else y]
    if rng.random() < 0.4 and hidden[-1].name != x.name:
        outputs.append(hidden[-1])
    return _case(g, kind, x, outputs)


def _case(g: Draft, kind: str, x: Value, outputs: Sequence[Value]) -> Case:
    rng = g.rng
    fixed = (
        rng.random() < 0.15 and x.sizes[0] == -1
    )  # an axis of one elsewhere is not known to be that of the samples
    samples = 1 if fixed else "n"
    sizes = [samples if size == -1 else size for size in x.sizes]
    declared = [helper.make_tensor_value_info("x", g.dtype, sizes)]
    inputs = [
        helper.make_tensor_value_info(name, g.dtype, array.shape)
        for name, array in g.weights.items()
        if rng.random() < 0.1
    ]
    if rng.random() < 0.3:
        rng.shuffle(g.nodes)
        g.said.append("unsorted")
    graph = helper.make_graph(
        g.nodes,
        "g",
        declared + inputs,
        [helper.make_tensor_value_info(value.name, g.dtype, None) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in g.weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)

    def draw(count: int) -> np.ndarray:
        shape = [count if size == -1 else size for size in x.sizes]
        return g.numbers.normal(size=shape).astype(TYPES[g.dtype])

    data, fresh = draw(rng.choice((5, 9, 16, 24))), [draw(7), draw(1)]
    axis = x.sizes.index(-1)
    apart = [np.split(array, array.shape[axis], axis) for array in (data, *fresh)]
    calls = (
        [[{"x": one} for one in ones] for ones in apart]
        if fixed
        else [[{"x": array}] for array in (data, *fresh)]
    )
    text = (
        f"{np.dtype(TYPES[g.dtype])} {kind}{sizes} {'; '.join(g.said)}; "
        f"{len(inputs)} initializers are inputs; {len(outputs)} outputs"
    )
    dtype = {
        TensorProto.FLOAT: torch.float32,
        TensorProto.DOUBLE: torch.float64,
        TensorProto.FLOAT16: torch.float16,
    }[g.dtype]
    return Case(proto, {"x": data}, calls[0], [*calls[1], *calls[2]], text, dtype)
