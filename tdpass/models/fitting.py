"""Tensors that somebody holds against the sizes that a model declares.

Axes too many, too few, and those that may hold samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from tdpass.errors import UsageError
from tdpass.models.batch import Batch
from tdpass.models.signature import Dims, Input, Signature

Axes = tuple[int | None, ...]
_BATCH_NAMES = ("batch", "batch_size", "n", "b", "bs")


def unstacked(batch: Batch, inputs: Sequence[Input]) -> Iterator[Batch]:
    """The calls in tensors that have one axis more than the model declares.

    Along their first axis lie whole calls. What has no axis more is shared by all calls, or holds one sample
    for each of them.
    """
    tensors = [_as_declared(entry, tensor) for entry, tensor in zip(inputs, batch.tensors, strict=True)]
    batch = batch.replaced(tensors)
    extra = [
        entry.dims is not None and tensor.dim() == len(entry.dims) + 1
        for entry, tensor in zip(inputs, tensors, strict=True)
    ]
    if not any(extra):
        yield batch
        return
    counts = {int(tensor.shape[0]) for tensor, stacked in zip(tensors, extra, strict=True) if stacked}
    if len(counts) > 1:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise UsageError(
            f"inputs of shapes {shapes} hold different numbers of calls along their first axis; give as "
            "many of each"
        )
    (count,) = counts
    beside = [
        None if more else _axis_beside(entry, tensor, count)
        for entry, tensor, more in zip(inputs, tensors, extra, strict=True)
    ]
    constant = all(
        bool((tensor == tensor[:1]).all()) for tensor, more in zip(tensors, extra, strict=True) if more
    )
    if constant and any(axis is not None for axis in beside):
        yield batch.replaced(
            [tensor[0] if more else tensor for tensor, more in zip(tensors, extra, strict=True)]
        )
        return
    for index in range(count):
        yield batch.replaced([_at(index, *item) for item in zip(tensors, extra, beside, strict=True)])


def _at(index: int, tensor: Tensor, stacked: bool, axis: int | None) -> Tensor:
    if stacked:
        return tensor[index]
    return tensor if axis is None else tensor.narrow(axis, index, 1)


def _axis_beside(entry: Input, tensor: Tensor, count: int) -> int | None:
    """The axis along which an input that is not stacked holds one sample for each of `count` calls."""
    sizes = entry.dims or ()
    fitting = (
        axis
        for axis, size in enumerate(sizes)
        if tensor.dim() > axis and tensor.shape[axis] == count and _takes_one(size)
    )
    return next(fitting, None)


def _takes_one(size: int | str) -> bool:
    return isinstance(size, str) or size == 1


def _as_declared(entry: Input, tensor: Tensor) -> Tensor:
    """A single number in the shape that the model declares for one."""
    single = entry.dims is not None and tensor.numel() == 1 and all(map(_takes_one, entry.dims))
    return tensor.reshape([1] * len(entry.dims or ())) if single else tensor


def missing_axes(inputs: Sequence[Input], batch: Batch) -> Axes:
    """Where each tensor that comes without the axis of samples is given one."""
    return tuple(_missing_axis(entry, tensor) for entry, tensor in zip(inputs, batch.tensors, strict=True))


def _missing_axis(entry: Input, tensor: Tensor) -> int | None:
    dims = entry.dims
    if dims is None or tensor.dim() != len(dims) - 1:
        return None
    found = [
        axis
        for axis, size in enumerate(dims)
        if _takes_one(size) and replace(entry, dims=dims[:axis] + dims[axis + 1 :]).fits(tensor.shape)
    ]
    named = [axis for axis in found if _names_batch(dims[axis])]
    return next(iter(named or found), None)


def _names_batch(size: int | str) -> bool:
    return str(size).lower() in _BATCH_NAMES


def may_hold_samples(inputs: Sequence[Input], fixed: int | None) -> bool:
    """Whether an open axis may be that of the samples.

    Where their number is `fixed`, only one that is named so, or has no name beside more than one.
    """
    opened = [size for entry in inputs for size in entry.dims or () if isinstance(size, str)]
    return bool(opened) and (
        fixed is None or any(_names_batch(size) or (not size and fixed > 1) for size in opened)
    )


def excess(entry: Input, tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Axes on which a tensor has another size than the model fixes, with that size."""
    if entry.dims is None or tensor.dim() != len(entry.dims):
        return ()
    pairs = enumerate(zip(entry.dims, tensor.shape, strict=True))
    return tuple((axis, size) for axis, (size, given) in pairs if isinstance(size, int) and size != given)


