"""The operators of com.tdpass in integers and of recurrent cells, against references and functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_nodes import Arrays, close, numbers, one_node, opened, run
from torch import Tensor

from tdpass.kernels import int8_chain, int8_factor, recurrent, recurrent_int8, weight_only
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_factor import columns
from tdpass.kernels.linear_chain import stages_of as linear_stages
from tdpass.kernels.stage import Stage, integers_of
from tdpass.models.onnx.operators.fused import FusedOp
from tdpass.models.onnx.operators.fused_integers import (
    DynamicChainOp,
    DynamicConvChainOp,
    Int8ChainOp,
    WeightOnlyOp,
)
from tdpass.models.onnx.operators.fused_recurrent import LowRankCellOp, Numbers

ENDS = [
    ("identity", False, False),
    ("relu", False, True),
    ("silu", True, False),
    ("gelu", True, True),
    ("relu6", False, True),
    ("clamp(-0.125,0.5)", True, True),
    ("clamp(-inf,0.25)", False, False),
]
CONVOLUTIONS = {
    "tucker2": (Stage(13, 6), Stage(6, 5, 1, (3, 3), (1, 1), (1, 1), (1, 1)), Stage(5, 17)),
    "spatial": (
        Stage(9, 5, 1, (3, 1), (2, 1), (1, 0), (1, 0)),
        Stage(5, 12, 1, (1, 3), (1, 2), (0, 1), (0, 1)),
    ),
    "cp": (
        Stage(10, 7),
        Stage(7, 7, 7, (3, 1), (1, 1), (1, 0), (1, 0)),
        Stage(7, 7, 7, (1, 3), (1, 1), (0, 1), (0, 1)),
        Stage(7, 11),
    ),
    "grouped": (Stage(12, 8), Stage(8, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1)), Stage(8, 20)),
    "uneven": (Stage(4, 3, 1, (2, 3), (1, 1), (0, 2), (1, 0), (1, 2)), Stage(3, 18)),
}


def grids(count: int) -> list[Grid]:
    return [Grid(0.02 + 0.003 * k, zero) for k, zero in zip(range(count), itertools.cycle((128, 100, 0)))]


def conv_attributes(k: int, stage: Stage) -> dict[str, object]:
    return {
        f"group_{k}": stage.groups,
        f"strides_{k}": stage.stride,
        f"pads_{k}": (*stage.before, *stage.after),
        f"dilations_{k}": stage.dilation,
    }


def int8_case(
    stages: Sequence[Stage], x: np.ndarray, residual: bool, activation: str, coded: bool, linear: bool
) -> tuple[onnx.ModelProto, Arrays, Tensor]:
    """A model of one chain of int8, what to run it on, and what its reference says."""
    op = Int8ChainOp(linear, len(stages), residual, activation, coded)
    reads, end = grids(len(stages)), Grid(0.011, 90) if coded else Grid()
    bias, constants, attributes = (
        numbers(stages[-1].outputs, 1)[:, 0],
        dict[str, np.ndarray](),
        dict[str, object](),
    )
    factors = []
    for k, (stage, grid) in enumerate(zip(stages, reads, strict=True), start=1):
        weight = torch.from_numpy(numbers(*stage.shape))
        factor = int8_factor.pack_weight(stage, weight)
        factors.append(factor)
        codes = stage.unpack(factor.weight, "quads").numpy()
        constants[f"w{k}"] = np.ascontiguousarray(codes[:, :, 0, 0].T) if linear else codes
        constants[f"w{k}_scale"] = factor.scale.numpy()
        constants |= {f"x{k}_scale": np.float32(grid.scale), f"x{k}_zero": np.uint8(grid.zero)}
        if not linear:
            attributes |= conv_attributes(k, stage)
    constants["bias"] = bias
    if coded:
        constants |= {"y_scale": np.float32(end.scale), "y_zero": np.uint8(end.zero)}
    found, inputs, rest = Grids(tuple(reads), end), {"x": x}, None
    given = torch.from_numpy(x)
    if residual:
        size: Sequence[int | torch.SymInt] = x.shape[2:]
        for stage in () if linear else stages:
            size = stage.output_size(size)
        shape = (
            (*x.shape[:-1], stages[-1].outputs) if linear else (len(x), stages[-1].outputs, *map(int, size))
        )
        inputs["residual"] = numbers(*shape)
        rest = torch.from_numpy(inputs["residual"])
    arguments = (given, *columns(factors), torch.from_numpy(bias), rest, found.numbers())
    if linear:
        widths = [stages[0].inputs, *(stage.outputs for stage in stages)]
        wanted = int8_chain.linear_reference(*arguments, widths, activation)
    else:
        wanted = int8_chain.conv_reference(*arguments, integers_of(stages), activation)
    return one_node(op, attributes, constants, inputs), inputs, wanted


def within_a_step(a: np.ndarray, b: np.ndarray, coded: bool) -> bool:
    """Whether numbers that rounding may have moved by a step of one of the grids are near each other."""
    difference = np.abs(a.astype(np.float64) - b)
    return (
        float(difference.max(initial=0)) <= (2 if coded else 0.08)
        and float(difference.sum()) <= 0.1 * difference.size
    )


def agrees(model: onnx.ModelProto, inputs: Arrays, wanted: Tensor, library: str, activation: str) -> None:
    made, coded = run(model, inputs, library), wanted.dtype == torch.uint8
    assert made.shape == tuple(wanted.shape)
    assert made.dtype == wanted.numpy().dtype
    if activation not in ("silu", "gelu"):
        assert np.array_equal(made, wanted.numpy())  # whole numbers: not a bit of difference
    else:
        assert np.allclose(made.astype(np.float32), wanted.float().numpy(), atol=1 if coded else 1e-5)
    plain = run(model, inputs)
    assert plain.shape == made.shape
    assert within_a_step(made, plain, coded)


@pytest.mark.parametrize(("activation", "residual", "coded"), ENDS)
@pytest.mark.parametrize("chain", CONVOLUTIONS)
def test_chains_of_convolutions_in_whole_numbers(
    library: str, chain: str, activation: str, residual: bool, coded: bool
) -> None:
    stages = CONVOLUTIONS[chain]
    x = np.random.default_rng(1).integers(0, 256, (2, stages[0].inputs, 9, 11), np.uint8)
    model, inputs, wanted = int8_case(stages, x, residual, activation, coded, linear=False)
    agrees(model, inputs, wanted, library, activation)


@pytest.mark.parametrize(("activation", "residual", "coded"), ENDS)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (0,)])
def test_chains_of_matrices_in_whole_numbers(
    library: str, shape: tuple[int, ...], activation: str, residual: bool, coded: bool
) -> None:
    x = np.random.default_rng(1).integers(0, 256, (*shape, 24), np.uint8)
    stages = linear_stages((24, 5, 19, 33))
    model, inputs, wanted = int8_case(stages, x, residual, activation, coded, linear=True)
    agrees(model, inputs, wanted, library, activation)


def dynamic_case(
    widths: tuple[int, ...], x: np.ndarray, residual: bool, activation: str, opset: int = 17
) -> tuple[onnx.ModelProto, Arrays, Tensor]:
    """A model of one chain of int8 that puts rows on grids of their own, and what its reference says."""
    op = DynamicChainOp(len(widths) - 1, residual, activation)
    stages, constants, factors = linear_stages(widths), dict[str, np.ndarray](), []
    for k, stage in enumerate(stages, start=1):
        factors.append(int8_factor.pack_weight(stage, torch.from_numpy(numbers(*stage.shape))))
        codes = stage.unpack(factors[-1].weight, "quads").numpy()
        constants[f"w{k}"] = np.ascontiguousarray(codes[:, :, 0, 0].T)
        constants[f"w{k}_scale"] = factors[-1].scale.numpy()
    constants["bias"] = numbers(widths[-1], 1)[:, 0]
    inputs = {"x": x} | ({"residual": numbers(*x.shape[:-1], widths[-1])} if residual else {})
    rest = torch.from_numpy(inputs["residual"]) if residual else None
    shift, none = torch.from_numpy(constants["bias"]), Grids((Grid(),) * len(stages)).numbers()
    wanted = int8_chain.linear_reference(
        torch.from_numpy(x), *columns(factors), shift, rest, none, widths, activation
    )
    return one_node(op, {}, constants, inputs, opset=opset), inputs, wanted


@pytest.mark.parametrize(("activation", "residual"), [end[:2] for end in ENDS])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (0,)])
def test_chains_of_matrices_that_round_rows(
    library: str, shape: tuple[int, ...], activation: str, residual: bool
) -> None:
    for widths in ((24, 5, 19, 33), (16, 9, 70)):
        x = np.random.default_rng(1).standard_normal((*shape, widths[0])).astype(np.float32)
        if x.size:
            x[0] = 0.0  # a row without a range
        model, inputs, wanted = dynamic_case(widths, x, residual, activation)
        agrees(model, inputs, wanted, library, activation)


def test_a_row_with_a_number_that_is_none_is_none(library: str) -> None:
    x = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    model, inputs, _ = dynamic_case((24, 5, 33), x, False, "relu")
    clean = run(model, inputs, library)
    x[1, 20] = np.nan
    made = run(model, inputs, library)
    assert np.isnan(made[1]).all()
    assert np.array_equal(made[::2], clean[::2])
    model, inputs, _ = cell_case(LowRankCellOp(4, False, "int8"), 4, 2)
    inputs["pre"][0, 1, 3] = np.nan
    made, *_ = opened(model, library).run(None, inputs)
    assert np.isnan(made[1:, 1]).all()
    assert not np.isnan(made[:, 0]).any()


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_a_chain_that_rounds_rows_says_what_it_computes_in_every_opset(opset: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    model, inputs, wanted = dynamic_case((24, 5, 33), x, True, "relu", opset)
    (made,) = ReferenceEvaluator(model).run(None, inputs)
    assert within_a_step(made, wanted.numpy(), coded=False)


def found_grid(x: Tensor) -> Grid:
    """As DynamicQuantizeLinear finds it, in float32."""
    low, high = (min(x.min(), torch.tensor(0.0)), max(x.max(), torch.tensor(0.0)))
    scale = (high - low) / 255 if high > low else torch.tensor(1.0)
    return Grid(float(scale), int((-low / scale).round().clamp(0, 255)))


def dynamic_conv_case(
    stages: Sequence[Stage], x: np.ndarray, residual: bool, activation: str
) -> tuple[onnx.ModelProto, Arrays, Tensor]:
    """A model of convolutions that find one grid each in a call, and what references say one by one."""
    op = DynamicConvChainOp(len(stages), residual, activation)
    bias = numbers(stages[-1].outputs, 1)[:, 0]
    constants, attributes = dict[str, np.ndarray](), dict[str, object]()
    read, wanted, last = torch.from_numpy(x), torch.empty(0), len(stages)
    inputs = {"x": x}
    for k, stage in enumerate(stages, start=1):
        factor = int8_factor.pack_weight(stage, torch.from_numpy(numbers(*stage.shape)))
        constants[f"w{k}"] = stage.unpack(factor.weight, "quads").numpy()
        constants[f"w{k}_scale"] = factor.scale.numpy()[:, None, None]
        attributes |= conv_attributes(k, stage)
        if residual and k == last:
            inputs["residual"] = numbers(len(x), stage.outputs, *map(int, stage.output_size(read.shape[2:])))
        wanted = int8_chain.conv_reference(
            read,
            *columns([factor]),
            torch.from_numpy(bias) if k == last else None,
            torch.from_numpy(inputs["residual"]) if residual and k == last else None,
            Grids((found_grid(read),)).numbers(),
            integers_of([stage]),
            activation if k == last else "identity",
        )
        read = wanted
    constants["bias"] = bias[:, None, None]
    return one_node(op, attributes, constants, inputs), inputs, wanted


@pytest.mark.parametrize(("activation", "residual"), [end[:2] for end in ENDS])
@pytest.mark.parametrize("chain", CONVOLUTIONS)
def test_chains_of_convolutions_that_find_their_grids(
    library: str, chain: str, activation: str, residual: bool
) -> None:
    stages = CONVOLUTIONS[chain]
    x = np.random.default_rng(1).standard_normal((2, stages[0].inputs, 9, 11)).astype(np.float32)
    for given in (x, np.abs(x), 0 * x):
        model, inputs, wanted = dynamic_conv_case(stages, given, residual, activation)
        agrees(model, inputs, wanted, library, activation)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 800])
def test_what_has_no_grid_becomes_no_number(library: str, place: int, bad: float) -> None:
    stages = CONVOLUTIONS["tucker2"]
    x = np.random.default_rng(1).standard_normal((1, stages[0].inputs, 9, 11)).astype(np.float32)
    model, inputs, _ = dynamic_conv_case(stages, x, False, "relu")
    x.reshape(-1)[place] = bad
    assert np.isnan(run(model, inputs, library)).all()


def weight_only_case(
    bits: int,
    groups: int,
    low_rank: bool,
    bias: bool,
    residual: bool,
    activation: str,
    tokens: tuple[int, ...],
    zeros: bool = False,
) -> tuple[onnx.ModelProto, Arrays, Tensor]:
    inputs, outputs, rank, size = 64, 37, 5, 64 // groups
    generator = torch.Generator().manual_seed(0)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, groups, generator=generator) / top
    points = torch.randint(-top, top, (outputs, groups), generator=generator, dtype=torch.int8)
    stored = [weight_only.pack_codes(codes, scale, bits, points if zeros else None)]
    held = codes.reshape(outputs * groups, size).numpy()
    if bits == 4:
        pairs = (codes.numpy().astype(np.int16) + 8).reshape(outputs, groups, size // 2, 2)
        held = (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8)
    constants = {"codes": held, "scale": scale.flatten().numpy()}
    if zeros:
        whole = torch.nn.functional.pad(points.int() + 8, (0, groups % 2)) if bits == 4 else points
        constants["zeros"] = whole.flatten().numpy()
        if bits == 4:
            constants["zeros"] = (whole[:, ::2] | whole[:, 1::2] << 4).to(torch.uint8).flatten().numpy()
    widths, x, shift = [inputs, outputs], numbers(*tokens, inputs), numbers(outputs, 1)[:, 0]
    if low_rank:
        thin = {"v": numbers(rank, inputs).astype(np.float16), "u": numbers(outputs, rank).astype(np.float16)}
        constants |= thin
        stored += [
            weight_only.pack_floats(torch.from_numpy(each).float(), torch.float32) for each in thin.values()
        ]
        widths.append(rank)
    given = {"x": x}
    if bias:
        constants["bias"] = shift
    if residual:
        given["residual"] = numbers(*tokens, outputs)
    op = WeightOnlyOp(bits, zeros, low_rank, bias, residual, activation)
    wanted = weight_only.reference(
        torch.from_numpy(x).double(),
        [each.codes for each in stored],
        [each.scales for each in stored],
        torch.from_numpy(shift) if bias else None,
        torch.from_numpy(given["residual"]).double() if residual else None,
        widths,
        activation,
    )
    sizes = {"K": inputs, "N": outputs, "block_size": size}
    return one_node(op, sizes, constants, given), given, wanted.float()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 2), (8, 1), (8, 4)])
@pytest.mark.parametrize(
    ("low_rank", "bias", "residual", "activation"),
    [
        (False, True, False, "relu"),
        (True, True, True, "gelu"),
        (True, False, False, "identity"),
        (False, False, True, "silu"),
    ],
)
def test_layers_of_few_bits(
    library: str,
    bits: int,
    groups: int,
    low_rank: bool,
    bias: bool,
    residual: bool,
    activation: str,
    zeros: bool,
) -> None:
    for tokens in ((1,), (3, 7), (0,)):
        model, inputs, wanted = weight_only_case(
            bits, groups, low_rank, bias, residual, activation, tokens, zeros
        )
        made = run(model, inputs, library)
        assert close(made, wanted.numpy())
        assert np.allclose(made, run(model, inputs), rtol=1e-3, atol=1e-3)


def stored_as(name: str, tensor: Tensor) -> np.ndarray | onnx.TensorProto:
    """A constant; numpy has no bfloat16."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    bits = tensor.view(torch.int16).numpy().tobytes()
    return helper.make_tensor(name, onnx.TensorProto.BFLOAT16, tuple(tensor.shape), bits, raw=True)


