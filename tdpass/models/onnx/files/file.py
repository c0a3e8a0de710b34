"""Reading ONNX files that may be unsound, and writing them so that no failure leaves half a model."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import onnx
import onnx_ir as ir

from tdpass.errors import InvalidModelError
from tdpass.files import folder_beside
from tdpass.models.onnx.files.bounds import check_outline
from tdpass.models.onnx.files.checks import check_proto, invalid_if_failing
from tdpass.models.onnx.files.storage import model_from, release_pages
from tdpass.models.onnx.graph.protos import drop_unused_initializers, tensor_protos

_INLINE_BELOW = 1024


def read(path: Path) -> ir.Model:
    """Load a model after checking it; external data stays on disk.  Raises `InvalidModelError`."""
    path = path.absolute()
    if not path.is_file():
        raise InvalidModelError(f"{str(path)!r} is not a file; give the path of an .onnx file")
    check_outline(path)
    what, hint = f"{str(path)!r} cannot be read", "the file is damaged or not ONNX; export the model again"
    with invalid_if_failing(what, hint):
        proto = onnx.load(path, load_external_data=False)
    check_proto(proto, path)
    drop_unused_initializers(proto.graph)
    with invalid_if_failing(what, hint):
        return model_from(proto, path.parent)


def write(model: ir.Model, path: Path, external: bool) -> list[Path]:
    """Write the model; with `external` its large weights go to a data file beside it.

    Everything is written under temporary names in the target folder, flushed and renamed: the data file
    first, under a name that nothing has, then the model.  A failure at any moment leaves what was there
    whole.  Returns the data files that only the previous model at that path used, by their names.
    """
    path = path.absolute()
    obsolete = _data_files(path)
    data = _free_name(path) if external else None
    with folder_beside(path) as folder:
        ir.save(
            model,
            folder / path.name,
            external_data=data,
            size_threshold_bytes=_INLINE_BELOW,
            callback=lambda *_: release_pages(),
        )
        release_pages()
        if data is not None and (folder / data).stat().st_size:
            _flush(folder / data)
            (folder / data).replace(path.parent / data)
        _flush(folder / path.name)
        (folder / path.name).replace(path)
    return obsolete


def remove_obsolete(files: list[Path]) -> None:
    """Delete data files that no model uses; readers that have them open keep their contents."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _free_name(path: Path) -> str:
    name, number = f"{path.name}.data", 1
    while (path.parent / name).exists():
        number += 1
        name = f"{path.name}.{number}.data"
    return name


def _data_files(path: Path) -> list[Path]:
    """Data files of the model now at `path` that are named after it, as those are that `write` makes."""
    if not path.is_file():
        return []
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception:  # noqa: BLE001 - whatever is there is no model whose data could be tidied up
        return []
    tensors = [tensor for tensor in tensor_protos(proto) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    locations = {
        entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"
    }
    return sorted(
        path.parent / name
        for name in locations
        if name.startswith(f"{path.name}.") and name.endswith(".data") and os.sep not in name
    )
