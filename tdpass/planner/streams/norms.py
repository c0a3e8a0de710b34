"""Normalizations in a recorded run: one call each, or spelled out in several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.planner.streams.values import Values, key_of, operands, written
from tdpass.tape import Call, Ref, leaves
from tdpass.tape.calls import argument

_LONGEST = 24
_SMALL = 0.1
_SAME = 1e-4
_PRODUCTS = frozenset({"mul", "__mul__", "__rmul__", "multiply"})
_SUMS = frozenset({"add", "__add__", "__radd__"})


@dataclass(frozen=True)
class Norm:
    """`weight (x - mean) / sqrt(variance + eps) + bias` over the last axis.

    The mean is left out where it is not `centred`. `calls` are the places of all calls that make it up.
    """

    reads: int
    makes: int
    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool
    calls: frozenset[int]

    def normalized(self, x: Tensor) -> Tensor:
        """What it makes of x before scale and shift."""
        return normalized(x, self.eps, centred=self.centred)


def normalized(x: Tensor, eps: float, *, centred: bool) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, of x without its mean where that is asked for."""
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def find_norms(values: Values) -> list[Norm]:
    """The normalizations of a run that scale by a weight of the model."""
    found = [norm for place, call in enumerate(values.tape.calls) if (norm := _of_one_call(place, call))]
    makers = {ref.number: place for place, call in enumerate(values.tape.calls) for ref in written(call)}
    for place, call in enumerate(values.tape.calls):
        found += [norm for norm in _spelled_out(place, call, makers, values) if norm]
    return found


def _of_one_call(place: int, call: Call) -> Norm | None:
    if call.name not in {"layer_norm", "rms_norm"}:
        return None
    centred = call.name == "layer_norm"
    names = ("input", "normalized_shape", "weight", *(("bias",) if centred else ()), "eps")
    given = {name: argument(call.args, call.kwargs, index, name) for index, name in enumerate(names)}
    x, weight = given["input"], given["weight"]
    if not isinstance(x, Ref) or not isinstance(weight, Tensor) or len(tuple(given["normalized_shape"])) != 1:
        return None
    eps = given["eps"]
    if eps is None:
        eps = 1e-5 if centred else torch.finfo(weight.dtype).eps
    (made,) = written(call)
    return Norm(x.number, made.number, weight, given.get("bias"), float(eps), centred, frozenset({place}))


def _spelled_out(place: int, call: Call, makers: dict[int, int], values: Values) -> Iterator[Norm | None]:
    """A norm whose last product, with its weight, this call is."""
    read = operands(call)
    weights = [leaf for leaf in read if isinstance(leaf, Tensor) and leaf.dim() == 1 and len(leaf) > 1]
    refs = [leaf for leaf in read if isinstance(leaf, Ref)]
    if call.name not in _PRODUCTS or len(read) != 2 or len(weights) != 1 or len(refs) != 1:
        return
    inside, scalars = _before(refs[0], makers, values)
    u = values.at(refs[0]).double()
    for number in sorted(
        {
            leaf.number
            for index in inside
            for leaf in operands(values.tape.calls[index])
            if isinstance(leaf, Ref)
        }
    ):
        x = values.by_number[number]
        if x.shape != u.shape or not x.is_floating_point() or x.shape[-1:] != weights[0].shape:
            continue
        kind = _kind(x.double(), u, scalars)
        between = frozenset(index for index in inside if _depends(index, number, makers, values))
        if kind is not None and _closed(between | {place}, written(call)[0].number, values):
            eps, centred = kind
            yield _with_shift(
                Norm(number, written(call)[0].number, weights[0], None, eps, centred, between | {place}),
                values,
            )
            return


def _before(ref: Ref, makers: dict[int, int], values: Values) -> tuple[list[int], list[float]]:
    """Calls without layers that lead to a value, nearest first, and the small numbers that they read."""
    inside: list[int] = []
    ahead, scalars = [ref], list[float]()
    while ahead and len(inside) < _LONGEST:
        place = makers.get(ahead.pop(0).number)
        if place is None or place in inside or values.tape.calls[place].shapes[1]:
            continue
        call = values.tape.calls[place]
        inside.append(place)
        scalars += [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, float)]
        for leaf in operands(call):
            if isinstance(leaf, Ref):
                ahead.append(leaf)
            elif leaf.numel() == 1 and leaf.is_floating_point():
                scalars.append(float(leaf))
    return inside, [number for number in scalars if 0 < number < _SMALL]


def _kind(x: Tensor, u: Tensor, scalars: list[float]) -> tuple[float, bool] | None:
    for eps in scalars:
        for centred in (False, True):
            if float((normalized(x, eps, centred=centred) - u).abs().max()) <= _SAME * float(u.abs().max()):
                return eps, centred
    return None


def _depends(place: int, number: int, makers: dict[int, int], values: Values) -> bool:
    """Whether a call comes after the value with that number was made, and computes with it."""
    ahead, seen = [place], set[int]()
    while ahead:
        here = ahead.pop()
        seen.add(here)
        for leaf in operands(values.tape.calls[here]):
            if not isinstance(leaf, Ref):
                continue
            if leaf.number == number:
                return True
            maker = makers.get(leaf.number)
            if maker is not None and maker > makers.get(number, -1) and maker not in seen:
                ahead.append(maker)
    return False


def _closed(places: frozenset[int], made: int, values: Values) -> bool:
    """Whether nothing but these calls reads what they make, the last value aside."""
    inner = {ref.number for place in places for ref in written(values.tape.calls[place])} - {made}
    readers = {
        place
        for place, call in enumerate(values.tape.calls)
        if inner & {leaf.number for leaf in operands(call) if isinstance(leaf, Ref)}
    }
    returned = {key_of(leaf) for leaf in _returned(values)}
    return readers <= places and not any(-1 - number in returned for number in inner)


def _returned(values: Values) -> list[Ref]:
    return [leaf for leaf in leaves(values.tape.output) if isinstance(leaf, Ref)]


def _with_shift(norm: Norm, values: Values) -> Norm:
    """The norm with the sum of a bias that alone follows it."""
    readers = [
        place
        for place, call in enumerate(values.tape.calls)
        if any(isinstance(leaf, Ref) and leaf.number == norm.makes for leaf in operands(call))
    ]
    if len(readers) != 1 or any(ref.number == norm.makes for ref in _returned(values)):
        return norm
    call = values.tape.calls[readers[0]]
    shifts = [leaf for leaf in operands(call) if isinstance(leaf, Tensor) and leaf.shape == norm.weight.shape]
    if call.name not in _SUMS or len(shifts) != 1 or len(operands(call)) != 2:
        return norm
    return Norm(
        norm.reads,
        written(call)[0].number,
        norm.weight,
        shifts[0],
        norm.eps,
        norm.centred,
        norm.calls | {readers[0]},
    )
