"""slice-heads: attention over fewer channels in every head, mixtures of those that were there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.job import Job
from tdpass.models.abilities import SlicesStreams
from tdpass.models.base import Batch, Model
from tdpass.passes.slicing import ROUNDING, Slices, Slicing, cause_of
from tdpass.pipeline import register_pass
from tdpass.planner.heads import Bases, Bond, Bonds, find_bases, find_bonds, fitting, narrowed
from tdpass.planner.trials import gap
from tdpass.planner.widths import Widths

_LEAST = 1
_KINDS = {"queries, keys and values": (True, False), "values": (False,), "queries and keys": (True,)}
_FAILURES = (InvalidModelError, UnsupportedError)


@register_pass
@dataclass(frozen=True)
class SliceHeads(Slicing):
    """Store attention heads over fewer channels, the same number in each: a narrower dense network.

    Queries and keys become `Q M` and `K N`, so that scores are the best of that rank on the data; values
    become `V M` and what reads them `W_o N`.  Shapes follow: attributes of torch modules that speak of the
    width of heads, constants of Reshape and Expand in ONNX graphs.  Where modules give queries, keys and
    values one width, all change or none.  A narrower model must answer as the whole one with the same
    channels at zero, else nothing is changed and the report says why.

    Of queries and keys that a rotary embedding turns, pairs of channels stay that add most to the scores on
    the data, alike in all heads and in all layers that share a table of angles, of which the numbers of these
    pairs stay.  `keep` is the share of channels that is left; with a budget among the options (`params=0.9`)
    it is the largest that meets it.  Comes before `plan`.
    """

    name = "slice-heads"
    instead = "params=0.9"

    def slices(self, model: Model, example: Batch, job: Job) -> Slices | str:
        bonds = _all(find_bonds(model.record(example)))
        reasons = dict(bonds.reasons)
        bases = find_bases(bonds, job.tapes(model)) if bonds.found else {}
        way, why = _way(model, example, bonds.found, bases)
        left = set(bonds.turned) - set(() if way is None else way.bonds)
        reasons |= {bond.left.site: why or bond.turned for bond in left}
        for site, reason in reasons.items():
            job.report.decline(site, f"its heads keep their width: {reason}")
        if way is None:
            return why
        most = max(bond.width for bond in way.bonds)
        attentions = len({bond.right.site for bond in way.bonds if bond.right.reads} or way.bonds)
        return Slices(
            Widths(model, example, way, most, _LEAST, self.name, "heads"),
            f"{way.what} of {attentions} attentions",
            f"the {most} channels in every head",
        )


@dataclass(frozen=True)
class _Way:
    """Which bonds change; it `rescales` queries where the model's own scale follows the width of heads."""

    what: str
    example: Batch
    bonds: tuple[Bond, ...]
    bases: Bases
    rescales: bool = False
    padded: bool = False

    def __call__(self, model: Model, keep: float) -> None:
        assert isinstance(model, SlicesStreams)
        found = _all(find_bonds(model.record(self.example)))
        chosen = replace(found, found=tuple(bond for bond in found.found if bond in self.bonds))
        for width in sorted({bond.width for bond in chosen.found}):
            sets = [bond.sets for bond in chosen.found if bond.width == width and bond.turned]
            count = fitting(max(_LEAST, round(keep * width)), sets)
            alike = replace(chosen, found=tuple(bond for bond in chosen.found if bond.width == width))
            scale = (count / width) ** 0.5 if self.rescales else 1.0
            model.slice_streams(narrowed(alike, self.bases, count, padded=self.padded, scale=scale))

    def differs(self, model: Model, keep: float) -> float:
        """How far the narrower model is from the whole one with its other channels at zero."""
        whole, small = model.clone(), model.clone()
        replace(self, padded=True, rescales=False)(whole, keep)
        self(small, keep)
        return gap(whole.run(self.example), small.run(self.example))


def _all(bonds: Bonds) -> Bonds:
    """The bonds with those that are turned among those that may change."""
    return replace(bonds, found=(*bonds.found, *bonds.turned))


def _way(model: Model, example: Batch, bonds: tuple[Bond, ...], bases: Bases) -> tuple[_Way | None, str]:
    """The way to narrow as much as there is that answers as it should, or why there is none."""
    whys = list[str]()
    for what, kinds in _KINDS.items():
        chosen = tuple(bond for bond in bonds if bond.scores in kinds)
        if {bond.scores for bond in chosen} != set(kinds):
            continue
        for rescales in (False, True) if True in kinds else (False,):
            way = _Way(what, example, chosen, bases, rescales)
            whys.append(_why_not(model, way))
            if not whys[-1]:
                return way, next(iter(whys), "")
    return None, whys[0] if whys else "no attention was found whose queries, keys and values layers make"


def _why_not(model: Model, way: _Way) -> str:
    whole = model.clone()
    replace(way, padded=True)(whole, 1.0)
    moved = gap(model.run(way.example), whole.run(way.example))
    if moved > ROUNDING:
        return f"with its heads in other channels, it answers otherwise by {moved:.2g} of its outputs' size"
    try:
        moved = way.differs(model, 0.5)
    except _FAILURES as error:
        return f"{way.what} do not run in narrower heads: {cause_of(error)}"
    return f"in narrower heads, {way.what} answer otherwise by {moved:.2g}" if moved > ROUNDING else ""
