"""Torch functions for operators that move, cut, join and reshape data, or make it from shapes."""

from __future__ import annotations

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.models.onnx.graph.functions import NotServedError, Operator, numbers, serves
from tdpass.models.onnx.graph.tensors import to_torch, torch_dtype


@serves("Reshape")
def _reshape(op: Operator, x: Tensor, shape: Tensor) -> Tensor:
    wanted = numbers(shape)
    if not op.integer("allowzero"):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


@serves("Flatten")
def _flatten(op: Operator, x: Tensor) -> Tensor:
    axis = op.integer("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(x.shape[:axis].numel(), -1)


@serves("Transpose")
def _transpose(op: Operator, x: Tensor) -> Tensor:
    return x.permute(op.integers("perm") or list(range(x.dim()))[::-1])


@serves("Squeeze")
def _squeeze(op: Operator, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = op.integers_or("axes", axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


@serves("Unsqueeze")
def _unsqueeze(op: Operator, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = op.integers_or("axes", axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@serves("Concat")
def _concat(op: Operator, *parts: Tensor) -> Tensor:
    return torch.cat(parts, op.integer("axis"))


@serves("Split")
def _split(op: Operator, x: Tensor, split: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = op.integer("axis")
    lengths = op.integers_or("split", split)
    if lengths is None:
        parts = op.integer("num_outputs", op.outputs)
        step = -(-x.shape[axis] // parts)
        lengths = [max(0, min(step, x.shape[axis] - part * step)) for part in range(parts)]
    return tuple(torch.split(x, lengths, axis))


@serves("Slice")
def _slice(
    op: Operator,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = op.integers_or("starts", starts) or [], op.integers_or("ends", ends) or []
    chosen = op.integers_or("axes", axes) or list(range(len(first)))
    strides = numbers(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, chosen, strides, strict=True):
        size = x.shape[axis]
        if step > 0:
            index: list[slice] = [slice(None)] * (axis % x.dim()) + [
                slice(*slice(start, end, step).indices(size))
            ]
            x = x[tuple(index)]
        else:
            picked = range(size)[slice(start, None if end < -size else end, step)]
            x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
    return x


@serves("Gather")
def _gather(op: Operator, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.integer("axis") % x.dim()
    flat = torch.remainder(indices.reshape(-1), x.shape[axis])
    return x.index_select(axis, flat).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@serves("GatherElements")
def _gather_elements(op: Operator, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.integer("axis")
    return torch.gather(x, axis, torch.remainder(indices, x.shape[axis]).long())


@serves("GatherND")
def _gather_nd(op: Operator, x: Tensor, indices: Tensor) -> Tensor:
    if op.integer("batch_dims"):
        raise NotServedError
    return x[tuple(indices.movedim(-1, 0))]


def _broadcast(a: list[int], b: list[int]) -> list[int]:
    rank = max(len(a), len(b))
    pairs = zip([1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b, strict=True)
    return [right if left == 1 else left for left, right in pairs]


@serves("Expand")
def _expand(_op: Operator, x: Tensor, shape: Tensor) -> Tensor:
    return torch.broadcast_to(x, _broadcast(list(x.shape), numbers(shape)))


@serves("Tile")
def _tile(_op: Operator, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(numbers(repeats))


@serves("Shape")
def _shape(op: Operator, x: Tensor) -> Tensor:
    end = op.integer("end") if "end" in op.attributes else None
    return torch.tensor(list(x.shape)[op.integer("start") : end], dtype=torch.int64)


@serves("Size")
def _size(_op: Operator, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@serves("Cast")
def _cast(op: Operator, x: Tensor) -> Tensor:
    return x.to(torch_dtype(ir.DataType(op.integer("to"))))


@serves("CastLike")
def _cast_like(_op: Operator, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@serves("ConstantOfShape")
def _constant_of_shape(op: Operator, shape: Tensor) -> Tensor:
    value = to_torch(op.attributes["value"].as_tensor()) if "value" in op.attributes else torch.zeros(1)
    return torch.full(numbers(shape), value.item(), dtype=value.dtype)


@serves("Range")
def _range(_op: Operator, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@serves("Dropout")
def _dropout(op: Operator, x: Tensor, _ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
    op.only_first_output()
    if training is not None and bool(training.item()):
        raise NotServedError
    return x


@serves("Trilu")
def _trilu(op: Operator, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    offset = numbers(diagonal)[0] if diagonal is not None else 0
    return torch.triu(x, offset) if op.integer("upper", 1) else torch.tril(x, offset)


@serves("Pad")
def _pad(
    op: Operator,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    flat = op.integers_or("pads", pads) or []
    chosen = numbers(axes) if axes is not None else list(range(x.dim()))
    mode = {"constant": "constant", "edge": "replicate", "reflect": "reflect"}.get(
        op.string("mode", "constant")
    )
    amounts = {axis % x.dim(): (flat[k], flat[k + len(chosen)]) for k, axis in enumerate(chosen)}
    reversed_pairs = [amounts.get(axis, (0, 0)) for axis in reversed(range(x.dim()))]
    if mode == "constant":
        fill = value.item() if value is not None else op.number("value", 0.0)
        return F.pad(x, [side for pair in reversed_pairs for side in pair], "constant", fill)
    spatial = reversed_pairs[: x.dim() - 2]
    if mode is None or not 3 <= x.dim() <= 5 or any(pair != (0, 0) for pair in reversed_pairs[x.dim() - 2 :]):
        raise NotServedError
    return F.pad(x, [side for pair in spatial for side in pair], mode)


@serves("DepthToSpace")
def _depth_to_space(op: Operator, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = op.integer("blocksize")
    if op.string("mode", "DCR") == "DCR":
        return (
            x.reshape(n, b, b, c // (b * b), h, w)
            .permute(0, 3, 4, 1, 5, 2)
            .reshape(n, c // (b * b), h * b, w * b)
        )
    return (
        x.reshape(n, c // (b * b), b, b, h, w)
        .permute(0, 1, 4, 2, 5, 3)
        .reshape(n, c // (b * b), h * b, w * b)
    )


@serves("SpaceToDepth")
def _space_to_depth(op: Operator, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = op.integer("blocksize")
    return (
        x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)
    )
