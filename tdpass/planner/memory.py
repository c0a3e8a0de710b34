"""How much memory recorded runs may take, and how many samples fit into it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tdpass.errors import InvalidModelError, UnsupportedError, UsageError
from tdpass.models.base import Batch, Model
from tdpass.tape import Tape

DEFAULT = 2 * 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB)?")
_PAUSED, _RUNNING = (
    0.75,
    0.25,
)  # parts of the limit: runs paused before a layer, and the one whose gradients are taken


@dataclass(frozen=True)
class Footprint:
    """Bytes that one sample takes.

    All its activations together, as a backward pass keeps them, and the most needed at one time.
    """

    total: float
    live: float

    @classmethod
    def of(cls, tape: Tape) -> Footprint:
        """From one replay; zeros where the run does not show its values."""
        total = most = 0
        held: dict[int, int] = {}
        playback = tape.play()
        with torch.no_grad():
            for index, call in enumerate(tape.calls):
                playback.advance(index + 1)
                for number in call.writes():
                    value = playback.value(number)
                    held[number] = 0 if value is None else value.nbytes
                    total += held[number]
                held = {
                    number: size for number, size in held.items() if tape.last_read.get(number, -1) > index
                }
                most = max(most, sum(held.values()))
        return cls(total / tape.batch_size, most / tape.batch_size)


def memory_limit() -> int:
    """`$TDPASS_MEMORY` in bytes, such as `512MiB` or `4GiB`; 2 GiB without.

    Raises `UsageError` for what is no size.
    """
    text = os.environ.get("TDPASS_MEMORY", "").strip()
    if not text:
        return DEFAULT
    limit = size_of(text)
    if limit < 1:
        raise UsageError(
            f"TDPASS_MEMORY={text!r} is not a size in memory; write a number of bytes with a unit, such as "
            "'512MiB' or '4GiB'"
        )
    return limit


def size_of(text: str) -> int:
    """Bytes that a text such as `512MiB` says; 0 for one that says none."""
    match = _SIZE.fullmatch(text.strip())
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def within_memory(model: Model, calls: Sequence[Batch], limit: int) -> tuple[list[Batch], list[str]]:
    """The calls cut to what fits.

    As many samples in one as a backward pass can keep, as many in all as can wait before a layer. Judged by
    the first sample.  Two runs of every sample wait side by side while a result is repaired.  Calls that
    cannot be cut stay whole, and one call always stays.  Returns what is to be said of it, too.
    """
    if not calls:
        return [], []
    try:
        needed = Footprint.of(model.record(calls[0].part(0, 1) if calls[0].divisible else calls[0]))
    except (
        UnsupportedError,
        InvalidModelError,
    ):  # it cannot be recorded and keeps no recordings, or takes no single sample
        return list(calls), []
    most = max(1, int(_RUNNING * limit / max(2 * needed.total, 1.0)))
    samples = max(1, int(_PAUSED * limit / max(2 * needed.live, 1.0)))
    if all(call.size <= most for call in calls) and sum(call.size for call in calls) <= samples:
        return list(calls), []
    kept: list[Batch] = []
    left = samples
    for call in calls:
        if kept and left <= 0:
            break
        size = min(call.size, max(left, 1)) if call.divisible else call.size
        step = min(most, size) if call.divisible else size
        kept += (
            [call.part(start, min(start + step, size)) for start in range(0, size, step)]
            if call.divisible
            else [call]
        )
        left -= size
    used, given = (sum(call.size for call in some) for some in (kept, calls))
    sizes = f"{used} of {given} samples are used, at most {max(call.size for call in kept)} in a call"
    takes = (
        f"a sample takes {needed.total / 2**20:.3g} MiB of activations, {needed.live / 2**20:.3g} "
        "MiB at a time"
    )
    return kept, [f"{sizes}: {takes}, and the limit is {limit / 2**20:.4g} MiB; set TDPASS_MEMORY to another"]
