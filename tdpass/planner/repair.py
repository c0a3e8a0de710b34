"""Repairing a compressed network on its own activations.

Biases that restore means, last factors by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tdpass.errors import NumericalError
from tdpass.formats.base import FORMATS, Stage
from tdpass.formats.layer import Layer
from tdpass.kinds import kind_of
from tdpass.planner.divergence import FittedDivergence, Tally
from tdpass.planner.least_squares import Sums, answers, least_squares
from tdpass.planner.lockstep import Lockstep, Moment
from tdpass.planner.storing import floating, stored_layer
from tdpass.site import Site
from tdpass.tape import Tape


def divergence_of(tapes: Sequence[Tape], layers: Mapping[str, Layer], divergence: FittedDivergence) -> float:
    """Divergence of the network with those layers from the original."""
    tally = Tally(divergence)
    with torch.no_grad():
        for tape in tapes:
            reference, outputs = tape.play().finish(), tape.play().fork(dict(layers)).finish()
            tally.add(divergence.outputs(reference), divergence.outputs(outputs))
    return tally.mean


def with_room_for_bias(layers: Mapping[str, Layer], room: Mapping[str, float]) -> frozenset[str]:
    """Layers that have a bias, and of those without one, front to back, as many as may get one.

    `room` is what is left by measure.
    """
    left, found = dict(room), {name for name, layer in layers.items() if layer.bias is not None}
    for name, layer in layers.items():
        width = layer.dtype.itemsize
        needed = {"params": layer.site.o, "bytes": layer.site.o * width}
        if (
            name not in found
            and not layer.site.table
            and all(needed[measure] <= amount for measure, amount in left.items())
        ):
            found.add(name)
            left = {measure: amount - needed[measure] for measure, amount in left.items()}
    return frozenset(found)


def correct_biases(
    tapes: Sequence[Tape], layers: Mapping[str, Layer], biased: Container[str]
) -> dict[str, Layer]:
    """Layers whose biases restore each site's mean output, front to back on the compressed activations.

    Activations are the compressed network's own. Only those named in `biased` have or get one.
    """
    corrected = dict(layers)
    lockstep = _start(tapes, layers)
    for name, moments in lockstep.sites():
        layer = corrected.get(name)
        if layer is None or not answers(layer, moments) or name not in biased:
            continue
        dtype = moments[0].target.dtype if layer.form.encoded else layer.dtype
        with torch.no_grad():
            gaps = [
                kind_of(layer.site).output_rows(moment.target - layer(moment.x.to(dtype)), layer.site)
                for moment in moments
            ]
            gap = sum(
                (rows.double().sum(0) for rows in gaps), torch.zeros(layer.site.o, dtype=torch.float64)
            ) / sum(rows.shape[0] for rows in gaps)
        bias = gap if layer.bias is None else layer.bias.double() + gap
        corrected[name] = replace(layer, bias=bias.to(dtype))
        lockstep.apply(name, corrected[name])
    return corrected


def refit_last_factors(
    tapes: Sequence[Tape],
    layers: Mapping[str, Layer],
    ridge: float,
    biased: Container[str],
    weight: Callable[[str], Tensor] | None = None,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers whose last factor and bias answer the compressed network's own activations as the original did.

    Per site, front to back: min || U z + b - target ||^2 + ridge * level * || U - U0 ||^2 over the
    calibration positions, where z are the features that the last factor reads, U0 is the factor as it was and
    level the mean of diag(E[z z^T]); b is zero for layers not named in `biased`.  A factor in a number type
    of its own is rounded again, each column making up for those before it; where it is the weight itself, U0
    is the site's, where `weight` gives that. Returns the layers, and the reason for each that was left as it
    was.
    """
    refitted = dict(layers)
    lockstep = _start(tapes, layers)
    once = lockstep.called_once()
    declined = {name: "it is called more than once, or never" for name in layers if name not in once}
    solved: set[str] = set()
    for name, moments in lockstep.sites():
        layer = refitted.get(name)
        if layer is None:
            continue
        chain = FORMATS.get(layer.format).chain
        stage = chain.last_stage(layer.site, layer.rank)
        reason = _why_not_refitted(layer, stage, moments)
        if stage is None or reason:
            declined[name] = reason
            continue
        refitted[name] = _refitted(layer, stage, moments, ridge, weight, bias=name in biased)
        lockstep.apply(name, refitted[name])
        solved.add(name)
    for name in set(layers) - solved - set(declined):
        declined[name] = "the compressed network reaches it with other samples than the original"
    return refitted, declined


def _start(tapes: Sequence[Tape], layers: Mapping[str, Layer]) -> Lockstep:
    lockstep = Lockstep(tapes)
    for name, layer in layers.items():
        lockstep.apply(name, layer)
    return lockstep


def _why_not_refitted(layer: Layer, stage: Stage | None, moments: Sequence[Moment]) -> str:
    if not answers(layer, moments):
        return "it makes fewer channels than the original, or reads none"
    if stage is None:
        return f"{layer.format} has no last factor to solve for"
    stored_apart = layer.form.encoded and FORMATS.get(layer.format).chain.name != layer.format
    return f"its factors are stored as '{layer.form}'" if stored_apart else ""


def _refitted(
    layer: Layer,
    stage: Stage,
    moments: Sequence[Moment],
    ridge: float,
    weight: Callable[[str], Tensor] | None,
    *,
    bias: bool,
) -> Layer:
    if not layer.form.encoded:
        found = _solve(
            layer.converted(FORMATS.get(layer.format).chain.name),
            stage.factor,
            stage.site,
            moments,
            ridge,
            bias=bias,
        )
        try:
            return found.converted(layer.format)
        except NumericalError:  # the pivots of the factor as it was do not make up the new one
            return layer
    plain, parts = (
        floating(layer, layer.reconstruct if weight is None else partial(weight, layer.site.name)),
        layer.storage.parts_of(stage.factor),
    )
    kept = {name: held for name, held in layer.factors.items() if name not in parts}
    return stored_layer(plain, layer.form, moments, ridge, "moments", bias=bias, kept=kept)


def _solve(
    layer: Layer, factor: str, site: Site, moments: Sequence[Moment], ridge: float, *, bias: bool
) -> Layer:
    current = layer.factors[factor]
    weight, offset = least_squares(layer, factor, Sums.of(layer, site, moments), ridge, bias=bias)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(offset).all()):
        return layer
    solved = weight.reshape(current.shape).to(current.dtype).contiguous()
    return replace(
        layer,
        factors={**layer.factors, factor: solved},
        bias=offset.to(current.dtype).contiguous() if bias else None,
    )
