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

UNREACHED = "it is not called when the model runs on the data"
_Calls = Sequence[tuple[Extent, int]]


def with_extents(site: Site, tapes: Sequence[Tape]) -> Site:
    """The site with the activation sizes that recorded runs show.

    Per sample, where each has the same whole number of calls. Where runs differ, because a layer is reached
    by some samples only or samples differ in size, those of all runs together.
    """
    each = [_calls(site, tape) for tape in tapes]
    alone = {_extents(site, calls, tape.batch_size) for calls, tape in zip(each, tapes, strict=True)}
    if len(alone) == 1:
        extents, samples = alone.pop()
        return replace(site, extents=extents, samples=samples)
    samples = sum(tape.batch_size for tape in tapes)
    times: Counter[Extent] = Counter()
    for extent, count in (call for calls in each for call in calls):
        times[extent] += count
    shared = math.gcd(samples, *times.values())
    together = [(extent, count // shared) for extent, count in times.items()]
    return replace(site, extents=_repeated(site, together), samples=samples // shared)


def _calls(site: Site, tape: Tape) -> _Calls:
    """The sizes that each call reads and makes, and how often."""
    return [
        kind_of(site).call(site, *tape.calls[index].shapes) for index in tape.site_calls.get(site.name, ())
    ]


def _extents(site: Site, calls: _Calls, samples: int) -> tuple[tuple[Extent, ...], int]:
    whole = all(times % samples == 0 for _, times in calls)
    return _repeated(
        site, [(extent, times // samples if whole else times) for extent, times in calls]
    ), 1 if whole else samples


def _repeated(site: Site, calls: _Calls) -> tuple[Extent, ...]:
    return tuple(extent for met, times in calls for extent in kind_of(site).extents(met, times))


def alike(batches: Sequence[Batch]) -> bool:
    """Whether all samples are of one size, however many a call holds."""
    return len({tuple(map(_size_of_sample, batch.tensors, batch.sample_axes)) for batch in batches}) <= 1


def _size_of_sample(tensor: Tensor, axis: int | None) -> tuple[int, ...]:
    return tuple(tensor.shape) if axis is None else (*tensor.shape[:axis], *tensor.shape[axis + 1 :])
