"""Layers of one set of weights that run at several widths and ranks.

Which one is a switch, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.documents import Count, Positive, Size
from tdpass.errors import UsageError
from tdpass.form import Form
from tdpass.formats.base import FORMATS, Factors
from tdpass.formats.layer import Layer
from tdpass.kinds import kind_of, kind_of_module
from tdpass.ops import TorchOps
from tdpass.site import Site

_OPS = TorchOps()


@dataclass(frozen=True)
class Cut:
    """The channels that are in use: so many from the first."""

    first: Count
    count: Size

    def of(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """That part of a tensor, as a view."""
        return tensor.narrow(axis, self.first, self.count)


@dataclass(frozen=True)
class AdaptiveForm:
    """One layer: its format, its rank at width and share 1 (0 for dense), and the channels that it reads and makes at each width."""

    format: str
    rank: Count
    inputs: tuple[Cut, ...]
    outputs: tuple[Cut, ...]

    @property
    def shrinks(self) -> bool:
        """Whether it has fewer channels at some width."""
        return len(set(self.inputs)) > 1 or len(set(self.outputs)) > 1


@dataclass(frozen=True)
class Adaptation:
    """The widths and shares of the rank that a model runs at, in rising order, and what they mean for its layers and batch-norms."""

    widths: tuple[Positive, ...]
    ranks: tuple[Positive, ...]
    layers: Mapping[str, AdaptiveForm]
    norms: Mapping[str, tuple[Cut, ...]]


class Dial:
    """The width and the share of the rank that a model runs at, by their places.

    Its adaptive layers share one dial.
    """

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self.width, self.rank = len(adaptation.widths) - 1, len(adaptation.ranks) - 1

    @property
    def place(self) -> int:
        """The number of the setting."""
        return self.width * len(self.adaptation.ranks) + self.rank

    @property
    def places(self) -> int:
        """How many settings there are; the last is the whole model."""
        return len(self.adaptation.widths) * len(self.adaptation.ranks)

    def turn(self, place: int) -> None:
        """Run at the setting of that number."""
        self.width, self.rank = divmod(place, len(self.adaptation.ranks))

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Run at the setting of that number for a while."""
        before = self.place
        self.turn(place)
        try:
            yield
        finally:
            self.turn(before)


