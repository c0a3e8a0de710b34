"""cuda: the first graphics processor of this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from tdpass.clock import Call
from tdpass.errors import UsageError
from tdpass.targets.base import register_target
from tdpass.targets.measured import MeasuredTarget
from tdpass.targets.runtimes import RUNTIMES

_WARM_UP_CALLS, _CALLS = 5, 20


@register_target
class CudaTarget(MeasuredTarget):
    """A CUDA device, timed between events on the current stream; torch models only."""

    name = "cuda"

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> CudaTarget:
        if way:
            raise UsageError(f"target cuda runs models in one way only, not in {way!r}; write 'cuda'")
        if not torch.cuda.is_available():
            raise UsageError(
                "target cuda needs a CUDA device and a build of torch for it, and finds none; use target cpu"
            )
        if frontend == "onnx":
            raise UsageError(
                "target cuda times torch models, and this one is ONNX; give the torch model, or use target "
                "cpu"
            )
        return cls([runtime for runtime in RUNTIMES if cls.name in runtime.families], cache)

    @cached_property
    def device(self) -> str:
        return torch.cuda.get_device_name()

    def clock(self, calls: Sequence[Call], threads: int, rounds: int) -> list[float]:
        for call in calls:
            for _ in range(_WARM_UP_CALLS):
                call()
        with torch.no_grad():
            times = [[_between_events(call) for call in calls] for _ in range(rounds)]
        return [statistics.median(column) for column in zip(*times, strict=True)]


def _between_events(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / _CALLS
