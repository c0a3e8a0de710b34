"""Random ONNX graphs of everything beside plain layers.

Recurrence, branches, loops, weights that are computed, and fused operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

STEPS, CHANNELS = 4, 12
FLOAT, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
MS = "com.microsoft"


@dataclass
class Sketch:
    """Nodes of one graph, with names that no other of the model has; values are `[t, n, channels]`."""

    rng: Random
    held: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    count: list[int] = field(default_factory=lambda: [0])

    def name(self, wanted: str) -> str:
        self.count[0] += 1
        return f"{wanted}{self.count[0]}"

    def op(self, operator: str, inputs: list[str], domain: str = "", **attributes: object) -> str:
        made = self.name(operator.lower())
        attributes |= {"domain": domain} if domain else {}
        self.nodes.append(helper.make_node(operator, inputs, [made], name=f"{made}_node", **attributes))
        return made

    def hold(self, array: np.ndarray, wanted: str = "layer") -> str:
        name = f"{self.name(wanted)}.weight"
        self.held[name] = array
        return name

    def weight(self, *shape: int) -> np.ndarray:
        drawn = np.random.default_rng(self.rng.randrange(2**31)).standard_normal(shape)
        return (drawn / np.sqrt(shape[-1])).astype(np.float32)

    def ints(self, *numbers: int) -> str:
        name = self.name("ints")
        self.held[name] = np.array(numbers, dtype=np.int64)
        return name

    def inner(self) -> Sketch:
        """The body of a node; what it holds is held outside."""
        return Sketch(self.rng, self.held, [], self.count)

    def graph(
        self,
        outputs: list[tuple[str, int]],
        inputs: Sequence[tuple[str, int]] = (),
        floats: Sequence[str | int] = (STEPS, "n", CHANNELS),
    ) -> GraphProto:
        """The nodes as a graph; what is no number of floats has no axis."""
        values = [
            [
                helper.make_tensor_value_info(name, kind, floats if kind == FLOAT else [])
                for name, kind in part
            ]
            for part in (inputs, outputs)
        ]
        return helper.make_graph(self.nodes, self.name("graph"), *values)


def matrix(g: Sketch, rows: int = CHANNELS, columns: int = CHANNELS) -> str:
    """A matrix, held plainly or computed from what is held."""
    array = g.weight(rows, columns)
    way = g.rng.choice(("plain", "plain", "transposed", "reshaped", "cast", "joined", "sliced", "unsqueezed"))
    if way == "transposed":
        return g.op("Transpose", [g.hold(array.T.copy())], perm=[1, 0])
    if way == "reshaped":
        return g.op("Reshape", [g.hold(array.reshape(-1)), g.ints(rows, columns)])
    if way == "cast":
        return g.op("Cast", [g.hold(array.astype(np.float16))], to=FLOAT)
    if way == "joined":
        return g.op("Concat", [g.hold(array[:, :4].copy()), g.hold(array[:, 4:].copy())], axis=1)
    if way == "sliced":
        wider = np.concatenate([array, array[:2]])
        return g.op("Slice", [g.hold(wider), g.ints(0), g.ints(rows), g.ints(0)])
    if way == "unsqueezed":
        return g.op("Squeeze", [g.op("Unsqueeze", [g.hold(array), g.ints(0)]), g.ints(0)])
    return g.hold(array)


def product(g: Sketch, x: str) -> str:
    way = g.rng.choice(("MatMul", "biased", "Einsum", "FusedMatMul"))
    if way == "Einsum":
        return g.op("Einsum", [x, matrix(g)], equation="tni,io->tno")
    if way == "FusedMatMul":
        return g.op("FusedMatMul", [x, matrix(g)], domain=MS, alpha=0.5)
    y = g.op("MatMul", [x, matrix(g)])
    return y if way == "MatMul" else g.op("Add", [y, g.hold(g.weight(CHANNELS), "bias")])


def twice(g: Sketch, x: str) -> str:
    held = matrix(g)
    return g.op("MatMul", [g.op("Tanh", [g.op("MatMul", [x, held])]), held])


def activation(g: Sketch, x: str) -> str:
    return g.op(g.rng.choice(("Relu", "Tanh", "Sigmoid")), [x])


def residual(g: Sketch, x: str) -> str:
    return g.op("Add", [x, product(g, activation(g, x))])


def recurrence(g: Sketch, x: str) -> str:
    operator = g.rng.choice(("LSTM", "GRU", "RNN"))
    gates, way = (
        {"LSTM": 4, "GRU": 3, "RNN": 1}[operator],
        g.rng.choice(("forward", "reverse", "bidirectional")),
    )
    d = 2 if way == "bidirectional" else 1
    shapes = {"w": (d, gates * CHANNELS, CHANNELS), "r": (d, gates * CHANNELS, CHANNELS)}
    inputs = [x, *(g.hold(g.weight(*shape), key) for key, shape in shapes.items())]
    if g.rng.random() < 0.7:
        inputs.append(g.hold(g.weight(d, 2 * gates * CHANNELS), "b"))
    more = {"linear_before_reset": g.rng.choice((0, 1))} if operator == "GRU" else {}
    more |= {"clip": 0.8} if g.rng.random() < 0.2 else {}
    y = g.op(operator, inputs, hidden_size=CHANNELS, direction=way, **more)
    return g.op("ReduceMean", [y], axes=[1], keepdims=0)


def convolution(g: Sketch, x: str) -> str:
    turned = g.op("Transpose", [x], perm=[1, 2, 0])
    y = g.op("Conv", [turned, g.hold(g.weight(CHANNELS, CHANNELS, 3))], pads=[1, 1])
    return g.op("Transpose", [y], perm=[2, 0, 1])


def branch(g: Sketch, x: str) -> str:
    total = g.op("ReduceSum", [x], keepdims=0)
    holds = g.op(g.rng.choice(("Less", "Greater")), [total, g.hold(np.array(1e9, np.float32), "most")])
    parts = {}
    for key in ("then_branch", "else_branch"):
        inner = g.inner()
        y = block(inner, x, depth=1)
        parts[key] = inner.graph([(y, FLOAT)])
    return g.op("If", [holds], **parts)


def loop(g: Sketch, x: str) -> str:
    inner, (i, on, state) = g.inner(), (g.name(key) for key in ("i", "on", "state"))
    y = inner.op("Tanh", [block(inner, state, depth=1)])
    still = inner.op("Identity", [on])
    body = inner.graph([(still, BOOL), (y, FLOAT)], [(i, I64), (on, BOOL), (state, FLOAT)])
    rounds, going = g.name("rounds"), g.name("going")
    g.held |= {rounds: np.array(g.rng.choice((1, 2, 3))), going: np.array(True)}
    return g.op("Loop", [rounds, going, x], body=body)


def scan(g: Sketch, x: str) -> str:
    inner, (state, part) = g.inner(), (g.name(key) for key in ("state", "part"))
    own, given = (inner.op("MatMul", [value, matrix(g)]) for value in (state, part))
    y = inner.op("Tanh", [inner.op("Add", [own, given])])
    seen = inner.op("Identity", [y])
    body = inner.graph([(y, FLOAT), (seen, FLOAT)], [(state, FLOAT), (part, FLOAT)], ("n", CHANNELS))
    start = g.op("ReduceMean", [x], axes=[0], keepdims=0)
    last, made = g.name("last"), g.name("scan")
    back = {"scan_input_directions": [1], "scan_output_directions": [1]} if g.rng.random() < 0.5 else {}
    g.nodes.append(
        helper.make_node(
            "Scan", [start, x], [last, made], name=f"{made}_node", body=body, num_scan_inputs=1, **back
        )
    )
    return made


SIMPLE: tuple[Callable[[Sketch, str], str], ...] = (product, twice, activation, residual)
BLOCKS = (*SIMPLE, product, recurrence, recurrence, convolution, branch, loop, scan)


def block(g: Sketch, x: str, depth: int = 0) -> str:
    return g.rng.choice(BLOCKS if depth == 0 else SIMPLE)(g, x)


def broad(seed: int, blocks: int) -> ModelProto:
    """A model of so many blocks and a product, from `x[4, n, 12]` to `y`."""
    g, y = Sketch(Random(seed)), "x"
    for _ in range(blocks):
        y = block(g, y)
    g.nodes.append(helper.make_node("MatMul", [y, matrix(g)], ["y"], name="head"))
    graph = helper.make_graph(
        g.nodes, "broad", [helper.make_tensor_value_info("x", FLOAT, [STEPS, "n", CHANNELS])],
        [helper.make_tensor_value_info("y", FLOAT, [STEPS, "n", CHANNELS])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in g.held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def nodes_of(proto: ModelProto) -> list[bytes]:
    """The nodes of the main graph as they are stored, in an order of their own."""
    return sorted(node.SerializeToString() for node in proto.graph.node)
