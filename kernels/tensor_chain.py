"""`tensor_chain`: a linear layer of several small cores as one operator.

It serves `tensor_train`, `tensor_ring` and `block_term`.

A program is a list of steps, each a small matrix on one axis of a block; any contraction order without sums
over open bonds is one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from ctypes import Array, addressof, byref, c_int32, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.activation import activate, check_activation
from tdpass.kernels.base import Op, implements, register_op
from tdpass.kernels.flops import of_arguments
from tdpass.products import by_rows

SCHEMA = "(Tensor x, Tensor[] weights, Tensor? bias, Tensor? residual, int[] steps, str activation) -> Tensor"
MAX_STEPS = 16
_INTEGERS, _PANEL, _MOST = 10, 8, 2**24
_AS_MADE = (0, 2, 1, 3)


@dataclass(frozen=True)
class Step:
    """Contracts the middle axis of a block.

    `[a, k, b]` and a weight `[k, o, r]`, or `[a, k, o, r]` if batched, give `[a, o, r, b]`. The result is
    stored with its axes (0 a, 1 o, 2 r, 3 b) in the order `order`; the next step reads the same numbers as a
    block of its own.  `r` is what the next step contracts and `o` a part of the output that is carried along:
    the kernel goes through the program a few `o` at a time where `o` and `b` are stored last and are the next
    step's `b`.
    """

    a: int
    k: int
    b: int
    o: int
    r: int
    batched: bool = False
    order: tuple[int, int, int, int] = _AS_MADE

    @property
    def inputs(self) -> int:
        """Size of the block that it reads."""
        return self.a * self.k * self.b

    @property
    def outputs(self) -> int:
        """Size of the block that it makes."""
        return self.a * self.o * self.r * self.b

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        """Shape of the packed weight."""
        return (self.a if self.batched else 1, -(-self.o * self.r // _PANEL), self.k, _PANEL)

    def integers(self) -> list[int]:
        """The step as an operator takes it."""
        return [self.a, self.k, self.b, self.o, self.r, int(self.batched), *self.order]

    def pack(self, weight: Tensor) -> Tensor:
        """`weight[k, o, r]`, or `[a, k, o, r]` if batched, in panels of 8 rows (o r), missing ones zero.

        Float32.
        """
        rows = weight.float().reshape(-1, self.k, self.o * self.r)
        return (
            F.pad(rows, (0, -rows.shape[2] % _PANEL))
            .reshape(len(rows), self.k, -1, _PANEL)
            .transpose(1, 2)
            .contiguous()
        )

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, `[a or 1, k, o, r]`."""
        return packed.transpose(1, 2).flatten(2)[:, :, : self.o * self.r].reshape(-1, self.k, self.o, self.r)


def steps_of(integers: Sequence[int]) -> tuple[Step, ...]:
    """The steps of a flat list of integers; raises `KernelError` for a list that is none."""
    if not integers or len(integers) % _INTEGERS:
        raise KernelError(
            f"{len(integers)} integers are no steps; each has {_INTEGERS}, as `Step.integers` gives them"
        )
    found = []
    for start in range(0, len(integers), _INTEGERS):
        a, k, b, o, r, batched, *order = integers[start : start + _INTEGERS]
        if min(a, k, b, o, r) < 1 or batched not in (0, 1) or sorted(order) != [0, 1, 2, 3]:
            raise KernelError(
                f"{[a, k, b, o, r, batched, *order]} is no step; five sizes of at least 1, then 0 or 1, "
                "then an order of the axes 0 to 3"
            )
        found.append(Step(a, k, b, o, r, bool(batched), (order[0], order[1], order[2], order[3])))
    return tuple(found)


def train_program(outs: Sequence[int], ins: Sequence[int], bonds: Sequence[int]) -> tuple[Step, ...]:
    """From the last core `G_d[bond, o_d, i_d, 1]` to the first.

    Step weights are `[(i_k right), o_k, left]`, `bonds` the inner ones.
    """
    ends = (1, *bonds, 1)
    return tuple(
        Step(math.prod(ins[:k]), ins[k] * ends[k + 1], math.prod(outs[k + 1 :]), outs[k], ends[k])
        for k in reversed(range(len(outs)))
    )


def ring_program(
    ins: tuple[int, int], outs: tuple[int, int], bonds: tuple[int, int, int, int]
) -> tuple[Step, ...]:
    """`[i1, 1, (r0 r1)]`, `[(r1 i2), 1, r2]`, `[r2, o1, r3]`, `[(r0 r3), o2, 1]`, `bonds` r0 to r3."""
    (i1, i2), (o1, o2), (r0, r1, r2, r3) = ins, outs, bonds
    return (
        Step(1, i1, i2, 1, r0 * r1),
        Step(r0, r1 * i2, 1, 1, r2),
        Step(r0, r2, 1, o1, r3),
        Step(1, r0 * r3, o1, o2, 1, order=(0, 2, 3, 1)),
    )


