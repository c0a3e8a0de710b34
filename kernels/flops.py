"""What the operators multiply and add: for tdpass's count of a run, and for torch's."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tdpass.kernels.stage import stages_of
from tdpass.products import PRODUCTS, Count, by_rows, convolution

_COUNTER = "torch.utils.flop_counter"


def count_products(name: str, macs: Count) -> None:
    """Make known what an operator of ours multiplies and adds, from its output and its arguments.

    Counters of torch ask for floating-point operations, two for each of them.
    """
    PRODUCTS.add(f"tdpass.{name}", macs)
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER], name)


def of_arguments(schema: str, macs: Callable[..., int], *names: str) -> Count:
    """A count that `macs` makes of the arguments of these names, wherever the operator's schema has them.

    What a call leaves out is None.
    """
    places = [part.split()[-1].partition("=")[0] for part in schema[1 : schema.index(")")].split(",")]

    def count(_y: object, *args: Any, **kwargs: Any) -> int:
        given = {**dict(zip(places, args, strict=False)), **kwargs}
        return macs(*(given.get(name) for name in names))

    return count


def conv_macs(x: Tensor, integers: Sequence[int]) -> int:
    """Multiply-adds of a chain of convolutions on images or signals."""
    size: Sequence[int | torch.SymInt] = (1, *x.shape[2:])[-2:]
    total = 0
    for stage in stages_of(integers):
        size = stage.output_size(size)
        total += convolution((), stage.shape, (x.shape[0], stage.outputs, *map(int, size)))
    return total


def linear_macs(x: Tensor, widths: Sequence[int]) -> int:
    """Multiply-adds of a chain of linear layers on the last axis of x."""
    return by_rows(x.shape, *pairwise(widths))


def _tell(counter: ModuleType, name: str) -> None:
    macs = PRODUCTS.get(f"tdpass.{name}")

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * macs(out_val, *args, **kwargs)

    counter.register_flop_formula(getattr(torch.ops.tdpass, name), get_raw=True)(flops)


class _WhenImported(MetaPathFinder):
    """Tells torch's counter of the operators when it is imported.

    It imports Triton, which takes too long for every program that uses tdpass.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = functools.partial(_executed, execute)  # type: ignore[method-assign]
        return spec


def _executed(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    for name in PRODUCTS.names():
        namespace, _, own = name.partition(".")
        if namespace == "tdpass":
            _tell(module, own)


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
