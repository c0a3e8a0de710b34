"""ONNX models of three libraries, in memory or in an `.onnx` file."""

from __future__ import annotations

from collections.abc import Sequence

from tdpass.models.base import Batch, Model
from tdpass.models.front_ends.base import FrontEnd, register_front_end

_TYPES = ("onnx.onnx_ml_pb2.ModelProto", "onnx_ir.Model", "onnx_graphsurgeon.ir.graph.Graph")


def _open(model: object, example: Batch | None, overridable: Sequence[str]) -> Model:
    # the ONNX libraries take a second, which torch models need not spend
    from tdpass.models.onnx.model import OnnxModel  # noqa: PLC0415

    return OnnxModel.open(model, example, overridable)


def _dequantized(model: object) -> object:
    from tdpass.models.onnx.files.source import source_of  # noqa: PLC0415 - as above
    from tdpass.models.onnx.rewriting.dequantized import dequantized  # noqa: PLC0415 - as above

    source = source_of(model)
    made = source.model.clone()
    dequantized(made)
    return source.give_back(made)


register_front_end(FrontEnd("onnx", _open, types=_TYPES, suffixes=(".onnx",), dequantized=_dequantized))