def block_program(outputs: int, parts: int, inputs: int, rank: tuple[int, int, int]) -> tuple[Step, ...]:
    """`[inputs, 1, (b r)]` per part, `[b, (r parts), 1, s]` per block, `[(b s), outputs, 1]`.

    The rank is (b, s, r).
    """
    b, s, r = rank
    return (
        Step(parts, inputs, 1, 1, b * r, order=(2, 0, 1, 3)),
        Step(b, r * parts, 1, 1, s, batched=True),
        Step(1, b * s, 1, outputs, 1),
    )


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    steps: Sequence[int],
    activation: str,
) -> Tensor:
    """`y = activation(P_S ... P_1 x + bias + residual)` on the last axis of x, with steps P_s."""
    chain = steps_of(steps)
    h = x.reshape(-1, chain[0].inputs)
    for step, weight in zip(chain, weights, strict=True):
        equation = "nakb,akor->naorb" if step.batched else "nakb,zkor->naorb"
        made = torch.einsum(equation, h.reshape(-1, step.a, step.k, step.b), step.unpack(weight).to(x.dtype))
        h = made.permute(0, *(axis + 1 for axis in step.order)).reshape(-1, step.outputs)
    y = h.reshape((*x.shape[:-1], chain[-1].outputs))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return activate(y if residual is None else y + residual, activation)


def fake(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    steps: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape and strides."""
    chain = steps_of(steps)
    if not 0 < len(chain) == len(weights) <= MAX_STEPS:
        raise KernelError(
            f"tensor_chain has {len(chain)} steps and {len(weights)} weights; it takes one weight per step, "
            f"1 to {MAX_STEPS} of them"
        )
    check_activation(activation)
    return x.new_empty((*x.shape[:-1], chain[-1].outputs))


def _macs(x: Tensor, steps: Sequence[int]) -> int:
    """Multiply-adds: what a step reads once per row that it makes of it."""
    return by_rows(x.shape, *((step.inputs, step.o, step.r) for step in steps_of(steps)))


TENSOR_CHAIN = register_op(
    Op("tensor_chain", SCHEMA, reference, fake, of_arguments(SCHEMA, _macs, "x", "steps"))
)


@functools.lru_cache(maxsize=4096)
def _program(integers: tuple[int, ...]) -> tuple[tuple[Step, ...], Array[c_int32]]:
    return steps_of(integers), (c_int32 * len(integers))(*integers)


@implements("tensor_chain", "cpu")
def native_cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    steps: Sequence[int],
    activation: str,
) -> Tensor:
    """The C++ kernel; float32 and bfloat16, float32 inside."""
    integers = tuple(steps)
    y = x.new_empty((*x.shape[:-1], _program(integers)[0][-1].outputs))
    rest = None if residual is None else residual.expand_as(y)
    return y if _run(x, weights, bias, rest, integers, activation, y) else NotImplemented


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    steps: tuple[int, ...],
    activation: str,
    y: Tensor,
) -> bool:
    library = native.serving(x, residual)
    if library is None or max(steps) > _MOST:
        return False
    chain, array = _program(steps)
    if x.shape[-1] != chain[0].inputs or (bias is not None and bias.shape != y.shape[-1:]):
        return False
    packed = [weight.float().contiguous() for weight in weights]
    wanted = [step.packed_shape for step in chain]
    if [weight.shape for weight in packed] != wanted:
        raise KernelError(
            f"a program of {len(chain)} steps takes weights packed as {wanted}, not "
            f"{[tuple(weight.shape) for weight in packed]}"
        )
    shift = None if bias is None else bias.float().contiguous()
    source, rest = x.contiguous(), None if residual is None else residual.contiguous()
    rest_rows = None if rest is None else native.rows(rest)
    pointers = (c_void_p * len(packed))(*(weight.data_ptr() for weight in packed))
    call = native.CProgram(
        native.DTYPES[x.dtype],
        len(chain),
        native.activation(activation),
        addressof(array),
        addressof(pointers),
        None if shift is None else shift.data_ptr(),
        None if rest_rows is None else addressof(rest_rows),
    )
    status: int = library.tdpass_tensor_chain(
        byref(call), byref(native.rows(source)), byref(native.rows(y)), None
    )
    return status == 0
