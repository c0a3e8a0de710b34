"""A site: one place in a model where a weight may be replaced."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

Pads = tuple[tuple[int, int], ...]
Extent = tuple[tuple[int, ...], tuple[int, ...]]


def selects(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether a site of that name is among the globs to include and not among those to exclude."""
    return any(fnmatchcase(name, pattern) for pattern in include) and not any(
        fnmatchcase(name, pattern) for pattern in exclude
    )


@dataclass(frozen=True)
class Site:
    """A weight `W[o, i / groups, *kernel]`, without a kernel that of a linear layer, and where it is used.

    `name` is the same on every front end: the module's path in torch, the initializer's name without
    `.weight` in ONNX.  `kind` is a name in `tdpass.kinds.KINDS`.  `padding` has a (before, after) pair per
    spatial axis.  `extents` holds one (input size, output size) per call, for `samples` samples together:
    spatial sizes of a convolution of one image, `((n,), (n,))` for a linear layer applied to `n` positions;
    it is empty until the model has been seen running.  `samples` is more than one only where a sample's own
    share of the calls is no whole number.  Of a `table` single rows `W[o]` are read too, or nothing else is,
    as an embedding does; `lookups` is how many, for `samples` samples.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: Pads = ()
    dilation: tuple[int, ...] = ()
    bias: bool = False
    itemsize: int = 4
    extents: tuple[Extent, ...] = ()
    samples: int = 1
    groups: int = 1
    table: bool = False
    lookups: int = 0

    @property
    def o(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def i(self) -> int:
        """Input channels."""
        return self.shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial size of the kernel; empty for a linear layer."""
        return self.shape[2:]

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.shape) - 2

    @property
    def weights(self) -> int:
        """Number of weights of the dense layer, bias not counted."""
        return math.prod(self.shape)

    @property
    def seen(self) -> bool:
        """Whether activation sizes are known, so that multiply-adds can be counted."""
        return bool(self.extents) or self.lookups > 0

    @property
    def in_positions(self) -> int:
        """Input positions of `samples` samples, summed over calls.

        How often a 1x1 layer at the input is applied.
        """
        return sum(math.prod(before) for before, _ in self.extents)

    @property
    def out_positions(self) -> int:
        """Output positions of `samples` samples, summed over calls."""
        return sum(math.prod(after) for _, after in self.extents)

    def channel_axis(self, axes: int) -> int:
        """Where the channels lie in what the layer reads and makes, among that many axes.

        Before them there may be none of samples.
        """
        return axes - 1 - self.axes

    def positions_after(self, axes: int) -> int:
        """Positions of `samples` samples with the first `axes` spatial axes at output size.

        The rest are still at input size.
        """
        return sum(math.prod(after[:axes]) * math.prod(before[axes:]) for before, after in self.extents)

    def geometry(self) -> dict[str, Any]:
        """What identifies the layer apart from its name and activation sizes, as JSON values."""
        record = asdict(self)
        named = ("kind", "shape", "stride", "padding", "dilation", *(("groups",) if self.groups > 1 else ()))
        return {key: record[key] for key in named}