def fixed_axis(entry: Input, declared: int | None) -> int | None:
    """The axis of a fixed size along which several calls may lie.

    That of the samples, else one of size 1, else the first.
    """
    sizes = entry.dims or ()
    if declared is not None or not sizes:
        return declared
    return sizes.index(1) if 1 in sizes else 0


def open_axis(entry: Input, tensor: Tensor, length: int, preferred: int = 0) -> int | None:
    """An axis that the model leaves open and that is `length` long, the preferred one where it is one.

    Else None.
    """
    sizes: Dims = entry.dims if entry.dims is not None else ("",) * tensor.dim()
    found = [
        axis for axis, size in enumerate(sizes) if isinstance(size, str) and tensor.shape[axis] == length
    ]
    return preferred if preferred in found else next(iter(found), None)


def candidate_axes(call: Batch, inputs: Sequence[Input]) -> Iterator[Axes]:
    """Axes that may hold the samples, likely ones first.

    Those of one declared name, then those of one length.
    """
    tried: set[Axes] = {(None,) * len(inputs)}
    for axes in (*_named_alike(inputs), *_equally_long(call, inputs)):
        if axes not in tried:
            tried.add(axes)
            yield axes


def _named_alike(inputs: Sequence[Input]) -> Iterator[Axes]:
    names = Counter(
        name
        for entry in inputs
        for name in {size for size in entry.dims or () if isinstance(size, str) and size}
    )
    first = next((entry.dims[0] for entry in inputs if entry.dims), None)
    for name in sorted(names, key=lambda name: (not _names_batch(name), name != first)):
        yield tuple(entry.dims.index(name) if entry.dims and name in entry.dims else None for entry in inputs)


def _equally_long(call: Batch, inputs: Sequence[Input]) -> Iterator[Axes]:
    pairs = list(zip(inputs, call.tensors, strict=True))
    for axis in (0, 1):
        opened = [
            tensor
            for entry, tensor in pairs
            if tensor.dim() > axis and open_axis(entry, tensor, tensor.shape[axis], axis) == axis
        ]
        for other in (0, 1) if opened else ():
            leader, length = opened[0], opened[0].shape[axis]
            yield tuple(
                open_axis(entry, tensor, length, axis if tensor is leader else other)
                for entry, tensor in pairs
            )


def sized(signature: Signature, batch: Batch) -> Batch:
    """A call of the types and sizes that the model fixes, made of example inputs of any batch.

    Cut, or grown by repetition.
    """
    inputs = signature.inputs_of(batch)
    tensors = [
        _as_declared(entry, entry.converted(tensor))
        for entry, tensor in zip(inputs, batch.tensors, strict=True)
    ]
    added = missing_axes(inputs, batch.replaced(tensors))
    tensors = [
        tensor if axis is None else tensor.unsqueeze(axis)
        for tensor, axis in zip(tensors, added, strict=True)
    ]
    places = [fixed_axis(*pair) for pair in zip(inputs, signature.fixed_axes(inputs), strict=True)]
    return batch.replaced([_fitted(*item) for item in zip(inputs, tensors, places, strict=True)])


def _fitted(entry: Input, tensor: Tensor, place: int | None) -> Tensor:
    for axis, size in excess(entry, tensor):
        if axis == place:
            return Batch((tensor,), axes=(axis,)).resized(size).args[0]
    return tensor
