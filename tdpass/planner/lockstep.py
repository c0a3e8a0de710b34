"""The original and the compressed network run side by side, front to back, one site at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.tape import Playback, Tape, site_order

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moment:
    """One calibration batch at one site: what the compressed network feeds it and what it should answer.

    `target` is the original's output, plus what the other summand lost where both meet in a residual sum, so
    that a layer also repairs the errors of the branch beside it.
    """

    x: Tensor
    target: Tensor


@dataclass
class Lockstep:
    """Playbacks of the dense runs (`tapes`) beside those with replaced layers.

    `apply` sets how a site runs from its moment on.
    """

    tapes: Sequence[Tape]
    dense: list[Playback] = field(init=False)
    compressed: list[Playback] = field(init=False)

    def __post_init__(self) -> None:
        self.dense = [tape.play() for tape in self.tapes]
        self.compressed = [tape.play() for tape in self.tapes]

    def sites(self) -> Iterator[tuple[str, list[Moment]]]:
        """Each site that no run calls more than once, in order, with a moment of every batch.

        In a moment both networks call it alike. Set `apply` before asking for the next.
        """
        for name in self.called_once():
            with torch.no_grad():
                found = [
                    self._moment(batch, indices[0])
                    for batch, tape in enumerate(self.tapes)
                    if (indices := tape.site_calls.get(name))
                ]
            moments = [moment for moment in found if moment is not None]
            if moments:
                yield name, moments

    def called_once(self) -> list[str]:
        """The layers that some run calls, none more than once, in order; tables, read by rows, are none."""
        return [
            name for name in site_order(self.tapes) if all(_at_most_once(tape, name) for tape in self.tapes)
        ]

    def apply(self, name: str, run: Apply) -> None:
        """Run the site with `run` from here on in the compressed network."""
        for playback in self.compressed:
            playback.replaced[name] = run

    def _moment(self, batch: int, index: int) -> Moment | None:
        """None where the compressed network does not come to that call, or comes with other rows."""
        tape, dense, compressed = self.tapes[batch], self.dense[batch], self.compressed[batch]
        x = compressed.advance(index).input_of(index)
        read = dense.advance(index).input_of(index)
        if x is None or read is None or x.shape != read.shape:
            return None
        partner = tape.residual_partner(index)
        lost = None if partner is None else _difference(dense.value(partner), compressed.value(partner))
        target = dense.step()
        assert target is not None
        if lost is not None and lost.shape == target.shape:
            target = target + lost
        return Moment(x, target)


def _at_most_once(tape: Tape, name: str) -> bool:
    calls = tape.site_calls.get(name, ())
    return len(calls) <= 1 and not any(tape.calls[index].looks_up for index in calls)


def _difference(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if ours is None or theirs is None or ours.shape != theirs.shape else ours - theirs
