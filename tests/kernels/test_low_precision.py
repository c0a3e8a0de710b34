"""What low precision promises beside a reference: exact codes, small errors, refusals that say why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CASES, cases_of
from low_precision import KINDS, chain, grid_over, scaled
from setting import Case, arguments, as_tuple, run_native
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import build, native, weight_only
from tdpass.kernels.base import IMPLEMENTATIONS, OPS
from tdpass.kernels.conv_chain import CONV_CHAIN
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_chain import CONV_CHAIN_INT8, LINEAR_CHAIN_INT8
from tdpass.kernels.int8_factor import MOST_PRODUCTS, columns, pack_weight
from tdpass.kernels.linear_chain import stages_of
from tdpass.kernels.stage import Stage, integers_of
from tdpass.kernels.weight_only import WEIGHT_ONLY_LINEAR

EXACT = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in ("conv_chain_int8", "linear_chain_int8")
    for case in cases_of(name)
    if case.args[-1] not in ("silu", "gelu")
]
BOTTLENECK = (Stage(24, 16), Stage(16, 16, 1, (3, 3), (1, 1), (1, 1), (1, 1)), Stage(16, 24))


@pytest.mark.parametrize(("name", "case"), EXACT)
def test_whole_numbers_are_those_of_the_reference_bit_for_bit(name: str, case: Case) -> None:
    op = OPS.get(name)
    args = arguments(op, case, torch.float32)
    (got,) = run_native(op, args)
    assert torch.equal(got, op.reference(*args)), case.name


def test_a_chain_in_whole_numbers_errs_by_its_grids() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 9, 9)
    factors, reads, y = chain(x, BOTTLENECK, (128,))
    whole = [Grid(grid.scale / 0.9, grid.zero) for grid in reads]
    got = CONV_CHAIN_INT8.call(
        x, *factors, None, None, Grids(tuple(whole)).numbers(), integers_of(BOTTLENECK), "identity"
    )
    # rounding to steps of 4 standard deviations in 127 errs by 0.9 %: weights and activations, three times
    assert float((got - y).norm() / y.norm()) < 0.009 * 6**0.5
    out = grid_over(y, 128)
    codes = CONV_CHAIN_INT8.call(
        x, *factors, None, None, Grids(tuple(whole), out).numbers(), integers_of(BOTTLENECK), "identity"
    )
    assert torch.equal(codes, out.codes(got).to(torch.uint8))


def test_rows_on_their_own_grids_do_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    factors = columns([pack_weight(s, scaled(*s.shape)) for s in stages_of((40, 9, 33))])
    rest = (None, None, Grids((Grid(), Grid())).numbers(), [40, 9, 33], "relu")
    x = torch.randn(70, 40)
    together = LINEAR_CHAIN_INT8.call(x, *factors, *rest)
    alone = torch.cat([LINEAR_CHAIN_INT8.call(row[None] * 1000, *factors, *rest) for row in x]) / 1000
    assert torch.allclose(together, alone, rtol=1e-2, atol=1e-3)
    assert torch.equal(together[5:6], LINEAR_CHAIN_INT8.call(x[5:6], *factors, *rest))


BY_ROW = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in CASES
    if name.startswith(("linear_chain_", "weight_only_"))
    for case in cases_of(name)
    if case.args[0].numel() and ("_int8" not in name or case.name.endswith("own"))
]


@pytest.mark.parametrize(("name", "case"), BY_ROW)
def test_a_row_with_a_number_that_is_none_is_none_and_no_other_row(name: str, case: Case) -> None:
    """All that reads integers or weights of them, but where ranges are stored."""
    op = OPS.get(name)
    args = arguments(op, case, torch.float32)
    (clean,) = ran(name, args)
    x = args[0].clone()
    x.reshape(-1, x.shape[-1])[0, -1] = math.nan
    (got,) = ran(name, [x, *args[1:]])
    rows, wanted = (y.reshape(-1, y.shape[-1]) for y in (got, clean))
    assert rows[0].isnan().all()
    assert torch.equal(rows[1:], wanted[1:])
    assert op.reference(x, *args[1:]).reshape(rows.shape)[0].isnan().all()


def ran(name: str, args: list[Any]) -> tuple[Tensor, ...]:
    """By the kernel, or by the reference of an operator that has no kernel for the CPU."""
    return (
        run_native(OPS.get(name), args)
        if (name, "cpu") in IMPLEMENTATIONS
        else as_tuple(OPS.get(name).reference(*args))
    )


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("low_rank_")])
@pytest.mark.parametrize("at", ["pre", "h0"])
def test_a_sample_of_a_sequence_with_a_number_that_is_none_is_none_from_there_on(name: str, at: str) -> None:
    op = OPS.get(name)
    case = next(case for case in cases_of(name) if case.args[0].shape[0] > 2 and case.args[0].shape[1] > 1)
    args = arguments(op, case, torch.float32)
    clean, *_ = run_native(op, args)
    place = [argument.name for argument in op.call._schema.arguments].index(at)
    args[place] = args[place].clone()
    args[place][..., 0, 1] = math.nan
    for y in (run_native(op, args)[0], op.reference(*args)[0]):
        assert y[1:, 0].isnan().all()
        assert not y[:, 1:].isnan().any()
    assert torch.equal(run_native(op, args)[0][:, 1:], clean[:, 1:])


def test_a_position_with_a_number_that_is_none_is_none_and_no_other() -> None:
    stages = (Stage(7, 3), Stage(3, 20))
    factors = columns([pack_weight(stage, scaled(*stage.shape)) for stage in stages])
    rest = (None, None, Grids((Grid(), Grid())).numbers(), integers_of(stages), "relu")
    x = torch.randn(2, 7, 5, 9, generator=torch.Generator().manual_seed(0))
    (clean,) = run_native(CONV_CHAIN_INT8, [x, *factors, *rest])
    x[1, 6, 2, 8] = math.nan
    (got,) = run_native(CONV_CHAIN_INT8, [x, *factors, *rest])
    assert got[1, :, 2, 8].isnan().all()
    assert int(got.isnan().sum()) == 20
    assert torch.equal(got[~got.isnan()], clean[~got.isnan()])


@pytest.mark.parametrize("name", ["conv_chain_int8", "linear_chain_int8"])
def test_in_a_stored_range_what_is_no_number_counts_as_its_lower_end(name: str) -> None:
    op = OPS.get(name)
    kind = "plain" if name == "conv_chain_int8" else "static"
    for case in cases_of(name):
        if case.name.endswith(kind) and case.args[0].numel() and case.args[0].is_floating_point():
            args = arguments(op, case, torch.float32)
            for low in (math.nan, -math.inf):
                args[0] = case.args[0].clone()
                args[0][0, 0] = low
                (got,) = run_native(op, args)
                assert torch.equal(got, op.reference(*args))
                args[0][0, 0] = -1e30
                assert torch.equal(got, run_native(op, args)[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("int")])
def test_weights_alone_err_by_half_a_step_at_most(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 64)
    stored = KINDS[kind](weight)
    found = weight_only.dense(stored, 20, 64, torch.float64)
    scales, _ = weight_only.split(stored.scales)
    groups = scales.shape[1]
    step = scales.transpose(1, 2).reshape(-1, groups)[:20].repeat_interleave(64 // groups, 1)
    assert bool(((found - weight).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("inputs", [1, 6])
@pytest.mark.parametrize("outputs", [256, 250, 3])
@pytest.mark.parametrize("flush", [False, True])
def test_every_code_of_float8_is_the_number_that_it_stands_for(
    tokens: int, inputs: int, outputs: int, flush: bool
) -> None:
    """Also where the processor is set to take the smallest numbers of float32 for zero."""
    codes = torch.arange(255, 255 - outputs, -1, dtype=torch.uint8)[:, None]
    stored = weight_only.pack_float8(codes.expand(-1, inputs), torch.ones(outputs, 1))
    factors = torch.tensor([1.0, -0.5, 2.0**-100]).repeat(3)[:tokens, None]
    x = torch.zeros(tokens, inputs)
    x[torch.arange(tokens), torch.arange(tokens) % inputs] = factors[:, 0]
    args = ([stored.codes], [stored.scales], None, None, [inputs, outputs], "identity")
    torch.set_flush_denormal(flush)
    try:
        got = WEIGHT_ONLY_LINEAR.call(x, *args)
    finally:
        torch.set_flush_denormal(False)
    wanted = factors * codes.view(torch.float8_e4m3fn).float().T
    assert torch.equal(got.isnan(), wanted.isnan())
    assert bool(wanted.isnan().any())
    assert float(wanted.nan_to_num().abs().max()) == 448
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("inputs", [1, 7, 64])
def test_one_number_that_is_none_spoils_its_own_output_alone(inputs: int) -> None:
    codes = torch.full((20, inputs), 0x38, dtype=torch.uint8)  # ones
    codes[17, inputs - 1] = 0xFF
    stored = weight_only.pack_float8(codes, torch.full((20, 1), 0.5))
    args = ([stored.codes], [stored.scales], None, None, [inputs, 20], "relu")
    got = WEIGHT_ONLY_LINEAR.call(torch.zeros(2, inputs) + 1, *args)
    assert got[:, 17].isnan().all()
    others = torch.arange(20) != 17
    assert torch.equal(got[:, others], torch.full((2, 19), 0.5 * inputs))


def _conv(stages: tuple[Stage, ...], numbers: list[float]) -> None:
    factors = columns([pack_weight(stage, torch.ones(stage.shape)) for stage in stages])
    x = torch.zeros(1, stages[0].inputs, 3, 3)
    CONV_CHAIN_INT8.reference(x, *factors, None, None, numbers, integers_of(stages), "identity")


@pytest.mark.parametrize(
    ("stages", "numbers", "says"),
    [
        (BOTTLENECK, Grids((Grid(),) * 3).numbers(), "reads several positions at once; give the grid"),
        ((Stage(2, 2),), [1.0, 0.0], "no grids of a chain of 1 stages"),
        ((Stage(2, 2),), [-1.0, 0.0] + [0.0] * 4, "is no grid; its scale is positive"),
        ((Stage(2, 2),), [1.0, 2.5] + [0.0] * 4, "its zero point 0 to 255"),
        ((Stage(2, 2),), [math.nan, 0.0] + [0.0] * 4, "no grids of a chain"),
        ((Stage(MOST_PRODUCTS + 1, 1),), [1.0, 0.0] + [0.0] * 4, "may exceed 32 bits"),
    ],
)
def test_what_is_no_chain_of_whole_numbers_is_refused(
    stages: tuple[Stage, ...], numbers: list[float], says: str
) -> None:
    with pytest.raises(KernelError, match=says):
        _conv(stages, numbers)


def test_weights_are_not_taken_in_other_numbers_of_bits_or_groups_that_do_not_divide() -> None:
    with pytest.raises(KernelError, match="codes of 3 bits are not served"):
        weight_only.pack_weight(torch.ones(4, 8), 3)
    with pytest.raises(KernelError, match="groups of 5 do not divide 8 inputs"):
        weight_only.pack_weight(torch.ones(4, 8), 4, 5)


def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TDPASS_ISA", raising=False)
    best, following = build.machine_targets()[:2]
    assert build.EMULATED not in (best, *build.compiled_targets())
    monkeypatch.setattr(build, "compiles", lambda target: target != best)
    assert native.chosen_isa() == following
    assert best not in build.compiled_targets()


def test_pairs_of_float32_activations_are_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 9, 9)
    weights = [scaled(*stage.shape) for stage in BOTTLENECK]
    packed = [stage.pack(weight, "pairs") for stage, weight in zip(BOTTLENECK, weights, strict=True)]
    integers = integers_of(BOTTLENECK)
    got = CONV_CHAIN.call(x, packed, None, None, integers, "identity", "pairs")
    wanted = CONV_CHAIN.call(x.bfloat16(), packed, None, None, integers, "identity", "pairs")
    assert got.dtype == torch.float32
    assert float((got - wanted.float()).norm() / got.norm()) < 0.01
