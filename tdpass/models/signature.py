"""What a model says of the tensors that it takes: names, types and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.errors import InvalidModelError
from tdpass.models.batch import Batch

Size = int | str
Dims = tuple[Size, ...]


@dataclass(frozen=True)
class Input:
    """One input as the model declares it; None where it says nothing.

    A size is a number where it is fixed and a text where it is open: equal texts stand for equal sizes, the
    empty one for a size of its own.  A `positional` input has a name that a call cannot use.
    """

    name: str
    dtype: torch.dtype | None = None
    dims: Dims | None = None
    required: bool = True
    positional: bool = False

    def converted(self, tensor: Tensor) -> Tensor:
        """The tensor in the input's type, where that changes no value but for rounding to a precision.

        Raises `InvalidModelError` where it does, or where only whoever trained the model knows how to
        convert.
        """
        if self.dtype is None or tensor.dtype is self.dtype:
            return tensor
        before, after = tensor.dtype, self.dtype
        told = f"the model takes {self} and is given {_plain(before)}"
        if after.is_floating_point and not before.is_floating_point and before is not torch.bool:
            raise InvalidModelError(f"{told}; convert it as it was for training: {TO_FLOAT}")
        if before.is_floating_point and not after.is_floating_point:
            raise InvalidModelError(f"{told}; give whole numbers, such as token numbers, in an integer type")
        made = tensor.to(after)
        unchanged = (
            torch.isfinite(made).all() if after.is_floating_point else torch.equal(made.to(before), tensor)
        )
        if not bool(unchanged):
            largest = float(tensor.abs().max()) if before is not torch.bool else 1.0
            raise InvalidModelError(
                f"{told}, with numbers up to {largest:g}, which {_plain(after)} cannot hold; scale or clip "
                "them as for training"
            )
        return made

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape can be given as it is."""
        if self.dims is None:
            return True
        return len(shape) == len(self.dims) and all(
            isinstance(size, str) or size == given for size, given in zip(self.dims, shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = (
            "of any shape" if self.dims is None else f"[{', '.join(str(size) or '?' for size in self.dims)}]"
        )
        return f"{self.name}: {'any type' if self.dtype is None else _plain(self.dtype)} {sizes}"


TO_FLOAT = (
    "images of uint8 usually as x.float() / 255, then normalised with the mean and deviation of training"
)


@dataclass(frozen=True)
class Signature:
    """The inputs in their order.

    `outputs` are the sizes of its outputs, `others` tells whether it takes inputs that are not listed.
    `notes` says what is to be known of the inputs.
    """

    inputs: tuple[Input, ...] = ()
    outputs: tuple[Dims | None, ...] = ()
    others: bool = False
    notes: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether there is an input of that name."""
        return self.others or any(known.name == name for known in self.inputs)

    @property
    def required(self) -> int:
        """How many inputs have no default."""
        return sum(known.required for known in self.inputs)

    def inputs_of(self, batch: Batch) -> list[Input]:
        """The input that each of the batch's tensors is for, positional ones first.

        Raises `InvalidModelError`, listing what the model takes, for a wrong name or count.
        """
        known = {entry.name: entry for entry in self.inputs}
        if len(batch.args) > len(known) and not self.others:
            raise self.unfit(f"the batch has {len(batch.args)} positional tensors")
        found = list(self.inputs[: len(batch.args)])
        found += [Input(f"argument {index}") for index in range(len(found), len(batch.args))]
        for name in batch.kwargs:
            if not self.takes(name):
                raise self.unfit(f"the model has no input {name!r}")
            if any(entry.name == name for entry in found):
                raise self.unfit(f"input {name!r} is given twice")
            found.append(known.get(name, Input(name)))
        given = {entry.name for entry in found}
        missing = [entry.name for entry in self.inputs if entry.required and entry.name not in given]
        if missing:
            raise self.unfit(f"the batch lacks {', '.join(missing)}")
        return found

    def call(self, named: Mapping[str, Tensor]) -> Batch:
        """The call of values by name, those in front that a call cannot name in their order."""
        placed = [entry.name for entry in self.inputs if entry.positional]
        if not all(name in named for name in placed):
            placed = []
        return Batch(
            tuple(named[name] for name in placed),
            {name: value for name, value in named.items() if name not in placed},
        )

    def bind(self, batch: Batch) -> dict[str, Tensor]:
        """Tensors by input name, in the types that the model takes.

        Raises `InvalidModelError`, listing those, for what does not fit.
        """
        bound: dict[str, Tensor] = {}
        for entry, tensor in zip(self.inputs_of(batch), batch.tensors, strict=True):
            bound[entry.name] = entry.converted(tensor)
            if not entry.fits(tensor.shape):
                raise self.unfit(
                    f"input {entry.name!r} is {_plain(tensor.dtype)} [{', '.join(map(str, tensor.shape))}]"
                )
        return bound

    def unfit(self, problem: str) -> InvalidModelError:
        """The error that says what is wrong and what the model takes."""
        wanted = [str(entry) for entry in self.inputs if entry.required]
        return InvalidModelError(f"{problem}; the model takes {', '.join(wanted) or 'no inputs'}")

    def fixed_axes(self, inputs: Iterable[Input]) -> tuple[int | None, ...]:
        """Where the samples of inputs of fixed sizes lie.

        Along the first size that all inputs with axes have in common. None for all where there is no such
        size, or an output has no axis of that size: the inputs are then one sample.
        """
        dims = [entry.dims or () for entry in inputs]
        ranked = [sizes for sizes in dims if sizes]
        shortest: Dims = min(ranked, key=len, default=())
        common = next((size for size in shortest if all(size in sizes for sizes in ranked)), None)
        if not isinstance(common, int) or any(
            common not in sizes
            for sizes in self.outputs
            if sizes and not any(isinstance(size, str) for size in sizes)
        ):
            return tuple(None for _ in dims)
        return tuple(sizes.index(common) if common in sizes else None for sizes in dims)

    def fixed_batch(self) -> int | None:
        """The one number of samples it takes, where every input fixes it."""
        needed = [entry for entry in self.inputs if entry.required]
        if any(entry.dims is None or (entry.dims and isinstance(entry.dims[0], str)) for entry in needed):
            return None
        axes = self.fixed_axes(needed)
        return next(
            (
                entry.dims[axis]
                for entry, axis in zip(needed, axes, strict=True)
                if entry.dims and axis is not None
            ),
            None,
        )  # type: ignore[return-value]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
