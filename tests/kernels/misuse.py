"""Every operator called wrongly in every way that can be generated from a right call.

`python misuse.py [operator ...]` tries each; a call either raises, or answers what the reference answers.  It
prints what it tries, so that the last line tells what crashed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpass.errors import TdpassError
from tdpass.kernels.base import IMPLEMENTATIONS, OPS, Op

INTEGERS = (-(2**40), -(2**31), -1, 0, 1, 2, 3, 7, 2**31, 2**40)
MOST_NUMBERS = 2**22  # of an output: what would be larger is not tried


def misuses(op: Op, args: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The arguments with one of them wrong, or other than it was."""
    names = [argument.name for argument in op.call._schema.arguments]
    for place, (name, value) in enumerate(zip(names, args, strict=True)):
        for what, changed in _changed(name, value):
            yield f"{name} {what}", [*args[:place], changed, *args[place + 1 :]]


def _changed(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from _tensors(value)
        yield from _indices(value) if value.dtype == torch.int32 else ()
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        yield from ((f"= {other}", other) for other in INTEGERS)
    elif isinstance(value, float):
        yield from ((f"= {other}", other) for other in (-1.0, math.inf, math.nan))
    elif isinstance(value, str):
        yield from ((f"= {text}", text) for text in ("nonsense", "clamp(0,nan)", "clamp(0)", "clamp(0,1,2)"))
    elif value and isinstance(value[0], Tensor):
        yield "none", []
        yield "one more", [*value, value[-1]]
        yield from (
            (f"[{k}] {what}", [*value[:k], other, *value[k + 1 :]])
            for k, each in enumerate(value)
            for what, other in _tensors(each)
        )
    else:
        yield "none", []
        yield "one fewer", value[:-1]
        yield "one more", [*value, 1]
        yield from (
            (f"[{k}] = {other}", [*value[:k], other, *value[k + 1 :]])
            for k in range(len(value))
            for other in INTEGERS
        )


def _tensors(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "an axis more", value[None]
    yield "flat", value.reshape(-1)
    yield "no axes", value.new_zeros(())
    yield "double", value.double()
    yield "whole numbers", value.long()
    for axis in range(value.dim()):
        yield f"narrower along {axis}", value.narrow(axis, 0, max(value.shape[axis] - 1, 0))
        yield f"wider along {axis}", torch.cat([value, value], axis)
        yield f"empty along {axis}", value.narrow(axis, 0, 0)


def _indices(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not len(value):
        return
    for other in (-(2**31), -2, -1, 10**6, 2**31 - 1):
        for place in {0, len(value) // 2, len(value) - 1}:
            changed = value.clone()
            changed[place] = other
            yield f"[{place}] = {other}", changed
    yield "descending", value.flip(0)
    yield "all the same", torch.full_like(value, int(value.max()))


def outcome(call: Callable[..., Any], args: list[Any]) -> tuple[Tensor, ...] | None:
    """What it returns; None where it raises."""
    try:
        result = call(*args)
    except (TdpassError, RuntimeError, ValueError, TypeError, IndexError):
        return None
    return result if isinstance(result, tuple) else (result,)


def agree(got: tuple[Tensor, ...] | None, wanted: tuple[Tensor, ...] | None) -> bool:
    """Whether a call did what the reference did, or refused."""
    if got is None or wanted is None:
        return got is None
    return all(
        a.shape == b.shape
        and torch.allclose(
            a.double(),
            b.double(),
            rtol=1e-4,
            atol=1e-4 * float(b.abs().max()) if b.numel() else 0,
            equal_nan=True,
        )
        for a, b in zip(got, wanted, strict=True)
    )


def native(op: Op) -> Callable[..., Any]:
    """The native implementation through ctypes, with the reference where it does not serve."""

    def run(*args: Any) -> Any:
        result = IMPLEMENTATIONS.get((op.name, "cpu"), op.reference)(*args)
        return op.reference(*args) if result is NotImplemented else result

    return run


def too_large(op: Op, args: list[Any]) -> bool:
    """Whether the result would fill the memory rather than tell anything."""
    with torch.device("meta"):
        fakes = outcome(op.fake, [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args])
    return fakes is not None and any(fake.numel() > MOST_NUMBERS for fake in fakes)


def main(names: list[str]) -> int:
    """Try every misuse of these operators, or of all; returns how many went wrong."""
    from cases import CASES, cases_of
    from setting import arguments

    from tdpass.kernels import binding

    binding.build()
    binding.load()
    wrong = 0
    for name in names or CASES:
        op = OPS.get(name)
        case = next(
            case
            for case in cases_of(name)
            if "empty" not in case.name and "-0" not in case.name and torch.float32 in case.dtypes
        )
        right = arguments(op, case, torch.float32)
        for what, args in misuses(op, right):
            sys.stdout.write(f"{name} {case.name}: {what}\n")
            sys.stdout.flush()
            if too_large(op, args):
                continue
            wanted = outcome(op.reference, args)
            for way, call in (("operator in C++", op.call), ("operator in Python", native(op))):
                if not agree(outcome(call, args), wanted):
                    wrong += 1
                    sys.stdout.write(f"WRONG through the {way}\n")
    return wrong


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    sys.exit(min(main(sys.argv[1:]), 100))
