"""The torch module that stands where a dense layer stood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.geometry import apply_dense
from tdpass.formats.integers import apply_integers, coded
from tdpass.formats.layer import Layer, check_form, storage_of
from tdpass.formats.lines import Lines, Smaller, apply_smaller, apply_stored, lines_left, smaller
from tdpass.formats.steps import apply_steps, steps_of
from tdpass.formats.storage import Storage
from tdpass.kernels import native
from tdpass.kinds import kind_of
from tdpass.layers.deferred import Deferred
from tdpass.layers.derived import Recipe, Tensors, derived
from tdpass.layers.tracing import is_traced, is_transformed
from tdpass.numbers import Part
from tdpass.ops import TorchOps
from tdpass.site import Site

_OPS = TorchOps()


@dataclass(frozen=True)
class Shrink(Recipe[Tensors]):
    """What is left of a dense layer of which whole outputs or input channels are not stored."""

    storage: Storage
    lines: Lines
    dtype: torch.dtype

    def __hash__(self) -> int:
        return hash((self.lines, self.dtype))

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        held = dict(zip(self.storage.parts(), tensors, strict=True))
        made = smaller(_OPS, held, self.storage, self.lines, self.dtype)
        # a view would keep alive the tensor that it is derived from
        found = (made.weight.detach(), made.places, made.order, made.kept)
        return tuple(tensor for tensor in found if tensor is not None)

    def made(self, held: Mapping[str, Tensor]) -> Smaller[Tensor]:
        """The smaller layer of these parts."""
        return Smaller(*derived(self, [held[name] for name in self.storage.parts()]))


class Factorized(nn.Module):
    """A layer in factored form: one parameter per factor, and `bias`.

    Factors in number types of their own are buffers. Trainable, exportable, compilable; `weight` rebuilds the
    dense weight for code that reads it. `pads` (as `F.pad` takes them) and `padding_mode` serve convolutions
    that do not pad with zeros.  While `rebuilt` is set, training computes with `weight` instead of the chain:
    the same output and gradients, and the faster way where ranks are so small that a chain spends its time on
    reading and writing what lies between its factors.  A table that is called with whole numbers answers with
    these rows.
    """

    rebuilt = False
    _floats = torch.float32

    def __init__(
        self, layer: Layer, bias: nn.Parameter | None, padding_mode: str = "zeros", pads: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.site: Site = layer.site
        self.form = layer.form
        self.format, self.rank = FORMATS.get(layer.format), layer.rank
        self.padding_mode, self.pads = padding_mode, pads
        self.storage = layer.storage
        # torch.compile asks for it, and reads no other text than one that is held
        self._text = f"{layer.site.kind} {'x'.join(map(str, layer.site.shape))}, {layer.form}"
        self.lines = lines_left(layer.site, layer.form, self.storage)
        plain = self.lines is None and not layer.form.activations
        self.steps = steps_of(layer.site, layer.form, self.storage, bias=True) if plain else None
        self.names, self._floats = tuple(layer.factors), layer.dtype
        for name, factor in layer.factors.items():
            if self.storage.numbers or name in self.storage.orders:
                self.register_buffer(name, factor)
            else:
                self.register_parameter(name, _parameter(factor))
        self.register_parameter("bias", None if bias is None else _parameter(bias))

    bias: nn.Parameter | None

    def factors(self) -> dict[str, Tensor]:
        """The factors as they are stored, by name.

        What a parametrization or a pruning mask of torch computes is a factor as one that is held.
        """
        held = {**self._parameters, **self._buffers}
        found = ((name, held.get(name)) for name in self.names)
        return {name: getattr(self, name) if value is None else value for name, value in found}

    @property
    def learns(self) -> bool:
        """Whether one of its factors or its bias asks for gradients."""
        bias = self.bias is not None and self.bias.requires_grad
        return bias or any(factor.requires_grad for factor in self.factors().values())

    def values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The factors as floating-point numbers, by name."""
        return dict(self.storage.restore(_OPS, self.factors(), dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, earlier in self.storage.earlier.items():
            held = state_dict.get(prefix + name)
            if isinstance(held, Tensor) and Part(tuple(held.shape), held.dtype) == earlier.part:
                state_dict[prefix + name] = earlier.renewed(held)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fits(self, x: Tensor, parts: Iterable[Tensor | None]) -> bool:
        """Whether kernels serve x here: its axes, device and type, which these parts of the layer have too."""
        axes = self.site.axes + 2
        shaped = x.dim() == axes if self.site.axes else x.dim() >= axes
        alike = x.dtype in native.DTYPES and all(part is None or part.dtype == x.dtype for part in parts)
        return shaped and alike and x.device.type == "cpu"

    def layer(self) -> Layer:
        """The layer as data, with the current factors."""
        factors = {name: value.detach() for name, value in self.factors().items()}
        bias = None if self.bias is None else self.bias.detach()
        return Layer(self.site, self.form, factors, bias, self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.site.table and not x.is_floating_point():
            return self.format.rows(_OPS, x, self.values(self._dtype), self.site, self.rank)
        if self.pads:
            x = F.pad(x, self.pads, mode=self.padding_mode)
        if self.rebuilt and self.training and self.names:
            return apply_dense(_OPS, x, self.product(), self.bias, self.site)
        held = self.factors()
        if self.form.activations:
            values = coded(self.storage, held, x.dtype)
            return apply_integers(self.format, x, values, self.bias, self.site, self.rank)
        if self.lines is not None and not (is_traced(x) or is_transformed()):
            recipe = Shrink(self.storage, self.lines, x.dtype)
            return apply_smaller(_OPS, x, recipe.made(held), self.bias, self.lines)
        if self.steps is not None:
            factors = self.storage.restore(_OPS, held, x.dtype)
            return apply_steps(_OPS, x, factors, self.bias, self.steps)
        return apply_stored(_OPS, x, held, self.bias, self.site, self.form, self.storage, x.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight the factors stand for, as the dense layer held it.

        Without gradients it is multiplied out only where its numbers are read.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stood_for()
        shape = kind_of(self.site).turned(torch.empty(self.site.shape, device="meta"), self.site.groups).shape
        return Deferred.of(self._stood_for, shape, self._dtype, next(iter(self.factors().values())).device)

    def _stood_for(self) -> Tensor:
        return kind_of(self.site).turned(self.product(), self.site.groups)

    @property
    def _dtype(self) -> torch.dtype:
        """The floating-point type of the weight it stands for."""
        if self.bias is not None:
            return self.bias.dtype
        return self._floats if self.storage.numbers else next(iter(self.factors().values())).dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._floats = fn(torch.empty(0, dtype=self._floats)).dtype
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def product(self) -> Tensor:
        """The weight `[o, i / groups, *kernel]` that the factors stand for."""
        return self.format.reconstruct(self.values(self._dtype), self.site)

    @property
    def in_features(self) -> int:
        """Input features of a linear layer."""
        return self.site.i

    @property
    def out_features(self) -> int:
        """Output features of a linear layer."""
        return self.site.o

    @property
    def in_channels(self) -> int:
        """Input channels of a convolution."""
        return self.site.i

    @property
    def out_channels(self) -> int:
        """Output channels of a convolution."""
        return self.site.o

    def extra_repr(self) -> str:
        return f"{self._text}, bias={self.bias is not None}"


def empty_layer(site: Site, form: Form, dtype: torch.dtype) -> Layer:
    """A layer of that structure without storage, on the meta device.

    Raises `PlanError` for a rank that does not fit.
    """
    check_form(site, form)
    site = form.on(site)
    storage = storage_of(site, form)
    parts = storage.parts() or {name: Part(shape, dtype) for name, shape in storage.shapes.items()}
    parts = {**parts, **storage.order_parts()}
    parts = {**parts, **{name: Part((2,), torch.float32) for name in storage.ranges}}
    return Layer(
        site,
        form,
        {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in parts.items()},
        floats=dtype,
    )


def _parameter(factor: Tensor) -> nn.Parameter:
    return (
        factor
        if isinstance(factor, nn.Parameter)
        else nn.Parameter(factor, requires_grad=factor.is_floating_point())
    )


def rebuild_while_training(model: nn.Module) -> None:
    """Let all factored layers of a model train with the weights that their factors stand for."""
    for module in model.modules():
        if isinstance(module, Factorized):
            module.rebuilt = True
