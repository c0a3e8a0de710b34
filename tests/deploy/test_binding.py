"""The operators in C++: the same answers as the references, the same layouts, the same refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, DTYPES_OF, cases_of
from setting import BOUNDS, CLAMPS, MALFORMED, Case, as_tuple, assert_close, exact, run_native
from setting import CHAINS as GEOMETRIES
from setting import arguments as arguments_of
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import base, binding, build, linear_chain, native, sparse
from tdpass.kernels.activation import activate
from tdpass.kernels.blocks import pack
from tdpass.kernels.conv_chain import CONV_CHAIN
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.linear_chain import stages_of as layers_of
from tdpass.kernels.stage import Lanes, Stage
from tdpass.kernels.tensor_chain import TENSOR_CHAIN, Step, block_program, ring_program, train_program

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")

CHAINS = {
    "one": (Stage(3, 5, 1, (3, 3), (1, 1), (1, 1), (1, 1)),),
    "tucker2": (Stage(7, 6), Stage(6, 9, 1, (3, 3), (2, 2), (1, 1), (1, 1)), Stage(9, 17)),
    "spatial": GEOMETRIES["spatial"],
    "cp": GEOMETRIES["cp"],
    "grouped": (Stage(8, 12, 2, (3, 3), (1, 1), (2, 2), (2, 2), (2, 2)), Stage(12, 20)),
}
ON_CPU = sorted(
    name for name in CASES if (name, "cpu") in base.IMPLEMENTATIONS
)  # the others have a reference only
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """The binding, which is in place for the rest of the process."""
    if native.library() is None:
        pytest.skip(native.missing())
    binding.build()
    assert sorted(binding.load()) == ON_CPU


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in CASES for case in cases_of(name)],
)
def test_every_operator_computes_what_its_kernel_does(name: str, case: Case) -> None:
    op = base.OPS.get(name)
    for dtype in case.dtypes:
        args = arguments_of(op, case, dtype)
        got, kernel = as_tuple(op.call(*args)), run_native(op, args)
        assert_close(got, exact(op, args), case.allowed(dtype))
        for one, other in zip(got, kernel, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert one.stride() == other.stride() or one.numel() == 0
            assert torch.equal(one, other)  # the kernel has answered, not the reference


ONE = Stage(1, 1).pack(torch.ones(1, 1, 1, 1), "channels")


def test_clamps_are_read_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every pair of bounds; the reference, which reads texts in Python, is not asked."""
    x = torch.tensor([*BOUNDS, 0.05, -0.7, 3e38, 1e-40, -1e-40])[:, None]
    wanted = {text: activate(x, text) for text in CLAMPS}
    monkeypatch.setattr(linear_chain, "activate", lambda *_: pytest.fail("the reference has answered"))
    for text in CLAMPS:
        assert torch.equal(LINEAR_CHAIN.call(x, [ONE], None, None, [1, 1], text), wanted[text]), text


@pytest.mark.parametrize("text", MALFORMED)
def test_texts_that_name_no_activation_are_refused(text: str) -> None:
    with pytest.raises(RuntimeError, match="is not one of identity, relu, relu6, silu, gelu"):
        LINEAR_CHAIN.call(torch.ones(1, 1), [ONE], None, None, [1, 1], text)


@pytest.mark.parametrize("name", list(CASES))
def test_every_operator_hands_over_what_its_kernel_does_not_serve(name: str) -> None:
    op, case = base.OPS.get(name), cases_of(name)[0]
    args = arguments_of(op, case, torch.float64)
    for one, other in zip(as_tuple(op.call(*args)), as_tuple(op.reference(*args)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", list(CASES))
def test_torch_finds_nothing_wrong_with_any(name: str) -> None:
    op = base.OPS.get(name)
    args = arguments_of(
        op,
        next(case for case in cases_of(name) if "empty" not in case.name and "-0" not in case.name),
        torch.float32,
    )
    torch.library.opcheck(
        op.call, tuple(args), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_blocks_that_do_not_fit_are_refused() -> None:
    values, inputs, start, rows = pack(torch.randn(8, 4), 4)
    for wrong in (
        (values, inputs[1:], start, rows),
        (values, inputs, start[1:], rows),
        (values, inputs, start, rows[:4]),
        (values, inputs, start, rows[:0]),
    ):
        with pytest.raises(RuntimeError, match="use what `pack` returns"):
            sparse.SPARSE_LINEAR.call(torch.randn(2, 4), *wrong, None, None, 8, "identity")
    whole = sparse.SPARSE_LINEAR.call(
        torch.ones(2, 4), values, inputs.long(), start.long(), rows.long(), None, None, 8, "identity"
    )
    served = sparse.SPARSE_LINEAR.call(
        torch.ones(2, 4), values, inputs, start, rows, None, None, 8, "identity"
    )
    torch.testing.assert_close(whole, served)  # indices of 64 bits are left to the reference


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9))


def arguments(
    name: str, lanes: Lanes, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], Tensor, list[int]]:
    stages = CHAINS[name]
    x = torch.randn(2, stages[0].inputs, 11, 13).to(dtype)
    weights = [stage.pack(torch.randn(stage.shape) / stage.shape[1] ** 0.5, lanes) for stage in stages]
    return (
        x,
        weights,
        torch.randn(stages[-1].outputs).to(dtype),
        [value for stage in stages for value in stage.integers()],
    )


