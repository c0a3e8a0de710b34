"""Front ends: every kind of model that `compress` takes, behind one protocol."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from tdpass.errors import InvalidModelError, UsageError
from tdpass.layers.factorized import Factorized as Factorized
from tdpass.layers.recurrent import OpenGRU as OpenGRU
from tdpass.layers.recurrent import OpenLSTM as OpenLSTM
from tdpass.layers.recurrent import open_recurrent as open_recurrent
from tdpass.models.base import Batch as Batch
from tdpass.models.base import Model as Model
from tdpass.models.onnx.model import OnnxModel, is_onnx
from tdpass.models.torch.exported_program import ExportedModel
from tdpass.models.torch.exported_program import load_program as load_program
from tdpass.models.torch.lift import lift
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.state import check_digest as check_digest
from tdpass.models.torch.state import load_module as load_module

ExampleInputs = Batch | Tensor | tuple[Tensor, ...] | dict[str, Tensor] | None


def open_model(model: object, example_inputs: ExampleInputs = None, overridable: Sequence[str] = ()) -> Model:
    """Any supported model as a `Model`; nothing is changed and, for files, little is read.

    Takes an `nn.Module`, `fx.GraphModule`, `ExportedProgram`, `onnx.ModelProto`, `onnx_ir.Model`,
    `onnx_graphsurgeon.Graph`, or a path to `.onnx` or `.pt2`.
    `overridable`: name globs of ONNX initializers that stay inputs.  Raises `InvalidModelError` for anything else.
    """
    example = as_example(example_inputs)
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix == ".pt2":
            return ExportedModel(load_program(path), example)
        if path.suffix == ".onnx":
            return OnnxModel.open(path, example, overridable)
        raise UsageError(f"cannot read {path.name!r} as a model; give a .onnx or .pt2 file, or a torch model")
    if isinstance(model, ExportedProgram):
        return ExportedModel(model, example)
    if isinstance(model, GraphModule):
        return TorchModel(lift(copy.deepcopy(model)), example)
    if isinstance(model, nn.Module):
        return TorchModel(model, example)
    if is_onnx(model):
        return OnnxModel.open(model, example, overridable)
    raise InvalidModelError(
        f"cannot compress a {type(model).__module__}.{type(model).__name__}; give an nn.Module, fx.GraphModule, ExportedProgram, "
        "onnx.ModelProto, onnx_ir.Model, onnx_graphsurgeon.Graph, or a path to .onnx or .pt2"
    )


def as_example(value: ExampleInputs) -> Batch | None:
    """Example inputs as a batch; raises `UsageError` for anything but tensors."""
    if value is None or isinstance(value, Batch):
        return value
    if isinstance(value, Tensor):
        return Batch((value,))
    entries = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, tuple | list) else [value]
    others = [type(entry).__name__ for entry in entries if not isinstance(entry, Tensor)]
    if others:
        raise UsageError(f"example_inputs hold a {others[0]}; give a tensor, a tuple or a dict of tensors (torch.from_numpy makes one of an array)")
    return Batch((), value) if isinstance(value, dict) else Batch(tuple(entries))

