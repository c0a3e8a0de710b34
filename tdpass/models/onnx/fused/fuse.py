"""Deciding which parts of an ONNX model become fused operators.

Measured one by one, beside their neighbours, then on the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.fusing.choose import measured, seconds_of
from tdpass.fusing.together import beside_neighbours, choose_together
from tdpass.kernels.native import onnx_ops_path
from tdpass.kernels.stage import Lanes
from tdpass.models.onnx.fused.links import Axes, axes_of
from tdpass.models.onnx.fused.neighbours import Neighbours, neighbours
from tdpass.models.onnx.fused.parts import Part
from tdpass.models.onnx.fused.rewrite import Fusion, Fusions, find_parts, fused, plain_initializers
from tdpass.models.onnx.fused.timing import Sizes, alone, in_a_row
from tdpass.models.onnx.operators.fused import REGISTER
from tdpass.models.onnx.operators.session import Session
from tdpass.models.onnx.rewriting.integer_activations import watched

MARGIN = 0.02  # by how much times must differ to be told apart
_HOPEFUL = (
    0.9  # a chain that loses a little alone can win beside others: between two of them no layout changes
)
_ROUNDS = 15


@dataclass(frozen=True)
class _Candidate:
    """A part, how many times as fast it is alone as one operator, in the better lanes, and seconds saved."""

    part: Part
    lanes: Lanes
    gain: float
    saved: float

    @property
    def fusion(self) -> Fusion:
        return Fusion(self.part.spec, self.lanes, self.part.operator.grain)


def decide(
    build: Callable[[], ir.Model],
    inputs: Mapping[str, Tensor],
    note: Callable[[str], None],
    decline: Callable[[str, str], None],
) -> Fusions:
    """The parts that make the model faster as one operator each, by the name of what they compute.

    The time is on one thread. `build` makes the model anew, which may then be changed; `inputs` are what to
    time it on, and may be missing.  A part is timed alone with either kind of lanes and in a row with each of
    its neighbours; then the model with those that gain together so, with those that gain alone, and with all.
    """
    try:
        onnx_ops_path()
    except KernelError as error:
        note(str(error))
        return {}
    model = build()
    plain_initializers(model)
    parts = find_parts(model)
    rows = neighbours(model, parts)
    known = _known_sizes(model, [*(part.reads for part in parts), *(row.reads for row in rows)], inputs)
    candidates = _candidates(model, parts, known, decline)
    clear = frozenset(name for name, candidate in candidates.items() if candidate.gain > 1 + MARGIN)
    chosen = clear
    if inputs and candidates:
        together = _together(model, rows, known, candidates)
        chosen = _fastest(build, candidates, (clear, together, frozenset(candidates)), inputs)
    for name, candidate in candidates.items():
        if name not in chosen:
            decline(
                candidate.part.label,
                f"as one operator it takes {1 / candidate.gain:.2f} times as long alone, and the model is "
                "no faster for it",
            )
    if chosen:
        gains = sorted(candidates[name].gain for name in chosen)
        made = f"{len(chosen)} chains became one operator each, {gains[0]:.2f} to {gains[-1]:.2f} times"
        if len(chosen) == 1:
            made = f"1 chain became one operator, {gains[0]:.2f} times"
        note(f"{made} as fast alone; the model, and all times here, need {REGISTER}")
    rounding = [name for name in chosen if candidates[name].part.operator.grain]
    if rounding:
        note(f"{len(rounding)} of {len(chosen)} operators round what they read, as their layers' weights are")
    return {name: candidates[name].fusion for name in candidates if name in chosen}


def _candidates(
    model: ir.Model, parts: Sequence[Part], known: Mapping[str, Axes], decline: Callable[[str, str], None]
) -> dict[str, _Candidate]:
    """The parts that are not clearly slower as one operator, by the name of what they compute.

    Of two parts that compute the same value the one that saves more.
    """
    found: dict[str, _Candidate] = {}
    for part in parts:
        sizes = _sizes_of(part.reads, known)
        if sizes is None:
            decline(part.label, "the size of its input is not known; pass data= or example_inputs=")
            continue
        verdict = measured([alone(model, part, sizes)], part.families, _HOPEFUL)
        if verdict.lanes is None:
            decline(part.label, f"as one operator it takes {1 / verdict.gain:.2f} times as long")
        else:
            saved = verdict.plain - verdict.seconds
            if part.key not in found or saved > found[part.key].saved:
                found[part.key] = _Candidate(part, verdict.lanes, verdict.gain, saved)
    return found


def _together(
    model: ir.Model,
    rows: Sequence[Neighbours],
    known: Mapping[str, Axes],
    candidates: Mapping[str, _Candidate],
) -> frozenset[str]:
    """The parts that save most beside each other, by what each takes in a row with its neighbours."""
    fusions = {name: candidate.fusion for name, candidate in candidates.items()}
    timed = list[Mapping[frozenset[str], float]]()
    for row in rows:
        sizes = _sizes_of(row.reads, known)
        if sizes is None or not {row.first.key, row.second.key} & set(fusions):
            continue
        seconds = in_a_row(model, row, sizes, fusions)
        timed += [] if seconds is None else [seconds]
    return choose_together(*beside_neighbours({name: c.saved for name, c in candidates.items()}, timed))


def _known_sizes(
    model: ir.Model, reads: Sequence[Sequence[ir.Value]], inputs: Mapping[str, Tensor]
) -> dict[str, Axes]:
    """Sizes of what parts read, by name.

    They are as they follow from those of the inputs, else as a run on these has them.
    """
    known = axes_of(model, {name: tuple(tensor.shape) for name, tensor in inputs.items()})
    read = dict.fromkeys(str(value.name) for values in reads for value in values)
    unknown = [name for name in read if _sizes(known.get(name)) is None]
    if inputs and unknown:
        seen = watched(model, unknown)(inputs)
        known |= {name: tuple(seen[name].shape) for name in unknown}
    return known


def _sizes_of(reads: Sequence[ir.Value], known: Mapping[str, Axes]) -> tuple[Sizes, ...] | None:
    """Sizes of all of these values, None where one is not known."""
    found = [_sizes(known.get(value.name or "")) for value in reads]
    sizes = tuple(each for each in found if each is not None)
    return sizes if len(sizes) == len(found) else None


def _sizes(axes: Axes | None) -> tuple[int, ...] | None:
    """Sizes with one sample where the first axis is open; None where another one is."""
    if not axes:
        return None
    first, *rest = axes
    known = [size for size in (first if isinstance(first, int) else 1, *rest) if isinstance(size, int)]
    return tuple(known) if len(known) == len(axes) and 0 not in known else None


def _fastest(
    build: Callable[[], ir.Model],
    candidates: Mapping[str, _Candidate],
    offered: Sequence[frozenset[str]],
    inputs: Mapping[str, Tensor],
) -> frozenset[str]:
    """Of some choices of chains the one that makes the model fastest; none where it gets no faster."""
    nothing: frozenset[str] = frozenset()
    choices = dict.fromkeys([nothing, *offered])
    if len(choices) == 1:
        return nothing
    calls = {
        choice: Session(fused(build(), {name: candidates[name].fusion for name in choice}), threads=1).bound(
            inputs
        )
        for choice in choices
    }
    times = seconds_of(calls, 1, _ROUNDS)
    best = min(times, key=lambda choice: times[choice])
    return best if times[best] < times[nothing] * (1 - MARGIN) else nothing