def strided(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, x], dim=3)[..., 1 : x.shape[3] + 1] if layout == "strided" else x


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(
    ("lanes", "dtype"), [(lanes, dtype) for lanes, dtypes in DTYPES_OF.items() for dtype in dtypes]
)
@pytest.mark.parametrize("name", list(CHAINS))
def test_convolutions_answer_as_the_reference(
    name: str, lanes: Lanes, layout: str, dtype: torch.dtype
) -> None:
    x, weights, bias, integers = arguments(name, lanes, dtype)
    x = strided(x, layout)
    shape = CONV_CHAIN.fake(x, weights, bias, None, integers, "identity", lanes)
    for activation, residual in (
        ("identity", None),
        ("relu", torch.randn(shape.shape).to(dtype)),
        ("silu", torch.randn(1, 1, 1, 1).to(dtype)),
        ("gelu", None),
    ):
        y = CONV_CHAIN.call(x, weights, bias, residual, integers, activation, lanes)
        expected = CONV_CHAIN.reference(
            x.float(),
            weights,
            bias.float(),
            None if residual is None else residual.float(),
            integers,
            activation,
            lanes,
        )
        assert (y.shape, y.stride(), y.dtype) == (shape.shape, shape.stride(), dtype)
        assert relative(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lanes", ["channels", "pairs"])
@pytest.mark.parametrize("size", [(3,), (1, 3), (7, 3), (2, 5, 3), (0, 3)])
def test_linear_layers_answer_as_the_reference(
    size: tuple[int, ...], lanes: Lanes, dtype: torch.dtype
) -> None:
    widths = [3, 18, 5]
    weights = [stage.pack(torch.randn(stage.shape), lanes) for stage in layers_of(widths)]
    x, bias, residual = (
        torch.randn(size).to(dtype),
        torch.randn(5).to(dtype),
        torch.randn(*size[:-1], 5).to(dtype),
    )
    for given in (x, torch.stack([x, x], -1)[..., 0]):
        y = LINEAR_CHAIN.call(given, weights, bias, residual, widths, "gelu")
        expected = LINEAR_CHAIN.reference(x.float(), weights, bias.float(), residual.float(), widths, "gelu")
        assert (y.shape, y.dtype, y.is_contiguous()) == (expected.shape, dtype, True)
        assert relative(y, expected) < TOLERANCE[torch.bfloat16 if lanes == "pairs" else dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1,), (5,), (2, 19)])
@pytest.mark.parametrize(
    "program",
    [
        train_program((3, 4), (5, 2), (7,)),
        ring_program((4, 3), (2, 5), (2, 3, 2, 2)),
        block_program(9, 3, 4, (2, 3, 2)),
    ],
)
def test_tensor_chains_answer_as_the_reference(
    program: tuple[Step, ...], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    integers = [value for step in program for value in step.integers()]
    weights = [
        step.pack(torch.randn((step.a, step.k, step.o, step.r) if step.batched else (step.k, step.o, step.r)))
        for step in program
    ]
    x, bias = torch.randn(*size, program[0].inputs).to(dtype), torch.randn(program[-1].outputs).to(dtype)
    residual = torch.randn(*size, program[-1].outputs).to(dtype)
    y = TENSOR_CHAIN.call(x, weights, bias, residual, integers, "relu")
    expected = TENSOR_CHAIN.reference(x.float(), weights, bias.float(), residual.float(), integers, "relu")
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert relative(y, expected) < TOLERANCE[dtype]
    assert "tensor_chain" in base.compiled()


def test_the_cpp_kernel_runs_and_python_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        base.IMPLEMENTATIONS, ("conv_chain", "cpu"), lambda *_: pytest.fail("Python was called")
    )
    x, weights, bias, integers = arguments("tucker2", "channels")
    CONV_CHAIN.call(x, weights, bias, None, integers, "relu", "channels")
    assert "conv_chain" in base.compiled()


