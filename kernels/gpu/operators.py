"""Runs the registered operators on CUDA through the Triton kernels.

Here stands which arguments those cover, and their weights are unpacked.

Covered are `conv_chain` of one k x k stage with a 1x1 before it, behind it, or both; `linear_chain` of two
layers; `tensor_chain` of a train of two to four cores or of a block term.  Anything else, and everything on a
machine without Triton, is left to the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdpass.kernels import linear_chain as linear
from tdpass.kernels import tensor_chain as tensor
from tdpass.kernels.base import implements
from tdpass.kernels.gpu.serving import FLOATS, covered, kept, kernel, spaced
from tdpass.kernels.stage import Lanes, Stage, stages_of

_CORES = range(2, 5)


def _matrix(stage: Stage, packed: Tensor, lanes: Lanes, dtype: torch.dtype) -> Tensor:
    """A 1x1 stage as `[o, i]`."""
    return kept(packed, (stage, lanes, dtype), lambda: spaced(stage.unpack(packed, lanes).flatten(1), dtype))


@implements("conv_chain", "cuda")
@covered(*FLOATS)
def conv_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    stages: Sequence[int],
    activation: str,
    lanes: Lanes,
) -> Any:
    """`tucker2`, `tensor_train` in three cores, and what has a stage less: `channel_svd`, `input_svd`."""
    chain = stages_of(stages)
    place = core_place(chain)
    if place is None or x.dim() != 4:
        return NotImplemented
    core = chain[place]
    taps = kept(
        weights[place],
        (core, lanes, x.dtype),
        lambda: core.unpack(weights[place], lanes).to(x.dtype, copy=True),
    )
    first = _matrix(chain[0], weights[0], lanes, x.dtype) if place == 1 else None
    last = _matrix(chain[-1], weights[-1], lanes, x.dtype) if place + 1 < len(chain) else None
    pads = tuple(zip(core.before, core.after, strict=True))
    return kernel("tucker2_conv2d")(
        x,
        first,
        taps,
        last,
        bias,
        residual,
        activation,
        stride=core.stride,
        padding=pads,
        dilation=core.dilation,
    )


def core_place(chain: Sequence[Stage]) -> int | None:
    """Which stage is the core: 0 or 1, with 1x1 stages around it; None where the chain is of another form."""
    if len(chain) > 3 or any(stage.groups > 1 for stage in chain):
        return None
    simple = [stage == Stage(stage.inputs, stage.outputs) for stage in chain]
    if len(chain) == 3:
        return 1 if simple[0] and simple[2] else None
    if len(chain) == 2 and not simple[1]:
        return 1 if simple[0] else None
    return 0


@implements("linear_chain", "cuda")
@covered(*FLOATS)
def linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    widths: Sequence[int],
    activation: str,
) -> Any:
    """`svd`."""
    if len(weights) != 2:
        return NotImplemented
    lanes = linear.lanes_of(weights)
    v, u = (
        _matrix(stage, packed, lanes, x.dtype)
        for stage, packed in zip(linear.stages_of(widths), weights, strict=True)
    )
    return kernel("svd_linear")(x, v, u, bias, residual, activation)


@implements("tensor_chain", "cuda")
@covered(*FLOATS)
def tensor_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    steps: Sequence[int],
    activation: str,
) -> Any:
    """`tensor_train` and `block_term` of linear layers.

    Their weights are given back the shapes that the formats store.
    """
    program = tensor.steps_of(steps)
    train = _train(program)
    if train is not None:
        cores = [
            _core(step, packed, i, s) for step, packed, (i, s) in zip(program, weights, train, strict=True)
        ]
        return kernel("tt_linear")(x, cores[::-1], bias, residual, activation)
    if len(program) == 3 and program[1].batched:
        parts, inputs, outputs = program[0].a, program[0].k, program[2].o
        b, s, r = program[1].a, program[1].r, program[0].r // program[1].a
        if program == tensor.block_program(outputs, parts, inputs, (b, s, r)):
            return _blocks(x, weights, bias, residual, activation, program, (parts, b, s, r))
    return NotImplemented


def _train(program: Sequence[tensor.Step]) -> list[tuple[int, int]] | None:
    """Of each step its part of the input and its right rank.

    None where the program is not that of a train that the kernel takes.
    """
    if len(program) not in _CORES or any(step.batched for step in program):
        return None
    right = (1, *(step.r for step in program[:-1]))
    ins = [step.k // s for step, s in zip(program, right, strict=True)]
    same = tensor.train_program(
        [step.o for step in reversed(program)], ins[::-1], [step.r for step in reversed(program[:-1])]
    )
    return list(zip(ins, right, strict=True)) if tuple(program) == same else None


def _core(step: tensor.Step, packed: Tensor, i: int, s: int) -> Tensor:
    """`[r, o, i, s]` of a step's weight `[(i s), o, r]`."""

    def make() -> Tensor:
        return (
            step.unpack(packed)
            .reshape(i, s, step.o, step.r)
            .permute(3, 2, 0, 1)
            .clone(memory_format=torch.contiguous_format)
        )

    return kept(packed, (step, "core", i, s), make)


def _blocks(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, residual: Tensor | None, activation: str,
    program: Sequence[tensor.Step], sizes: tuple[int, int, int, int],
) -> Tensor:  # fmt: skip
    """`block_term_linear` from step weights `[i, 1, (b r)]`, `[b, (r p), 1, s]`, `[(b s), o, 1]`."""
    parts, b, s, r = sizes
    low, middle, high = program
    first = kept(weights[0], (low, x.dtype), lambda: spaced(low.unpack(weights[0])[0, :, 0].T, x.dtype))
    core = kept(
        weights[1],
        (middle, r),
        lambda: (
            middle.unpack(weights[1]).reshape(b, r, parts, s).transpose(1, 2).reshape(b, parts * r, s).clone()
        ),
    )
    last = kept(weights[2], (high, x.dtype), lambda: spaced(high.unpack(weights[2])[0, :, :, 0].T, x.dtype))
    made: Tensor = kernel("block_term_linear")(x, first, core, last, bias, residual, activation)
    return made
