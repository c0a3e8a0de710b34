"""Calibration data of many kinds as batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.base import Batch

_ALLOWED = "give a tensor, an array, a dict by input name, an .npz or .npy file, or an iterable of batches (as a DataLoader is)"


def as_batches(data: object, samples: int = 512, batch_size: int = 64) -> list[Batch]:
    """Up to `samples` samples of calibration data as batches of at most `batch_size`.

    A tensor or array is the one input; a dict holds inputs by name; a tuple of tensors holds positional inputs; an iterable
    yields any of these, where a pair of a tensor and a one-axis integer tensor is read as (input, labels).  Integers stay
    integers, floats become float32.  Raises `UsageError` for anything else, `InvalidModelError` for a file that cannot be read
    or values that are not finite.
    """
    if samples < 1 or batch_size < 1:
        raise UsageError(f"samples={samples} and batch_size={batch_size} must be at least 1")
    if isinstance(data, str | Path):
        data = _read(Path(data))
    whole = _whole(data)
    batches: list[Batch] = []
    left = samples
    for batch in [whole] if whole is not None else _each(data):
        _check(batch)
        for part in _split(batch, min(left, batch.size), batch_size):
            batches.append(part)
            left -= part.size
        if left <= 0:
            break
    if not batches:
        raise UsageError("the calibration data is empty; " + _ALLOWED)
    return batches


def _whole(data: object) -> Batch | None:
    if isinstance(data, Batch):
        return data
    if isinstance(data, Tensor | np.ndarray):
        return Batch((_tensor(data),))
    if isinstance(data, Mapping):
        return Batch((), {str(name): _tensor(value) for name, value in data.items()})
    if isinstance(data, tuple) and data and all(isinstance(value, Tensor | np.ndarray) for value in data):
        return Batch(_without_labels(data))
    return None


def _each(data: object) -> Iterable[Batch]:
    if not isinstance(data, Iterable) or isinstance(data, bytes):
        raise UsageError(f"calibration data of type {type(data).__name__} is not understood; {_ALLOWED}")
    for item in data:
        batch = _whole(tuple(item) if isinstance(item, list) else item)
        if batch is None:
            raise UsageError(f"a calibration batch of type {type(item).__name__} is not understood; {_ALLOWED}")
        yield batch


def _without_labels(values: Sequence[object]) -> tuple[Tensor, ...]:
    tensors = tuple(_tensor(value) for value in values)
    labelled = len(tensors) == 2 and tensors[1].dim() == 1 and not tensors[1].is_floating_point() and tensors[0].dim() > 1
    return tensors[:1] if labelled else tensors


def _tensor(value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise UsageError(f"calibration data of type {value.dtype} is not understood; give numbers")
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise UsageError(f"calibration data of type {type(value).__name__} is not understood; {_ALLOWED}")
    return value.detach().float() if value.is_floating_point() else value.detach()


def _check(batch: Batch) -> None:
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in batch.tensors}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise UsageError(f"inputs of shapes {[tuple(t.shape) for t in batch.tensors]} do not share a first axis of samples; stack samples along axis 0")
    for tensor in batch.tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidModelError("the calibration data holds NaN or infinite values; clean it first")


def _split(batch: Batch, samples: int, batch_size: int) -> Iterable[Batch]:
    for start in range(0, samples, batch_size):
        stop = min(start + batch_size, samples)
        yield Batch(tuple(t[start:stop] for t in batch.args), {name: t[start:stop] for name, t in batch.kwargs.items()})


def _read(path: Path) -> object:
    if path.suffix not in (".npz", ".npy"):
        raise UsageError(f"cannot read {path.name!r} as calibration data; give an .npz or .npy file")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidModelError(f"cannot read calibration data from {path}: {error}; write it with numpy.savez") from None
    positional = [name for name in arrays if name.startswith("arr_")]
    if len(positional) == len(arrays):
        return tuple(arrays[name] for name in positional)
    return arrays
