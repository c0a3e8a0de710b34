"""What recorded runs show of the sizes that layers work on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tdpass.kinds import kind_of
from tdpass.models.batch import Batch
from tdpass.site import Extent, Site
from tdpass.tape import Tape

_LOOKUP: Extent = ((), ())  # stands for rows that are read one by one
UNREACHED = "it is not called when the model runs on the data"
_Calls = Sequence[tuple[Extent, int]]


def with_extents(site: Site, tapes: Sequence[Tape]) -> Site:
    """The site with the activation sizes that recorded runs show.

    Per sample, where each has the same whole number of calls. Where runs differ, because a layer is reached
    by some samples only or samples differ in size, those of all runs together.
    """
    each = [_calls(site, tape) for tape in tapes]
    alone = {_per_sample(calls, tape.batch_size) for calls, tape in zip(each, tapes, strict=True)}
    if len(alone) == 1:
        return _with(site, *alone.pop())
    samples = sum(tape.batch_size for tape in tapes)
    times: Counter[Extent] = Counter()
    for extent, count in (call for calls in each for call in calls):
        times[extent] += count
    shared = math.gcd(samples, *times.values())
    together = tuple((extent, count // shared) for extent, count in times.items())
    return _with(site, together, samples // shared)


def _calls(site: Site, tape: Tape) -> _Calls:
    """The sizes that each call reads and makes, and how often."""
    made = [tape.calls[index] for index in tape.site_calls.get(site.name, ())]
    return [
        (_LOOKUP, math.prod(call.shapes[0])) if call.looks_up else kind_of(site).call(site, *call.shapes)
        for call in made
    ]


def _per_sample(calls: _Calls, samples: int) -> tuple[tuple[tuple[Extent, int], ...], int]:
    whole = all(times % samples == 0 for _, times in calls)
    shared = samples if whole else 1
    return tuple((extent, times // shared) for extent, times in calls), samples // shared


def _with(site: Site, calls: _Calls, samples: int) -> Site:
    layers = [(extent, times) for extent, times in calls if extent != _LOOKUP]
    extents = tuple(extent for met, times in layers for extent in kind_of(site).extents(met, times))
    lookups = sum(times for extent, times in calls if extent == _LOOKUP)
    return replace(site, extents=extents, samples=samples, lookups=lookups)


def alike(batches: Sequence[Batch]) -> bool:
    """Whether all samples are of one size, however many a call holds."""
    return len({tuple(map(_size_of_sample, batch.tensors, batch.sample_axes)) for batch in batches}) <= 1


def _size_of_sample(tensor: Tensor, axis: int | None) -> tuple[int, ...]:
    return tuple(tensor.shape) if axis is None else (*tensor.shape[:axis], *tensor.shape[axis + 1 :])
