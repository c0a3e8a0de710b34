"""Storing layers in number types and with supports, on the compressed network's own activations."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, Stage
from tdpass.formats.layer import Layer
from tdpass.kinds import kind_of
from tdpass.ops import Pads, TorchOps
from tdpass.planner.least_squares import Sums, answers, least_squares
from tdpass.planner.lockstep import Lockstep, Moment
from tdpass.planner.moments import FULL_LIMIT, VALUES_PER_CALL, centered, working
from tdpass.planner.remainders import metric_of, stored_beside
from tdpass.planner.rounding import Way, rounded_factor
from tdpass.site import Site
from tdpass.tape import Tape

RIDGE = 1e-3


def store_layers(
    tapes: Sequence[Tape],
    layers: Mapping[str, Layer],
    forms: Mapping[str, Form],
    biased: Container[str],
    way: Way = "moments",
    ridge: float = RIDGE,
) -> dict[str, Layer]:
    """The layers, those named in `forms` stored so, front to back.

    Of a chain of factors each but the last is rounded in the second moments of what it reads; the last is
    then solved for, so that the layer answers what the original did, which makes up for the others, and
    rounded in those of what it reads.  Layers not named in `biased` have no bias.  With another `way` each
    factor is rounded as it is.  So is every factor of a layer that is called more than once, that reads too
    much, or that makes fewer channels than the original.
    """
    lockstep = Lockstep(tapes)
    made = {name: layer.stored(forms[name]) if name in forms else layer for name, layer in layers.items()}
    for name, layer in made.items():
        lockstep.apply(name, layer)
    for name, moments in lockstep.sites():
        if (
            name in forms
            and layers[name].site.weights // layers[name].site.o <= FULL_LIMIT
            and answers(layers[name], moments)
        ):
            made[name] = stored_layer(layers[name], forms[name], moments, ridge, way, bias=name in biased)
            lockstep.apply(name, made[name])
    return made


def stored_layer(
    layer: Layer,
    form: Form,
    moments: Sequence[Moment],
    ridge: float,
    way: Way,
    *,
    bias: bool,
    kept: Mapping[str, Tensor] | None = None,
) -> Layer:
    """A layer of floating-point factors stored in a form.

    `kept` are the parts of factors that are stored already.
    """
    if FORMATS.get(form.format).remainder:
        return _stored_with_remainder(layer, form, moments, ridge, way, bias=bias)
    storage, values, parts = replace(layer, form=form).storage, dict(layer.factors), dict(kept or {})
    stage = FORMATS.get(layer.format).last_stage(layer.site, layer.rank)
    for name in storage.shapes:
        if name in parts or (stage is not None and name == stage.factor):
            continue
        seen = _moments_of(name, replace(layer, factors=values), moments) if way != "nearest" else None
        rounded = rounded_factor(values[name], seen, storage.numbers[name], storage.supports.get(name), way)
        parts.update(storage.stored(name, rounded.factor, rounded.beside))
        values[name] = rounded.factor.to(values[name].dtype)
    offset = layer.bias
    if stage is not None and stage.factor not in parts:
        weight, sums = _answering(replace(layer, factors=values), stage, moments, ridge, way, bias=bias)
        numbers, support = storage.numbers[stage.factor], storage.supports.get(stage.factor)
        covariance = None if way == "nearest" else sums.covariance
        rounded = rounded_factor(weight, covariance, numbers, support, way)
        parts.update(storage.stored(stage.factor, rounded.factor, rounded.beside))
        offset = sums.offsets(rounded.factor.flatten(1)) if bias else None
    orders = {name: layer.factors[name] for name in storage.orders}
    return Layer(
        layer.site,
        form,
        {**{name: parts[name] for name in (*storage.parts(), *storage.ranges)}, **orders},
        None if offset is None else offset.to(layer.dtype),
        layer.dtype,
    )


def _answering(
    layer: Layer, stage: Stage, moments: Sequence[Moment], ridge: float, way: Way, *, bias: bool
) -> tuple[Tensor, Sums]:
    """The last factor that makes up for the others' losses, with `moments`, else as it is.

    With it are its second moments.
    """
    sums, current = Sums.of(layer, stage.site, moments), layer.factors[stage.factor]
    weight = current.double()
    if way == "moments":
        found, _ = least_squares(layer, stage.factor, sums, ridge, bias=bias)
        weight = found.reshape(current.shape) if bool(torch.isfinite(found).all()) else weight
    return weight, sums


def _stored_with_remainder(
    layer: Layer, form: Form, moments: Sequence[Moment], ridge: float, way: Way, *, bias: bool
) -> Layer:
    """The layer's weight, as a dense layer answers best, in a form with a remainder."""
    dense = replace(layer, form=DENSE, factors={"kernel": layer.reconstruct()})
    stage = FORMATS.get(DENSE.format).last_stage(layer.site, DENSE.rank)
    assert stage is not None
    weight, sums = _answering(dense, stage, moments, ridge, way, bias=bias)
    covariance = None if way == "nearest" else sums.covariance
    parts = stored_beside(weight, layer, form, metric_of(covariance), covariance, way)
    made = replace(layer, form=form, factors=parts, floats=layer.dtype)
    offset = sums.offsets(made.reconstruct().double().flatten(1)) if bias else None
    return replace(made, bias=None if offset is None else offset.to(layer.dtype))


