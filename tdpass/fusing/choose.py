"""Which chains are worth a fused operator, by measurement: once per process and shape, remembered on disk."""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.clock import interleaved
from tdpass.documents import Amount, Document, register_document
from tdpass.errors import TdpassError, UsageError
from tdpass.files import cache_folder, write_text
from tdpass.fusing.plain import frozen_chain, laid_out, plain_chain
from tdpass.kernels import base, native
from tdpass.kernels.conv_chain import CONV_CHAIN, activate, packing
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import Lanes, Stage
from tdpass.machine import processor

Layout = Literal["channels_last", "contiguous"]
LANES: tuple[Lanes, ...] = ("channels", "pixels")
FORMATS_OF: dict[Layout, torch.memory_format] = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

_ROUNDS, _LEAST_SECONDS = 9, 2e-3


@dataclass(frozen=True)
class _Rules:
    lanes: tuple[Lanes, ...] = LANES
    measure: bool = True


_RULES = [_Rules()]


@dataclass(frozen=True)
class ChainCall:
    """A chain as it is called: `size` is that of its input, `[n, c, h, w]` or `[positions, c]`; then what follows its last layer.

    With `frozen` its weights are constants, which the plain layers too have laid out beforehand.
    """

    stages: tuple[Stage, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = "contiguous"
    bias: bool = False
    residual: bool = False
    activation: str = "identity"
    frozen: bool = False

    @property
    def linear(self) -> bool:
        """Whether it is a chain of linear layers."""
        return len(self.size) == 2

    def key(self, threads: int) -> str:
        """What its times depend on, as text."""
        stages = " ".join(",".join(map(str, stage.integers())) for stage in self.stages)
        after = f"{'+bias' * self.bias}{'+residual' * self.residual} {self.activation}"
        frozen = " frozen" * self.frozen
        return f"{stages} | {'x'.join(map(str, self.size))} {str(self.dtype).removeprefix('torch.')} {self.layout} {after}{frozen} threads={threads}"


@dataclass(frozen=True)
class Verdict:
    """The fastest lane family, None where the plain chain is faster; seconds of it and of the plain chain, 0 where unmeasured."""

    lanes: Lanes | None
    seconds: float = 0.0
    plain: float = 0.0

    @property
    def best(self) -> float:
        """Seconds of what is chosen."""
        return self.plain if self.lanes is None else self.seconds


def served(device: str, dtype: torch.dtype) -> str:
    """Why there is no kernel for that device and type; empty where there is one."""
    if device != "cpu":
        return f"there are no fused kernels for {device}"
    if dtype not in native.DTYPES:
        return f"the kernels compute in {' and '.join(str(known).removeprefix('torch.') for known in native.DTYPES)}, this is {dtype}"
    return native.missing()


@contextmanager
def choosing(lanes: str = "auto", *, measure: bool = True) -> Iterator[None]:
    """Within it, convolutions use one lane family, "channels" or "pixels", unless it is "auto"; or all chains are fused unmeasured."""
    if lanes != "auto" and lanes not in LANES:
        raise UsageError(f"lanes={lanes!r} is not known; it is one of auto, {', '.join(LANES)}")
    _RULES.append(_Rules(LANES if lanes == "auto" else tuple(family for family in LANES if family == lanes), measure))
    try:
        yield
    finally:
        _RULES.pop()


def choose(calls: Sequence[ChainCall], *, measure: bool = True) -> Verdict:
    """Whether to fuse a chain that is called so, and in which lanes.

    Timed against the same layers called one by one in eager torch, channels last: the library that inductor's code calls for
    them too.  The fused operator is timed as the dispatcher calls it.  Unmeasured, every chain is fused.  A layer alone has to
    gain more than 5 %: its packed weight is a second copy.
    """
    families: tuple[Lanes, ...] = ("channels",) if calls[0].linear else _RULES[-1].lanes
    if not measure or not _RULES[-1].measure:
        return Verdict(families[0])
    rows = [_times(call) for call in calls]
    plain = sum(row[0] for row in rows)
    fused = {family: sum(row[1 + LANES.index(family)] for row in rows) for family in families}
    lanes = min(fused, key=lambda family: fused[family])
    enough = plain if len(calls[0].stages) > 1 else 0.95 * plain
    return Verdict(lanes if fused[lanes] < enough else None, fused[lanes], plain)


_KNOWN: dict[str, list[float]] = {}


def _times(call: ChainCall) -> list[float]:
    """Seconds of the plain chain and of each lane family; infinite where one does not serve it."""
    key = call.key(torch.get_num_threads())
    if not _KNOWN:
        _KNOWN.update(_read(_file()))
    if key not in _KNOWN:
        _KNOWN[key] = _measure(call)
        _remember(_file())
    return _KNOWN[key]


def _measure(call: ChainCall) -> list[float]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(math.sqrt(shape[-1])).to(call.dtype)

    weights = [noise(*stage.shape) for stage in call.stages]
    bias = noise(call.stages[-1].outputs) if call.bias else None
    if call.linear:
        x, flat = noise(*call.size), [weight.flatten(1) for weight in weights]
        residual = noise(call.size[0], call.stages[-1].outputs) if call.residual else None
        packed = [stage.pack(weight, packing("channels", call.dtype)) for stage, weight in zip(call.stages, weights, strict=True)]
        widths = [call.size[1], *(stage.outputs for stage in call.stages)]
        calls: list[Callable[[], Tensor]] = [
            lambda: _finish(F.linear(functools.reduce(F.linear, flat[:-1], x), flat[-1], bias), residual, call.activation),
            functools.partial(LINEAR_CHAIN.call, x, packed, bias, residual, widths, call.activation),
        ]
    else:
        calls = _convolutions(call, noise(*call.size), weights, bias)
    seconds = _interleaved(calls)
    return [*seconds, *[float("inf")] * (1 + len(LANES) - len(seconds))]


def _convolutions(call: ChainCall, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> list[Callable[[], Tensor]]:
    last = x.contiguous(memory_format=torch.channels_last)
    laid = x.contiguous(memory_format=FORMATS_OF[call.layout])
    plain = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    rest = plain_chain(last, call.stages, plain, None).clone() if call.residual else None
    residual = None if rest is None else rest.contiguous(memory_format=FORMATS_OF[call.layout])
    integers = [value for stage in call.stages for value in stage.integers()]
    ahead, relu = laid_out(call.stages, weights, call.size) if call.frozen else None, rest is None and call.activation == "relu"
    calls: list[Callable[[], Tensor]] = [lambda: _finish(plain_chain(last, call.stages, plain, bias), rest, call.activation)]
    if ahead is not None:
        calls = [lambda: _finish(frozen_chain(last, call.stages, ahead, bias, relu), rest, "identity" if relu else call.activation)]
    for family in LANES:
        lanes = packing(family, call.dtype)
        packed = [stage.pack(weight, lanes) for stage, weight in zip(call.stages, weights, strict=True)]
        calls.append(functools.partial(CONV_CHAIN.call, laid, packed, bias, residual, integers, call.activation, lanes))
    return calls


def _finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return activate(y if residual is None else y + residual, activation)


def _interleaved(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Seconds of each: the median of thread time at one thread, the least wall time at more."""
    alone = torch.get_num_threads() == 1
    with torch.inference_mode(mode=False), torch.no_grad():
        rows = interleaved(calls, _ROUNDS, clock=time.thread_time if alone else time.perf_counter, least=_LEAST_SECONDS, warm_up=0.0)
    return [statistics.median(row) if alone else min(row) for row in rows]


def _machine() -> str:
    library = native.library()
    state = None if library is None else Path(library._name).stat()
    kernels = "none" if state is None else f"{state.st_size} {state.st_mtime_ns}"
    called = "called from Python" if "conv_chain" not in base.compiled() else "called in C++"
    parts = (processor(), native.isa(), torch.__version__, kernels, called)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _file() -> Path:
    """One file per processor, instruction set, torch and build of the kernels."""
    return cache_folder() / "chains" / f"{_machine()}.json"


_TIMES = register_document(Document("table of chain times", dict[str, list[Amount | None]], UsageError, "it is measured again"))


def _read(path: Path) -> dict[str, list[float]]:
    """What was measured, infinite where a lane does not serve; a file that is missing or damaged holds nothing."""
    rows: dict[str, list[Amount | None]] | None = None
    with suppress(OSError, ValueError):
        rows = _TIMES.unsealed(path.read_text(encoding="utf-8"), path.name)
    return {key: [float("inf") if value is None else value for value in row] for key, row in (rows or {}).items() if len(row) == 1 + len(LANES)}


def _remember(path: Path) -> None:
    """Add to what other processes wrote; a folder that cannot be written is no error."""
    rows = {key: [None if value == float("inf") else value for value in row] for key, row in {**_read(path), **_KNOWN}.items()}
    with suppress(OSError, TdpassError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _TIMES.sealed(rows, path.name))
