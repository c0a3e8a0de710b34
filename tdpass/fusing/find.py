"""Finding chains in the graph of a front end, which says how a layer is read and what follows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from tdpass.fusing.spec import Chain, Link, N, V
from tdpass.kernels.conv_chain import MAX_STAGES
from tdpass.kernels.stage import widths_of


class Reader(Protocol[N, V]):
    """How a front end reads its graph.

    Of `norm`, `bias`, `residual` and `activation`, each gives the chain with what it is named for, where such
    a call alone reads the chain's result and may move into it; else the chain as it is.  `cuts` says that a
    row of layers may be several low-rank layers, which nothing marks.
    """

    cuts: bool

    def links(self) -> Iterable[Link[N, V]]:
        """The layers, in the order of the graph."""

    def following(self, link: Link[N, V]) -> N | None:
        """The one call that reads a layer's result."""

    def fuses(self, first: Link[N, V], second: Link[N, V]) -> bool:
        """Whether the second reads the result of the first as its input, in the same type."""

    def norm(self, chain: Chain[N, V]) -> Chain[N, V]:
        """With an inference batch-norm."""

    def bias(self, chain: Chain[N, V]) -> Chain[N, V]:
        """With a bias that is added by a call of its own."""

    def residual(self, chain: Chain[N, V]) -> Chain[N, V]:
        """With a sum of two results of the same size."""

    def activation(self, chain: Chain[N, V]) -> Chain[N, V]:
        """With an activation."""

    def movable(self, chain: Chain[N, V]) -> bool:
        """Whether all of it may be computed where its last call is."""

    def fused(self) -> Iterable[Chain[N, V]]:
        """Chains that are one call already, bare."""


def find_chains(reader: Reader[N, V], *, alone: bool = False) -> list[Chain[N, V]]:
    """Chains of 2 to 6 convolutions or linear layers, none of which shares a call with another.

    A convolution alone counts where batch-norm follows it: where weights are no constants of the graph,
    nothing else would fold the one into the other, or lay the weight out for the kernel once and for all.  A
    chain is cut where an intermediate is wider than both its neighbours, where the reader says so: what is
    narrow between two wide layers is low rank, what is wide between two narrow ones is where one low-rank
    layer ends and the next begins.  With `alone` every layer that is left counts by itself.
    """
    links = {link.nodes[0]: link for link in reader.links() if link.stage is not None}
    found: list[Chain[N, V]] = []
    taken: set[N] = set()  # of a sum of two chains one takes it in, and reads the other

    def take(wholes: Iterable[Chain[N, V]]) -> None:
        chain = next(
            (chain for chain in wholes if taken.isdisjoint(chain.nodes) and reader.movable(chain)), None
        )
        if chain is not None:
            found.append(chain)
            taken.update(chain.nodes)

    for row in _rows(reader, links):
        for part in _parts(row, cuts=reader.cuts):
            take(
                chain
                for chain in _wholes(reader, part)
                if len(part) > 1 or (chain.norm is not None and part[0].axes)
            )
    for chain in reader.fused():
        take([_extended(reader, chain), chain] if chain.activation == "identity" else [chain])
    for link in links.values() if alone else ():
        take(_wholes(reader, [link]))
    return found


def _rows(reader: Reader[N, V], links: dict[N, Link[N, V]]) -> Iterator[list[Link[N, V]]]:
    """Layers of which each alone reads the one before; in the order of their first ones."""
    after: dict[N, Link[N, V]] = {}
    for link in links.values():
        user = None if link.bias is not None else reader.following(link)
        follower = None if user is None else links.get(user)
        if follower is not None and follower.axes == link.axes and reader.fuses(link, follower):
            after[link.node] = follower
    inner = {follower.node for follower in after.values()}
    for link in links.values():
        if link.node in inner:
            continue
        row = [link]
        while row[-1].node in after:
            row.append(after[row[-1].node])
        yield row


def _parts(row: Sequence[Link[N, V]], *, cuts: bool) -> Iterator[list[Link[N, V]]]:
    """Parts of a row of layers that may be chains."""
    stages = [link.stage for link in row if link.stage is not None]
    widths = widths_of(stages)
    part: list[Link[N, V]] = []
    for index, link in enumerate(row):
        part.append(link)
        end = index + 1 == len(row)
        if end or len(part) == MAX_STAGES or (cuts and widths[index] < widths[index + 1] > widths[index + 2]):
            yield part
            part = []


def _wholes(reader: Reader[N, V], part: Sequence[Link[N, V]]) -> Iterator[Chain[N, V]]:
    """The chain with all that follows it and may move into it, with its batch-norm, and bare."""
    bare = Chain(tuple(part), tuple(node for link in part for node in link.nodes), part[-1].bias)
    yield _extended(reader, bare)
    yield reader.norm(bare)
    yield bare


def _extended(reader: Reader[N, V], chain: Chain[N, V]) -> Chain[N, V]:
    for extend in (reader.norm, reader.bias, reader.residual, reader.activation):
        chain = extend(chain)
    return chain
