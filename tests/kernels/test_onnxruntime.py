"""The operators of com.tdpass in ONNX Runtime, against what their functions say that they compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_nodes import Arrays, close, numbers, one_node, opened, run
from setting import ENDINGS

from tdpass.errors import KernelError
from tdpass.kernels import build, native
from tdpass.models.onnx.operators.fused import DOMAIN, FusedOp, function_of


@dataclass(frozen=True)
class Conv:
    """A stage: outputs, kernel, and what Conv has as attributes."""

    o: int
    kernel: tuple[int, ...]
    group: int = 1
    strides: tuple[int, ...] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, ...] = (1, 1)


TUCKER2 = (Conv(6, (1, 1)), Conv(5, (3, 3), pads=(1, 1, 1, 1)), Conv(17, (1, 1)))
CP = (
    Conv(7, (1, 1)),
    Conv(7, (3, 1), 7, pads=(1, 0, 1, 0)),
    Conv(7, (1, 3), 7, pads=(0, 1, 0, 1)),
    Conv(11, (1, 1)),
)
CHAINS = {
    "tucker2": (13, TUCKER2),
    "spatial": (
        9,
        (
            Conv(5, (3, 1), strides=(2, 1), pads=(1, 0, 1, 0)),
            Conv(12, (1, 3), strides=(1, 2), pads=(0, 1, 0, 1)),
        ),
    ),
    "uneven": (4, (Conv(3, (2, 3), pads=(0, 2, 1, 0), dilations=(1, 2)), Conv(18, (1, 1)))),
    "cp": (10, CP),
    "grouped": (12, (Conv(8, (1, 1)), Conv(8, (3, 3), 4, pads=(1, 1, 1, 1)), Conv(20, (1, 1)))),
    "line": (7, (Conv(4, (1,), 1, (1,), (0, 0), (1,)), Conv(9, (5,), 1, (2,), (2, 1), (1,)))),
    "one": (3, (Conv(8, (3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),)),
}


def conv_case(
    chain: str, bias: bool, residual: bool, activation: str, lanes: int, batch: int, size: tuple[int, int]
) -> tuple[onnx.ModelProto, Arrays]:
    channels, stages = CHAINS[chain]
    op = FusedOp(False, len(stages), bias, residual, activation)
    attributes: dict[str, object] = {"lanes": lanes}
    constants: Arrays = {}
    inputs = {"x": numbers(batch, channels, *size[: len(stages[0].kernel)])}
    for k, stage in enumerate(stages, start=1):
        constants[f"w{k}"] = numbers(stage.o, channels // stage.group, *stage.kernel)
        attributes |= {
            f"{name}_{k}": getattr(stage, name) for name in ("group", "strides", "pads", "dilations")
        }
        channels = stage.o
    if bias:
        constants["bias"] = numbers(channels, 1)[:, 0]
    if residual:
        bare = FusedOp(False, len(stages), False, False, "identity")
        plain = one_node(
            bare, attributes, {name: array for name, array in constants.items() if name != "bias"}, inputs
        )
        inputs["residual"] = numbers(*run(plain, inputs).shape)
    return one_node(op, attributes, constants, inputs), inputs


@pytest.mark.parametrize("lanes", [0, 1])
@pytest.mark.parametrize("chain", CHAINS)
def test_chains_of_convolutions_compute_what_their_functions_say(
    library: str, chain: str, lanes: int
) -> None:
    for batch, size in ((1, (11, 13)), (3, (8, 8)), (2, (5, 4))):
        model, inputs = conv_case(chain, True, False, "relu", lanes, batch, size)
        assert close(run(model, inputs, library), run(model, inputs))


@pytest.mark.parametrize("activation", ENDINGS)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True), (True, True)])
def test_bias_residual_and_activation(library: str, bias: bool, residual: bool, activation: str) -> None:
    model, inputs = conv_case("tucker2", bias, residual, activation, 1, 2, (9, 7))
    assert close(run(model, inputs, library), run(model, inputs))
    assert close(ReferenceEvaluator(model).run(None, inputs)[0], run(model, inputs))


def linear_case(
    shape: tuple[int, ...], widths: tuple[int, ...], bias: bool, residual: bool, activation: str
) -> tuple[onnx.ModelProto, Arrays]:
    op = FusedOp(True, len(widths) - 1, bias, residual, activation)
    constants = {f"w{k}": numbers(widths[k - 1], widths[k]) for k in range(1, len(widths))}
    inputs = {"x": numbers(*shape, widths[0])}
    if bias:
        constants["bias"] = numbers(widths[-1], 1)[:, 0]
    if residual:
        inputs["residual"] = numbers(*shape, widths[-1])
    return one_node(op, {"lanes": 0}, constants, inputs), inputs


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize(
    ("bias", "residual", "activation"),
    [(True, False, "gelu"), (False, True, "identity"), (True, True, "relu"), (False, False, "silu")],
)
def test_chains_of_matrices(
    library: str, shape: tuple[int, ...], bias: bool, residual: bool, activation: str
) -> None:
    model, inputs = linear_case(shape, (24, 5, 19, 33), bias, residual, activation)
    assert close(run(model, inputs, library), run(model, inputs))
    assert close(ReferenceEvaluator(model).run(None, inputs)[0], run(model, inputs))


@pytest.mark.parametrize("lanes", [0, 1])
@pytest.mark.parametrize("batch", [1, 5])
def test_two_threads_give_what_one_gives(library: str, lanes: int, batch: int) -> None:
    model, inputs = conv_case("tucker2", True, True, "relu", lanes, batch, (67, 45))
    alone, both = run(model, inputs, library), opened(model, library, threads=2)
    for _ in range(20):
        assert np.array_equal(both.run(None, inputs)[0], alone)


def test_the_batch_may_change_and_be_empty(library: str) -> None:
    model, inputs = conv_case("cp", True, False, "identity", 0, 3, (6, 9))
    fused, plain = opened(model, library), opened(model, None)
    for batch in (3, 1, 2, 0):
        some = {"x": inputs["x"][:batch]}
        assert close(fused.run(None, some)[0], plain.run(None, some)[0])


def test_the_kernel_runs_where_it_is_registered_and_the_function_where_not(
    library: str, tmp_path: Path
) -> None:
    model, inputs = conv_case("tucker2", True, False, "relu", 1, 1, (8, 8))
    ran: dict[bool, str] = {}
    for registered in (False, True):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{registered}.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if registered:
            options.register_custom_ops_library(library)
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        ).run(None, inputs)
        ran[registered] = " ".join(
            node.op_type for node in onnx.load(tmp_path / f"{registered}.onnx").graph.node
        )
    assert ran[True] == "ConvChain3BiasRelu"
    assert "Chain" not in ran[False]
    assert "Conv" in ran[False]


def test_weights_that_are_not_constant(library: str) -> None:
    widths = (24, 5, 33)
    op = FusedOp(True, 2, True, False, "relu")
    arrays = {"x": numbers(7, 24), "w1": numbers(24, 5), "w2": numbers(5, 33), "bias": numbers(33, 1)[:, 0]}
    node = helper.make_node(op.name, op.inputs, ["y"], domain=DOMAIN, lanes=0)
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()
    ]
    graph = helper.make_graph(
        [node], "g", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, (7, widths[-1]))]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)], ir_version=8
    )
    model.functions.append(ir.serde.serialize_function(function_of(op, 17)))
    for scale in (1, 2):
        inputs = {name: scale * array for name, array in arrays.items()}
        assert close(run(model, inputs, library), run(model, inputs))


def test_what_cannot_be_computed_is_an_error_that_says_why(library: str) -> None:
    model, inputs = conv_case("tucker2", True, True, "relu", 0, 1, (6, 6))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "C"
    session = opened(model, library)
    with pytest.raises(Exception, match="ConvChain3BiasAddRelu: 12 channels come to a stage that takes 13"):
        session.run(None, {**inputs, "x": inputs["x"][:, :12]})
    with pytest.raises(Exception, match="the residual is larger than the output of the chain"):
        session.run(None, {**inputs, "residual": np.concatenate([inputs["residual"]] * 2)})
    model.graph.node[0].attribute.remove(next(a for a in model.graph.node[0].attribute if a.name == "lanes"))
    model.graph.node[0].attribute.append(helper.make_attribute("lanes", 7))
    with pytest.raises(Exception, match="lanes is 0 or 1, not 7"):
        opened(model, library)


def test_one_row_of_a_residual_serves_all(library: str) -> None:
    model, inputs = conv_case("tucker2", True, True, "relu", 1, 3, (6, 7))
    inputs["residual"] = inputs["residual"][:1]
    assert close(run(model, inputs, library), run(model, inputs))


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TDPASS_KERNELS", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    native._onnx_ops.cache_clear()
    try:
        with pytest.raises(
            KernelError,
            match="the fused operators for ONNX Runtime are missing: there is no C\\+\\+ compiler",
        ):
            native.onnx_ops_path()
    finally:
        native._onnx_ops.cache_clear()


@pytest.mark.parametrize("value", [-(2**40), -1, 0, 2**31, 2**40])
@pytest.mark.parametrize("name", ["group", "strides", "dilations", "lanes", "pads"])
def test_attributes_that_no_convolution_has_are_refused(library: str, name: str, value: int) -> None:
    if (name, value) == ("pads", 0):
        pytest.skip("a convolution may have it")
    model, inputs = conv_case("tucker2", True, False, "relu", 0, 2, (6, 5))
    wanted = run(model, inputs)
    (node,) = model.graph.node
    for attribute in node.attribute:
        places = range(len(attribute.ints)) if attribute.name.startswith(name) else ()
        for place in places:
            before = attribute.ints[place]
            attribute.ints[place] = value
            _refused_unless(model, inputs, library, wanted, right=value == before)
            attribute.ints[place] = before
        if attribute.name.startswith(name) and not places:
            before, attribute.i = attribute.i, value
            _refused_unless(model, inputs, library, wanted, right=value == before)
            attribute.i = before
    assert close(run(model, inputs, library), wanted)


def _refused_unless(
    model: onnx.ModelProto, inputs: Arrays, library: str, wanted: np.ndarray, *, right: bool
) -> None:
    if right:
        assert close(run(model, inputs, library), wanted)
        return
    with pytest.raises(
        Exception, match=r"ConvChain3BiasRelu.*(is not served|must|lanes is|smaller than the kernel)"
    ):
        run(model, inputs, library)
