"""The coordinates of streams: their principal directions on the calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.formats.metric import eigenpairs
from tdpass.planner.streams.stream import Streams
from tdpass.planner.streams.values import Values, written
from tdpass.tape import Tape


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions `[width, width]` along which a stream varies, most first, and how much.

    Where norms subtract the mean, the last direction is that of the mean, all channels alike: zero where
    nothing but norms reads the stream, so that nothing is written along it.  `keeps_mean` says that something
    else reads it, and that it stays whatever the width.
    """

    directions: Tensor
    energies: Tensor
    keeps_mean: bool = False

    @property
    def width(self) -> int:
        """How many channels there are."""
        return len(self.directions)

    def cut(self, count: int) -> Tensor:
        """The directions `[width, count]` that are left."""
        if not self.keeps_mean:
            return self.directions[:, :count]
        return torch.cat([self.directions[:, : count - 1], self.directions[:, -1:]], 1)

    def read(self, count: int) -> int:
        """How many of `count` channels a norm reads."""
        return count - 1 if self.keeps_mean else count

    def share(self, count: int) -> float:
        """The share of the mean square that `count` channels hold of what a norm reads."""
        whole = float(self.energies.sum())
        return float(self.energies[: self.read(count)].sum()) / whole if whole > 0 else 1.0


def find_bases(streams: Streams, tapes: Sequence[Tape]) -> dict[int, Basis]:
    """The principal directions of every stream that may turn, by its number.

    Eigenvectors of the second moments of what its norms make of it before scale and shift; of what layers
    read of it directly, relative to its mean square.  Runs whose calls are not those of the first are left
    out.
    """
    turning = streams.turning()
    moments = {
        number: torch.zeros(streams.streams[number].width, streams.streams[number].width, dtype=torch.float64)
        for number in turning
    }
    first = [call.name for call in tapes[0].calls]
    for tape in tapes:
        if [call.name for call in tape.calls] == first:
            _add(moments, streams, tape)
    whole = streams.keep_mean()
    return {
        number: _basis(moments[number], centred=streams.streams[number].centred, keeps_mean=number in whole)
        for number in turning
    }


def _add(moments: dict[int, Tensor], streams: Streams, tape: Tape) -> None:
    norms = [(norm.reads, norm) for number in moments for norm in streams.streams[number].norms]
    made = {norm.makes: number for number in moments for norm in streams.streams[number].made}
    read = {number: [norm for reads, norm in norms if reads == number] for number in dict(norms)}
    values = Values(tape, dict(tape.inputs))
    for call in values.steps(forget=True):
        for number in (ref.number for ref in written(call)):
            for norm in read.get(number, ()):
                rows = norm.normalized(_rows(values.by_number[number]))
                moments[streams.value[number]] += rows.T @ rows / len(rows)
            if number in made and streams.streams[made[number]].readers:
                rows = _rows(values.by_number[number])
                moments[made[number]] += rows.T @ rows / rows.square().mean().clamp_min(1e-30) / len(rows)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).double()


def _basis(moment: Tensor, *, centred: bool, keeps_mean: bool) -> Basis:
    if not centred:
        values, vectors = eigenpairs(moment)
        return Basis(vectors.flip(1).contiguous(), values.flip(0).clamp_min(0))
    mean = moment.new_full((len(moment), 1), len(moment) ** -0.5)
    rest = moment - mean @ (mean.T @ moment)
    rest = rest - (rest @ mean) @ mean.T
    # the mean's own eigenvalue is put below all others, so that its direction is the last
    level = float(rest.diagonal().sum()) + 1e-30
    values, vectors = eigenpairs((rest + rest.T) / 2 - level * (mean @ mean.T))
    directions, energies = vectors.flip(1).contiguous(), values.flip(0).clone()
    directions[:, -1:], energies[-1] = mean if keeps_mean else torch.zeros_like(mean), 0.0
    return Basis(directions, energies.clamp_min(0), keeps_mean)
