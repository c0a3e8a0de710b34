"""How data becomes calls of a model.

Cut and grown only where the model shows that it takes samples one beside the other.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.base import Batch, Model
from tdpass.models.fitting import (
    Axes,
    candidate_axes,
    excess,
    fixed_axis,
    may_hold_samples,
    missing_axes,
    open_axis,
    unstacked,
)
from tdpass.models.signature import TO_FLOAT, Input

_ROUNDING = {
    torch.float16: 3e-2,
    torch.bfloat16: 3e-2,
}  # else _FINE: a batch is summed in another order than a sample
_FINE = 1e-3


@dataclass(frozen=True)
class _Way:
    """How given tensors become calls.

    `added` are axes to insert, `axes` those along which samples then lie, all None where a call stays whole;
    `least` and `most` bound the samples of a call, and a call that is `one_sample` is not divided further.
    """

    axes: Axes
    least: int = 1
    most: int | None = None
    added: Axes = ()
    one_sample: bool = False

    def call(self, given: Batch) -> Batch:
        """The tensors as one call, not yet cut."""
        pairs = zip(given.tensors, self.added or (None,) * len(self.axes), strict=True)
        return replace(
            given.replaced([tensor if axis is None else tensor.unsqueeze(axis) for tensor, axis in pairs]),
            axes=self.axes,
        )

    def pieces(self, call: Batch, most: int) -> Iterator[Batch]:
        """Parts of at most that many samples.

        The last takes in a rest that is too small for a call, or drops it where the size is fixed.
        """
        if not call.divisible:
            yield call
            return
        starts = list(range(0, call.size, most))
        if len(starts) > 1 and call.size - starts[-1] < self.least:
            starts.pop()
        stops = [start + most for start in starts]
        if self.least < most:
            stops[-1] = call.size
        for start, stop in zip(starts, stops, strict=True):
            part = replace(call.part(start, stop), whole=self.least == most)
            yield replace(part, axes=(None,) * len(self.axes)) if self.one_sample else part


@dataclass
class Calls:
    """Turns tensors that somebody holds into calls that the model takes, of at most `limit` samples.

    The sizes that the model declares come first; where it leaves one open, two samples in one call must be
    answered as they are one by one, or the model is run on the calls as they were given.  `notes` says what
    was done beyond cutting.
    """

    model: Model
    limit: int = 64
    notes: list[str] = field(default_factory=list)
    _ways: dict[object, _Way] = field(default_factory=dict)

    def of(self, given: Iterable[Batch], samples: int) -> Iterator[Batch]:
        """Calls of up to `samples` samples, in the order of the data.

        Single samples of one shape are put together. Raises `InvalidModelError` or `UsageError` for what the
        model does not take.
        """
        singles: dict[object, list[Batch]] = {}
        left = samples
        for call, way in itertools.chain.from_iterable(map(self._fitted, given)):
            if left < min(way.least, samples):
                break
            taken = call.part(0, max(left, way.least))
            left -= taken.size
            most = self.limit if way.most is None else way.most
            if taken.size > 1 or not taken.divisible or most == 1:
                yield from way.pieces(taken, most)
                continue
            alike = singles.setdefault(_kind(taken), [])
            alike.append(taken)
            if len(alike) == most:
                yield _joined(alike)
                alike.clear()
        yield from (_joined(alike) for alike in singles.values() if alike)

    def _fitted(self, batch: Batch) -> Iterator[tuple[Batch, _Way]]:
        inputs = self.model.signature().inputs_of(batch)
        batch = batch.replaced(
            [entry.converted(tensor) for entry, tensor in zip(inputs, batch.tensors, strict=True)]
        )
        for given in unstacked(batch, inputs):
            key = (
                given.axes,
                tuple(
                    (entry.name, tensor.dim(), excess(entry, tensor))
                    for entry, tensor in zip(inputs, given.tensors, strict=True)
                ),
            )
            if key not in self._ways:
                self._ways[key] = self._way(given, inputs)
            yield self._ways[key].call(given), self._ways[key]

    def _way(self, given: Batch, inputs: Sequence[Input]) -> _Way:
        if given.axes is not None:
            return _Way(given.axes)
        added = missing_axes(inputs, given)
        whole = _Way((None,) * len(added), added=added)
        call = whole.call(given)
        if any(excess(*pair) for pair in zip(inputs, call.tensors, strict=True)):
            return replace(self._cut_to_fixed(call, inputs), added=added)
        signature = self.model.signature()
        if all(entry.dims is not None for entry in inputs) and not may_hold_samples(
            inputs, signature.fixed_batch()
        ):
            axes = signature.fixed_axes(inputs)
            size = replace(call, axes=axes).size
            return _Way(axes, size, size, added)
        for axes in candidate_axes(call, inputs):
            bounds = self._bounds(replace(call, axes=axes))
            if bounds is not None:
                if bounds == (1, 1) and any(axes) and all(entry.dims is None for entry in inputs):
                    self._say_other_axis(call, axes)
                return _Way(axes, *bounds, added)
        return self._uncut(whole) if any(entry.dims is not None for entry in inputs) else self._unseen(call)

    def _cut_to_fixed(self, call: Batch, inputs: Sequence[Input]) -> _Way:
        """The way where the model fixes the size of a call and the data has another.

        Several calls one beside the other.
        """
        signature = self.model.signature()
        declared = signature.fixed_axes(inputs)
        pairs = list(zip(inputs, call.tensors, strict=True))
        expected = [fixed_axis(entry, axis) for entry, axis in zip(inputs, declared, strict=True)]
        beyond = [dict(excess(*pair)) for pair in pairs]
        leading = [
            found
            for (entry, _), axis, found in zip(pairs, expected, beyond, strict=True)
            if list(found) == [axis]
        ]
        for (entry, tensor), axis, found in zip(pairs, expected, beyond, strict=True):
            # beside an input that shows the number of samples, another may hold them along any axis of that
            # size
            alike = (
                len(found) == 1
                and bool(leading)
                and leading[0] is not found
                and set(found.values()) == set(leading[0].values())
            )
            if found and list(found) != [axis] and not alike:
                raise signature.unfit(f"input {entry.name!r} is [{', '.join(map(str, tensor.shape))}]")
        held = {
            (int(tensor.shape[axis]), size)
            for (_, tensor), found in zip(pairs, beyond, strict=True)
            for axis, size in found.items()
        }
        if len(held) > 1:
            raise signature.unfit(
                f"the inputs of sizes {[tuple(tensor.shape) for tensor in call.tensors]} hold different "
                "numbers of calls"
            )
        ((length, size),) = held
        if length < size:
            raise UsageError(
                f"the model takes exactly {size} samples at a time, the data holds {length}; give more, or "
                "export it with a dynamic first axis"
            )
        axes = tuple(
            next(iter(found), open_axis(*pair, length)) for pair, found in zip(pairs, beyond, strict=True)
        )
        return _Way(axes, size, size, one_sample=size > 1 and not any(axis is not None for axis in declared))

    def _bounds(self, call: Batch) -> tuple[int, int | None] | None:
        """The least and the most samples of a call where its axes hold samples, as running the model shows.

        None where they do not.
        """
        pair = call.part(0, 2) if call.size > 1 else call.resized(2)
        one, both = self._tried(pair.part(0, 1)), self._tried(pair)
        if both is None:
            return (1, 1) if one is not None and call.size > 1 else None
        if one is not None and _follow(both, (one, self._tried(pair.part(1, 2)))):
            return 1, None
        # a model that squeezes its answers loses the axis of a single sample
        four = call.part(0, 4) if call.size > 3 else call.resized(4)
        return (
            (2, None)
            if _follow(self._tried(four), (self._tried(four.part(0, 2)), self._tried(four.part(2, 4))))
            else None
        )

    def _say_other_axis(self, call: Batch, axes: Axes) -> None:
        """Say that the model takes the data only in slices along an axis where samples seldom lie."""
        at = next(axis for axis in axes if axis)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in call.tensors)
        self.notes.append(
            f"the model does not run on the data as it is, {shapes}: it is called with one slice along axis {at} "
            "at a time; check that samples lie there, and not channels"
        )

    def _tried(self, call: Batch) -> object:
        """What the model answers.

        None where it fails, which it may do in any way on sizes that it does not take.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.model.run(call)
            except Exception:  # noqa: BLE001
                return None

    def _unseen(self, call: Batch) -> _Way:
        """The way for a model that declares no sizes, where no axis of the data holds samples.

        It may be one without that axis.
        """
        added: Axes = tuple(0 if tensor.dim() else None for tensor in call.tensors)
        sample = _Way(added, added=added)
        bounds = self._bounds(sample.call(call)) if any(axis is not None for axis in added) else None
        if bounds is not None:
            return sample
        try:
            self.model.run(call)
        except InvalidModelError as error:
            if any(tensor.dtype is torch.uint8 for tensor in call.tensors):
                raise InvalidModelError(
                    f"{error}; the data is uint8: convert it as it was for training, {TO_FLOAT}"
                ) from error
            raise
        return self._uncut(_Way(call.sample_axes))

    def _uncut(self, way: _Way) -> _Way:
        note = (
            "the model is run on the calls of the data as they are: it does not answer several "
            "samples in a call as it does one by one"
        )
        if note not in self.notes:
            self.notes.append(note)
        return way


