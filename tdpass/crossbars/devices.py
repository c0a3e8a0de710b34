"""What devices make of the conductances that they are to have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdpass.errors import UsageError
from tdpass.targets.crossbar import CrossbarArray


class Chip(Protocol):
    """Devices whose behaviour was measured."""

    def programmed(self, siemens: Tensor, array: CrossbarArray, seed: int) -> Tensor:
        """The conductances that cells have which were programmed to these."""


@dataclass(frozen=True)
class Devices:
    """How cells and their wires differ from what they are to be; by default not at all.

    `variation` is the deviation of the logarithm of a conductance, `stuck_on` and `stuck_off` are the shares
    of the programmed cells that have the largest or the least conductance whatever they are to have, `wires`
    adds their resistance to the first order, and `chip` are measured devices in place of the log-normal ones.
    `converters` rounds activations to the array's `input_bits` and sums to its `adc_bits`, over the range
    that each has in a call.
    """

    variation: float = 0.0
    stuck_on: float = 0.0
    stuck_off: float = 0.0
    wires: bool = False
    converters: bool = True
    chip: Chip | None = None

    def __post_init__(self) -> None:
        if self.variation < 0 or min(self.stuck_on, self.stuck_off) < 0 or self.stuck_on + self.stuck_off > 1:
            raise UsageError(
                f"variation={self.variation}, stuck_on={self.stuck_on}, stuck_off={self.stuck_off}: a "
                "deviation of 0 or more, and shares within 1"
            )

    def programmed(self, siemens: Tensor, array: CrossbarArray, seed: int) -> Tensor:
        """The conductances `[arrays, rows, columns]` that are there, of those that shall be.

        A cell of 0 is absent and stays so.
        """
        generator, present = torch.Generator().manual_seed(seed), siemens > 0
        made = siemens if self.chip is None else self.chip.programmed(siemens, array, seed)
        if self.variation:
            made = (
                made
                * torch.randn(made.shape, generator=generator, dtype=made.dtype).mul_(self.variation).exp_()
            )
        if self.stuck_on or self.stuck_off:
            fate = torch.rand(made.shape, generator=generator)
            made = torch.where(fate < self.stuck_on, array.conductances[-1], made)
            made = torch.where(fate >= 1 - self.stuck_off, array.conductances[0], made)
        made = torch.where(present, made, 0)
        return behind_wires(made, array.wire_ohms) if self.wires else made


def behind_wires(siemens: Tensor, ohms: float) -> Tensor:
    """The conductances that cells `[.., rows, columns]` seem to have behind lines of `ohms` a cell.

    The lines run from cell to cell; the result is exact to the first order in their resistance. Rows are
    driven at their first column, columns read at virtual ground below their last row.  A cell's current
    lowers the voltage of its row by the resistance that it shares with the others there, and lifts that of
    its column likewise, so that g_ij -> g_ij (1 - r sum_j' (1 + min(j, j')) g_ij' - r sum_i' (R - max(i, i'))
    g_i'j);  in each order of r the answer is linear in the inputs.
    """
    rows, columns = siemens.shape[-2:]
    i, j = torch.arange(rows), torch.arange(columns)
    along = (1 + torch.minimum(j[:, None], j)).to(siemens)
    down = (rows - torch.maximum(i[:, None], i)).to(siemens)
    return siemens * (1 - ohms * (siemens @ along + down @ siemens)).clamp_min(0)
