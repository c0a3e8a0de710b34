"""Repairing a compressed network on its own activations: biases that restore means, last factors by least squares."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdpass.formats.base import FORMATS, Layer, Stage
from tdpass.kinds import kind_of
from tdpass.ops import TorchOps
from tdpass.planner.divergence import FittedDivergence, Tally
from tdpass.planner.lockstep import Lockstep, Moment
from tdpass.planner.moments import working
from tdpass.site import Site
from tdpass.tape import Tape

_OPS = TorchOps()
_ROWS_PER_CALL = 2**24


def divergence_of(tapes: Sequence[Tape], layers: Mapping[str, Layer], divergence: FittedDivergence) -> float:
    """Divergence of the network with those layers from the original."""
    tally = Tally(divergence)
    with torch.no_grad():
        for tape in tapes:
            reference, outputs = tape.play().finish(), tape.play().fork(dict(layers)).finish()
            tally.add(divergence.outputs(reference), divergence.outputs(outputs))
    return tally.mean


def with_room_for_bias(layers: Mapping[str, Layer], room: Mapping[str, float]) -> frozenset[str]:
    """Layers that have a bias, and of those without one, front to back, as many as may get one; `room` is what is left by measure."""
    left, found = dict(room), {name for name, layer in layers.items() if layer.bias is not None}
    for name, layer in layers.items():
        width = layer.dtype.itemsize
        needed = {"params": layer.site.o, "bytes": layer.site.o * width}
        if name not in found and all(needed[measure] <= amount for measure, amount in left.items()):
            found.add(name)
            left = {measure: amount - needed[measure] for measure, amount in left.items()}
    return frozenset(found)


def correct_biases(tapes: Sequence[Tape], layers: Mapping[str, Layer], biased: Container[str]) -> dict[str, Layer]:
    """Layers whose biases restore each site's mean output, front to back on the compressed network's own activations.

    Only those named in `biased` have or get one.
    """
    corrected = dict(layers)
    lockstep = _start(tapes, layers)
    for name, moments in lockstep.sites():
        layer = corrected.get(name)
        if layer is None or not _answers(layer, moments) or name not in biased:
            continue
        with torch.no_grad():
            gaps = [kind_of(layer.site).output_rows(moment.target - layer(moment.x.to(layer.dtype)), layer.site) for moment in moments]
            gap = sum((rows.double().sum(0) for rows in gaps), torch.zeros(layer.site.o, dtype=torch.float64)) / sum(rows.shape[0] for rows in gaps)
        bias = gap if layer.bias is None else layer.bias.double() + gap
        corrected[name] = replace(layer, bias=bias.to(layer.dtype))
        lockstep.apply(name, corrected[name])
    return corrected


def refit_last_factors(tapes: Sequence[Tape], layers: Mapping[str, Layer], ridge: float, biased: Container[str]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers whose last factor and bias answer the compressed network's own activations as the original did.

    Per site, front to back: min || U z + b - target ||^2 + ridge * level * || U - U0 ||^2 over the calibration positions,
    where z are the features that the last factor reads, U0 is the factor as it was and level the mean of diag(E[z z^T]); b is zero
    for layers not named in `biased`.
    Returns the layers, and the reason for each that was left as it was.
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
        found = _solve(layer.converted(chain.name), stage.factor, stage.site, moments, ridge, bias=name in biased)
        refitted[name] = found.converted(layer.format)
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
    if not _answers(layer, moments):
        return "it makes fewer channels than the original, or reads none"
    if stage is None:
        return f"{layer.format} has no last factor to solve for"
    return f"its factors are stored as '{layer.form}'" if layer.form.encoded else ""


def _answers(layer: Layer, moments: Sequence[Moment]) -> bool:
    """Whether the layer makes all channels of what it should answer, from what it reads."""
    site = layer.site
    return site.i > 0 and all(moment.target.shape[site.channel_axis(moment.target.dim())] == site.o for moment in moments)


def _solve(layer: Layer, factor: str, site: Site, moments: Sequence[Moment], ridge: float, *, bias: bool) -> Layer:
    current, groups = layer.factors[factor], site.groups
    width = current[0].numel() + 1
    normal = torch.zeros(groups, width, width, dtype=torch.float64)
    cross = torch.zeros(groups, site.o // groups, width, dtype=torch.float64)
    rows = 0
    generator = torch.Generator()
    with torch.no_grad():
        for moment in moments:
            z = FORMATS.get(layer.format).features(_OPS, moment.x.to(layer.dtype), layer.factors, layer.site, layer.rank)
            limit = max(4 * width, _ROWS_PER_CALL // (groups * width))
            features = working(kind_of(site).rows(z, site, limit, generator.manual_seed(rows)))
            targets = working(_same_rows(kind_of(layer.site).output_rows(moment.target, layer.site), limit, generator.manual_seed(rows)))
            for group, (read, wanted) in enumerate(zip(features.chunk(groups, 1), targets.chunk(groups, 1), strict=True)):
                with_one = _with_one(read)
                normal[group] += (with_one.T @ with_one).double()
                cross[group] += (wanted.T @ with_one).double()
            rows += features.shape[0]
    offset = torch.zeros(site.o) if layer.bias is None else layer.bias
    before = torch.cat([current.double().flatten(1), offset.double()[:, None]], 1).chunk(groups)
    solved = torch.cat([_pulled(normal[group] / rows, cross[group] / rows, before[group], ridge, bias=bias) for group in range(groups)])
    if not bool(torch.isfinite(solved).all()):
        return layer
    weight = solved[:, : width - 1].reshape(current.shape).to(current.dtype).contiguous()
    return replace(layer, factors={**layer.factors, factor: weight}, bias=solved[:, -1].to(current.dtype).contiguous() if bias else None)


def _pulled(normal: Tensor, cross: Tensor, before: Tensor, ridge: float, *, bias: bool) -> Tensor:
    """Least squares for weight and, as the last column, bias; pulled towards what they were."""
    width = len(normal)
    pull = torch.full((width,), ridge * float(normal.diagonal()[:-1].mean()) + 1e-12, dtype=torch.float64)
    if bias:
        pull[-1] = 1e-12
    else:
        normal, cross, before, pull = normal[:-1, :-1], cross[:, :-1], before[:, :-1], pull[:-1]
    solved: Tensor = torch.linalg.solve(normal + torch.diag(pull), (cross + before * pull).T).T
    return solved


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)


def _same_rows(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """The subset that `rows` drew with the same limit and seed."""
    return rows if rows.shape[0] <= limit else rows[torch.randperm(rows.shape[0], generator=generator)[:limit]]