def cell_case(
    op: LowRankCellOp, steps: int, batch: int, opset: int = 17
) -> tuple[onnx.ModelProto, Arrays, list[Tensor]]:
    hidden, rank = 21, 6
    v, u = torch.from_numpy(numbers(rank, hidden)), torch.from_numpy(numbers(op.gates * hidden, rank))
    inputs = {"pre": numbers(steps, batch, op.gates * hidden)}
    inputs |= {f"{state}_first": numbers(batch, hidden) for state in op.states}
    bias = torch.from_numpy(numbers(op.gates * hidden, 1)[:, 0])
    given = [torch.from_numpy(array) for array in inputs.values()]
    if op.numbers in ("weight only", "int8"):
        left, right = recurrent_int8.pack_v(v), recurrent_int8.pack_u(u, op.gates)
        flat = [int8_factor.pack_weight(Stage(*each.shape[::-1]), each[:, :, None, None]) for each in (v, u)]
        codes = [
            Stage(*each.shape[::-1]).unpack(factor.weight, "quads")[:, :, 0, 0].T.contiguous()
            for each, factor in zip((v, u), flat, strict=True)
        ]
        constants = {"v": codes[0], "v_scale": left.scale, "u": codes[1], "u_scale": right.scale}
        v, u = ((code * factor.scale).T for code, factor in zip(codes, flat, strict=True))
        factors: tuple[Tensor, ...] = (*left, *right)
        references = {4: recurrent_int8.lstm_reference, 3: recurrent_int8.gru_reference}
    else:
        stored = torch.bfloat16 if op.numbers == "bfloat16" else torch.float32
        constants = {"v": v.T.contiguous().to(stored), "u": u.T.contiguous().to(stored)}
        v, u = v.to(stored), u.to(stored)
    if op.numbers != "int8":
        factors = (recurrent.pack_v(v), recurrent.pack_u(u, op.gates))
        references = {4: recurrent.lstm_reference, 3: recurrent.gru_reference}
    held = {name: stored_as(name, tensor) for name, tensor in {**constants, "bias": bias}.items()}
    wanted = references[op.gates](given[0], *factors, bias, *given[1:], op.reverse)
    return one_node(op, {}, held, inputs, open_axis=2, opset=opset), inputs, list(wanted)


