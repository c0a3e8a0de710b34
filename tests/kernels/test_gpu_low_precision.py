"""The Triton kernels of operators whose weights have few bits, interpreted or on a CUDA device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import cases_of
from gpu_setting import DEVICE, normal, run_interpreted, runs_kernels, starts_interpreted, tile
from low_precision import bytes_of, chain, grid_over
from setting import Case, arguments, exact, map_tensors
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.kernels import float8_chain
from tdpass.kernels.base import IMPLEMENTATIONS, OPS
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_factor import columns, pack_weight
from tdpass.kernels.linear_chain import stages_of
from tdpass.kernels.stage import Stage, integers_of

pytestmark = pytest.mark.usefixtures("here")
# The references round as the kernels do; what is left are activations, and types that x is given in.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@starts_interpreted
def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def serve(name: str, args: list[Any]) -> tuple[Tensor, Tensor]:
    """What the kernels and the reference make of these arguments."""
    there = map_tensors(lambda tensor: tensor.to(DEVICE), args)
    y = IMPLEMENTATIONS[name, "cuda"](*there)
    assert isinstance(y, Tensor), f"{name} left it to the reference"
    wanted = OPS.get(name).reference(*args)
    assert isinstance(wanted, Tensor)
    assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
    return y.cpu(), wanted


def assert_same(name: str, args: list[Any]) -> None:
    """Floating-point numbers within rounding of their type, codes the same."""
    y, wanted = serve(name, args)
    if wanted.dtype == torch.uint8:
        assert torch.equal(y, wanted)
        return
    error = (y.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-3)
    assert error <= TOLERANCE[wanted.dtype], f"relative error {error:.1e}"


def chosen(name: str, parts: tuple[str, ...]) -> Iterator[Case]:
    """Cases of an operator with one of these parts in their name."""
    return (case for case in cases_of(name) if any(part in case.name for part in parts))


LINEAR = [*chosen("linear_chain_int8", ("(70, 9, 64, 5)-5-", "(33, 16, 1)-5-", "(20, 40)-1-"))]


@runs_kernels
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_linear_chain_int8(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same("linear_chain_int8", arguments(OPS.get("linear_chain_int8"), case, dtype))


@runs_kernels
@pytest.mark.parametrize("read", ["bytes", "static", "own"])
@pytest.mark.parametrize("between", ["static", "own"])
@pytest.mark.parametrize("rest", ["bytes", "float"])
def test_linear_chain_int8_in_one_launch(
    read: str, between: str, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdpass.kernels.gpu import linear_chain_int8

    monkeypatch.setattr(linear_chain_int8, "candidates", lambda *_: [tile(fused=1)])
    args = pair(read, between, rest)
    serve_exactly(args)


def serve_exactly(args: list[Any]) -> None:
    """Without an activation all that is computed is rounded as the reference rounds it: the same bits."""
    y, wanted = serve("linear_chain_int8", args)
    assert torch.equal(y, wanted)


def pair(read: str, between: str, rest: str, widths: tuple[int, int, int] = (45, 19, 37)) -> list[Any]:
    """Two layers; where the residual is in bytes the output is too."""
    x, residual = normal(3, 5, widths[0]).cpu(), normal(3, 5, widths[2]).cpu()
    stages = stages_of(widths)
    factors = columns([pack_weight(s, normal(*s.shape, scale=s.inputs**-0.5).cpu()) for s in stages])
    first, second = grid_over(x, 100), grid_over(x, 128)
    last, added = grid_over(x, 17), grid_over(residual, 201)
    grids = Grids(
        (Grid() if read == "own" else first, Grid() if between == "own" else second),
        *((last, added) if rest == "bytes" else ()),
    )
    given = bytes_of(x, first) if read == "bytes" else x
    kept = bytes_of(residual, added) if rest == "bytes" else residual
    bias = normal(widths[2]).cpu()
    return [given, *factors, bias, kept, grids.numbers(), list(widths), "identity"]


@runs_kernels
@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # numpy's, of infinity times zero
@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("fused", [0, 1])
def test_rows_with_numbers_that_are_none(number: float, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdpass.kernels.gpu import linear_chain_int8

    monkeypatch.setattr(linear_chain_int8, "candidates", lambda *_: [tile(fused=fused)])
    args = pair("own", "own", "float")
    args[0][1, 2] = number
    args[0][0, 0, 3] = number
    y, wanted = serve("linear_chain_int8", args)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.nan_to_num(), wanted.nan_to_num())


@runs_kernels
def test_sums_are_made_in_32_bits_and_totals_added_as_given() -> None:
    x = torch.full((2, 300), 255, dtype=torch.uint8)
    stage = stages_of((300, 3))[0]
    factors = columns([pack_weight(stage, torch.ones(stage.shape))])
    factors[2][0] += torch.tensor([0, 5, 2**31 - 1 - 127 * 300], dtype=torch.int32)
    grids = Grids((Grid(1.0, 255),)).numbers()
    serve_exactly([x, *factors, None, None, grids, [300, 3], "identity"])


CONV_STAGES = {
    "tucker2": (Stage(5, 3), Stage(3, 4, 1, (3, 2), (2, 1), (1, 0), (1, 1)), Stage(4, 18)),
    "channel_svd": (Stage(5, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)), Stage(4, 7)),
    "input_svd": (Stage(5, 3), Stage(3, 6, 1, (2, 2), (2, 2), (0, 0), (0, 0), (1, 2))),
    "wide": (Stage(40, 37, 1, (1, 3), (1, 1), (0, 1), (0, 1)),),
}


@runs_kernels
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("stages", CONV_STAGES)
def test_conv_chain_int8(stages: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdpass.kernels.gpu import conv_chain_int8

    chained = CONV_STAGES[stages]
    fused = last if chained[-1].pointwise and len(chained) > 1 else 0
    monkeypatch.setattr(conv_chain_int8._Call, "candidates", lambda _: [tile(last=fused, m=32)])
    for own in (False, True):
        for args in images(chained, own):
            y, wanted = serve("conv_chain_int8", args)
            assert y.stride() == wanted.stride()
            assert torch.equal(y, wanted)


def images(stages: tuple[Stage, ...], own: bool) -> Iterator[list[Any]]:
    """Codes in and out, and floats channels last; with `own`, a grid per position where there may be."""
    x = normal(2, stages[0].inputs, 4, 5).cpu()
    factors, reads, y = chain(x, stages, (128, 3, 200))
    core = max(range(len(stages)), key=lambda place: not stages[place].pointwise)
    reads = [Grid() if own and place != core else grid for place, grid in enumerate(reads)]
    bias, residual, integers = normal(y.shape[1]).cpu(), normal(*y.shape).cpu(), integers_of(stages)
    floats, added = Grids(tuple(reads)), grid_over(residual, 9)
    placed = x.contiguous(memory_format=torch.channels_last)
    yield [placed, *factors, bias, residual, floats.numbers(), integers, "identity"]
    on_grids = Grids(tuple(reads), grid_over(y, 90), added)
    read = bytes_of(x, reads[0]) if reads[0] else x
    yield [read, *factors, None, bytes_of(residual, added), on_grids.numbers(), integers, "relu"]


@runs_kernels
def test_a_core_without_a_grid_is_left_to_the_reference() -> None:
    stages = (Stage(5, 4), Stage(4, 6))
    factors = columns([pack_weight(stage, normal(*stage.shape)) for stage in stages])
    args = [normal(2, 5, 3, 3), *factors, None, None, Grids((Grid(), Grid())).numbers(), integers_of(stages)]
    assert IMPLEMENTATIONS["conv_chain_int8", "cuda"](*args, "relu") is NotImplemented


WEIGHT_ONLY = [
    case
    for case in cases_of("weight_only_linear")
    if any(f"{size}-9-17" in case.name for size in ("17x64", "17x13")) or "-40x70-1-0" in case.name
]


@runs_kernels
@pytest.mark.parametrize("apart", [0, 1, 2])
@pytest.mark.parametrize("case", WEIGHT_ONLY, ids=lambda case: case.name)
def test_weight_only_linear(case: Case, apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tdpass.kernels.gpu import weight_only_linear

    monkeypatch.setattr(weight_only_linear, "candidates", lambda *_: [tile(apart=apart, k=32)])
    op = OPS.get("weight_only_linear")
    for dtype in TOLERANCE if apart == 0 else (torch.float32,):
        args = arguments(op, case, dtype)
        y, _ = serve("weight_only_linear", args)
        (wanted,) = exact(op, args)
        error = (y.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


FLOAT8 = [*chosen("linear_chain_float8", ("(33, 16, 1)-5", "(3, 1, 17)-33"))]


@runs_kernels
@pytest.mark.parametrize("case", FLOAT8, ids=lambda case: case.name)
def test_linear_chain_float8(case: Case) -> None:
    op = OPS.get("linear_chain_float8")
    for dtype in (torch.float32, torch.float16):
        args = arguments(op, case, dtype)
        if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            assert IMPLEMENTATIONS[op.name, "cuda"](*map_tensors(Tensor.cuda, args)) is NotImplemented
            continue
        y, _ = serve(op.name, args)
        (wanted,) = exact(op, args)
        error = (y.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[torch.bfloat16 if args[5] else dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_a_chip_without_float8_leaves_it_to_the_reference(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from tdpass.kernels.gpu import language

    args = FLOAT8[0].args
    monkeypatch.setattr(language, "INTERPRETED", True)
    monkeypatch.setattr(language, "capability_of", lambda _: capability)
    assert IMPLEMENTATIONS["linear_chain_float8", "cuda"](*args) is NotImplemented
    with pytest.raises(UnsupportedError, match=r"8\.\d has no float8 arithmetic; one of 8\.9 or newer has"):
        language.check(args[0], "relu", args[1][0].view(float8_chain.FLOAT8))
