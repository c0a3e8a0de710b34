"""Fewer channels of heads: the mixtures of them that answer best, and the weights that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.formats.metric import eigenpairs
from tdpass.models.streams import HeadWidth, NewLayer, StreamEdits
from tdpass.planner.heads.angles import Table
from tdpass.planner.heads.bonds import Bond, Bonds, Side
from tdpass.planner.heads.selection import Selection
from tdpass.planner.streams.values import Values, written
from tdpass.tape import Ref, Tape

_RIDGE = 1e-6


@dataclass(frozen=True)
class Meeting:
    """Where two sides of a bond meet: mixtures `[width, width]`, those that matter most first.

    `X M_r (Y N_r)^T`, M `left` and N `right`, on the first r columns is the best approximation of `X Y^T` of
    rank r on the data, and at full width is equal to it.
    """

    left: Tensor
    right: Tensor

    def cut(self, count: int, *, padded: bool) -> tuple[Tensor, Tensor]:
        """The first `count` mixtures of both sides, `padded` with zeros to the full width."""
        return _cut(self.left, count, padded=padded), _cut(self.right, count, padded=padded)

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Meeting:
        """That of second moments `X^T X` and `Y^T Y`.

        With `A^T A` and `B^T B` these and `A B^T = U S V^T`: `M = B^T V S^-1/2`, `N = A^T U S^-1/2`.
        """
        a, b = _root(left), _root(right)
        u, s, v = torch.linalg.svd(a @ b.T)
        scale = s.clamp_min(s[0] * torch.finfo(s.dtype).eps).rsqrt()
        return cls(b.T @ v.T * scale, a.T @ u * scale)


Bases = Mapping[tuple[str, str, bool], Sequence[Meeting | Selection]]


def find_bases(bonds: Bonds, tapes: Sequence[Tape]) -> Bases:
    """The mixtures of every group of every bond.

    Queries and keys by their second moments on the data; values by those of what attention makes of them, and
    the weight of the layer that reads it.  Runs whose calls are not those of the first are left out.
    """
    first = [call.name for call in tapes[0].calls]
    made = {side.site for bond in bonds.found for side in (bond.left, bond.right)}
    read = {bond.right.site for bond in bonds.found if bond.right.reads}
    moments: dict[tuple[str, bool], Tensor] = {}
    for tape in tapes:
        if [call.name for call in tape.calls] == first:
            _add(moments, tape, made, read)
    chosen = _selections(bonds, moments)
    return {
        _key(bond): [chosen.get(_key(bond)) or _meeting(bond, group, bonds, moments) for group in bond.groups]
        for bond in bonds.found
    }


def _selections(
    bonds: Bonds, moments: Mapping[tuple[str, bool], Tensor]
) -> dict[tuple[str, str, bool], Selection]:
    """The choice of sets of bonds whose heads are turned: one for all that share a table of angles."""
    turned = [bond for bond in bonds.found if bond.turned]
    energies = {_key(bond): _energies(bond, moments) for bond in turned}
    found = dict[tuple[str, str, bool], Selection]()
    for bond in turned:
        together = _together(bond, turned, bonds.tables)
        summed = torch.stack([energies[_key(other)] for other in together]).sum(0)
        found[_key(bond)] = Selection(bond.sets, tuple(summed.tolist()))
    return found


def _together(bond: Bond, turned: Sequence[Bond], tables: Sequence[Table]) -> list[Bond]:
    """The bonds whose angles come from tables that those of one do, or of one of them."""
    sites = {bond.left.site, bond.right.site}
    while more := set[str]().union(*(table.sites for table in tables if table.sites & sites)) - sites:
        sites |= more
    return [other for other in turned if {other.left.site, other.right.site} & sites]


def _energies(bond: Bond, moments: Mapping[tuple[str, bool], Tensor]) -> Tensor:
    """`sum over heads E|q_s|^2 E|k_s|^2` of every set s, as a share of all: what it adds to scores.

    That is the mean of `(q_s^T R k_s)^2` over all angles, but for a factor.
    """
    found = torch.zeros(len(bond.sets), dtype=torch.float64)
    for left, right in bond.groups:
        q, k = (
            _blocks(moments[side.site, False], starts, bond.width).diagonal()
            for side, starts in ((bond.left, left), (bond.right, right))
        )
        found += torch.stack([q[list(each)].sum() * k[list(each)].sum() for each in bond.sets])
    return found / found.sum().clamp_min(torch.finfo(found.dtype).tiny)


def _key(bond: Bond) -> tuple[str, str, bool]:
    """What a bond is known by, in copies of a model too."""
    return bond.left.site, bond.right.site, bond.scores


def _add(moments: dict[tuple[str, bool], Tensor], tape: Tape, made: set[str], read: set[str]) -> None:
    values = Values(tape, dict(tape.inputs))
    for call in values.steps(forget=True):
        if call.site in read and isinstance(call.args[0], Ref):
            _count(moments, (str(call.site), True), values.at(call.args[0]))
        if call.site in made:
            _count(moments, (str(call.site), False), values.at(written(call)[0]))


def _count(moments: dict[tuple[str, bool], Tensor], key: tuple[str, bool], x: Tensor) -> None:
    rows = x.flatten(0, -2).double()
    moments[key] = moments.get(key, 0.0) + rows.T @ rows / len(rows)


def _meeting(
    bond: Bond,
    group: tuple[tuple[int, ...], tuple[int, ...]],
    bonds: Bonds,
    moments: Mapping[tuple[str, bool], Tensor],
) -> Meeting:
    right = moments[bond.right.site, bond.right.reads]
    if bond.scores:
        return Meeting.of(
            _blocks(moments[bond.left.site, False], group[0], bond.width),
            _blocks(right, group[1], bond.width),
        )
    weight = bonds.layers[bond.right.site][0].detach().cpu().double()
    return Meeting.of(_blocks(right, group[1], bond.width), _blocks(weight.T @ weight, group[1], bond.width))


def _blocks(moment: Tensor, starts: Sequence[int], width: int) -> Tensor:
    return torch.stack([moment[at : at + width, at : at + width] for at in starts]).sum(0)


def _root(moment: Tensor) -> Tensor:
    """A with `A^T A` the moment, which gets a small ridge so that no direction is lost for good."""
    values, vectors = eigenpairs(moment)
    level = float(values[-1]) * _RIDGE or 1.0
    return (values.clamp_min(0) + level).sqrt()[:, None] * vectors.T


@dataclass
class _Blocks:
    """What becomes of the heads of one layer, by first channel: rows, and columns where it reads them."""

    rows: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    width: int = 0


def narrowed(
    bonds: Bonds, bases: Bases, count: int, *, padded: bool = False, scale: float = 1.0
) -> StreamEdits:
    """The edits that leave `count` channels in every head.

    With `padded` the others stay, and hold zeros, so that the model answers alike at its full width.  Queries
    are multiplied by `scale`.
    """
    layers: dict[str, _Blocks] = {}
    for bond in bonds.found:
        for group, meeting in zip(bond.groups, bases[_key(bond)], strict=True):
            left, right = meeting.cut(count, padded=padded)
            _note(layers, bond.left, group[0], left * (scale if bond.scores else 1.0), bond.width)
            _note(layers, bond.right, group[1], right, bond.width)
    edits, values = StreamEdits(), not any(bond.scores for bond in bonds.found)
    kept = _kept(bonds, bases)
    for name, blocks in layers.items():
        weight, bias = bonds.layers[name]
        new = _along(weight.detach().cpu().double(), blocks.rows, blocks.width)
        new = _along(new.T, blocks.columns, blocks.width).T
        shift = None if bias is None else _along(bias.detach().cpu().double(), blocks.rows, blocks.width)
        key = id(weight)
        edits.held[key] = weight
        edits.layers[key] = NewLayer(
            new.to(weight.dtype).contiguous(), None if shift is None else shift.to(weight.dtype).contiguous()
        )
        after = blocks.width if padded else count
        edits.heads[key] = HeadWidth(
            blocks.width,
            after,
            len(blocks.rows),
            len(blocks.columns),
            values,
            *(() if name not in kept or padded else (kept[name].channels(count), kept[name].turned(count))),
        )
    for table in () if padded else bonds.tables:
        chosen = next((kept[site] for site in table.sites if site in kept), None)
        new = table.tensor if chosen is None else table.kept(chosen.places(count))
        if new.shape != table.tensor.shape:
            edits.held[id(table.tensor)] = table.tensor
            edits.tables[id(table.tensor)] = new
    return edits


def _kept(bonds: Bonds, bases: Bases) -> dict[str, Selection]:
    """By which choice the heads of layers get narrower that are turned."""
    return {
        side.site: chosen
        for bond in bonds.found
        for chosen in bases[_key(bond)]
        if isinstance(chosen, Selection)
        for side in (bond.left, bond.right)
    }


def _note(layers: dict[str, _Blocks], side: Side, starts: Sequence[int], mixture: Tensor, width: int) -> None:
    blocks = layers.setdefault(side.site, _Blocks())
    blocks.width = width
    (blocks.columns if side.reads else blocks.rows).update(dict.fromkeys(starts, mixture))


def _cut(mixture: Tensor, count: int, *, padded: bool) -> Tensor:
    if not padded:
        return mixture[:, :count]
    kept = mixture.clone()
    kept[:, count:] = 0
    return kept


def _along(x: Tensor, blocks: Mapping[int, Tensor], width: int) -> Tensor:
    """The first axis with mixtures of every block of `width` in its place."""
    parts, at = list[Tensor](), 0
    for start in sorted(blocks):
        parts += [x[at:start], blocks[start].T @ x[start : start + width]]
        at = start + width
    return torch.cat([*parts, x[at:]])