@pytest.mark.parametrize("held", ["float", "bfloat16", "weight only", "int8"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gates", [3, 4])
def test_sequences_through_cells(library: str, gates: int, reverse: bool, held: Numbers) -> None:
    op = LowRankCellOp(gates, reverse, held)
    for steps, batch in ((1, 1), (9, 3), (0, 2)):
        model, inputs, wanted = cell_case(op, steps, batch)
        made = opened(model, library).run(None, inputs)
        tolerance = 1.5e-2 if held == "int8" else 1e-5
        for one, other in zip(made, wanted, strict=True):
            assert one.shape == tuple(other.shape)
            assert np.allclose(one, other.numpy(), atol=tolerance)
        if steps:
            for one, other in zip(opened(model, None).run(None, inputs), made, strict=True):
                assert np.allclose(one, other, atol=tolerance)


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_a_cell_says_what_it_computes_in_every_opset(library: str, opset: int) -> None:
    cells: list[tuple[int, Numbers]] = [(3, "int8"), (4, "int8"), (4, "float"), (4, "bfloat16")]
    cells += (
        [(4, "weight only")] if opset > 18 else []
    )  # onnx's own evaluator reads scales by column from 19 on
    for gates, held in cells:
        model, inputs, wanted = cell_case(LowRankCellOp(gates, False, held), 4, 2, opset)
        made = ReferenceEvaluator(model).run(None, inputs)
        assert np.allclose(made[0], wanted[0].numpy(), atol=1.5e-2 if held == "int8" else 1e-5)


@pytest.mark.parametrize("lanes", [0, 1])
@pytest.mark.parametrize("linear", [False, True])
def test_weights_of_bfloat16(library: str, linear: bool, lanes: int) -> None:
    op = FusedOp(linear, 2, True, True, "relu", half=True)
    shapes = ((24, 5), (5, 33)) if linear else ((5, 24, 3, 1), (33, 5, 1, 1))
    x = numbers(7, 24) if linear else numbers(2, 24, 6, 5)
    exact = [torch.from_numpy(numbers(*shape)).bfloat16() for shape in shapes]
    constants: dict[str, np.ndarray | onnx.TensorProto] = {
        f"w{k}": helper.make_tensor(
            f"w{k}", onnx.TensorProto.BFLOAT16, shape, each.view(torch.int16).numpy().tobytes(), raw=True
        )
        for k, (shape, each) in enumerate(zip(shapes, exact, strict=True), start=1)
    }
    constants["bias"] = numbers(33, 1)[:, 0]
    attributes: dict[str, object] = {"lanes": lanes}
    if not linear:
        for k in (1, 2):
            attributes |= {
                f"group_{k}": 1,
                f"strides_{k}": [1, 1],
                f"pads_{k}": [0] * 4,
                f"dilations_{k}": [1, 1],
            }
    inputs = {"x": x, "residual": numbers(7, 33) if linear else numbers(2, 33, 4, 5)}
    model = one_node(op, attributes, constants, inputs)
    made, plain = run(model, inputs, library), run(model, inputs)
    assert np.abs(made - plain).max() < 1.5e-2 * np.abs(plain).max()


def test_what_does_not_fit_is_an_error_that_says_why(library: str) -> None:
    stages = linear_stages((24, 5, 33))
    x = np.zeros((2, 24), np.uint8)
    model, _, _ = int8_case(stages, x, False, "identity", False, linear=True)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "C"
    with pytest.raises(Exception, match="Int8LinearChain2: 23 channels come to a stage that takes 24"):
        opened(model, library).run(None, {"x": x[:, :23]})
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    model.graph.input.append(helper.make_tensor_value_info("w1_scale", 1, [5]))
    model.graph.initializer.remove(held["w1_scale"])
    with pytest.raises(Exception, match="Int8LinearChain2: input 4 has to be a constant"):
        opened(model, library)
    rows = np.zeros((2, 24), np.float32)
    model, _, _ = dynamic_case((24, 5, 33), rows, False, "identity")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "C"
    with pytest.raises(Exception, match="DynamicInt8LinearChain2: 23 channels come to a stage that takes 24"):
        opened(model, library).run(None, {"x": rows[:, :23]})
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    held["w2_scale"].CopyFrom(numpy_helper.from_array(np.ones(32, np.float32), "w2_scale"))
    with pytest.raises(Exception, match="DynamicInt8LinearChain2: a weight has one scale per output channel"):
        opened(model, library)
    held["w2_scale"].CopyFrom(numpy_helper.from_array(np.ones(33), "w2_scale"))
    with pytest.raises(Exception, match="DynamicInt8LinearChain2: input 4 is of type 11, not 1"):
        opened(model, library)
    few, _, _ = weight_only_case(4, 2, False, True, False, "relu", (1,))
    few.graph.node[0].attribute[1].i = 36
    with pytest.raises(Exception, match="WeightOnlyLinear4BiasRelu: codes and scales are not of one matrix"):
        opened(few, library)
    few, _, _ = weight_only_case(8, 2, False, True, False, "relu", (1,), zeros=True)
    held = {tensor.name: tensor for tensor in few.graph.initializer}
    held["zeros"].CopyFrom(numpy_helper.from_array(np.zeros(3, np.int8), "zeros"))
    with pytest.raises(Exception, match="WeightOnlyLinear8ZerosBiasRelu: the zero points are not those"):
        opened(few, library)
    cell, states, _ = cell_case(LowRankCellOp(4, False, "float"), 3, 2)
    cell.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "H"
    with pytest.raises(Exception, match="LowRankLstm: a state has not the size"):
        opened(cell, library).run(None, {**states, "c_first": states["c_first"][:, :20]})


def test_two_threads_give_what_one_gives(library: str) -> None:
    model, inputs, wanted = cell_case(LowRankCellOp(4, False, "int8"), 40, 12)
    alone, both = opened(model, library), opened(model, library, threads=2)
    for _ in range(10):
        for one, other in zip(alone.run(None, inputs), both.run(None, inputs), strict=True):
            assert np.array_equal(one, other)
    assert len(wanted) == 3