class Adaptive(nn.Module):
    """A layer of which a part of the channels and of the rank is in use, as its dial says.

    Its factors are its parameters. The rank grows with the width.  Factors are views of the whole ones, so
    that a switch costs nothing and all settings train the same numbers.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, path: str, dial: Dial, factors: Factors | None = None) -> None:
        """In the place of `layer`; without `factors` these are on the meta device, to be filled."""
        super().__init__()
        kind = kind_of_module(layer)
        assert kind is not None
        self.dial, self.form = dial, dial.adaptation.layers[path]
        self.site = kind.site(layer, path)
        self.format = FORMATS.get(self.form.format)
        self.cls = kind.base_of(layer)
        self.options = {name: getattr(layer, name) for name in kind.arguments if name != "bias"}
        weight: Any = layer.weight
        self.names = list(self.format.shapes(self.site, self._whole))
        for name, shape in self.format.shapes(self.site, self._whole).items():
            made = torch.empty(shape, dtype=weight.dtype, device="meta") if factors is None else factors[name]
            parameter = (
                made
                if isinstance(made, nn.Parameter)
                else nn.Parameter(made, requires_grad=weight.requires_grad)
            )
            self.register_parameter(name, parameter)
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
        self.sites = [
            _narrow(self.site, *cuts) for cuts in zip(self.form.inputs, self.form.outputs, strict=True)
        ]

    @property
    def _whole(self) -> tuple[int, ...]:
        return (self.form.rank,) if self.form.rank else ()

    def rank_at(self, place: int) -> tuple[int, ...]:
        """The rank at a setting; none of a dense layer."""
        if not self.form.rank:
            return ()
        adaptation = self.dial.adaptation
        width, share = divmod(place, len(adaptation.ranks))
        wanted = round(self.form.rank * adaptation.widths[width] * adaptation.ranks[share])
        site = self.sites[width]
        return (max(1, min(wanted, self.form.rank, site.o, site.weights // site.o)),)

    def kept(self, place: int) -> tuple[Site, tuple[int, ...], dict[str, Tensor], Tensor | None]:
        """Site, rank, factors and bias of what is in use at a setting."""
        width, rank = place // len(self.dial.adaptation.ranks), self.rank_at(place)
        inputs, outputs = self.form.inputs[width], self.form.outputs[width]
        factors = {name: getattr(self, name) for name in self.names}
        first, last = self.names[0], self.names[-1]
        if self.site.groups == 1:
            factors[first] = inputs.of(factors[first], 1)
        factors[last] = outputs.of(factors[last])
        if rank:
            factors[first], factors[last] = factors[first][: rank[0]], factors[last][:, : rank[0]]
        bias = None if self.bias is None else outputs.of(self.bias)
        return self.sites[width], rank, factors, bias

    def forward(self, x: Tensor) -> Tensor:
        site, rank, factors, bias = self.kept(self.dial.place)
        return self.format.apply(_OPS, x, factors, bias, site, rank)

    @property
    def weight(self) -> Tensor:
        """The dense weight of what is in use."""
        site, _, factors, _ = self.kept(self.dial.place)
        return self.format.reconstruct(factors, site)

    def factored(self) -> Layer | None:
        """What is in use as factors; None of a layer that is not factored."""
        site, rank, factors, bias = self.kept(self.dial.place)
        own = {name: factor.detach().contiguous() for name, factor in factors.items()}
        return (
            Layer(site, Form(self.form.format, rank), own, None if bias is None else bias.detach())
            if rank
            else None
        )

    def plain(self) -> nn.Module:
        """An ordinary dense layer of what is in use, with tensors of its own."""
        site, _, factors, bias = self.kept(self.dial.place)
        assert self.cls is not None
        options = {**self.options, **({"groups": site.groups} if "groups" in self.options else {})}
        made = kind_of(site).build(self.cls, site.shape, options)
        weight = self.format.reconstruct(factors, site).detach().clone(memory_format=torch.contiguous_format)
        made.register_parameter("weight", nn.Parameter(weight))
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        return made

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.site.shape))
        return f"{self.site.kind} {shape}, {self.form.format}, rank {self.form.rank}, widths {self.dial.adaptation.widths}"


def _narrow(site: Site, inputs: Cut, outputs: Cut) -> Site:
    if site.groups > 1:
        return Site(**{**vars(site), "shape": (outputs.count, *site.shape[1:]), "groups": outputs.count})
    return Site(**{**vars(site), "shape": (outputs.count, inputs.count, *site.kernel)})


class AdaptiveNorm(nn.Module):
    """A batch-norm with a scale and a shift for each width, and statistics for each setting."""

    def __init__(self, norm: Any, path: str, dial: Dial) -> None:
        super().__init__()
        self.dial, self.cuts, self.cls = dial, dial.adaptation.norms[path], type(norm)
        self.eps, self.momentum, self.affine = (
            norm.eps,
            0.1 if norm.momentum is None else norm.momentum,
            norm.affine,
        )
        self.counted: int | None = None
        for width, cut in enumerate(self.cuts):
            if self.affine:
                self.register_parameter(f"weight{width}", nn.Parameter(cut.of(norm.weight.detach()).clone()))
                self.register_parameter(f"bias{width}", nn.Parameter(cut.of(norm.bias.detach()).clone()))
            for share in range(len(dial.adaptation.ranks)):
                place = width * len(dial.adaptation.ranks) + share
                self.register_buffer(f"mean{place}", cut.of(norm.running_mean).clone())
                self.register_buffer(f"variance{place}", cut.of(norm.running_var).clone())

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, scale, shift = self._held()
        if self.counted is None:
            return F.batch_norm(x, mean, variance, scale, shift, self.training, self.momentum, self.eps)
        self.counted += 1
        return F.batch_norm(
            x, mean, variance, scale, shift, training=True, momentum=1 / self.counted, eps=self.eps
        )

    def _held(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        place, width = self.dial.place, self.dial.width
        statistics = self._buffers[f"mean{place}"], self._buffers[f"variance{place}"]
        assert statistics[0] is not None
        assert statistics[1] is not None
        if not self.affine:
            return *statistics, None, None  # type: ignore[return-value]
        return *statistics, self._parameters[f"weight{width}"], self._parameters[f"bias{width}"]  # type: ignore[return-value]

    def plain(self) -> nn.Module:
        """An ordinary batch-norm of what is in use, with tensors of its own."""
        mean, variance, scale, shift = (
            None if tensor is None else tensor.detach().clone() for tensor in self._held()
        )
        norm: Any = self.cls(self.cuts[self.dial.width].count, self.eps, self.momentum, self.affine)
        norm.running_mean, norm.running_var = mean, variance
        if scale is not None and shift is not None:
            norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
        return norm  # type: ignore[no-any-return]


def dial_of(model: nn.Module) -> Dial:
    """The dial of a model; raises `UsageError` for one that runs at one width only."""
    for module in model.modules():
        if isinstance(module, Adaptive | AdaptiveNorm):
            return module.dial
    raise UsageError(
        "the model has one width and rank only; train it with ChannelAdaptive, or load the artifact of one"
    )


def set_width(model: nn.Module, width: float) -> None:
    """Let a model run at one of its widths from now on; takes microseconds and copies nothing.

    Raises `UsageError` for a width that it was not trained at, and for an ordinary model.
    """
    dial = dial_of(model)
    dial.width = _place_of(width, dial.adaptation.widths, "width")


def set_rank(model: nn.Module, share: float) -> None:
    """Let a model run at one of its shares of the rank from now on, as `set_width` does for widths."""
    dial = dial_of(model)
    dial.rank = _place_of(share, dial.adaptation.ranks, "share of the rank")


def _place_of(value: float, known: Sequence[float], noun: str) -> int:
    if value not in known:
        raise UsageError(f"{value!r} is no {noun} of this model; it has: {', '.join(map(str, known))}")
    return known.index(value)


@torch.no_grad()
def estimate_statistics(model: nn.Module, run: Callable[[], None]) -> None:
    """Estimate the statistics of all batch-norms anew at every setting, from what `run` calls the model with; the dial stays."""
    dial, norms = dial_of(model), [module for module in model.modules() if isinstance(module, AdaptiveNorm)]
    for place in range(dial.places):
        with dial.at(place):
            for norm in norms:
                norm.counted = 0
            run()
            for norm in norms:
                norm.counted = None
