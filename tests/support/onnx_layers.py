"""Layers of ONNX graphs, in the operators and spellings that they come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_bodies
import torch
from cells import Cell, Sizes, add, noise
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import node

FLOAT = TensorProto.FLOAT
MS = "com.microsoft"
ROWS, TOKENS, STEPS = (4, 24), (2, 3, 24), (3, 2, 16)
LINE, IMAGE, VOLUME = (2, 8, 11), (2, 8, 7, 9), (2, 8, 5, 6, 4)
Held = dict[str, np.ndarray]


def held(*shape: int, seed: int = 2, dtype: type = np.float32) -> np.ndarray:
    return noise(*shape, seed=seed).numpy().astype(dtype)


def graph(
    nodes: Sequence[onnx.NodeProto],
    constants: Held,
    fed: Sizes,
    opset: int = 17,
    ir: int = 8,
    kind: int = FLOAT,
    outputs: Sequence[str] = ("y",),
    overridable: Sequence[str] = (),
) -> onnx.ModelProto:
    domains = sorted({made.domain for made in nodes if made.domain})
    stored = [_tensor(array, name) for name, array in constants.items()]
    inputs = [helper.make_tensor_value_info("x", kind, fed)]
    inputs += [
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in stored
        if ir < 4 or tensor.name in overridable
    ]
    made = helper.make_graph(
        list(nodes), "g", inputs,
        [helper.make_tensor_value_info(name, kind, None) for name in outputs], stored,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=opsets, ir_version=ir))


def _tensor(array: np.ndarray, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def layer(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    constants: Held,
    fed: Sizes,
    sites: tuple[str, ...] = ("w",),
    left: str = "",
    dtype: torch.dtype = torch.float32,
    step: float = 0.0,
    **said: Any,
) -> None:
    """A row of one graph."""
    kinds = {torch.float16: TensorProto.FLOAT16, torch.float64: TensorProto.DOUBLE}
    said.setdefault("kind", kinds.get(dtype, FLOAT))

    def given() -> tuple[torch.Tensor, ...]:
        return (noise(*fed, seed=1).to(dtype),)

    add(Cell(name, "onnx", lambda: graph(nodes, constants, fed, **said), given, sites, left, step))


def made(name: str, make: Any, fed: Sizes, sites: tuple[str, ...], left: str = "") -> None:
    """A row of a graph that is written elsewhere."""
    add(Cell(name, "onnx", make, lambda: (noise(*fed, seed=1),), sites, left))


def recurrent(operator: str, directions: int = 1, **said: Any) -> tuple[list[onnx.NodeProto], Held]:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    constants = {
        "W": held(directions, gates * 8, 16), "R": held(directions, gates * 8, 8, seed=3),
        "B": held(directions, 2 * gates * 8, seed=4),
    }  # fmt: skip
    way = "bidirectional" if directions == 2 else "forward"
    read = "x W R B" if "P" not in said else "x W R B    P"
    constants |= {"P": held(1, 24)} if said.pop("P", False) else {}
    made_node = helper.make_node(
        operator, read.split(" "), ["y"], name="layer", hidden_size=8, direction=way, **said
    )
    return [made_node], constants


def recurrent_sites(*parts: str, directions: int = 1) -> tuple[str, ...]:
    ends = ("", "_reverse")[:directions]
    return tuple(f"layer.{part}_l0{end}" for end in ends for part in parts)


def contrib(operator: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """A node of ONNX Runtime's own domain; two spaces leave an input out."""
    return helper.make_node(operator, inputs.split(" "), outputs.split(" "), domain=MS, **attributes)


