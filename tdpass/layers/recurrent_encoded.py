"""Hidden-to-hidden products of encoded factors, as the recurrent cells take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpass.form import DYNAMIC
from tdpass.kernels.recurrent import pack_u, pack_v
from tdpass.kernels.recurrent_int8 import pack_cell
from tdpass.layers.derived import Recipe, Tensors, derived
from tdpass.layers.float_chain import FloatChain
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.one_operator import EncodedChain


@dataclass(frozen=True)
class PackIntegerCell(Recipe[Tensors]):
    """Codes of V and U, then their scales, as a cell of so many gates takes them."""

    gates: int

    def make(self, tensors: Sequence[Tensor]) -> Tensors:
        v, u, v_scale, u_scale = tensors
        packed = pack_cell((v, v_scale), (u, u_scale), self.gates)
        return tuple(part.clone() for part in packed)


@dataclass(frozen=True)
class PackFloatCell(Recipe[Tensors]):
    """V and U, as a cell of so many gates takes them: bfloat16 where both are stored so, else float32."""

    gates: int

    def make(self, tensors: Sequence[Tensor]) -> Tensors:
        half = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        dtype = torch.bfloat16 if half else torch.float32
        v, u = (tensor.flatten(1) for tensor in tensors)
        return pack_v(v, dtype), pack_u(u, self.gates, dtype)


def is_integer_cell(module: nn.Module) -> bool:
    """Whether a cell in whole numbers computes what the module does.

    It multiplies by two matrices, puts every row on a grid of its own before either, and nobody watches it.
    """
    return isinstance(module, IntegerChain) and module.form.activations == DYNAMIC and _is_cell(module)


def is_float_cell(module: nn.Module) -> bool:
    """Whether a cell on factors of a number type of their own computes what the module does."""
    return isinstance(module, FloatChain) and _is_cell(module)


def _is_cell(module: EncodedChain) -> bool:
    return (
        not module.apart
        and len(module.lowered.stages) == 2
        and module.activation == "identity"
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def integer_cell(module: IntegerChain, gates: int) -> Tensors:
    """V and U of such a module, packed."""
    return derived(PackIntegerCell(gates), module.codes_and_scales())


def float_cell(module: FloatChain, gates: int) -> Tensors:
    """V and U of such a module, packed."""
    return derived(PackFloatCell(gates), [module.get_buffer(name) for name in module.lowered.factors])
