"""Every operator on its cases: native against reference in float64.

Also shapes and strides, memory, and every instruction set.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, cases_of
from setting import ACTIVATIONS, Case, arguments, as_tuple, assert_close, exact, map_tensors, run_native
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tdpass.kernels import build, native
from tdpass.kernels.base import IMPLEMENTATIONS, OPS, use_reference
from tdpass.kernels.binding import all_operators

ALL = [pytest.param(name, case, id=f"{name}-{case.name}") for name in CASES for case in cases_of(name)]
GUARD = Path(__file__).parent / "guard.py"


def test_every_operator_has_cases() -> None:
    assert set(CASES) == set(OPS.names())


def test_native_kernels_are_there() -> None:
    assert native.library() is not None, native.missing()


@pytest.mark.parametrize(("name", "case"), ALL)
def test_native_agrees_with_the_reference(name: str, case: Case) -> None:
    op = OPS.get(name)
    for dtype in case.dtypes:
        args = arguments(op, case, dtype)
        assert_close(run_native(op, args), exact(op, args), case.allowed(dtype))


CHAINS = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in ("conv_chain", "linear_chain")
    for case in cases_of(name)
]
STEEPEST = 1.13  # of the activations: gelu
SUMMED = 1000 * torch.finfo(torch.float32).eps / 2  # more terms than any case has, added up in float32


@pytest.mark.parametrize(("name", "case"), CHAINS)
def test_chains_of_bfloat16_err_by_no_more_than_its_rounding(name: str, case: Case) -> None:
    op = OPS.get(name)
    args = arguments(op, case, torch.bfloat16)
    (got,), (wanted,) = run_native(op, args), exact(op, args)
    sizes = map_tensors(Tensor.abs, args)
    sizes[[argument.name for argument in op.call._schema.arguments].index("activation")] = "identity"
    (size,), unit = exact(op, sizes), torch.finfo(torch.bfloat16).eps / 2
    # every number between two stages may be off by `unit`, and the result once more
    between = STEEPEST * size * ((1 + unit) ** (len(args[1]) - 1) * (1 + SUMMED) - 1)
    assert bool(((got.double() - wanted).abs() <= between + unit * (wanted.abs() + between)).all())


@pytest.mark.parametrize("name", list(CASES))
def test_fake_has_the_shapes_and_strides_of_native_and_reference(name: str) -> None:
    op = OPS.get(name)
    for case in cases_of(name):
        args = arguments(op, case, case.dtypes[0])
        with FakeTensorMode() as mode:
            faked = as_tuple(op.fake(*map_tensors(mode.from_tensor, args)))
        with use_reference():
            reference = as_tuple(op.call(*args))
        for fake, one, other in zip(faked, run_native(op, args), reference, strict=True):
            assert fake.dtype == one.dtype == other.dtype
            assert fake.shape == one.shape == other.shape
            if fake.numel():
                assert fake.stride() == one.stride() == other.stride(), case.name


@pytest.mark.parametrize("name", list(CASES))
def test_activations_may_have_gaps(name: str) -> None:
    op = OPS.get(name)
    names = [argument.name for argument in op.call._schema.arguments]
    for case in cases_of(name):
        args = arguments(op, case, case.dtypes[0])
        gaps = [
            spread(arg) if key in ACTIVATIONS and isinstance(arg, Tensor) else arg
            for key, arg in zip(names, args, strict=True)
        ]
        assert_close(run_native(op, gaps), exact(op, args), case.allowed(case.dtypes[0]))


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between them, and its last two axes the other way round in memory."""
    between = float("nan") if tensor.is_floating_point() else 1
    wide = torch.full(
        (*tensor.shape[:-2], tensor.shape[-1], 2 * tensor.shape[-2]), between, dtype=tensor.dtype
    )
    view = wide.transpose(-1, -2)[..., ::2, :]
    return view.copy_(tensor)


@pytest.mark.parametrize("name", list(CASES))
def test_torch_accepts_the_operator(name: str) -> None:
    op = OPS.get(name)
    args = arguments(
        op,
        next(case for case in cases_of(name) if "empty" not in case.name and "-0" not in case.name),
        torch.float32,
    )
    torch.library.opcheck(op.call, tuple(args), test_utils=("test_schema", "test_faketensor"))


def run_guarded(**env: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(GUARD)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, (
        f"{done.stdout.splitlines()[-1:]} ended with {done.returncode}: {done.stderr[-2000:]}"
    )


def test_nothing_past_the_end_of_a_tensor_is_touched() -> None:
    run_guarded()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("isa", build.machine_targets()[1:])
def test_other_instruction_sets(isa: str) -> None:
    run_guarded(TDPASS_ISA=isa)


@pytest.mark.parametrize(("side", "index"), [("end", 3), ("start", -1)])
def test_the_guard_stops_what_it_should(side: str, index: int) -> None:
    code = f"""
import ctypes, guard, torch
tensor = guard.Guarded({side!r}).copy(torch.ones(3))
assert (ctypes.c_float * 3).from_address(tensor.data_ptr())[2] == 1
ctypes.c_float.from_address(tensor.data_ptr() + 4 * {index}).value
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=GUARD.parent,
        env=os.environ,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("name", sorted(op.name for op in all_operators()))
def test_what_python_implements_takes_what_the_schema_says(name: str) -> None:
    """The schema is the one declaration: C++ has it from the build; functions that drifted are found here."""
    op = OPS.get(name)
    wanted = [argument.name for argument in op.call._schema.arguments]
    functions = [
        op.reference,
        op.fake,
        *(function for (of, device), function in IMPLEMENTATIONS.items() if of == name and device == "cpu"),
    ]
    assert len(functions) in (2, 3)
    for function in functions:
        assert list(inspect.signature(function).parameters) == wanted, function