MATRIX, TALL = held(16, 24), held(24, 16)
KERNEL = held(12, 8, 3, 3)
layer("Linear", [node("MatMul", "x w", "p"), node("Add", "p b")], {"w": TALL, "b": held(16)}, TOKENS)
layer("Linear without bias", [node("Gemm", "x w", transB=1)], {"w": MATRIX}, ROWS)
layer("Conv1d", [node("Conv", "x w b", pads=[1, 1])], {"w": held(12, 8, 3), "b": held(12)}, LINE)
layer("Conv2d", [node("Conv", "x w", pads=[1] * 4)], {"w": KERNEL}, IMAGE)
layer("Conv3d", [node("Conv", "x w")], {"w": held(12, 8, 3, 3, 3)}, VOLUME)
layer(
    "Conv2d, strided and dilated",
    [node("Conv", "x w", strides=[2, 1], dilations=[1, 2], pads=[0, 1, 2, 1])],
    {"w": held(12, 8, 3, 2)},
    IMAGE,
)
layer("Conv2d, grouped", [node("Conv", "x w", group=2)], {"w": held(12, 4, 3, 3)}, IMAGE)
layer("Conv2d, depthwise", [node("Conv", "x w", group=8)], {"w": held(16, 1, 3, 3)}, IMAGE)
layer(
    "Conv2d, padding same",
    [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])],
    {"w": held(12, 8, 4, 3)},
    IMAGE,
)
layer(
    "Conv2d, padding reflected",
    [node("Pad", "x p", "q", mode="reflect"), node("Conv", "q w")],
    {"w": KERNEL, "p": np.array([0, 0, 1, 2, 0, 0, 1, 2])},
    IMAGE,
)
layer("ConvTranspose1d", [node("ConvTranspose", "x w", strides=[2], pads=[1, 1])], {"w": held(8, 6, 3)}, LINE)
layer(
    "ConvTranspose2d",
    [node("ConvTranspose", "x w", strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])],
    {"w": held(8, 6, 3, 3)},
    IMAGE,
)
layer("ConvTranspose3d", [node("ConvTranspose", "x w", strides=[2] * 3)], {"w": held(8, 6, 3, 3, 3)}, VOLUME)
layer("ConvTranspose2d, grouped", [node("ConvTranspose", "x w", group=2)], {"w": held(8, 3, 3, 3)}, IMAGE)
layer("LSTM", *recurrent("LSTM"), STEPS, recurrent_sites("input", "hidden"))
layer(
    "LSTM, two layers both ways",
    *recurrent("LSTM", 2),
    STEPS,
    recurrent_sites("input", "hidden", directions=2),
)
layer("LSTM with peepholes", *recurrent("LSTM", P=True), STEPS, (), "peepholes")
layer("GRU", *recurrent("GRU", linear_before_reset=1), STEPS, recurrent_sites("input", "hidden"))
layer(
    "GRU, reset before the product",
    *recurrent("GRU"),
    STEPS,
    recurrent_sites("input", "hidden", "hidden_new"),
)
layer("RNN", *recurrent("RNN"), STEPS, recurrent_sites("input", "hidden"))
layer(
    "Embedding",
    [node("Cast", "x", "i", to=7), node("Gather", "w i")],
    {"w": held(20, 16)},
    ROWS,
)
layer(
    "Embedding of columns",
    [node("Cast", "x", "i", to=7), node("Gather", "w i", axis=1)],
    {"w": held(20, 16)},
    ROWS,
    (),
    "another axis than its rows",
)
layer(
    "Embedding tied to the head",
    [
        node("Cast", "x", "i", to=7),
        node("Gather", "w i", "h"),
        node("Transpose", "w", "t"),
        node("MatMul", "h t"),
    ],
    {"w": held(20, 16)},
    ROWS,
)
layer(
    "Embedding tied to a copy in the head",
    [node("Cast", "x", "i", to=7), node("Gather", "w i", "h"), node("MatMul", "h val_0")],
    {"w": held(20, 16), "val_0": held(20, 16).T},
    ROWS,
)
layer("x @ w", [node("MatMul", "x w")], {"w": TALL}, TOKENS)
layer("w @ x", [node("MatMul", "w x")], {"w": held(16, 3)}, TOKENS)
layer(
    "Gemm, both transposed and scaled",
    [node("Gemm", "x w c", transA=1, transB=1, alpha=0.5, beta=2.0)],
    {"w": held(16, 4), "c": held(24, 16)},
    ROWS,
)
layer("Einsum", [node("Einsum", "x w", equation="bsi,oi->bso")], {"w": MATRIX}, TOKENS)
layer("Einsum that names no result", [node("Einsum", "x w", equation="...i,io")], {"w": TALL}, TOKENS)
layer(
    "Einsum into heads and out of them",
    [node("Einsum", "x v", "h", equation="bsi,hoi->bhso"), node("Einsum", "h w", equation="bhso,hom->bms")],
    {"v": held(2, 8, 24), "w": held(2, 8, 20)},
    TOKENS,
    ("v", "w"),
)
layer(
    "Einsum of several matrices",
    [node("Einsum", "x w", equation="bsi,bio->bso")],
    {"w": held(2, 24, 16)},
    TOKENS,
    (),
    "no product with one matrix",
)
layer("matrices of experts", [node("MatMul", "x w")], {"w": held(2, 24, 16)}, TOKENS, (), "several matrices")
layer("FusedConv", [node("FusedConv", "x w", domain=MS, activation="Relu")], {"w": KERNEL}, IMAGE)
layer(
    "FusedConv that clips",
    [node("FusedConv", "x w", domain=MS, activation="Clip", activation_params=[0.0, 6.0])],
    {"w": KERNEL},
    IMAGE,
)
layer(
    "FusedGemm",
    [node("FusedGemm", "x w", domain=MS, activation="LeakyRelu", activation_alpha=0.1, transB=1)],
    {"w": MATRIX},
    ROWS,
)
layer("FusedMatMul", [node("FusedMatMul", "x w", domain=MS, alpha=2.0)], {"w": TALL}, TOKENS)
layer(
    "FusedMatMul from the left, both transposed",
    [node("FusedMatMul", "w x", domain=MS, transA=1, transB=1)],
    {"w": TALL},
    TOKENS,
)
layer("TransposeMatMul", [node("TransposeMatMul", "x w", domain=MS, transB=1)], {"w": MATRIX}, TOKENS)
layer(
    "Attention of ONNX Runtime",
    [node("Attention", "x w b", domain=MS, num_heads=2)],
    {"w": held(24, 48), "b": held(48)},
    TOKENS,
)
layer(
    "Attention of ONNX Runtime, masked and causal",
    [contrib("Attention", "x w b m  a", num_heads=2, unidirectional=1, qkv_hidden_sizes=[16, 16, 20])],
    {
        "w": held(24, 52),
        "b": held(52),
        "m": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
        "a": held(2, 2, 3, 3, seed=5),
    },
    TOKENS,
)
layer(
    "Attention of ONNX Runtime with a past",
    [contrib("Attention", "x w b  p", "y now", num_heads=2), node("Identity", "now", "z")],
    {"w": held(24, 48), "b": held(48), "p": held(2, 2, 2, 4, 8)},
    TOKENS,
    (),
    "goes on from what it saw before",
    outputs=("y", "z"),
)
layer(
    "QAttention",
    [node("DynamicQuantizeLinear", "x", "i s z"), contrib("QAttention", "i w b s t  z", num_heads=2)],
    {
        "w": np.arange(-127, 1025, dtype=np.int64).reshape(24, 48).astype(np.int8),
        "b": held(48),
        "t": np.array(0.01, np.float32),
    },
    TOKENS,
    (),
    "quantized",
)
CODES = (TALL * 90).astype(np.int8)
STEPS_OF = {"s": np.linspace(0.01, 0.03, 16, dtype=np.float32), "z": np.zeros(16, np.int8)}
GRIDS = {
    "xs": np.array(0.02, np.float32), "xz": np.array(128, np.uint8),
    "ys": np.array(0.05, np.float32), "yz": np.array(128, np.uint8),
}  # fmt: skip
CODED, NUMBERED = node("QuantizeLinear", "x xs xz", "q"), node("DequantizeLinear", "c ys yz")
layer(
    "weight of int8 and its scales",
    [node("DequantizeLinear", "w s z", "f", axis=0), node("Gemm", "x f", transB=1)],
    {"w": CODES.T, **STEPS_OF},
    ROWS,
)
layer(
    "weight of uint8, bias of int32",
    [
        node("DequantizeLinear", "w s z", "f"),
        node("DequantizeLinear", "b s", "g"),
        node("Conv", "x f g", pads=[1] * 4),
    ],
    {
        "w": (KERNEL * 90 + 120).astype(np.uint8),
        "s": np.array(0.01, np.float32),
        "z": np.array(120, np.uint8),
        "b": np.arange(12, dtype=np.int32),
    },
    IMAGE,
)
layer(
    "weight of int8 with scales by input",
    [node("DequantizeLinear", "w s", "f", axis=0), node("MatMul", "x f")],
    {"w": CODES, "s": np.linspace(0.01, 0.03, 24, dtype=np.float32)},
    TOKENS,
    (),
    "other scales than",
)
layer(
    "QLinearConv",
    [CODED, node("QLinearConv", "q xs xz w s z ys yz b", "c", pads=[1] * 4), NUMBERED],
    {
        "w": (KERNEL * 90).astype(np.int8),
        "s": np.linspace(0.01, 0.03, 12, dtype=np.float32),
        "z": np.zeros(12, np.int8),
        "b": np.arange(12, dtype=np.int32) * 20,
        **GRIDS,
    },
    IMAGE,
    step=0.05,
)
layer(
    "QLinearMatMul",
    [CODED, node("QLinearMatMul", "q xs xz w s z ys yz", "c"), NUMBERED],
    {"w": CODES, **STEPS_OF, **GRIDS},
    TOKENS,
    step=0.05,
)
layer(
    "QGemm",
    [CODED, contrib("QGemm", "q xs xz w s z b", transB=1, alpha=0.5)],
    {"w": CODES.T, **STEPS_OF, **GRIDS, "b": np.arange(16, dtype=np.int32) * 20},
    ROWS,
)
layer(
    "MatMulInteger",
    [node("DynamicQuantizeLinear", "x", "q a z"), node("MatMulInteger", "q w z", "c"),
     node("Cast", "c", "f", to=FLOAT), node("Mul", "f a")],
    {"w": CODES},
    TOKENS,
    (),
    "quantized",
)  # fmt: skip
layer(
    "MultiHeadAttention after layers",
    [
        *(node("MatMul", f"x {name}", f"h{name}") for name in "qkv"),
        node("MultiHeadAttention", "hq hk hv b", domain=MS, num_heads=2),
    ],
    {**{name: held(24, 16, seed=place) for place, name in enumerate("qkv")}, "b": held(48)},
    TOKENS,
    ("q", "k", "v"),
)
layer(
    "SkipLayerNormalization after a layer",
    [node("MatMul", "x w", "h"), node("SkipLayerNormalization", "h h g b", domain=MS)],
    {"w": TALL, "g": held(16), "b": held(16)},
    TOKENS,
)
layer(
    "BiasGelu after a layer",
    [node("MatMul", "x w", "h"), node("BiasGelu", "h b", domain=MS)],
    {"w": TALL, "b": held(16)},
    TOKENS,
)
layer(
    "weight in a Constant",
    [node("Constant", "", "w", value=numpy_helper.from_array(TALL)), node("MatMul", "x w")],
    {},
    TOKENS,
)
layer("weight transposed", [node("Transpose", "w", "t"), node("MatMul", "x t")], {"w": MATRIX}, TOKENS)
layer(
    "weight reshaped",
    [node("Reshape", "w s", "t"), node("MatMul", "x t")],
    {"w": TALL.reshape(-1), "s": np.array([24, 16])},
    TOKENS,
)
layer(
    "weight cast",
    [node("Cast", "w", "t", to=FLOAT), node("MatMul", "x t")],
    {"w": TALL.astype(np.float16)},
    TOKENS,
)
layer(
    "weight scaled",
    [node("ReduceL2", "w", "n", axes=[1], keepdims=1), node("Div", "w n", "d"), node("Mul", "d g", "t"),
     node("MatMul", "x t")],
    {"w": TALL, "g": held(24, 1)},
    TOKENS,
)  # fmt: skip
layer(
    "weight taken apart",
    [
        node("Split", "proj", "q k", axis=1),
        node("Split", "shift", "s t"),
        node("MatMul", "x q", "a"),
        node("MatMul", "x k", "b"),
        node("Add", "a s", "c"),
        node("Add", "b t", "d"),
        node("Mul", "c d"),
    ],
    {"proj": TALL, "shift": held(16)},
    TOKENS,
    ("proj.0", "proj.1"),
)
layer(
    "weight put together",
    [node("Concat", "w v", "t", axis=1), node("MatMul", "x t")],
    {"w": TALL[:, :8], "v": TALL[:, 8:]},
    TOKENS,
)
layer(
    "weight filled in",
    [node("ConstantOfShape", "s", "w", value=numpy_helper.from_array(np.array([0.25], np.float32))),
     node("MatMul", "x w")],
    {"s": np.array(TALL.shape, dtype=np.int64)},
    TOKENS,
)  # fmt: skip
layer("weight that is an input too", [node("MatMul", "x w")], {"w": TALL}, TOKENS, overridable=("w",))
layer(
    "weight that is an output too",
    [node("MatMul", "x w")],
    {"w": TALL},
    TOKENS,
    (),
    "also a graph output",
    outputs=("y", "w"),
)
layer(
    "called three times",
    [node("MatMul", "x w", "a"), node("MatMul", "a w", "b"), node("MatMul", "b w")],
    {"w": held(16, 16)},
    (4, 16),
)
layer(
    "called on a constant first",
    [node("MatMul", "c w", "a"), node("MatMul", "x w", "b"), node("Add", "a b")],
    {"w": held(16, 16), "c": held(1, 16)},
    (4, 16),
)
layer(
    "its weight also read",
    [node("MatMul", "x w", "h"), node("ReduceSum", "w", "s", keepdims=0), node("Mul", "h s")],
    {"w": TALL},
    TOKENS,
    (),
    "also read by a ReduceSum node",
)
layer(
    "DeformConv",
    [node("DeformConv", "x w o")],
    {"w": KERNEL, "o": np.zeros((2, 18, 5, 7), np.float32)},
    IMAGE,
    (),
    "deformable",
    opset=19,
)
layer("float16", [node("MatMul", "x w")], {"w": TALL.astype(np.float16)}, TOKENS, dtype=torch.float16)
layer("float64", [node("MatMul", "x w")], {"w": TALL.astype(np.float64)}, TOKENS, dtype=torch.float64)
for _opset, _ir in (
    (7, 3),
    (8, 3),
    (9, 4),
    (11, 6),
    (13, 7),
    (15, 8),
    (18, 8),
    (20, 9),
    (21, 10),
    (22, 10),
    (23, 11),
    (24, 12),
    (25, 13),
    (26, 13),
):
    layer(
        f"opset {_opset}, IR {_ir}",
        [node("Conv", "x w", "c"), node("Relu", "c")],
        {"w": KERNEL},
        IMAGE,
        opset=_opset,
        ir=_ir,
    )
made("branch of an If", lambda: onnx_bodies.branches(own=True), (4, 8), ("b",), "not called when")
made("body of a Loop", onnx_bodies.loop, (4, 8), ("cell",))
made("body of a Scan", onnx_bodies.scan, (2, 5, 8), ("own", "input"))
made("branch in a Loop", onnx_bodies.nested, (4, 8), ("deep",))
made("local function", onnx_bodies.functions, (4, 8), ("one", "k", "two"))
