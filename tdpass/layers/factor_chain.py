"""`factor_chain`: a fused chain called by its factors.

Their packed form is looked up by identity when it runs. Compiled and exported programs thus hold the factors
alone, as parameters that may be edited, loaded and saved like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from tdpass.kernels.base import NAMESPACE
from tdpass.kernels.conv_chain import CONV_CHAIN, packing
from tdpass.kernels.flops import conv_macs, count_products, linear_macs, of_arguments
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import stages_of, widths_of
from tdpass.layers.derived import DERIVED, PackChain
from tdpass.layers.tracing import is_traced

NAME = "factor_chain"
LINEAR = "linear"
_SCHEMA = "(Tensor x, Tensor[] factors, Tensor? bias, int[] stages, str activation, str lanes) -> Tensor"


def chain(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    stages: Sequence[int],
    activation: str,
    lanes: str,
) -> Tensor:
    """The operator where it is traced, and what it runs where it is not, which spares a dispatch."""
    y: Tensor = (FACTOR_CHAIN if is_traced(x) else run)(x, factors, bias, stages, activation, lanes)
    return y


def run(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    stages: Sequence[int],
    activation: str,
    lanes: str,
) -> Tensor:
    """The chain, and its activation.

    `lanes` is "channels" or "pixels", or "linear" for linear layers on the last axis of x.
    """
    family = packing("pixels" if lanes == "pixels" else "channels", x.dtype)

    def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        chain = stages_of(stages)
        return PackChain(chain, family, (False,) * len(chain)).make(tensors)

    packed = list(DERIVED.get(factors, (NAME, family, *stages), pack))
    return _call(x, packed, bias, stages, activation, LINEAR if lanes == LINEAR else family)


def fake(
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    stages: Sequence[int],
    activation: str,
    lanes: str,
) -> Tensor:
    """Shape and strides."""
    del bias
    if lanes == LINEAR:
        widths = widths_of(stages_of(stages))
        return LINEAR_CHAIN.fake(x, factors, None, None, widths, activation)  # type: ignore[return-value]
    flat = x.dim() == 3
    y: Any = CONV_CHAIN.fake(x.unsqueeze(2) if flat else x, factors, None, None, stages, activation, lanes)
    return y.squeeze(2) if flat else y  # type: ignore[no-any-return]


def _macs(x: Tensor, stages: Sequence[int], lanes: str) -> int:
    """Multiply-adds."""
    return linear_macs(x, widths_of(stages_of(stages))) if lanes == LINEAR else conv_macs(x, stages)


def _call(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, stages: Sequence[int], activation: str, lanes: str
) -> Tensor:
    if lanes == LINEAR:
        widths = widths_of(stages_of(stages))
        return LINEAR_CHAIN.call(x, packed, bias, None, widths, activation)  # type: ignore[no-any-return]
    if x.dim() == 3:
        y: Any = CONV_CHAIN.call(x.unsqueeze(2), packed, bias, None, stages, activation, lanes)
        return y.squeeze(2)  # type: ignore[no-any-return]
    return CONV_CHAIN.call(x, packed, bias, None, stages, activation, lanes)  # type: ignore[no-any-return]


_LIBRARY: Any = Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(NAME + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl(NAME, run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{NAME}", fake, lib=_LIBRARY)
count_products(NAME, of_arguments(_SCHEMA, _macs, "x", "stages", "lanes"))
FACTOR_CHAIN: Any = torch.ops.tdpass.factor_chain.default