def in_format_of(layer: Layer, form: Form) -> Layer:
    """A layer of floating-point factors in the format and at the rank of a form.

    Its weight is the same where that can be.
    """
    if layer.format == form.format:
        return layer
    fmt, weight = FORMATS.get(form.format), layer.reconstruct()
    factors = fmt.factorize(weight, layer.site, form.rank)
    plain = replace(layer, form=replace(form, numbers=(), support=""), factors=factors)
    return plain.to(weight.dtype)


@dataclass
class _Tap(TorchOps):
    """Adds up the second moments of what one factor of a chain is multiplied by."""

    factor: Tensor
    sums: Tensor | None = None
    means: Tensor | None = None
    rows: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._see(x, weight, Site("", "linear", tuple(weight.shape)))
        return super().linear(x, weight, bias)

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        window = tuple(stride), tuple((before, after) for before, after in padding), tuple(dilation)
        self._see(x, weight, Site("", "conv", tuple(weight.shape), *window, groups=groups))
        return super().conv(x, weight, bias, stride, padding, dilation, groups)

    def covariance(self) -> Tensor | None:
        """`[groups, d, d]`.

        None where the factor is no weight of a convolution or linear layer as it is stored.
        """
        if self.sums is None or self.means is None:
            return None
        return centered(self.sums / self.rows, self.means / self.rows)

    def _see(self, x: Tensor, weight: Tensor, site: Site) -> None:
        same = (
            weight.data_ptr() == self.factor.data_ptr()
            and weight.is_contiguous()
            and weight.shape[0] == self.factor.shape[0]
        )
        if not same or weight.numel() != self.factor.numel():
            return
        width = site.weights // site.o
        limit = max(2 * width, VALUES_PER_CALL // (site.groups * width))
        rows = working(kind_of(site).rows(x, site, limit, self.generator.manual_seed(self.rows)))
        parts = torch.stack(rows.chunk(site.groups, 1))
        found, mean = (parts.transpose(1, 2) @ parts).double(), parts.sum(1, dtype=torch.float64)
        self.sums = found if self.sums is None else self.sums + found
        self.means = mean if self.means is None else self.means + mean
        self.rows += len(rows)


def _moments_of(name: str, layer: Layer, moments: Sequence[Moment]) -> Tensor | None:
    """The covariance of what a factor reads."""
    tap = _Tap(layer.factors[name])
    with torch.no_grad():
        for moment in moments:
            FORMATS.get(layer.format).apply(
                tap, moment.x.to(layer.dtype), layer.factors, layer.bias, layer.site, layer.rank
            )
    return tap.covariance()


def floating(layer: Layer, weight: Callable[[], Tensor]) -> Layer:
    """A layer with factors of floating-point numbers, of the type of the site's weight.

    They are those it stands for, or that weight itself where it is dense.
    """
    if not layer.form.encoded:
        return layer
    plain = replace(layer.form, numbers=(), support="", activations="")
    own = weight()
    factors = {"kernel": own} if plain == DENSE else dict(layer.values(own.dtype))
    return replace(layer, form=plain, factors=factors).to(own.dtype)
