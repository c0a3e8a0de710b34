"""Models: every kind that `compress` takes, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tdpass.errors import UsageError
from tdpass.layers.attention import open_attention as open_attention
from tdpass.layers.bilinear import open_bilinear as open_bilinear
from tdpass.layers.embedding_bag import open_embedding_bags as open_embedding_bags
from tdpass.layers.factorized import Factorized as Factorized
from tdpass.layers.recurrent import OpenGRU as OpenGRU
from tdpass.layers.recurrent import OpenLSTM as OpenLSTM
from tdpass.layers.recurrent import open_recurrent as open_recurrent
from tdpass.models.base import Batch as Batch
from tdpass.models.base import Model as Model
from tdpass.models.dequantize import dequantize as dequantize
from tdpass.models.front_ends import front_end_of
from tdpass.models.torch.saving.state import load_module as load_module
from tdpass.models.torch.saving.tensor_file import check_digest as check_digest

ExampleInputs = Batch | Tensor | tuple[Tensor, ...] | dict[str, Tensor] | None


def open_model(model: object, example_inputs: ExampleInputs = None, overridable: Sequence[str] = ()) -> Model:
    """Any supported model as a `Model`; nothing is changed and, for files, little is read.

    Takes what a front end is registered for: an `nn.Module`, `fx.GraphModule`, `ExportedProgram`,
    `onnx.ModelProto`, `onnx_ir.Model`, `onnx_graphsurgeon.Graph`, or a path to `.onnx` or `.pt2`.
    `overridable`: name globs of ONNX initializers that stay inputs.  Raises `InvalidModelError` for anything
    else, `UsageError` for other files.
    """
    source = Path(model) if isinstance(model, str) else model
    return front_end_of(source).open(source, as_example(example_inputs), overridable)


def as_example(value: ExampleInputs) -> Batch | None:
    """Example inputs as a batch; raises `UsageError` for anything but tensors."""
    if value is None or isinstance(value, Batch):
        return value
    if isinstance(value, Tensor):
        return Batch((value,))
    held = value.values() if isinstance(value, dict) else value
    entries = list(held) if isinstance(value, dict | tuple | list) else [value]
    others = [type(entry).__name__ for entry in entries if not isinstance(entry, Tensor)]
    if others:
        raise UsageError(
            f"example_inputs hold a {others[0]}; give a tensor, a tuple or a dict of tensors "
            "(torch.from_numpy makes one of an array)"
        )
    return Batch((), value) if isinstance(value, dict) else Batch(tuple(entries))
