"""What becomes of weights where streams are stored in fewer coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.models.streams import NewLayer, NewNorm, StreamEdits
from tdpass.planner.streams.bases import Basis
from tdpass.planner.streams.norms import Norm
from tdpass.planner.streams.stream import Stream, Streams, Sum

LEAST = 2  # channels of a stream: a norm that subtracts means needs one beside that of the mean


def sliced(streams: Streams, bases: Mapping[int, Basis], keep: float) -> StreamEdits:
    """The edits that leave that share of the channels of each stream that may turn; at 1 answers stay.

    With P the directions of a stream that are left, whoever writes to it becomes `P^T W`, and its readers
    `W P`.  A norm that reads it works on what is left of the centred stream; its scale g and shift become
    part of the layers that alone read what it makes, `W diag(g) P`, else of an adapter `P'^T diag(g) P` to
    the coordinates P' that these have.  What a norm reads goes to a sum in other coordinates by `P'^T P`.
    """
    return _Slicing(streams, bases, keep).edits()


@dataclass(frozen=True)
class _Slicing:
    streams: Streams
    bases: Mapping[int, Basis]
    keep: float

    def edits(self) -> StreamEdits:
        found = StreamEdits()
        for number, stream in self.streams.streams.items():
            if number in self.bases:
                self._tables(stream, self._cut(number), found)
        for key, weight in self._layers().items():
            new = self._layer(weight)
            if new is not None:
                found.held[key], found.layers[key] = weight, new
                found.tables.pop(key, None)
        for norm in self.streams.norms:
            read = self.streams.reads.get(id(norm.weight))
            if read is not None and read in self.bases:
                found.held[id(norm.weight)] = norm.weight
                found.norms[id(norm.weight)] = self._norm(norm, read)
        for led in self.streams.sums:
            key, shortcut = id(led.norm.weight), self._shortcut(led)
            found.norms[key] = replace(found.norms[key], shortcut=shortcut.to(led.norm.weight.dtype))
        return found

    def _layers(self) -> dict[int, Tensor]:
        return {
            key: weight
            for stream in self.streams.streams.values()
            for key, weight in (*stream.writers.items(), *stream.readers.items())
        }

    def count(self, number: int) -> int:
        """The channels that are left of a stream."""
        return max(LEAST, round(self.keep * self.bases[number].width))

    def _cut(self, number: int) -> Tensor:
        return self.bases[number].cut(self.count(number))

    def _shortcut(self, led: Sum) -> Tensor:
        """From the coordinates of a summand to those of the sum: all channels where these stay."""
        cut = self._cut(led.source)
        return (self._cut(led.target).T @ cut if led.target in self.bases else cut).contiguous()

    def _tables(self, stream: Stream, cut: Tensor, found: StreamEdits) -> None:
        for key, (tensor, axis) in stream.tables.items():
            found.held[key] = tensor
            moved = torch.tensordot(tensor.detach().cpu().double(), cut, dims=([axis], [0]))
            found.tables[key] = moved.movedim(-1, axis).to(tensor.dtype).contiguous()

    def _layer(self, weight: Tensor) -> NewLayer | None:
        key, bias = id(weight), self.streams.biases[id(weight)]
        reads, writes = self.streams.reads.get(key), self.streams.writes[key]
        transposed = key in self.streams.transposed
        new = (weight.T if transposed else weight).detach().cpu().double()
        shift = None if bias is None else bias.detach().cpu().double()
        norm = self._taken_up(reads)
        if norm is not None:
            scale, offset, cut = norm.weight, norm.bias, self._normed(self.streams.reads[id(norm.weight)])
            if offset is not None:
                moved = new.flatten(2).sum(2) if new.dim() > 2 else new
                added = moved @ offset.detach().cpu().double()
                shift = added if shift is None else shift + added
            new = _read(new, scale.detach().cpu().double()[:, None] * cut)
        elif reads is not None and reads in self.bases:
            new = _read(new, self._cut(reads))
        if writes in self.bases:
            cut = self._cut(writes)
            new = torch.tensordot(cut.T, new, dims=1)
            shift = None if shift is None else cut.T @ shift
        elif norm is None and reads not in self.bases:
            return None
        new = new.T if transposed else new
        return NewLayer(
            new.to(weight.dtype).contiguous(), None if shift is None else shift.to(weight.dtype).contiguous()
        )

    def _taken_up(self, number: int | None) -> Norm | None:
        """The norm whose scale and shift the readers of a stream take up."""
        if number is None or not self.streams.streams[number].passes:
            return None
        norm = self.streams.streams[number].made[0]
        return norm if self.streams.reads.get(id(norm.weight)) in self.bases else None

    def _ratio(self, number: int) -> float:
        """`|x|^2 / width` over `|c|^2 / reads` for coordinates c of x.

        What was left out counts by its mean share.
        """
        basis, count = self.bases[number], self.count(number)
        return basis.width * basis.share(count) / basis.read(count)

    def _normed(self, number: int) -> Tensor:
        """What a norm makes of a stream, before scale and shift, from its normalized coordinates.

        The matrix is `[width, reads]`.
        """
        cut = self._cut(number)[:, : self.bases[number].read(self.count(number))]
        return cut.mul(self._ratio(number) ** 0.5)

    def _norm(self, norm: Norm, number: int) -> NewNorm:
        basis, makes = self.bases[number], self.streams.writes[id(norm.weight)]
        reads, eps = basis.read(self.count(number)), norm.eps * self._ratio(number)
        if self._taken_up(makes) is not None:
            return NewNorm(reads, eps, basis.keeps_mean)
        cut = norm.weight.detach().cpu().double()[:, None] * self._normed(number)
        shift = None if norm.bias is None else norm.bias.detach().cpu().double()
        if makes in self.bases:
            into = self._cut(makes)
            cut, shift = into.T @ cut, None if shift is None else into.T @ shift
        dtype = norm.weight.dtype
        return NewNorm(
            reads,
            eps,
            basis.keeps_mean,
            cut.to(dtype).contiguous(),
            None if shift is None else shift.to(dtype).contiguous(),
        )


def _read(weight: Tensor, cut: Tensor) -> Tensor:
    """The weight `[o, i, *kernel]` of a layer that reads coordinates instead: `[o, count, *kernel]`."""
    read: Tensor = torch.tensordot(weight, cut, dims=([1], [0]))
    return read.movedim(-1, 1)
