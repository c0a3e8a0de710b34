"""Hidden-to-hidden products of int8 factors, as the recurrent cells in whole numbers take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tdpass.form import DYNAMIC
from tdpass.kernels.recurrent_int8 import pack_cell
from tdpass.layers.derived import Recipe, Tensors, derived
from tdpass.layers.integer_chain import IntegerChain


@dataclass(frozen=True)
class PackIntegerCell(Recipe[Tensors]):
    """Codes of V and U, then their scales, as a cell of so many gates takes them."""

    gates: int

    def make(self, tensors: Sequence[Tensor]) -> Tensors:
        v, u, v_scale, u_scale = tensors
        packed = pack_cell((v, v_scale), (u, u_scale), self.gates)
        return tuple(part.clone() for part in packed)


def is_integer_cell(module: nn.Module) -> bool:
    """Whether a cell in whole numbers computes what the module does.

    It multiplies by two matrices, puts every row on a grid of its own before either, and nobody watches it.
    """
    return (
        isinstance(module, IntegerChain)
        and not module.apart
        and module.form.activations == DYNAMIC
        and len(module.lowered.stages) == 2
        and module.activation == "identity"
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def integer_cell(module: IntegerChain, gates: int) -> Tensors:
    """V and U of such a module, packed."""
    return derived(PackIntegerCell(gates), module.codes_and_scales())
