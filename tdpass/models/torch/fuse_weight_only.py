"""Which linear layers of whole numbers run faster as one operator, by the table of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdpass.fusing.choose import PLAIN, measuring, seconds_of, times_kept
from tdpass.kernels import native
from tdpass.layers.factorized import Factorized
from tdpass.layers.weight_only import WeightOnly, why_not_weight_only
from tdpass.machine import processor
from tdpass.timings import Key, Row, geometry_of

_LEAST = 1 / 0.95  # what is packed is a second copy of the weight
_FUSED = "weight_only_linear"


def fuse_weight_only(layer: Factorized, inputs: Sequence[Tensor] | None) -> tuple[WeightOnly | None, str]:
    """The layer as one operator where that is faster on these inputs (given without storage), else why not."""
    reason = why_not_weight_only(layer.layer())
    if reason:
        return None, reason
    fused = WeightOnly.of(layer)
    if inputs is None or not measuring():
        return fused, ""
    if not inputs:
        return None, "it is not called when the model runs on the data"
    times = [_times(layer, fused, x) for x in inputs]
    plain, one = (sum(each[way] for each in times) for way in (PLAIN, _FUSED))
    if one * _LEAST < plain:
        return fused, ""
    return None, f"{one * 1e6:.0f} us as one operator, {plain * 1e6:.0f} us as it is"


def _times(layer: Factorized, fused: WeightOnly, like: Tensor) -> dict[str, float]:
    """Seconds of either way, measured where the table has none; the form, and so its precision, is part of the key."""
    threads = torch.get_num_threads()
    keys = {
        way: Key(
            f"{processor()} {native.isa()}",
            f"torch {torch.__version__}, kernels {native.version()}",
            threads,
            int(like.shape[0]),
            str(like.dtype).removeprefix("torch."),
            f"{geometry_of(layer.site)} {tuple(like.shape)}",
            f"{layer.form} {way}",
            (),
        )
        for way in (PLAIN, _FUSED)
    }
    table = times_kept()
    known = table.get(keys.values())
    if len(known) < len(keys):
        x = torch.randn(like.shape, dtype=like.dtype)
        seconds = seconds_of({PLAIN: lambda: layer(x), _FUSED: lambda: fused.packed_call(x)}, threads)
        known = {keys[way]: Row(time) for way, time in seconds.items()}
        table.put(known)
    return {way: known[key].seconds for way, key in keys.items()}
