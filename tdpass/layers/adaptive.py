"""Layers of one set of weights that run at several widths and ranks.

Which one is a switch, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, Factors
from tdpass.formats.layer import Layer
from tdpass.formats.storage import Storage
from tdpass.kinds import kind_of, kind_of_module
from tdpass.layers.dial import Cut, Dial
from tdpass.layers.upper_bits import Codes, scale_of, type_of
from tdpass.ops import TorchOps
from tdpass.site import Site

_OPS = TorchOps()


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
        self.storage, self.dtype = Storage(self.format.shapes(self.site, self._whole), {}), weight.dtype
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
        if dial.adaptation.bits:
            self.code()

    def code(self) -> None:
        """Hold the factors as integers of the bits of the adaptation, as buffers."""
        bits = self.dial.adaptation.bits
        self.storage = replace(self.storage, numbers=dict.fromkeys(self.names, type_of(max(8, bits[-1]))))
        for name in self.names:
            codes = Codes.of(getattr(self, name), bits[-1], bits[0])
            delattr(self, name)
            self.register_buffer(name, codes.values)
            self.register_buffer(scale_of(name), codes.scale)

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
        site, rank, held, bias = self._held(place)
        factors = {
            name: part.floats(self.dtype) if isinstance(part, Codes) else part for name, part in held.items()
        }
        return site, rank, factors, bias

    def _held(self, place: int) -> tuple[Site, tuple[int, ...], dict[str, Tensor | Codes], Tensor | None]:
        """The same with factors as they are held, in the bits that the dial says."""
        width, rank = place // len(self.dial.adaptation.ranks), self.rank_at(place)
        inputs, outputs = self.form.inputs[width], self.form.outputs[width]
        factors = {name: self._factor(name) for name in self.names}
        first, last = self.names[0], self.names[-1]
        if self.site.groups == 1:
            factors[first] = factors[first].narrow(1, inputs.first, inputs.count)
        factors[last] = factors[last].narrow(0, outputs.first, outputs.count)
        if rank:
            factors[first] = factors[first].narrow(0, 0, rank[0])
            factors[last] = factors[last].narrow(1, 0, rank[0])
        if self.dial.bits:
            factors = {
                name: part.upper(self.dial.bits) if isinstance(part, Codes) else part
                for name, part in factors.items()
            }
        bias = None if self.bias is None else outputs.of(self.bias)
        return self.sites[width], rank, factors, bias

    def _factor(self, name: str) -> Tensor | Codes:
        values: Tensor = getattr(self, name)
        if not self.storage.numbers:
            return values
        return Codes(values, getattr(self, scale_of(name)), self.dial.adaptation.bits[-1])

    def forward(self, x: Tensor) -> Tensor:
        site, rank, factors, bias = self.kept(self.dial.place)
        return self.format.apply(_OPS, x, factors, bias, site, rank)

    @property
    def weight(self) -> Tensor:
        """The dense weight of what is in use."""
        site, _, factors, _ = self.kept(self.dial.place)
        return self.format.reconstruct(factors, site)

    def factored(self) -> Layer | None:
        """What is in use as factors, in a number type of its bits; None of a dense floating-point layer."""
        site, rank, held, bias = self._held(self.dial.place)
        form, own = Form(self.form.format, rank), dict[str, Tensor]()
        for name, part in held.items():
            if isinstance(part, Codes):
                form = replace(form, numbers=(str(type_of(part.bits)),))
                own |= part.stored(name)
            else:
                own[name] = part.detach().contiguous()
        return Layer(site, form, own, None if bias is None else bias.detach()) if form != DENSE else None

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
        return (
            f"{self.site.kind} {shape}, {self.form.format}, rank {self.form.rank}, widths "
            f"{self.dial.adaptation.widths}"
        )


def _narrow(site: Site, inputs: Cut, outputs: Cut) -> Site:
    if site.groups > 1:
        # whole groups of outputs: a depthwise layer has one channel in each, others stay whole
        groups = site.groups * outputs.count // site.o
        return Site(**{**vars(site), "shape": (outputs.count, *site.shape[1:]), "groups": groups})
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
        weight, bias = self._parameters[f"weight{width}"], self._parameters[f"bias{width}"]
        return *statistics, weight, bias  # type: ignore[return-value]

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


def set_bits(model: nn.Module, bits: int) -> None:
    """Let a model compute with so many upper bits of its weights from now on; switches as `set_width` does.

    Raises `UsageError` for a number that it was not made for, as by `ChannelAdaptive(bits=(8, 16))`.
    """
    dial = dial_of(model)
    dial.bits = dial.adaptation.bits[_place_of(bits, dial.adaptation.bits, "number of bits")]


def hold_bits(model: nn.Module, bits: Sequence[int]) -> None:
    """Hold the weights of the adaptive layers as integers, which run at these numbers of bits."""
    dial = dial_of(model)
    dial.adaptation = replace(dial.adaptation, bits=tuple(sorted(bits)))
    dial.bits = dial.adaptation.bits[-1]
    for module in model.modules():
        if isinstance(module, Adaptive):
            module.code()


def _place_of(value: float, known: Sequence[float], noun: str) -> int:
    if value not in known:
        raise UsageError(
            f"{value!r} is no {noun} of this model; it has: {', '.join(map(str, known)) or 'none'}"
        )
    return known.index(value)


@torch.no_grad()
def estimate_statistics(model: nn.Module, run: Callable[[], None]) -> None:
    """Estimate the statistics of all batch-norms anew at every setting.

    They are those of what `run` calls the model with; the dial stays.
    """
    dial, norms = dial_of(model), [module for module in model.modules() if isinstance(module, AdaptiveNorm)]
    for place in range(dial.places):
        with dial.at(place):
            for norm in norms:
                norm.counted = 0
            run()
            for norm in norms:
                norm.counted = None
