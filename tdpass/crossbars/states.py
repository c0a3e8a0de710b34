"""What the cells of a crossbar can hold of a weight."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from tdpass.constraints.device_levels import DeviceLevels
from tdpass.errors import UsageError
from tdpass.targets.crossbar import CrossbarArray


def device_levels(array: CrossbarArray) -> DeviceLevels:
    """The magnitudes that a weight may have, the largest as 1.

    2^(b - 1) of the sums over its cells, evenly chosen where there are more. A weight of d cells is  sum_j
    2^(c (d - 1 - j)) g_j  with the conductances g_j of its cells of c bits, the most significant first.
    """
    sums = _sums(array)
    return DeviceLevels(tuple(value / sums[-1][0] for value, _ in sums))


def states_of(array: CrossbarArray) -> Tensor:
    """For every magnitude, ascending, the states of a weight's cells, counted from 0: `[levels, digits]`."""
    return torch.tensor([states for _, states in _sums(array)])


def digit_weights(array: CrossbarArray) -> Tensor:
    """What a cell of each digit counts, so that the largest magnitude is 1: per siemens."""
    significance = torch.tensor(
        [float(2 ** (array.cell_bits * (array.digits - 1 - j))) for j in range(array.digits)],
        dtype=torch.float64,
    )
    return significance / _sums(array)[-1][0]


@cache
def _sums(array: CrossbarArray) -> tuple[tuple[float, tuple[int, ...]], ...]:
    if array.signs == "offset":
        raise UsageError(
            "weights with an offset are priced, not mapped, as a zero weight is no absent cell there; use "
            "an array with signs: pair or fragments"
        )
    base, found = 2**array.cell_bits, dict[float, tuple[int, ...]]()
    for states in product(range(base), repeat=array.digits):
        value = sum(
            array.conductances[state] * base ** (array.digits - 1 - j) for j, state in enumerate(states)
        )
        found.setdefault(value, states)
    rising = sorted(found.items())
    wanted = 2 ** (array.weight_bits - 1)
    if len(rising) <= wanted:
        return tuple(rising)
    return tuple(rising[round(k * (len(rising) - 1) / (wanted - 1))] for k in range(wanted))
