"""Whole networks in single precision, bfloat16 and bytes.

`python -m benchmarks.bench_models --dtype` times them.

Every candidate is `dense`, `chain` (low rank as plain layers) or `fused` (low rank by the operators of this
package) in one runtime.  `error` is the relative difference of the outputs, in the Euclidean norm, from those
of the dense network in single precision; `dense` and `chain` are each compared by their best runtime.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import tdpass
from benchmarks.nets import Net, exported
from benchmarks.results import Value
from tdpass.clock import on_cpu, threads_of_torch
from tdpass.models import Batch, open_model
from tdpass.models.base import Model
from tdpass.planner.rank_plan import RankPlan
from tdpass.targets.runtimes import RUNTIMES

DTYPES = ("fp32", "bf16", "int8")
COLUMNS = (
    "net", "batch", "threads", "dtype", "macs_ratio", "shape", "runtime", "ms", "error", "error_of_dense",
    "over_best_dense_of_type", "over_best_dense",
)  # fmt: skip
ROUNDS = 11
STATIC = "quantize,quantize-activations{calibration=minmax}"


@dataclass(frozen=True)
class Candidate:
    """One way to run the network: its shape, the runtime, the call, and what it answers."""

    shape: str
    runtime: str
    call: Callable[[], object]
    answer: Tensor


def candidates(
    dtype: str,
    dense: nn.Module,
    chain: nn.Module | None,
    x: Tensor,
    threads: int,
    runtimes: Collection[str] = (),
) -> list[Candidate]:
    """Everything to be timed in that type; what a runtime does not serve is left out.

    Of low rank nothing where there is no `chain`; with `runtimes` those of these names alone are asked, and
    no operators of this package.
    """
    ways = {"fp32": _fp32, "bf16": _bf16, "int8": _int8}
    plain = [
        each
        for shape, module in (("dense", dense), ("chain", chain))
        if module is not None
        for each in ways[dtype](shape, module, x, threads, runtimes)
    ]
    if chain is None or runtimes:
        return plain
    return [*plain, *(_fused_int8(chain, x, threads) if dtype == "int8" else _fused(dtype, chain, x))]


def _fp32(
    shape: str, module: nn.Module, x: Tensor, threads: int, asked: Collection[str] = ()
) -> Iterator[Candidate]:
    torch_side, onnx_side = open_model(module, x), open_model(exported(module, x), None)
    yield from in_runtimes(("eager", "inductor"), torch_side, shape, x, threads, asked)
    yield from in_runtimes(("onnxruntime", "openvino"), onnx_side, shape, x, threads, asked)


def _bf16(
    shape: str, module: nn.Module, x: Tensor, threads: int, asked: Collection[str] = ()
) -> Iterator[Candidate]:
    half = functools.partial(copy.deepcopy, module)
    yield from in_runtimes(
        ("eager", "inductor"),
        open_model(half().bfloat16(), x.bfloat16()),
        shape,
        x.bfloat16(),
        threads,
        asked,
    )
    yield from in_runtimes(
        ("openvino_default",), open_model(exported(module, x), None), shape, x, threads, asked
    )


def _int8(
    shape: str, module: nn.Module, x: Tensor, threads: int, asked: Collection[str] = ()
) -> Iterator[Candidate]:
    artifact = tdpass.compress(exported(module, x), None, x, pipeline=STATIC, strict=False)
    yield from in_runtimes(("onnxruntime", "openvino"), artifact.opened, shape, x, threads, asked)
    dynamic = STATIC.replace("minmax", "dynamic")
    small = tdpass.compress(copy.deepcopy(module), None, x, pipeline=dynamic, strict=False)
    if any("read integers" in note for row in small.report.passes for note in row.notes):
        yield from in_runtimes(("eager", "inductor"), small.opened, shape, x, threads, asked)


def _fused(dtype: str, chain: nn.Module, x: Tensor) -> Iterator[Candidate]:
    """The operators of this package in floating point."""
    module, seen = (
        (copy.deepcopy(chain), x) if dtype == "fp32" else (copy.deepcopy(chain).bfloat16(), x.bfloat16())
    )
    if x.dim() == 4:
        module = module.to(memory_format=torch.channels_last)
        seen = seen.contiguous(memory_format=torch.channels_last)
    compiled: Any = torch.compile(module, backend="tdpass", options={"freeze": True})
    with torch.no_grad():
        answer = compiled(seen)
        yield Candidate("fused", "torch", functools.partial(compiled, seen), answer.float())


def _fused_int8(chain: nn.Module, x: Tensor, threads: int) -> Iterator[Candidate]:
    """The operators of this package in whole numbers.

    Both where each layer alone is faster by them, and in graphs, which hand bytes on.
    """
    module, seen = copy.deepcopy(chain), x
    if x.dim() == 4:
        module = module.to(memory_format=torch.channels_last)
        seen = x.contiguous(memory_format=torch.channels_last)
    made = tdpass.compress(module, None, seen, pipeline=f"{STATIC},fuse-kernels", strict=False)
    yield from in_runtimes(("eager", "inductor"), made.opened, "fused", seen, threads)
    assert isinstance(made.model, nn.Module)
    compiled: Any = torch.compile(made.model, backend="tdpass", options={"freeze": True})
    with TemporaryDirectory() as folder, torch.no_grad():
        tdpass.deploy(made.model, x, Path(folder) / "net.pt2")
        package = tdpass.load_deployed(Path(folder) / "net.pt2")
        yield Candidate("fused", "torch", functools.partial(compiled, seen), compiled(seen).float())
        yield Candidate("fused", "package", functools.partial(package, x), package(x).float())


def in_runtimes(
    names: tuple[str, ...], model: Model, shape: str, x: Tensor, threads: int, asked: Collection[str] = ()
) -> Iterator[Candidate]:
    """A whole model in these runtimes, those left out that do not serve it."""
    for name in names:
        if asked and name.removesuffix("_default") not in asked:
            continue
        runtime = RUNTIMES.get(name)
        call = runtime.prepare_model(model, Batch((x,)), threads) if runtime.available() else None
        if call is not None:
            yield Candidate(shape, name, call, _answer(name, call, model, x))


def _answer(name: str, call: Callable[[], object], model: Model, x: Tensor) -> Tensor:
    """What the runtime answers, or the model where the runtime writes to memory of its own."""
    found = call()
    if isinstance(found, Tensor):
        return found.detach().float()
    if name.startswith("openvino") and found is not None:
        return torch.from_numpy(next(iter(found.values())).copy()).float()  # type: ignore[attr-defined]
    with torch.no_grad():
        returned = model.run(Batch((x,)))
    value = next(iter(returned.values())) if isinstance(returned, dict) else returned
    assert isinstance(value, Tensor)
    return value.float()


def rows_of(
    net: Net, plan: RankPlan, batch: int, threads: int, dtypes: tuple[str, ...], rounds: int = ROUNDS
) -> list[dict[str, Value]]:
    """Times and errors of one network in these types, all in one process and in turn."""
    model, x = net.build(), net.input(batch)
    made = tdpass.compress(model, plan=plan, pipeline="fold-batchnorm,factorize", example_inputs=x)
    assert isinstance(made.model, nn.Module)
    with torch.no_grad(), threads_of_torch(threads):
        exact, low = model(x).float(), made.model(x).float()
        found = [
            (dtype, each) for dtype in dtypes for each in candidates(dtype, model, made.model, x, threads)
        ]
        head: dict[str, Value] = {"net": net.name, "batch": batch, "threads": threads}
        return rows_of_candidates(head, found, exact, low, plan, rounds)


def rows_of_candidates(
    head: Mapping[str, Value],
    found: Sequence[tuple[str, Candidate]],
    exact: Tensor,
    low: Tensor,
    plan: RankPlan,
    rounds: int,
) -> list[dict[str, Value]]:
    """Times and errors of what runs in each type.

    `exact` and `low` are what the dense network answers, and the one of low rank, in single precision.
    """
    threads = int(str(head["threads"]))
    seconds = on_cpu([each.call for _, each in found], threads, rounds, least=0.02, warm_up=0.2)
    best: dict[str, float] = {}
    for (dtype, each), time in zip(found, seconds, strict=True):
        if each.shape == "dense":
            best[dtype] = min(time, best.get(dtype, math.inf))
    return [
        {
            **head,
            "dtype": dtype,
            "macs_ratio": plan.original.macs / plan.planned.macs,
            "shape": each.shape,
            "runtime": each.runtime,
            "ms": 1e3 * time,
            "error": _apart(each.answer, exact if each.shape == "dense" else low),
            "error_of_dense": _apart(each.answer, exact),
            "over_best_dense_of_type": best[dtype] / time,
            "over_best_dense": min(best.values()) / time,
        }
        for (dtype, each), time in zip(found, seconds, strict=True)
    ]


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
