"""The form that a weight of integers is in already, which what takes its place is held against."""

from __future__ import annotations

from torch import Tensor

from tdpass.form import DENSE, Form
from tdpass.formats.layer import Layer, storage_of
from tdpass.models.onnx.graph.stored_integers import NUMBERS, Integers, one_along
from tdpass.models.onnx.graph.tensors import held
from tdpass.models.onnx.sites.weight_use import WeightUse
from tdpass.numbers import SCALE, VALUES, numbers_named
from tdpass.numbers.scaled import ZERO
from tdpass.site import Site

BY_CHANNEL = (
    "the weight is quantized with other scales than one, or one for each output channel; compress the "
    "floating-point model, or what tdpass.dequantize makes of this one, then quantize it"
)


def as_stored(site: Site, use: WeightUse) -> Layer | None:
    """The dense layer of a weight of integers in the form that it is stored in.

    None for a weight of numbers, and where scales or zero points differ within an output channel.
    """
    found = use.found_integers()
    text = None if found is None else NUMBERS.get(held(found.source).dtype)
    if found is None or text is None:
        return None
    laid_out = found.laid_out(use.turned)
    beside = _beside(laid_out, use.scale, whole=held(found.scale_source).size == 1)
    if beside is None:
        return None
    name = text + "/tensor" * (len(beside[SCALE]) < site.o) + "/zero" * (ZERO in beside)
    form, numbers = Form(DENSE.format, (), (name,)), numbers_named(name)
    storage = storage_of(site, form)
    parts = {VALUES: numbers.packed(laid_out.codes), **numbers.packed_beside(beside)}
    (kernel,) = storage.shapes
    factors = {storage.part_of(kernel, part): tensor for part, tensor in parts.items()}
    return Layer(site, form, factors, use.bias_tensor())


def _beside(laid_out: Integers, scale: float, *, whole: bool) -> dict[str, Tensor] | None:
    """Scales and zero points by output channel, or one for all; None where they differ within a channel."""
    scales = laid_out.scale_along(0)
    zeros = None if laid_out.zeros is None else one_along(laid_out.zeros, 0)
    if scales is None or (zeros is None and laid_out.zeros is not None):
        return None
    parts = {SCALE: scales * scale}
    if zeros is not None:
        parts[ZERO] = zeros.to(laid_out.codes.dtype)
    return {name: part[:1] for name, part in parts.items()} if whole else parts
