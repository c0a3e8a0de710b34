"""Chooses block shapes by timing them once per device and shape, and remembers the choice on disk.

The choices of one device and Triton version lie in one JSON file, `gpu/<device>-triton<version>.json` in
`$TDPASS_CACHE` (default: the user's cache folder); a shape that is in it is never timed again.  Nothing is
timed while a CUDA graph is captured, under the interpreter, or with `TDPASS_TUNE=0`: the remembered choice
serves, else the first candidate, which each kernel lists as its default.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from tdpass.errors import TdpassError, UnsupportedError
from tdpass.files import write_text
from tdpass.kernels.gpu.language import INTERPRETED
from tdpass.kernels.gpu.weights import capturing

Config = dict[str, int]
Choices = dict[str, Config]
Timer = Callable[[Callable[[], object]], float]
_VERSION = 1  # of what the numbers in a configuration mean
_LOCK = threading.RLock()  # a kernel being tuned may tune those that it calls
_CHOICES: dict[Path, Choices] = {}  # what lies on disk
_USED: dict[tuple[Path, str], Config] = {}  # what has been checked to fit its kernel
_ROUNDS, _KEEP = 7, 1.5
_UNFIT = (
    CompilationError,
    OutOfResources,
    PTXASError,
)  # too much shared memory or too many registers for this device


def cache_file(device: torch.device) -> Path:
    """Where the choices for a device are remembered."""
    return _file(
        os.environ.get("TDPASS_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdpass",
        device,
    )


@functools.lru_cache(maxsize=64)
def _file(root: str | Path, device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Path(root) / "gpu" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-triton{triton.__version__}.json"


def bucket(size: int) -> int:
    """Sizes that vary from call to call, rounded up to a power of two, so that each needs no timing."""
    return 1 << max(0, size - 1).bit_length()


def choose(
    kernel: str,
    key: Sequence[Any],
    x: Tensor,
    candidates: Callable[[], Sequence[Config]],
    run: Callable[[Config], object],
    timer: Timer | None = None,
) -> Config:
    """The fastest of `candidates` for this kernel and shape, on the device of x.

    `key` names the shape and types; `run` launches the kernel with a configuration, and must be free to do so
    repeatedly. Raises `UnsupportedError` where no candidate runs.
    """
    path, name = cache_file(x.device), f"{_VERSION} {kernel} {' '.join(str(part) for part in key)}"
    found = _USED.get((path, name))
    if found is not None:
        return found
    with _LOCK:
        if path not in _CHOICES:
            _CHOICES[path] = _read(path)
        listed = candidates()
        found = _CHOICES[path].get(name)
        if found is not None and found.keys() == listed[0].keys():
            _USED[path, name] = found
            return found
        if len(listed) == 1 or (timer is None and not _may_time(x)):
            return listed[0]
        best = _USED[path, name] = _fastest(kernel, listed, run, timer or _seconds)
        _CHOICES[path] = {**_read(path), **_CHOICES[path], name: best}
        _write(path)
        return best


def _may_time(x: Tensor) -> bool:
    return x.is_cuda and not INTERPRETED and not capturing(x) and os.environ.get("TDPASS_TUNE", "1") != "0"


def _fastest(kernel: str, listed: Sequence[Config], run: Callable[[Config], object], timer: Timer) -> Config:
    """The candidate of least median time.

    Rounds go over all that are left in turn, so that a slow moment hits each alike.
    """
    times: dict[int, list[float]] = {}
    reason: Exception | None = None
    for place, config in enumerate(listed):
        try:
            run(config)  # compiles
            times[place] = [timer(lambda config=config: run(config))]  # type: ignore[misc]
        except _UNFIT as error:
            reason = error
    if not times:
        raise UnsupportedError(
            f"no configuration of the GPU kernel {kernel} runs on this device: {reason}; the operator's "
            "reference serves it"
        ) from reason
    limit = _KEEP * min(first[0] for first in times.values())
    left = {place: seen for place, seen in times.items() if seen[0] <= limit}
    for _ in range(_ROUNDS):
        for place, seen in left.items():
            seen.append(timer(lambda place=place: run(listed[place])))  # type: ignore[misc]
    return listed[min(left, key=lambda place: statistics.median(left[place]))]


def _seconds(call: Callable[[], object]) -> float:
    """Seconds on the device, by events around three launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(3):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 3e3


def _read(path: Path) -> Choices:
    """What is remembered; a file that is missing or damaged remembers nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {name: config for name, config in content.items() if _sound(config)}
        if isinstance(content, Mapping)
        else {}
    )


def _sound(config: object) -> bool:
    return isinstance(config, dict) and all(isinstance(value, int) for value in config.values())


def _write(path: Path) -> None:
    """Remember the choices; a cache that cannot be written only costs timing again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(_CHOICES[path], indent=1, sort_keys=True) + "\n")
    except (OSError, TdpassError):
        return
