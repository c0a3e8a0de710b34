"""A product of a recurrent layer, dense or factored, as the fused operators and torch's own layer take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.formats.lowering import lower
from tdpass.kernels.conv_chain import packing
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.recurrent import pack_u, pack_v
from tdpass.kernels.stage import Stage
from tdpass.layers.derived import PackChain, Recipe, Tensors, derived
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.site import Site

# how many times fewer multiply-adds factors need that are no chain, to be no slower than one matrix product
_FACTORS_LEAD = 4
# at more than one sample, torch's LSTM does that much more in the same time than the fused operators
_LSTM_LEAD = 1.25
_FORWARDS = (nn.Linear.forward, Factorized.forward, Fused.forward)


def is_plain(module: nn.Module) -> bool:
    """Whether it only multiplies with a weight, so that using the weight without a call goes unnoticed."""
    watched = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    known = module._parameters.keys() != {"bias"} or parametrize.is_parametrized(module, "weight")
    rounds = isinstance(module, Factorized) and bool(module.form.activations)
    return getattr(module.forward, "__func__", None) in _FORWARDS and not watched and known and not rounds


@dataclass(frozen=True)
class Rebuilt(Recipe[Tensors]):
    """The dense weight of a factored layer."""

    form: Form
    site: Site
    names: tuple[str, ...]

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (
            Layer(self.site, self.form, dict(zip(self.names, tensors, strict=True))).reconstruct().detach(),
        )


@dataclass(frozen=True)
class PackCell(Recipe[Tensors]):
    """`V[rank, hidden]` and `U[(gates hidden), rank]`, packed, of a chain of matrices.

    It is cut in two where it is narrowest; V may be the identity.
    """

    gates: int

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        widths = [tensor.shape[1] for tensor in tensors]
        cut = widths.index(min(widths))
        one = torch.eye(widths[0], dtype=tensors[0].dtype, device=tensors[0].device)
        v, u = (
            reduce(lambda product, weight: weight @ product, part)
            for part in ([one, *tensors[:cut]], tensors[cut:])
        )
        return pack_v(v.detach()), pack_u(u.detach(), self.gates)


def form(module: nn.Module) -> tuple[object, ...]:
    """What a module is made of; another one after it was factored in place."""
    return (type(module), module.form) if isinstance(module, Factorized) else (type(module),)


@dataclass(frozen=True)
class Product:
    """A linear or factored layer: the names of what it multiplies with, and how those are packed.

    They are packed where they are a chain of matrices. `form` is that of the module when this was made;
    `called` and `thin` are the multiply-adds of the layer as it is, and of the two matrices that it is to a
    recurrent kernel; `dense` those of its weight.  `computed` says that the weight is a parametrization's,
    made anew whenever it is asked for.
    """

    module: nn.Module
    form: tuple[object, ...]
    names: tuple[str, ...]
    chain: PackChain | None
    widths: tuple[int, ...]
    rebuild: Rebuilt | None
    called: int
    thin: int
    dense: int
    computed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Product:
        """The product that a plain module is."""
        if not isinstance(module, Factorized):
            o, i = module.weight.shape  # type: ignore[misc]
            computed = parametrize.is_parametrized(module, "weight")
            return cls(
                module,
                form(module),
                ("weight",),
                _chain((Stage(i, o),)),
                (i, o),
                None,
                i * o,
                i * (i + o),
                i * o,
                computed,
            )
        site = replace(module.site, extents=(((1,), (1,)),))
        lowered, called = lower(module.layer()), module.format.cost(site, module.rank).macs
        names = tuple(module.factors())
        rebuild = Rebuilt(module.form, replace(site, extents=()), names)
        if lowered is None:
            return cls(
                module,
                form(module),
                names,
                None,
                (),
                rebuild,
                called,
                site.i * (site.i + site.o),
                site.weights,
            )
        names, widths = lowered.factors, tuple(lowered.widths)
        thin = min(widths[:-1]) * (site.i + site.o)
        return cls(
            module,
            form(module),
            names,
            _chain(lowered.stages),
            widths,
            replace(rebuild, names=names),
            called,
            thin,
            site.weights,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """What it multiplies with, as it is now."""
        return [getattr(self.module, name) for name in self.names]

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    def weight(self, *, trained: bool) -> Tensor:
        """The dense weight; differentiable where it is `trained`, else kept from call to call."""
        if trained or self.rebuild is None:
            weight: Tensor = self.module.weight  # type: ignore[assignment]
            return weight
        return derived(self.rebuild, self.tensors)[0]

    def __call__(self, x: Tensor) -> Tensor:
        """The layer on the last axis of x, without gradients.

        It is one operator where it is a chain, else whatever is faster, its factors or its weight.
        """
        result: Tensor
        if self.chain is None and self.called * _FACTORS_LEAD > self.dense:
            result = F.linear(x, self.weight(trained=False), self.bias)
        elif self.chain is None:
            result = self.module(x)
        else:
            recipe = replace(self.chain, lanes=packing(self.chain.lanes, x.dtype))
            packed = derived(recipe, self.tensors)
            result = LINEAR_CHAIN.call(x, list(packed), self.bias, None, self.widths, "identity")
        return result

    def cell(self, gates: int) -> tuple[Tensor, ...]:
        """V and U as a recurrent kernel takes them."""
        tensors = (
            self.tensors
            if self.chain is not None or self.rebuild is None
            else derived(self.rebuild, self.tensors)
        )
        return derived(PackCell(gates), tensors)


def _chain(stages: tuple[Stage, ...]) -> PackChain:
    return PackChain(stages, "channels", (False,) * len(stages))


def lead(products: Sequence[Product], samples: int, states: int) -> bool:
    """Whether the fused operators serve these products and are faster than torch's own layer.

    The products are those of input and hidden state in turn.
    """
    if any(product.computed for product in products):
        return False
    if not all(tensor.dtype == torch.float32 for product in products for tensor in product.tensors):
        return False
    own = sum(min(product.called, product.dense) for product in products[::2]) + sum(
        product.thin for product in products[1::2]
    )
    return samples == 1 or states == 1 or own * _LSTM_LEAD <= sum(product.dense for product in products)


def recorded() -> bool:
    """Whether somebody follows the calls of torch functions."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return torch._C._get_tracing_state() is not None or any(
        not isinstance(mode, DeviceContext) for mode in modes
    )