def test_weights_of_another_type_are_converted() -> None:
    x, weights, bias, integers = arguments("tucker2", "channels")
    halved = [weight.bfloat16() for weight in weights]
    expected = CONV_CHAIN.call(
        x, [weight.float() for weight in halved], bias, None, integers, "relu", "channels"
    )
    assert torch.equal(CONV_CHAIN.call(x, halved, bias, None, integers, "relu", "channels"), expected)
    pairs, bias = (
        [stage.pack(torch.randn(stage.shape), "pairs") for stage in CHAINS["tucker2"]],
        bias.bfloat16(),
    )
    expected = CONV_CHAIN.call(x.bfloat16(), pairs, bias, None, integers, "relu", "pairs")
    assert torch.equal(
        CONV_CHAIN.call(
            x.bfloat16(), [weight.float() for weight in pairs], bias, None, integers, "relu", "pairs"
        ),
        expected,
    )
    gaps = [torch.stack([weight, weight], -1)[..., 0] for weight in weights]
    expected = CONV_CHAIN.call(x, weights, bias, None, integers, "relu", "channels")
    assert torch.equal(CONV_CHAIN.call(x, gaps, bias, None, integers, "relu", "channels"), expected)


def test_what_the_kernel_does_not_serve_the_reference_answers() -> None:
    x, weights, bias, integers = arguments("tucker2", "channels")
    exact = CONV_CHAIN.reference(x.double(), weights, bias.double(), None, integers, "relu", "channels")
    assert torch.equal(
        CONV_CHAIN.call(x.double(), weights, bias.double(), None, integers, "relu", "channels"), exact
    )
    with base.use_reference(), base.use_reference():
        forced = CONV_CHAIN.call(x, weights, bias, None, integers, "relu", "channels")
    assert torch.equal(forced, CONV_CHAIN.reference(x, weights, bias, None, integers, "relu", "channels"))


def test_wrong_arguments_are_refused_by_name() -> None:
    x, weights, bias, integers = arguments("tucker2", "channels")
    with pytest.raises(RuntimeError, match="'tanh' is not one of identity, relu, relu6, silu, gelu"):
        CONV_CHAIN.call(x, weights, bias, None, integers, "tanh", "channels")
    with pytest.raises(RuntimeError, match=r"stage 0 of a chain takes weights packed as \[1, 1, 7, 1, 8\]"):
        CONV_CHAIN.call(x, weights, bias, None, integers, "relu", "pixels")
    with pytest.raises(
        RuntimeError, match=r"stage 0 of a chain takes weights packed as \[1, 1, 1, 4, 16, 2\]"
    ):
        CONV_CHAIN.call(x.bfloat16(), weights, bias, None, integers, "relu", "pairs")
    with pytest.raises(RuntimeError, match="3 stages has 2 weights"):
        CONV_CHAIN.call(x, weights[:2], bias, None, integers, "relu", "channels")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_torch_finds_nothing_wrong(layout: str) -> None:
    x, weights, bias, integers = arguments("cp", "channels")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        CONV_CHAIN.call,
        (strided(x, layout), weights, bias, None, integers, "relu", "channels"),
        test_utils=tests,
    )
    widths = [3, 4, 5]
    packed = [stage.pack(torch.randn(stage.shape), "channels") for stage in layers_of(widths)]
    torch.library.opcheck(
        LINEAR_CHAIN.call, (torch.randn(2, 3), packed, None, None, widths, "identity"), test_utils=tests
    )


def test_memory_is_given_back() -> None:
    x, weights, bias, integers = arguments("one", "channels")

    def pages(calls: int) -> int:
        for _ in range(calls):
            CONV_CHAIN.call(x, weights, bias, None, integers, "relu", "channels")
        return int(Path("/proc/self/statm").read_text().split()[1])

    pages(2000)
    before = pages(1)
    assert pages(20000) - before < 100


SCRIPT = """
import warnings
warnings.simplefilter("error")
import torch, tdpass
from tdpass.kernels import base
from tdpass.kernels.linear_chain import LINEAR_CHAIN, stages_of
weights = [stage.pack(torch.ones(stage.shape), "channels") for stage in stages_of([2, 2])]
print(*LINEAR_CHAIN.call(torch.ones(1, 2), weights, None, None, [2, 2], "identity").tolist(), *base.compiled())
"""


@pytest.mark.parametrize(("asked", "names"), [("", "".join(f" {name}" for name in ON_CPU)), ("python", "")])
def test_a_new_process_takes_what_lies_in_the_cache(asked: str, names: str) -> None:
    environment = {**os.environ, "TDPASS_BINDING": asked}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    assert run.stdout.strip().startswith(f"[2.0, 2.0]{names}")
    assert bool(names) or "chain" not in run.stdout


def test_a_library_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_COMPILED", set())
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    with pytest.raises(KernelError, match=r"cannot load .*wrong.so.*doctor --build"):
        binding._open(wrong)