def _kind(call: Batch) -> object:
    """Equal for calls that can be put together: shapes, types, and what the samples share."""

    def one(tensor: Tensor, axis: int | None) -> object:
        shared = (
            None if axis is not None else tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
        return tensor.shape, tensor.dtype, shared

    return (
        tuple(call.kwargs),
        call.sample_axes,
        tuple(one(*pair) for pair in zip(call.tensors, call.sample_axes, strict=True)),
    )


def _joined(calls: Sequence[Batch]) -> Batch:
    columns = zip(*(call.tensors for call in calls), strict=True)
    return calls[0].replaced(
        [
            column[0] if axis is None else torch.cat(column, axis)
            for column, axis in zip(columns, calls[0].sample_axes, strict=True)
        ]
    )


def _follow(whole: object, parts: Sequence[object]) -> bool:
    """Whether what a call answers is what its parts answer, side by side along some axis of an output."""
    columns = [
        [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)] for outputs in (whole, *parts)
    ]
    if len({len(column) for column in columns}) != 1:
        return False
    axes = [_axis_of(together, single) for together, *single in zip(*columns, strict=True)]
    return None not in axes and any(axis is not None and axis >= 0 for axis in axes)


def _axis_of(whole: Tensor, parts: Sequence[Tensor]) -> int | None:
    """The axis along which the parts make up the whole, -1 where each equals it; None where neither is so."""
    if any(part.dim() != whole.dim() for part in parts):
        return None
    differing = [axis for axis in range(whole.dim()) if parts[0].shape[axis] != whole.shape[axis]]
    if not differing:
        return -1 if all(_close(whole, part) for part in parts) else None
    axis = differing[0]
    if len(differing) > 1 or sum(part.shape[axis] for part in parts) != whole.shape[axis]:
        return None
    return axis if _close(whole, torch.cat(list(parts), axis)) else None


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding: whole numbers, which may be the places of maxima, but for one in a hundred."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return float((a != b).double().sum()) <= 0.01 * a.numel()
    allowed = _ROUNDING.get(a.dtype, _FINE)
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).norm()) <= allowed * float(a.norm()) + 1e-12
