"""Weights that stay in the data file beside a model and are mapped into memory only while they are read."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir

from tdpass.models.onnx.graph.graphs import all_nodes
from tdpass.models.onnx.graph.shapes import put_in_order
from tdpass.models.onnx.graph.tensors import sizes

# Every mapping that somebody still reads from, so that their pages can be let go of together.
_MAPPINGS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def map_file(descriptor: int, length: int, start: int = 0) -> mmap.mmap:
    """Part of an open file as memory that must not be written to; it outlives the descriptor."""
    mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start)
    _MAPPINGS.add(mapped)
    return mapped


def release_pages() -> None:
    """Let go of the memory that mapped files take up.

    What is read again comes from the file (or its cache) again.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapped in list(_MAPPINGS):
            mapped.madvise(mmap.MADV_DONTNEED)


def release_heap() -> None:
    """Give freed memory back to the system, where the C library can.

    Small blocks that stay between large ones keep it from doing so.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    """The C library's `malloc_trim`; only glibc has one."""
    try:
        return cast("Callable[[int], int]", ctypes.CDLL(None).malloc_trim)
    except (AttributeError, OSError, TypeError):
        return None


class DataFile:
    """An open data file: read as it was when opened, even after another file takes its name."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)

    def tensor(self, stored: ir.ExternalTensor) -> ir.LazyTensor:
        """The tensor, mapped afresh on each reading and unmapped when the reader lets go of it."""
        shape = ir.Shape(sizes(stored))
        load = partial(self._map, stored.dtype, shape, stored.offset or 0, stored.nbytes)
        return ir.LazyTensor(
            load,
            stored.dtype,
            shape,
            name=stored.name,
            doc_string=stored.doc_string,
            metadata_props=dict(stored.metadata_props),
        )

    def _map(self, dtype: ir.DataType, shape: ir.Shape, offset: int, length: int) -> ir.TensorProtocol:
        if length == 0:
            return ir.Tensor(np.empty(shape.numpy(), dtype.numpy()), dtype)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapped = map_file(self._descriptor, offset - start + length, start)
        if dtype.bitwidth < 8:
            packed = np.frombuffer(mapped, np.uint8, length, offset - start)
            return ir.PackedTensor(packed, dtype, shape=shape)
        numbers = np.frombuffer(mapped, dtype.numpy(), length // dtype.numpy().itemsize, offset - start)
        return ir.Tensor(numbers.reshape(shape.numpy()), dtype)


def model_from(proto: onnx.ModelProto, folder: Path | None) -> ir.Model:
    """The model in order, its external data in that folder; contents stay in their files.

    Raises `ValueError` for a cyclic graph.
    """
    model = ir.from_proto(proto)
    put_in_order(model)
    if folder is not None:
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            ir.external_data.set_base_dir(graph, str(folder))
    return model


def open_data_files(model: ir.Model) -> bool:
    """Let every external tensor read through an open file instead of by path.

    Returns whether there was one.
    """
    files: dict[Path, DataFile] = {}

    def opened(tensor: ir.ExternalTensor) -> ir.LazyTensor:
        path = Path(tensor.path).absolute()
        if path not in files:
            files[path] = DataFile(path)
        return files[path].tensor(tensor)

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = opened(value.const_value)
    for node in all_nodes(model):
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, opened(attribute.value))
    return bool(files)


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
