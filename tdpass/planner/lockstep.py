"""The original and the compressed network run side by side, front to back, one site at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.tape import Playback, Tape

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moment:
    """One calibration batch at one site: what the compressed network feeds it and what it should answer.

    `target` is the original's output, plus what the other summand lost where both meet in a residual sum, so that a layer
    also repairs the errors of the branch beside it.
    """

    x: Tensor
    target: Tensor


@dataclass
class Lockstep:
    """Replays of the dense runs (`tapes`) beside runs with replaced layers; `apply` sets how a site runs from its moment on."""

    tapes: Sequence[Tape]
    dense: list[Playback] = field(init=False)
    compressed: list[Playback] = field(init=False)

    def __post_init__(self) -> None:
        self.dense = [tape.play() for tape in self.tapes]
        self.compressed = [tape.play() for tape in self.tapes]

    def sites(self) -> Iterator[tuple[str, list[Moment]]]:
        """Each site that is called once, in order, with one moment per batch; set `apply` before asking for the next."""
        once = {name: indices[0] for name, indices in self.tapes[0].site_calls.items() if len(indices) == 1}
        for name in sorted(once, key=lambda name: once[name]):
            with torch.no_grad():
                moments = [self._moment(batch, tape.site_calls[name][0]) for batch, tape in enumerate(self.tapes)]
            yield name, moments

    def apply(self, name: str, run: Apply) -> None:
        """Run the site with `run` from here on in the compressed network."""
        for playback in self.compressed:
            playback.replaced[name] = run

    def _moment(self, batch: int, index: int) -> Moment:
        tape, dense, compressed = self.tapes[batch], self.dense[batch], self.compressed[batch]
        x = compressed.advance(index).input_of(index)
        dense.advance(index)
        partner = tape.residual_partner(index)
        lost = None
        if partner is not None and partner in dense.values and partner in compressed.values:
            lost = dense.values[partner] - compressed.values[partner]
        target = dense.step()
        if lost is not None and lost.shape == target.shape:
            target = target + lost
        return Moment(x, target)
