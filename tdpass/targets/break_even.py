"""From which share of zero weights on a sparse layer is no slower than the dense one.

Measured by a target, or given as a table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

from tdpass.constraints.sparse import Group
from tdpass.documents import read_yaml
from tdpass.errors import UsageError
from tdpass.kinds import KINDS
from tdpass.site import Site
from tdpass.targets.base import ONE_CALL, Setting, open_target

STAIRCASE = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
_GROUPS = get_args(Group)
_TABLE, _ANY, _NEVER = "table", "any", "never"
_ROW = (
    f"a row is {{kind: {' or '.join(KINDS.names())}, group: weight, shape: [64, any, 3, 3], "
    "sparsity: 0.8 or never}; group and shape may be left out"
)


class BreakEven(Protocol):
    """A machine that says from which sparsity on pruning a layer pays: a `Target`, or a `BreakEvenTable`."""

    def break_even_sparsity(
        self, site: Site, group: str = "weight", setting: Setting = ONE_CALL
    ) -> float | None:
        """The smallest share of zero weights, 0 to 1, at which the layer takes no longer than dense.

        None where there is none. `group` is what is zero at once, as in `tdpass.constraints.sparse.Sparse`; a
        `block` is 16 outputs of one column.  Raises `UsageError` for another.
        """


def leaves_dense(site: Site, group: str) -> bool:
    """Whether the layer is dense again once its zero groups are gone.

    Raises `UsageError` for an unknown group.
    """
    if group not in _GROUPS:
        raise UsageError(f"group {group!r} is not known; what is zero at once is one of {', '.join(_GROUPS)}")
    return group in ("row", "filter", "channel") or (group == "column" and not site.axes)


def crossing(ratio: Callable[[float], float], steps: Sequence[float] = STAIRCASE) -> float | None:
    """The s from which on ratio(s) <= 1, for a ratio that falls with the sparsity s.

    None where it stays above. Bisection over the steps, then a straight line in log(1 - s) between the two
    around it.
    """
    ratio = functools.cache(ratio)
    below, found = -1, len(steps) - 1
    if not ratio(steps[found]) <= 1:  # not a number where neither runs
        return None
    while found - below > 1:
        middle = (below + found) // 2
        below, found = (below, middle) if ratio(steps[middle]) <= 1 else (middle, found)
    if found == 0:
        return steps[0]
    slow, fast = ratio(steps[below]), ratio(steps[found])
    density: float = (1 - steps[below]) * ((1 - steps[found]) / (1 - steps[below])) ** (
        (slow - 1) / (slow - fast)
    )
    return 1 - density


@dataclass(frozen=True)
class BreakEvenRow:
    """The break-even sparsity of layers of that kind and shape.

    None in a shape stands for any size, None as the sparsity for never.
    """

    kind: str
    sparsity: float | None
    group: str = "weight"
    shape: tuple[int | None, ...] | None = None

    def distance(self, site: Site, group: str) -> tuple[float, int]:
        """How far the site is, infinite where the row says nothing of it, and how many sizes are open."""
        if (self.kind, self.group) != (site.kind, group):
            return math.inf, 0
        if self.shape is None:
            return 0.0, len(site.shape)
        pairs = list(zip(self.shape, site.shape, strict=False))
        if len(self.shape) != len(site.shape) or any(size not in (None, axis) for size, axis in pairs[2:]):
            return math.inf, 0
        return sum(
            abs(math.log2(axis / size)) for size, axis in pairs[:2] if size is not None
        ), self.shape.count(None)


@dataclass(frozen=True)
class BreakEvenTable:
    """Break-even sparsities of a machine that is not here, in one setting.

    The nearest row of the site's kind, group and kernel counts: that with the least |log2(o / its o)| +
    |log2(i / its i)|, where an open size is no distance; of equals the one with fewer open sizes, then the
    first.  Groups that leave a smaller dense layer break even at 0 unless a row says otherwise.
    """

    rows: tuple[BreakEvenRow, ...]
    name: str = "the break-even table"

    @classmethod
    def load(cls, path: str | Path) -> BreakEvenTable:
        """Read a YAML list of rows `{kind, group, shape, sparsity}`.

        Raises `UsageError` naming the row that is none.
        """
        read = read_yaml(Path(path), "break-even table", f"it is a YAML list of rows, {_ROW}")
        if not isinstance(read, list) or not read:
            raise UsageError(f"the break-even table {path} holds no list of rows; {_ROW}")
        rows = []
        for number, row in enumerate(read, 1):
            wrong = _wrong(row)
            if wrong:
                raise UsageError(f"row {number} of the break-even table {path}: {wrong}; {_ROW}")
            shape = row.get("shape")
            sizes = None if shape is None else tuple(None if size == _ANY else int(size) for size in shape)
            rows.append(
                BreakEvenRow(
                    row["kind"],
                    None if row["sparsity"] == _NEVER else float(row["sparsity"]),
                    row.get("group", "weight"),
                    sizes,
                )
            )
        return cls(tuple(rows), f"the break-even table {path}")

    def break_even_sparsity(
        self, site: Site, group: str = "weight", setting: Setting = ONE_CALL
    ) -> float | None:
        """The sparsity of the nearest row; the setting is that of the table.

        Raises `UsageError` where no row is of the site's kind and kernel.
        """
        dense = leaves_dense(site, group)
        row = min(self.rows, key=lambda row: row.distance(site, group), default=None)
        if row is not None and math.isfinite(row.distance(site, group)[0]):
            return row.sparsity
        if dense:
            return 0.0
        wanted = ", ".join([*[_ANY] * 2, *map(str, site.kernel)])
        raise UsageError(
            f"{self.name} says nothing of {site.name!r}; add a row {{kind: {site.kind}, group: {group}, "
            f"shape: [{wanted}], sparsity: ...}}"
        )


def _wrong(row: object) -> str:
    """What is wrong with a row as it was read; empty where nothing is."""
    if not isinstance(row, dict) or not {"kind", "sparsity"} <= row.keys() <= {
        "kind",
        "sparsity",
        "group",
        "shape",
    }:
        return f"{row!r} is not one"
    kind, group, shape, sparsity = row["kind"], row.get("group", "weight"), row.get("shape"), row["sparsity"]
    if not isinstance(kind, str) or kind not in KINDS:
        return f"kind {kind!r} is not known"
    if group not in _GROUPS:
        return f"group {group!r} is none of {', '.join(_GROUPS)}"
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool) and 0 <= sparsity <= 1
    if not number and sparsity != _NEVER:
        return f"sparsity {sparsity!r} is not from 0 to 1"
    axes = KINDS.get(kind).axes
    sizes = shape is None or (
        isinstance(shape, list)
        and len(shape) - 2 in axes
        and all(size == _ANY or _counts(size) for size in shape)
    )
    return "" if sizes else f"shape {shape!r} is not that of a {kind} weight"


def _counts(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def open_break_even(text: str | BreakEven, frontend: str = "torch", cache: Path | None = None) -> BreakEven:
    """Read `table:FILE.yaml` as a `BreakEvenTable`, and any other text as the target of that name.

    What is neither text is returned as it is.
    """
    if not isinstance(text, str):
        return text
    name, _, path = text.strip().partition(":")
    return BreakEvenTable.load(path) if name == _TABLE else open_target(text, frontend, cache)
