"""Models whose weights are integers already, as models of floating-point numbers that can be compressed."""

from __future__ import annotations

from pathlib import Path

from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.front_ends import front_end_of


def dequantize(model: object) -> object:
    """A copy of a model with floating-point numbers in place of integers, to be factored and quantized anew.

    ONNX models with QuantizeLinear and DequantizeLinear, with QLinear operators or with products that make
    bytes in every call (a path, `onnx.ModelProto` or `onnx_ir.Model`, given back as its kind), modules with
    layers of `torch.ao.nn.quantized`, modules whose weights are tensors that know how to `dequantize`, as
    torchao's, and graphs and exported programs with nodes that quantize and dequantize, as PT2E converts
    them.  What is rounded on its way through the model is passed on as it is.  Raises `UsageError` for
    anything else.
    """
    source = Path(model) if isinstance(model, str) else model
    try:
        made = front_end_of(source).dequantized
    except InvalidModelError:
        made = None
    if made is None:
        raise UsageError(
            "dequantize takes an nn.Module, an exported program or an ONNX model, not a "
            f"{type(model).__name__}; compress the "
            "floating-point model, then quantize it"
        )
    return made(source)
