"""Exported programs of torch.export, in memory or in a `.pt2` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.export import ExportedProgram

from tdpass.models.base import Batch, Model
from tdpass.models.front_ends.base import FrontEnd, register_front_end
from tdpass.models.torch.exported_program import ExportedModel, dequantized_program, load_program


def _open(model: object, example: Batch | None, _overridable: Sequence[str]) -> Model:
    program = load_program(model) if isinstance(model, Path) else model
    assert isinstance(program, ExportedProgram)
    return ExportedModel(program, example)


def _dequantized(model: object) -> object:
    program = load_program(model) if isinstance(model, Path) else model
    assert isinstance(program, ExportedProgram)
    return dequantized_program(program)


register_front_end(
    FrontEnd(
        "torch.export", _open, types=(ExportedProgram,), suffixes=(".pt2",),
        trusted=lambda path: load_program(path, trust=True), dequantized=_dequantized,
    )
)  # fmt: skip
