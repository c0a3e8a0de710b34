"""How the linear layers of several cores are contracted.

The program of the operator `tensor_chain`, and its weights.
"""

from __future__ import annotations

from torch import Tensor

from tdpass.formats.blocks import BATCHED
from tdpass.formats.layer import Layer
from tdpass.formats.multilinear import balanced_factors
from tdpass.formats.trains import LinearTrain
from tdpass.kernels.tensor_chain import Step, block_program, ring_program, train_program

Contraction = tuple[tuple[Step, ...], list[Tensor]]


def contraction_of(layer: Layer) -> Contraction | None:
    """Steps and packed weights that compute `layer` without its bias.

    None for what is no chain of linear cores.
    """
    make = _CONTRACTIONS.get(layer.format)
    if make is None or layer.form.encoded or layer.site.axes:
        return None
    steps, weights = make(layer)
    return steps, [step.pack(weight) for step, weight in zip(steps, weights, strict=True)]


def _train(layer: Layer) -> Contraction:
    o, i = LinearTrain(layer.site, len(layer.rank)).parts
    cores = [layer.factors[f"g{k + 1}"] for k in range(len(o))]
    return train_program(o, i, layer.rank), [core.permute(2, 3, 1, 0) for core in reversed(cores)]


def _ring(layer: Layer) -> Contraction:
    o, i = layer.site.o, layer.site.i
    (o2, o1), (i1, i2) = balanced_factors(o, 2), balanced_factors(i, 2)
    r0, r1, r2, r3 = layer.rank
    g1, g2, g3, g4 = (layer.factors[f"g{k}"] for k in (1, 2, 3, 4))
    weights = [g1.permute(2, 0, 1), g2.permute(1, 2, 0), g3.permute(2, 0, 1), g4.permute(1, 2, 0)]
    return ring_program((i1, i2), (o1, o2), (r0, r1, r2, r3)), weights


def _blocks(layer: Layer) -> Contraction:
    b, s, r = layer.rank
    outputs, parts, inputs = BATCHED.modes(layer.site).shape
    core = layer.factors["core"].reshape(b, parts, r, s).transpose(1, 2)
    return block_program(outputs, parts, inputs, (b, s, r)), [
        layer.factors["first"].T,
        core,
        layer.factors["last"].T,
    ]


_CONTRACTIONS = {"tensor_train": _train, "tensor_ring": _ring, "block_term": _blocks}
