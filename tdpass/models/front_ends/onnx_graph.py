"""ONNX models of three libraries, in memory or in an `.onnx` file."""

from __future__ import annotations

from collections.abc import Sequence

from tdpass.models.base import Batch, Model
from tdpass.models.front_ends.base import FrontEnd, register_front_end

_TYPES = ("onnx.onnx_ml_pb2.ModelProto", "onnx_ir.Model", "onnx_graphsurgeon.ir.graph.Graph")


def _open(model: object, example: Batch | None, overridable: Sequence[str]) -> Model:
    from tdpass.models.onnx.model import OnnxModel  # noqa: PLC0415 - the ONNX libraries take a second, which torch models need not spend

    return OnnxModel.open(model, example, overridable)


register_front_end(FrontEnd("onnx", _open, types=_TYPES, suffixes=(".onnx",)))
