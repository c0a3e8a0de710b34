"""Channel paths: what lies between two layers where no channel meets another.

Channels in between may be fewer, or others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tdpass.site import Site
from tdpass.tape import CHANNELWISE, Call, Ref, Tape, leaves, mapped
from tdpass.tape.calls import argument

POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"})
POOLS |= frozenset(
    {
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "boolean_dispatch",
        "_max_pool2d",
        "flatten",
    }
)
_MEAN = "mean"
_WHY = {
    "batch_norm": "a batch-norm follows it; put fold-batchnorm before",
    "add": "its output enters a sum, whose other side would have to change too",
    "cat": "its output is concatenated with others",
}


@dataclass(frozen=True)
class Path:
    """The second site alone reads what the first makes, through `calls` that treat every channel by itself.

    A channel becomes `spread` inputs of the second site: more than one where positions are flattened.
    """

    first: str
    second: str
    calls: tuple[Call, ...]
    spread: int

    def between(self, x: Tensor) -> Tensor:
        """What the second site reads of any channels `x` in the place of what the first makes."""
        for call in self.calls:
            args, kwargs = mapped(partial(_filled, x), (call.args, dict(call.kwargs)))
            x = call.func(*args, **kwargs)
        return x


def _filled(x: Tensor, leaf: object) -> object:
    return x if isinstance(leaf, Ref) else leaf


def path_from(tape: Tape, name: str, sites: Mapping[str, Site]) -> Path | str:
    """The path from a site, or why there is none."""
    indices = tape.site_calls.get(name, [])
    if len(indices) != 1:
        return f"it is called {len(indices)} times"
    number, calls = next(tape.calls[indices[0]].writes()), list[Call]()
    while True:
        readers = tape.readers(number)
        if tape.is_output(number):
            return "the model returns its output"
        if len(readers) != 1:
            return f"{len(readers)} calls read its output"
        call = tape.calls[readers[0]]
        if call.site is not None:
            return _met(tape.calls[indices[0]], sites[name], call, tuple(calls), sites, Ref(number))
        written = list(call.writes())
        read = [leaf for leaf in leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Ref | Tensor)]
        passes = call.name in CHANNELWISE | POOLS or _averages(
            call, sites[name], tape.calls[indices[0]], calls
        )
        if not passes or len(written) != 1 or len(read) != 1:
            return _WHY.get(
                call.name.strip("_"), f"its output goes through {call.name}, where channels may meet"
            )
        calls.append(call)
        number = written[0]


def _averages(call: Call, made: Site, making: Call, before: Sequence[Call]) -> bool:
    """Whether a call is a mean over axes of positions, none of which went before."""
    dims, axes = argument(call.args, call.kwargs, 1, "dim"), len(making.shapes[1])
    given = (dims,) if isinstance(dims, int) else dims
    if call.name != _MEAN or not given or any(other.name in {_MEAN, "flatten"} for other in before):
        return False
    return all(dim % axes > made.channel_axis(axes) for dim in given)


def _met(
    making: Call, made: Site, reading: Call, calls: tuple[Call, ...], sites: Mapping[str, Site], value: Ref
) -> Path | str:
    read = sites.get(reading.site or "")
    if read is None or reading.args[0] != value:
        return f"its output is read by {reading.site!r}, which is left alone"
    if made.groups > 1 or read.groups > 1:
        return f"{made.name if made.groups > 1 else read.name} is grouped"
    flat = any(call.name == "flatten" for call in calls)
    first, second = made.channel_axis(len(making.shapes[1])), read.channel_axis(len(reading.shapes[0]))
    if read.i % made.o or (read.i != made.o and not flat) or first != second:
        return f"what {read.name!r} sums over are not its channels"
    return Path(made.name, read.name, calls, read.i // made.o)


def find_paths(tapes: Sequence[Tape], sites: Mapping[str, Site]) -> tuple[list[Path], dict[str, str]]:
    """The paths of the first run that are in every run, front to back; and why there is none from a site."""
    paths: list[Path] = []
    reasons: dict[str, str] = {}
    for name in sorted(tapes[0].site_calls, key=lambda name: tapes[0].site_calls[name][0]):
        if name not in sites:
            continue
        found = [path_from(tape, name, sites) for tape in tapes]
        whys = [each for each in found if isinstance(each, str)]
        same = {(each.second, each.spread, len(each.calls)) for each in found if isinstance(each, Path)}
        if whys or len(same) != 1:
            reasons[name] = whys[0] if whys else "what follows it is not the same in every run"
            continue
        (path, *_) = (each for each in found if isinstance(each, Path))
        if all(len(tape.site_calls[path.second]) == 1 for tape in tapes):
            paths.append(path)
        else:
            reasons[name] = f"what it feeds, {path.second!r}, is called several times"
    return paths, reasons


def runs_of(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Paths that follow each other, each in one run."""
    after = {path.first: path for path in paths}
    reached = {path.second for path in paths}
    runs = []
    for path in paths:
        if path.first in reached:
            continue
        run = [path]
        while run[-1].second in after:
            run.append(after[run[-1].second])
        runs.append(tuple(run))
    return runs
