"""Values of options, read before anything that they name is opened.

What no option allows is a fault of the command line alone, whatever lies on the disk.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tdpass.cost import Budget
from tdpass.errors import TdpassError, UsageError
from tdpass.pipeline import Pipeline
from tdpass.planner.memory import size_of
from tdpass.sources.weights import check_suffix
from tdpass.targets import check_target

T = TypeVar("T")
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}
_INPUT = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")
Shape = tuple[tuple[int, ...], torch.dtype]


class CommandLineError(UsageError):
    """Words of a command that are wrong by themselves; what they name plays no part."""


def value(read: Callable[[str], T]) -> Callable[[str], T]:
    """`read` as argparse calls it, which puts the option's name before what an error says."""

    @functools.wraps(read)
    def reading(text: str) -> T:
        try:
            return read(text)
        except TdpassError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reading


@value
def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"{text!r} is not a whole number of at least 1")
    return int(text)


@value
def amount(text: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"{text!r} is not a number of at least 0")
    return number


@value
def memory(text: str) -> int:
    """A size in memory."""
    size = size_of(text)
    if size < 1:
        raise UsageError(
            f"{text!r} is no size in memory; write a number of bytes with a unit, such as 512MiB or 4GiB"
        )
    return size


@value
def limit(text: str) -> tuple[str, str]:
    """`macs=0.4` as a measure and its bound, which a budget can hold."""
    key, sign, bound = (part.strip() for part in text.partition("="))
    if not (key and sign and bound):
        raise UsageError(
            f"budget {text!r} is not KEY=VALUE; write --budget macs=0.4, and repeat the option for further "
            "limits"
        )
    Budget.parse({key: bound})
    return key, bound


def budget(limits: Sequence[tuple[str, str]]) -> dict[str, str]:
    """All limits that are given; raises `CommandLineError` for a measure that is given twice."""
    pairs = dict(limits)
    if len(pairs) < len(limits):
        keys = [key for key, _ in limits]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CommandLineError(f"budget {twice!r} is given twice; give each limit once")
    return pairs


@value
def target_name(text: str) -> str:
    """The name of a target; what follows a colon is for the target to open."""
    check_target(text)
    return text


@value
def pipeline(text: str) -> Pipeline | Path:
    """Passes as text, or the file that holds them."""
    path = Path(text)
    return path if path.suffix in (".yaml", ".yml") else Pipeline.parse(text)


@value
def weights_file(text: str) -> str:
    """The name of a file of weights."""
    check_suffix(Path(text))
    return text


@value
def setting(text: str) -> str:
    """`KEY=VALUE`, for a recipe to take."""
    key, sign, _ = text.partition("=")
    if not sign or not key.strip():
        raise UsageError(f"{text!r} is not KEY=VALUE; write finetune=2, or method.admm-nn.keep=3000")
    return text


def file_ending(*suffixes: str) -> Callable[[str], Path]:
    """A file to write, whose name ends in one of these."""

    @value
    def path_of(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            raise UsageError(
                f"{path.name!r} must end in {' or '.join(suffixes)}; write -o "
                f"{path.with_suffix(suffixes[0]).name if path.name else 'FILE' + suffixes[0]}"
            )
        return path

    return path_of


@value
def shape(text: str) -> Shape:
    """`1x3x32x32` or `1x16:int64` as a shape and an element type."""
    match = _INPUT.fullmatch(text)
    dtype = _DTYPES.get((match[2] or "float32") if match else "")
    if match is None or dtype is None:
        raise UsageError(
            f"input {text!r} is not SHAPE or SHAPE:DTYPE; write 1x3x32x32 or 1x16:int64 (types: "
            f"{', '.join(_DTYPES)})"
        )
    sizes = tuple(int(size) for size in match[1].split("x"))
    if min(sizes) < 1:
        raise UsageError(f"input {text!r} has an empty axis; every size must be at least 1")
    return sizes, dtype


def inputs(shapes: Sequence[Shape]) -> tuple[Tensor, ...] | None:
    """Tensors of these shapes: fixed noise for floats, zeros for whole numbers; None for none."""
    generator = torch.Generator().manual_seed(0)
    return (
        tuple(
            torch.randn(sizes, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(sizes, dtype=dtype)
            for sizes, dtype in shapes
        )
        or None
    )
