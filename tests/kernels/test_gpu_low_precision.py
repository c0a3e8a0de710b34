"""The Triton kernels of operators whose weights have few bits, interpreted or on a CUDA device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import cases_of
from gpu_setting import DEVICE, compiles, normal, run_interpreted, runs_kernels, starts_interpreted, tile
from low_precision import KINDS, bytes_of, grid_over
from setting import Case, arguments, exact, map_tensors
from torch import Tensor

from tdpass.errors import UnsupportedError
from tdpass.kernels import float8_chain
from tdpass.kernels.base import IMPLEMENTATIONS, OPS
from tdpass.kernels.grid import Grid, Grids
from tdpass.kernels.int8_factor import columns, pack_weight
from tdpass.kernels.linear_chain import stages_of
from tdpass.kernels.weight_only import Stored, pack_floats

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


@compiles
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_defaults_compile_for_a_device_that_is_not_here(
    capability: int, compiled_for: Callable[[int], dict[str, int]]
) -> None:
    shared = compiled_for(capability)
    for widths, rows, own in (
        ((768, 160, 64), 512, False),
        ((768, 48, 64), 512, True),
        ((64, 48, 64), 8, False),
        ((64, 40), 8, True),
    ):
        assert IMPLEMENTATIONS["linear_chain_int8", "cuda"](*layers(widths, rows, own)) is not NotImplemented
    for pack, dtype, rows, rank in (
        (KINDS["int4/32"], torch.bfloat16, 1, 40),
        (KINDS["int4"], torch.float16, 512, 0),
        (KINDS["int8"], torch.float32, 8, 140),
    ):
        args = weight_only_layer(pack, dtype, rows, rank)
        assert IMPLEMENTATIONS["weight_only_linear", "cuda"](*args) is not NotImplemented
    if capability == 90:
        for grid in (0.0, 0.5):
            args = float8_layers(grid)
            assert IMPLEMENTATIONS["linear_chain_float8", "cuda"](*args) is not NotImplemented
    assert shared.keys() - {"svd_kernel"} == {
        "pair_kernel",
        "int8_gemm_kernel",
        "weight_only_kernel",
        "gemm_kernel",
    }
    assert max(shared.values()) <= 99 << 10, "a default must fit every device of capability 8.0 and newer"


def layers(widths: tuple[int, ...], rows: int, own: bool) -> list[Any]:
    """Codes on grids throughout, or bfloat16 with every row on a grid of its own."""
    stages = stages_of(widths)
    factors = columns([pack_weight(stage, normal(*stage.shape)) for stage in stages])
    grids = (
        Grids((Grid(),) * len(stages)) if own else Grids((Grid(1.0, 3),) * len(stages), Grid(1.0), Grid(2.0))
    )
    x, rest = (
        torch.zeros(rows, n, dtype=torch.bfloat16 if own else torch.uint8) for n in (widths[0], widths[-1])
    )
    return [x, *factors, normal(widths[-1]), rest, grids.numbers(), list(widths), "gelu"]


def weight_only_layer(
    pack: Callable[[Tensor], Stored], dtype: torch.dtype, rows: int, rank: int
) -> list[Any]:
    """Of 768 inputs and 64 outputs."""
    stored = [pack(normal(64, 768))]
    stored += [pack_floats(normal(rank, 768)), KINDS["int8"](normal(64, rank))] if rank else []
    weights, scales = (list(each) for each in zip(*stored, strict=True))
    x, widths = normal(rows, 768, dtype=dtype), [768, 64, *([rank] if rank else [])]
    return [x, weights, scales, normal(64), None, widths, "silu"]


def float8_layers(grid: float) -> list[Any]:
    """Of 768 inputs, rank 48 and 64 outputs, in bfloat16."""
    packed = [float8_chain.pack_weight(normal(48, 768)), float8_chain.pack_weight(normal(64, 48))]
    weights, scales = (list(each) for each in zip(*packed, strict=True))
    x = normal(512, 768, dtype=torch.bfloat16)
    return [x, weights, scales, normal(64), None, grid, [768, 48, 64], "gelu"]
