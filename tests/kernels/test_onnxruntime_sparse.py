"""The sparse operators of com.tdpass in ONNX Runtime, against what their functions say that they compute."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_nodes import RNG, Arrays, close, numbers, one_node, opened, run
from setting import ENDINGS

from tdpass.kernels.blocks import CYCLES
from tdpass.models.onnx.operators.fused_sparse import SparseOp

GEOMETRIES: dict[str, dict[str, object]] = {
    "plain": {},
    "padded": {"pads_1": (1, 1, 1, 1)},
    "steps": {"strides_1": (2, 2), "pads_1": (0, 1, 1, 0)},
    "apart": {"dilations_1": (2, 1), "strides_1": (1, 3)},
}
REST: dict[str, object] = {
    "group_1": 1,
    "strides_1": (1, 1),
    "pads_1": (0, 0, 0, 0),
    "dilations_1": (1, 1),
}


def weight_of(*shape: int, block: int = 1, kept: float = 0.2) -> np.ndarray:
    """Zeros but for some blocks of so many outputs, and a row of nothing."""
    tiles = RNG.random((-(-shape[0] // block), *shape[1:])) < kept
    weight = numbers(*shape) * np.repeat(tiles, block, 0)[: shape[0]]
    weight[shape[0] // 2] = 0
    return weight.astype(np.float32)


def conv_case(
    geometry: str, block: int, op: SparseOp, *, line: bool = False
) -> tuple[onnx.ModelProto, Arrays]:
    attributes = {**REST, **GEOMETRIES[geometry]}
    inputs, constants = {"x": numbers(2, 5, 9, 21)}, {"w": weight_of(19, 5, 3, 2, block=block)}
    if line:
        attributes = {name: value if value == 1 else (1,) * (len(value) // 2) for name, value in REST.items()}
        inputs, constants = {"x": numbers(2, 5, 21)}, {"w": weight_of(19, 5, 3, block=block)}
    if op.bias:
        constants["bias"] = numbers(19, 1)[:, 0]
    if op.residual:
        plain = one_node(SparseOp(False, False, False, "identity"), attributes, {"w": constants["w"]}, inputs)
        inputs["residual"] = numbers(*run(plain, inputs).shape)
    return one_node(op, attributes, constants, inputs), inputs


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_compute_what_their_functions_say(library: str, geometry: str) -> None:
    for block in CYCLES:
        model, inputs = conv_case(geometry, block, SparseOp(False, True, False, "relu"))
        assert close(run(model, inputs, library), run(model, inputs))
    model, inputs = conv_case("plain", 1, SparseOp(False, False, False, "identity"), line=True)
    assert close(run(model, inputs, library), run(model, inputs))


def linear_case(shape: tuple[int, ...], op: SparseOp, weight: np.ndarray) -> tuple[onnx.ModelProto, Arrays]:
    (outputs, inner), constants = weight.shape, {"w": weight}
    inputs = {"x": numbers(*shape, inner)}
    if op.bias:
        constants["bias"] = numbers(outputs, 1)[:, 0]
    if op.residual:
        inputs["residual"] = numbers(*shape, outputs)
    return one_node(op, {}, constants, inputs), inputs


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (2, 3, 40)])
@pytest.mark.parametrize("block", CYCLES)
def test_products_compute_what_their_functions_say(library: str, block: int, shape: tuple[int, ...]) -> None:
    for o, i, kept in ((33, 50, 0.2), (3, 200, 0.02), (1, 1, 0.0), (16, 7, 1.0)):
        op = SparseOp(True, True, False, "identity")
        model, inputs = linear_case(shape, op, weight_of(o, i, block=block, kept=kept))
        assert close(run(model, inputs, library), run(model, inputs))


@pytest.mark.parametrize("activation", ENDINGS)
@pytest.mark.parametrize("linear", [True, False])
def test_bias_residual_and_activation(library: str, linear: bool, activation: str) -> None:
    for bias, residual in ((False, False), (True, False), (False, True), (True, True)):
        op = SparseOp(linear, bias, residual, activation)
        model, inputs = linear_case((2, 5), op, weight_of(33, 20)) if linear else conv_case("padded", 1, op)
        assert close(run(model, inputs, library), run(model, inputs))
        assert close(ReferenceEvaluator(model).run(None, inputs)[0], run(model, inputs))


def test_a_weight_that_is_no_constant_is_packed_in_every_call(library: str) -> None:
    op, weight = SparseOp(True, False, False, "identity"), weight_of(33, 20)
    inputs = {"x": numbers(3, 20), "w": weight}
    session = opened(one_node(op, {}, {}, inputs, open_axis=9), library)
    for scale in (1, 2):
        given = {"x": inputs["x"], "w": scale * weight}
        assert close(session.run(None, given)[0], scale * inputs["x"] @ weight.T)


@pytest.mark.parametrize(
    ("sizes", "attributes", "why"),
    [((4, 3, 1, 1), {"group_1": 2}, "several groups"), ((4, 2, 1, 1), {}, "channels come")],
)
def test_what_is_not_served_is_said(
    library: str, sizes: tuple[int, ...], attributes: dict[str, object], why: str
) -> None:
    op = SparseOp(False, False, False, "identity")
    inputs = {"x": numbers(1, 3 * sizes[1], 4, 4)} if attributes else {"x": numbers(1, 3, 4, 4)}
    model = one_node(op, {**REST, **attributes}, {"w": weight_of(*sizes)}, inputs)
    with pytest.raises(Exception, match=why):
        run(model, inputs, library)
