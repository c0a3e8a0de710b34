"""Calibration data of many kinds as batches, and as calls of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import TypeIs

from tdpass.arrays import read_arrays
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.base import Batch, Model
from tdpass.models.calls import Calls
from tdpass.models.signature import Signature
from tdpass.models.torch.model import TorchModel
from tdpass.raw import RAW_KINDS, Raw, Reader, raw_kind_of
from tdpass.raw.hub import PREFIX, from_hub

_SCALARS = (bool, int, float, np.generic)
_NUMBERS = (Tensor, np.ndarray, *_SCALARS)
_COLLATED = 32
_ALLOWED = (
    "give a tensor, an array, a dict by input name, an .npz or .npy file, images, sound or "
    "text in a folder or file, a Dataset, or an iterable of calls (as a DataLoader is)"
)


def as_batches(data: object, samples: int = 512, batch_size: int = 64) -> list[Batch]:
    """Up to `samples` samples of calibration data as batches of at most `batch_size`, for whichever model.

    A tensor or array is the one input; a dict holds inputs by name; a tuple of tensors holds positional
    inputs; an iterable yields any of these, where a pair of a tensor and a one-axis integer tensor is read as
    (input, labels).  Integers stay integers, floats become float32.  Raises `UsageError` for anything else
    and for inputs that share no first axis, `InvalidModelError` for a file that cannot be read or values that
    are not finite.
    """
    _at_least_one(samples, batch_size)
    batches: list[Batch] = []
    left = samples
    for batch in _read_calls(data, Signature(others=True), []):
        _check_first_axis(batch)
        taken = min(left, batch.size)
        batches += [
            batch.part(start, min(start + batch_size, taken)) for start in range(0, taken, batch_size)
        ]
        left -= taken
        if left <= 0:
            break
    return _some(batches)


def calls_of(
    model: Model, data: object, samples: int = 512, batch_size: int = 64
) -> tuple[list[Batch], list[str]]:
    """Calibration data as calls that the model takes, up to `samples` samples, and what is to be said of it.

    The kinds of data are those of `as_batches`, a `Dataset` of single samples, and raw data, in a folder or
    file, of a kind in `tdpass.raw`.  Inputs whose samples lie along another axis, scalars beside a batch,
    calls of a fixed size, samples without an axis of their own and samples of different sizes are put as the
    model takes them: samples are cut and put together, at most `batch_size` in a call, only where that
    changes no answer (see `Calls`).  Named values that the model does not take, such as labels, are left out;
    the only array is the only input, whatever it is called.  Raises `InvalidModelError` for what does not fit
    it, else as `as_batches`.
    """
    _at_least_one(samples, batch_size)
    notes: list[str] = []
    read = _processed(data, model, samples)
    calls = Calls(model, batch_size, notes).of(_read_calls(read, model.signature(), notes), samples)
    return _some(list(calls)), notes


def _processed(data: object, model: Model, samples: int) -> object:
    """Raw data as its processor makes it what the model reads; all other data as it is."""
    if not isinstance(data, Raw | str | Path):
        return data
    raw = data if isinstance(data, Raw) else Raw(data)
    module = model.module if isinstance(model, TorchModel) else None
    reader = Reader(module, _sample(model), raw.processor)
    if str(raw.data).startswith(PREFIX):
        return from_hub(str(raw.data), reader, samples)
    path = Path(raw.data)
    if not path.exists():
        raise InvalidModelError(f"there is no file {path}; check the path")
    kind = raw_kind_of(path)
    if kind is not None:
        return kind.read(path, reader, samples)
    if path.is_dir() or raw.processor is not None:
        known = ", ".join(sorted(suffix for kind in RAW_KINDS for suffix in kind.suffixes))
        raise UsageError(f"{path} holds no image, text or sound ({known}); check the path")
    return path


def _sample(model: Model) -> tuple[int, ...] | None:
    """The shape of what the model reads first, without samples, where an example or declaration says."""
    example, declared = model.example(), model.signature().inputs
    if example is not None and example.tensors:
        return tuple(example.tensors[0].shape[1:])
    dims = declared[0].dims if declared else None
    sizes = () if dims is None else dims[1:]
    return (
        tuple(size for size in sizes if isinstance(size, int))
        if sizes and all(isinstance(size, int) for size in sizes)
        else None
    )


def _at_least_one(samples: int, batch_size: int) -> None:
    if samples < 1 or batch_size < 1:
        raise UsageError(f"samples={samples} and batch_size={batch_size} must be at least 1")


def _some(batches: list[Batch]) -> list[Batch]:
    if not batches:
        raise UsageError("the calibration data is empty; " + _ALLOWED)
    return batches


def _read_calls(data: object, signature: Signature, notes: list[str]) -> Iterator[Batch]:
    """The calls in the data, as they were given but for what the model does not take."""
    if isinstance(data, str | Path):
        data = _read(Path(data))
    whole = _whole(data, signature, notes)
    for batch in [whole] if whole is not None else _each(data, signature, notes):
        _check(batch)
        yield batch


def _whole(data: object, signature: Signature, notes: list[str]) -> Batch | None:
    if isinstance(data, Batch):
        return data
    if isinstance(data, Tensor | np.ndarray):
        return Batch((_tensor(data),))
    if isinstance(data, Mapping):
        return _only_input(data, signature, notes) or signature.call(
            {name: _tensor(value) for name, value in _taken(data, signature, notes).items()}
        )
    if (
        isinstance(data, tuple)
        and data
        and all(isinstance(value, _NUMBERS) for value in data)
        and not isinstance(data[0], _SCALARS)
    ):
        return Batch(_without_labels([_tensor(value) for value in data], signature))
    return None


def _only_input(data: Mapping[object, object], signature: Signature, notes: list[str]) -> Batch | None:
    """The one array, or the one beside labels, for a model of one input that has another name.

    None where it is not that.
    """
    if (
        signature.others
        or signature.required > 1
        or len(signature.inputs) != 1
        or len(data) > 2
        or any(signature.takes(str(name)) for name in data)
    ):
        return None
    tensors = _without_labels([_tensor(value) for value in data.values()], signature)
    if len(tensors) != 1:
        return None
    note = (
        f"{next(iter(data))!r} in the data is taken for the model's only input, {signature.inputs[0].name!r}"
    )
    if note not in notes:
        notes.append(note)
    return Batch(tensors)


def _taken(data: Mapping[object, object], signature: Signature, notes: list[str]) -> dict[str, object]:
    """The named values that the model takes.

    All of them where it takes too few, so that the error can say so.
    """
    named = {str(name): value for name, value in data.items()}
    taken = {name: value for name, value in named.items() if signature.takes(name)}
    if not taken:
        return named
    for name in (name for name in named if name not in taken):
        note = f"{name!r} in the data is left out: the model has no such input"
        if note not in notes:
            notes.append(note)
    return taken


def _each(data: object, signature: Signature, notes: list[str]) -> Iterator[Batch]:
    if _is_map_style(data):
        data = DataLoader(data, batch_size=_COLLATED)
    if not isinstance(data, Iterable) or isinstance(data, bytes):
        raise UsageError(f"calibration data of type {type(data).__name__} is not understood; {_ALLOWED}")
    for item in data:
        batch = _whole(tuple(item) if isinstance(item, list) else item, signature, notes)
        if batch is None:
            raise UsageError(
                f"a calibration batch of type {type(item).__name__} is not understood; {_ALLOWED}"
            )
        yield batch


def _is_map_style(data: object) -> TypeIs[Dataset[Any]]:
    """Whether it gives single samples by their index, as the data sets of torch and Hugging Face do."""
    library = type(data).__module__.partition(".")[0]
    return (isinstance(data, Dataset) and not isinstance(data, IterableDataset)) or (
        library == "datasets" and hasattr(data, "__getitem__")
    )


def _without_labels(tensors: Sequence[Tensor], signature: Signature) -> tuple[Tensor, ...]:
    """The tensors without the labels that data sets pair with an input.

    Labels are integers of at most one axis; they are left out where the model needs one input only.
    """
    labelled = (
        len(tensors) == 2
        and tensors[1].dim() <= 1
        and not tensors[1].is_floating_point()
        and tensors[0].dim() > tensors[1].dim()
    )
    return tuple(tensors[:1] if labelled and signature.required < 2 else tensors)


def _tensor(value: object) -> Tensor:
    if isinstance(value, (list, tuple, *_SCALARS)):
        value = _array(value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise UsageError(f"calibration data of type {value.dtype} is not understood; give numbers")
        value = torch.from_numpy(value if value.flags.c_contiguous else np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise UsageError(f"calibration data of type {type(value).__name__} is not understood; {_ALLOWED}")
    return value.detach().float() if value.is_floating_point() else value.detach()


def _array(value: object) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"calibration data of type {type(value).__name__} is not understood ({error}); {_ALLOWED}"
        ) from None


def _check(batch: Batch) -> None:
    if any(tensor.numel() == 0 for tensor in batch.tensors) or not batch.tensors:
        raise UsageError(
            f"inputs of shapes {[tuple(t.shape) for t in batch.tensors]} hold no number; give at least one "
            "sample"
        )
    for tensor in batch.tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidModelError("the calibration data holds NaN or infinite values; clean it first")


def _check_first_axis(batch: Batch) -> None:
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in batch.tensors}
    if len(sizes) != 1 or None in sizes:
        raise UsageError(
            f"inputs of shapes {[tuple(t.shape) for t in batch.tensors]} do not share a first axis of "
            "samples; stack samples along axis 0"
        )


def _read(path: Path) -> object:
    arrays = read_arrays(path)
    if not isinstance(arrays, dict):
        return arrays
    positional = [name for name in arrays if name.startswith("arr_")]
    return tuple(arrays[name] for name in positional) if len(positional) == len(arrays) else arrays
