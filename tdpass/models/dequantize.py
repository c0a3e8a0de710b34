"""Models whose weights are integers already, as models of floating-point numbers that can be compressed."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from torch import nn
from torch.fx import GraphModule

from tdpass.errors import UsageError
from tdpass.models.onnx.dequantized import dequantized
from tdpass.models.onnx.source import source_of
from tdpass.models.torch.quantized import dequantized_module


def dequantize(model: object) -> object:
    """A copy of a model with floating-point numbers in place of integers, to be factored and quantized anew.

    ONNX models with QuantizeLinear and DequantizeLinear or with QLinear operators (a path, `onnx.ModelProto`
    or `onnx_ir.Model`, given back as its kind), modules with layers of `torch.ao.nn.quantized`, and modules
    whose weights are tensors that know how to `dequantize`, as torchao's.  What is rounded on its way through
    the model is passed on as it is.  Raises `UsageError` for anything else.
    """
    if isinstance(model, nn.Module) and not isinstance(model, GraphModule):
        return dequantized_module(model)
    if isinstance(model, str | Path | onnx.ModelProto | ir.Model):
        source = source_of(model)
        made = source.model.clone()
        dequantized(made)
        return source.give_back(made)
    raise UsageError(
        f"dequantize takes an nn.Module or an ONNX model, not a {type(model).__name__}; compress the "
        "floating-point model, then quantize it"
    )
