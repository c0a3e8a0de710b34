"""What kinds of ONNX models come in, and how a result is given back as the kind that it was made from."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from tdpass.errors import InvalidModelError
from tdpass.models.onnx.files.checks import check_proto, check_structure, invalid_if_failing
from tdpass.models.onnx.files.file import read
from tdpass.models.onnx.files.storage import model_from

_GRAPHSURGEON = "onnx_graphsurgeon"


@dataclass(frozen=True)
class Source:
    """The model that came in.

    `give_back` makes a rewritten one its kind, `owned` says that nobody else reads its data files.
    """

    model: ir.Model
    give_back: Callable[[ir.Model], object]
    owned: bool = False


def source_of(given: object) -> Source:
    """Reads a path, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`.

    Raises `InvalidModelError` for others and unsound ones.
    """
    if isinstance(given, str | Path):
        return Source(read(Path(given)), ir.Model.clone, owned=True)
    if isinstance(given, onnx.ModelProto):
        return Source(_read_proto(given), ir.to_proto)
    if isinstance(given, ir.Model):
        check_structure(given, "see that it was built or changed correctly")
        return Source(given, ir.Model.clone)
    if type(given).__module__.partition(".")[0] == _GRAPHSURGEON:
        surgeon = importlib.import_module(_GRAPHSURGEON)
        with invalid_if_failing("the graphsurgeon graph cannot be exported", "see that it is complete"):
            proto = surgeon.export_onnx(given)
        return Source(_read_proto(proto), lambda model: surgeon.import_onnx(ir.to_proto(model)))
    raise InvalidModelError(
        f"{type(given).__name__} is no ONNX model; give a path, an onnx.ModelProto, an onnx_ir.Model or an "
        "onnx_graphsurgeon.Graph"
    )


def _read_proto(proto: onnx.ModelProto) -> ir.Model:
    check_proto(proto)
    with invalid_if_failing("the model cannot be read", "export it again"):
        return model_from(proto, None)
