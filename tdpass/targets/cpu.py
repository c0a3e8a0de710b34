"""cpu: this machine's processor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from tdpass.clock import on_cpu
from tdpass.errors import UsageError
from tdpass.machine import processor
from tdpass.targets.base import register_target
from tdpass.targets.runtimes import RUNTIMES, Runtime
from tdpass.targets.runtimes.base import Call
from tdpass.targets.sparse import SparseTarget

_FAMILY = {"onnx": "onnxruntime"}
_ELSEWHERE = "cuda"


@register_target
class CpuTarget(SparseTarget):
    """The processor of this machine.

    `cpu` divides layers among the runtimes of the front end: those of torch, or ONNX Runtime for ONNX models.
    `cpu:FAMILY` names another family, `cpu:RUNTIME` one runtime.
    """

    name = "cpu"

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> CpuTarget:
        return cls(runtimes_of(way, _FAMILY.get(frontend, "torch")), cache)

    @cached_property
    def device(self) -> str:
        return f"{processor()} {torch.backends.cpu.get_cpu_capability()}"

    def clock(self, calls: Sequence[Call], threads: int, rounds: int) -> list[float]:
        return on_cpu(calls, threads, rounds)


def runtimes_of(way: str, default: str) -> list[Runtime]:
    """The installed runtimes of a family, those that are slow to prepare left out, or the one of that name.

    Raises `UsageError` for a name that is neither, or when what it names is not installed.
    """
    here = [runtime for runtime in RUNTIMES if _ELSEWHERE not in runtime.families]
    known = sorted(
        {runtime.name for runtime in here} | {family for runtime in here for family in runtime.families}
    )
    if way and way not in known:
        raise UsageError(f"target cpu has no runtime {way!r}; known: {', '.join(known)}")
    chosen = way or default
    found = [runtime for runtime in here if chosen in runtime.families and not runtime.on_demand] or [
        runtime for runtime in here if runtime.name == chosen
    ]
    installed = [runtime for runtime in found if runtime.available()]
    if not installed:
        raise UsageError(f"the runtime {chosen!r} is not installed; install it, or leave it out of target")
    return sorted(installed, key=lambda runtime: runtime.name)
