"""Targets that run the sparse operators of this package, timed against the dense layer."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from tdpass.constraints.sparse import Group, Sparse
from tdpass.errors import UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.lowering import stage_of
from tdpass.kernels import native
from tdpass.kernels.base import compiled
from tdpass.kernels.blocks import pack
from tdpass.kernels.sparse import SPARSE_CONV2D, SPARSE_LINEAR
from tdpass.site import Site
from tdpass.targets.base import ONE_CALL, Setting
from tdpass.targets.break_even import STAIRCASE, crossing, leaves_dense
from tdpass.targets.layers import channels_last, example_input, make_layer
from tdpass.targets.measured import CAREFUL_ROUNDS, MeasuredTarget
from tdpass.targets.runtimes.base import Bound
from tdpass.timings import Key, Row, geometry_of

BLOCK = (16, 1)  # outputs and columns: what the operators skip at once
_PARTS = 10_000  # sparsities are kept as whole numbers of this


class SparseTarget(MeasuredTarget):
    """A device with `sparse_linear` and `sparse_conv2d`, which take part in no plan.

    They are asked when weights are pruned.
    """

    def break_even_sparsity(
        self, site: Site, group: str = "weight", setting: Setting = ONE_CALL
    ) -> float | None:
        steps = (
            STAIRCASE[1:] if leaves_dense(site, group) else STAIRCASE
        )  # all of its lines are the dense layer
        return crossing(lambda sparsity: self.sparse_over_dense(site, group, [sparsity], setting)[0], steps)

    def sparse_over_dense(
        self, site: Site, group: str, sparsities: Sequence[float], setting: Setting
    ) -> list[float]:
        """Time of the layer with that share of zeros over that of the dense layer in its fastest runtime.

        Groups that leave a dense layer are timed as that smaller layer, with what gathers its input or puts
        its output in place, in any runtime; others in the sparse operators, infinite where these do not serve
        the layer.  What is not in the table is measured in turn with the dense layer. Raises `UsageError` for
        sparsities outside [0, 1), and without compiled operators.
        """
        if not all(0 <= sparsity < 1 for sparsity in sparsities):
            raise UsageError(
                f"sparsities {list(sparsities)} are not shares of zero weights; each is at least 0 and "
                "below 1"
            )
        if leaves_dense(site, group):
            forms = [_kept_by(group, sparsity) for sparsity in sparsities]
            whole, *smaller = self.time(site, [DENSE, *forms], setting, careful=True)
            return [time.seconds / whole.seconds for time in smaller]
        if native.library() is None:
            raise UsageError(
                f"target {self.name} has no sparse operators here: {native.missing()}; use a table of "
                "break-even sparsities, table:FILE.yaml"
            )
        dense = self.time(site, [DENSE], setting)[0].seconds
        sums = [0.0] * len(sparsities)
        for extent, count in Counter(site.extents).items():
            times = self._sparse(replace(site, extents=(extent,)), group, sparsities, setting)
            sums = [
                total + count / site.samples * seconds for total, seconds in zip(sums, times, strict=True)
            ]
        return [seconds / dense for seconds in sums]

    def _sparse(self, site: Site, group: str, sparsities: Sequence[float], setting: Setting) -> list[float]:
        """Seconds of one call, on the scale of the dense times that are kept."""
        keys = {sparsity: self._sparse_key(site, group, sparsity, setting) for sparsity in sparsities}
        known = self.table.get(keys.values())
        calls = [
            (key, call)
            for sparsity, key in keys.items()
            if key not in known
            for call in sparse_calls(site, group, sparsity, setting)
        ]
        rows = {key: Row(math.inf, careful=True) for key in keys.values() if key not in known}
        if calls:
            ruler = self._ruler(site, setting)
            first = [] if ruler is None else [ruler[1]]
            times = self.clock([*first, *(call for _, call in calls)], setting.threads, CAREFUL_ROUNDS)
            scale = 1.0 if ruler is None else ruler[0] / times[0]
            for (key, _), seconds in zip(calls, times[len(first) :], strict=True):
                rows[key] = Row(min(rows[key].seconds, seconds * scale), careful=True)
        self.table.put(rows)
        known = self.table.get(keys.values())
        return [known[keys[sparsity]].seconds for sparsity in sparsities]

    def _sparse_key(self, site: Site, group: str, sparsity: float, setting: Setting) -> Key:
        # called through Python an operator takes longer, which counts in a small layer
        binding = "c++" if SPARSE_LINEAR.name in compiled() else "python"
        runtime = f"sparse {native.isa()} {native.version()} {binding}"
        dtype = str(setting.dtype).removeprefix("torch.")
        return Key(
            self.device,
            runtime,
            setting.threads,
            setting.batch,
            dtype,
            geometry_of(site),
            f"zeros by {group}",
            (round(sparsity * _PARTS),),
        )


def _kept_by(group: str, sparsity: float) -> Form:
    """The form of a dense layer with that share of zeros by whole outputs or input channels."""
    support = "rows" if group in ("row", "filter") else "channels"
    return Form(DENSE.format, (), support=f"{support}/{100 * (1 - sparsity):.6g}%")


def pruned_weight(weight: Tensor, group: str, sparsity: float) -> Tensor:
    """What magnitude pruning leaves of a weight of noise.

    Groups are at random places, those of a larger share among those of a smaller one.
    """
    o, columns = weight.flatten(1).shape
    groups = {
        "weight": o * columns,
        "block": math.ceil(o / BLOCK[0]) * columns,
        "column": columns,
        "kernel": math.prod(weight.shape[:2]),
    }[group]
    return Sparse(max(1, round((1 - sparsity) * groups)), cast("Group", group), BLOCK).project(weight)


def sparse_calls(site: Site, group: str, sparsity: float, setting: Setting) -> list[Bound]:
    """The layer with that share of zeros as one operator, images laid out in every way.

    None where the operators do not serve it.
    """
    stage = stage_of(site)
    if setting.dtype not in native.DTYPES or stage is None or stage.groups > 1:
        return []
    layer = make_layer(site, DENSE, setting.dtype)
    pruned = pruned_weight(layer.factors["kernel"], group, sparsity)
    x, blocks, rest = (
        example_input(layer, setting.batch),
        pack(pruned, positions=setting.batch * site.out_positions),
        (layer.bias, None),
    )
    if not site.axes:
        return [Bound(functools.partial(SPARSE_LINEAR.call, x, *blocks, *rest, site.o, "identity"), blocks)]
    geometry, seen = stage.integers(), x if x.dim() == 4 else x[:, :, None]
    return [
        Bound(functools.partial(SPARSE_CONV2D.call, placed, *blocks, *rest, geometry, "identity"), blocks)
        for placed in (seen.contiguous(), channels_last(seen))
    ]
