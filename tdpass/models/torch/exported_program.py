"""Exported programs: unpacked into modules, rewritten, and exported again with the same dynamic shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten, tree_unflatten

from tdpass.errors import InvalidModelError, UsageError
from tdpass.files import replacing
from tdpass.models.base import Batch, Model
from tdpass.models.signature import Dims, Input, Signature
from tdpass.models.torch.graphs.lift import lift
from tdpass.models.torch.graphs.quantized_graph import dequantized_graph
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.saving.program_archive import broken, plain_archive
from tdpass.packing import StoredSize


class ExportedModel(TorchModel):
    """An `ExportedProgram`; training mode was fixed when it was exported and stays so."""

    frontend = "torch.export"
    suffix = ".pt2"

    def __init__(self, program: ExportedProgram, example: Batch | None = None) -> None:
        self.program = program
        graph_module = program.module()
        assert isinstance(graph_module, GraphModule)
        super().__init__(lift(graph_module), example or _example(program))

    def unwrap(self) -> ExportedProgram:
        return exported_again(self.module, self.program)

    def signature(self) -> Signature:
        return Signature(tuple(_inputs(self.program)), tuple(_outputs(self.program)))

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        if path.suffix != ".pt2":
            raise UsageError(f"cannot save an exported program as {path.name!r}; name a .pt2 file")
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.export.save(self.unwrap(), file, extra_files=dict(metadata))

    def stored(self, path: Path) -> StoredSize | None:
        return None  # a program's tensors are not packed

    def reader(self) -> Callable[[Path], Model | None]:
        return lambda path: ExportedModel(load_program(path))


def exported_again(module: nn.Module, program: ExportedProgram) -> ExportedProgram:
    """A program of another module that is called as this one, with its example and its dynamic shapes.

    Raises `InvalidModelError` where the program carries no example, and where the module cannot be exported.
    """
    if program.example_inputs is None:
        raise InvalidModelError(
            "the exported program carries no example inputs, so it cannot be exported again; save it "
            "with them"
        )
    args, kwargs = program.example_inputs
    shapes = _dynamic_shapes(program)
    try:
        return torch.export.export(module, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise InvalidModelError(
            f"the rewritten program could not be exported again: {str(error).splitlines()[0]}"
        ) from error


def dequantized_program(program: ExportedProgram) -> ExportedProgram:
    """The program with floating-point numbers in place of integers; raises as `exported_again` does."""
    graph_module = program.module()
    assert isinstance(graph_module, GraphModule)
    return exported_again(dequantized_graph(graph_module), program)


def load_program(path: Path, trust: bool = False) -> ExportedProgram:
    """Read a `.pt2` file.

    Raises `InvalidModelError` when it is missing or damaged, and unless you `trust` it when loading could run
    code.
    """
    if not path.is_file():
        raise InvalidModelError(f"there is no file {path}; give a .pt2 file written by torch.export.save")
    source = path if trust else plain_archive(path)
    try:
        return torch.export.load(source)
    except Exception as error:  # noqa: BLE001 - a damaged archive fails in any of a dozen ways
        raise broken(path, error) from None


def _example(program: ExportedProgram) -> Batch | None:
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    if not all(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        return None
    return Batch(tuple(args), dict(kwargs))


def _inputs(program: ExportedProgram) -> Iterator[Input]:
    placeholders = {
        node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"
    }
    names = program.graph_signature.user_inputs
    args, _ = tree_unflatten(list(names), program.call_spec.in_spec)
    for name in names:
        value = placeholders.get(name) if isinstance(name, str) else None
        known = Input(str(name), positional=name in args)
        yield (
            replace(known, dtype=value.dtype, dims=_sizes(value))
            if isinstance(value, torch.Tensor)
            else known
        )


def _outputs(program: ExportedProgram) -> Iterator[Dims | None]:
    made = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for name in program.graph_signature.user_outputs:
        value = made.get(name) if isinstance(name, str) else None
        yield _sizes(value) if isinstance(value, torch.Tensor) else None


def _sizes(value: torch.Tensor) -> Dims:
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def _dynamic_shapes(program: ExportedProgram) -> Any:
    """The dynamic axes of every input, read off the program's placeholders."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    dims: dict[str, Any] = {}

    def axis(size: Any) -> Any:
        if isinstance(size, int):
            return Dim.STATIC
        symbol = size.node.expr
        if not symbol.is_symbol:
            return Dim.AUTO
        if symbol not in dims:
            limits = program.range_constraints.get(symbol)
            low = max(0, int(limits.lower)) if limits is not None else 0
            high = int(limits.upper) if limits is not None and limits.upper < 2**31 else None
            dims[symbol] = Dim(f"dim_{symbol}", min=low, max=high)
        return dims[symbol]

    leaves: list[Any] = []
    for name in program.graph_signature.user_inputs:
        value = placeholders[name].meta.get("val") if isinstance(name, str) and name in placeholders else None
        leaves.append(
            {position: axis(size) for position, size in enumerate(value.shape)}
            if isinstance(value, torch.Tensor)
            else None
        )
    _, spec = tree_flatten(program.example_inputs)
    args, kwargs = tree_unflatten(leaves, spec)
    return (
        {**dict(zip(_argument_names(program.module()), args, strict=False)), **kwargs}
        if kwargs
        else tuple(args)
    )


def _argument_names(module: nn.Module) -> list[str]:
    return [node.name for node in module.graph.nodes if node.op == "placeholder"]  # type: ignore[union-attr]
