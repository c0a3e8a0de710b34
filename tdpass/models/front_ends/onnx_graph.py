"""ONNX models of three libraries, in memory or in an `.onnx` file."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from tdpass.models.front_ends.base import FrontEnd, register_front_end
from tdpass.models.onnx.model import OnnxModel

_TYPES = (onnx.ModelProto, ir.Model, "onnx_graphsurgeon.ir.graph.Graph")

register_front_end(FrontEnd("onnx", OnnxModel.open, types=_TYPES, suffixes=(".onnx",)))
