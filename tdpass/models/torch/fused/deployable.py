"""Torch models as they are compiled ahead of time: factored layers as calls of the fused operators."""

from __future__ import annotations

import copy
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.formats.lowering import Lowered, chain_of
from tdpass.kernels import native
from tdpass.kernels.conv_chain import CONV_CHAIN, packing
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import Lanes
from tdpass.kernels.tensor_chain import TENSOR_CHAIN
from tdpass.kernels.weight_only import WEIGHT_ONLY_LINEAR
from tdpass.layers.contracted import Contracted
from tdpass.layers.derived import Tensors
from tdpass.layers.float_chain import FloatChain
from tdpass.layers.fused import Fused
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.level_conv import LevelConv
from tdpass.layers.one_operator import OneOperator
from tdpass.layers.sparse import SparseLayer
from tdpass.layers.weight_only import WeightOnly
from tdpass.models.base import Batch
from tdpass.models.torch.fused.integer_graph import (
    is_integer_chain,
    join_integers,
    lay_channels_innermost,
    pack_integers,
)


class FusedLayer(nn.Module):
    """A factored layer for inference: the fused operator on packed factors.

    The factors are buffers, and nothing takes Python to run.
    """

    def __init__(self, dense: Fused | OneOperator, lowered: Lowered) -> None:
        super().__init__()
        self.axes = lowered.axes
        self.integers, self.widths = lowered.integers, lowered.widths
        self.activation = dense.activation
        self.lanes: Lanes = "pixels" if isinstance(dense, Fused) and dense.lanes == "pixels" else "channels"
        if not isinstance(dense, Fused):
            self.lanes = lowered.lanes
        self.lanes = packing(self.lanes, dense.layer().dtype)
        self.padding_mode, self.pads = dense.padding_mode, dense.pads
        self.packed = [f"packed_{index}" for index in range(len(lowered.stages))]
        for name, packed in zip(self.packed, lowered.pack(dense.layer(), self.lanes), strict=True):
            self.register_buffer(name, packed)
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().float())

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.pads:
            x = F.pad(x, self.pads, mode=self.padding_mode)
        weights = [getattr(self, name) for name in self.packed]
        if not self.axes:
            return LINEAR_CHAIN.call(x, weights, self.bias, None, self.widths, self.activation)  # type: ignore[no-any-return]
        y = CONV_CHAIN.call(
            x.unsqueeze(2) if self.axes == 1 else x,
            weights,
            self.bias,
            None,
            self.integers,
            self.activation,
            self.lanes,
        )
        return y.squeeze(2) if self.axes == 1 else y  # type: ignore[no-any-return]


class Packed(nn.Module, ABC):
    """A layer for inference: its operator on what is packed of it, which buffers hold."""

    def __init__(self, dense: OneOperator, packed: Sequence[Tensor]) -> None:
        super().__init__()
        self.activation = dense.activation
        self.names = [f"packed_{index}" for index in range(len(packed))]
        for name, tensor in zip(self.names, packed, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach())

    bias: Tensor | None

    @abstractmethod
    def called(self, x: Tensor, packed: list[Tensor]) -> Tensor:
        """The operator on this input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x, [getattr(self, name) for name in self.names])


class PackedWeights(Packed):
    """A layer of whole numbers of few bits, by codes and scales."""

    def __init__(self, dense: WeightOnly) -> None:
        super().__init__(dense, dense.packed())
        self.widths = dense.widths

    def called(self, x: Tensor, packed: list[Tensor]) -> Tensor:
        y: Tensor = WEIGHT_ONLY_LINEAR.call(
            x, packed[::2], packed[1::2], self.bias, None, self.widths, self.activation
        )
        return y


class PackedCores(Packed):
    """A linear layer of small cores, by these."""

    def __init__(self, dense: Contracted) -> None:
        cores, steps = dense.packed()
        super().__init__(dense, cores)
        self.steps = steps

    def called(self, x: Tensor, packed: list[Tensor]) -> Tensor:
        y: Tensor = TENSOR_CHAIN.call(x, packed, self.bias, None, self.steps, self.activation)
        return y


class PackedImage(Packed):
    """A layer that is called as an operator on images, by what is packed of its weight."""

    def __init__(self, dense: SparseLayer | LevelConv, packed: Tensors) -> None:
        super().__init__(dense, packed)
        self.call = dense.called

    def called(self, x: Tensor, packed: list[Tensor]) -> Tensor:
        return self.call(x, packed, self.bias, self.activation)


class PackedSparse(PackedImage):
    """A layer of mostly zeros, by the weights that it keeps."""

    def __init__(self, dense: SparseLayer) -> None:
        super().__init__(dense, dense.packed(dense.site.out_positions))


class PackedLevels(PackedImage):
    """A convolution of levels, by codes and levels."""

    def __init__(self, dense: LevelConv) -> None:
        super().__init__(dense, dense.packed())


def fused(module: nn.Module) -> tuple[nn.Module, int]:
    """A copy for inference on the CPU, and how many layers run fused.

    Those are the layers that are one operator already, as `fuse_layers` chooses them.  Layers of int8 factors
    that read integers are called by what they store until `export_program` packs them.
    """
    twin = copy.deepcopy(module).cpu()
    for child in twin.modules():
        child.training = False
    made: dict[int, nn.Module] = {}
    for name, layer in list(twin.named_modules(remove_duplicate=False)):
        new = made.get(id(layer)) or _packed_layer(layer)
        if new is None:
            continue
        made[id(layer)] = new
        owner, _, leaf = name.rpartition(".")
        if not name:
            return new, 1
        setattr(twin.get_submodule(owner), leaf, new)
    return twin, len(made)


def _packed_layer(layer: nn.Module) -> nn.Module | None:
    """A layer that is one operator as a call of it that needs no Python; None where it stays as it is."""
    if not isinstance(layer, Fused | OneOperator) or layer.layer().dtype not in native.DTYPES:
        return None
    if isinstance(layer, WeightOnly):
        return PackedWeights(layer)
    if isinstance(layer, Contracted):
        return PackedCores(layer)
    if isinstance(layer, SparseLayer):
        return PackedSparse(layer)
    if isinstance(layer, LevelConv):
        return PackedLevels(layer)
    if isinstance(layer, IntegerChain):
        return layer
    chosen = isinstance(layer, FloatChain) or (isinstance(layer, Fused) and layer.lanes is not None)
    lowered = chain_of(layer.layer()) if chosen else None
    return None if lowered is None else FusedLayer(layer, lowered)


def export_program(module: nn.Module, example: Batch, dynamic_batch: bool) -> ExportedProgram:
    """Export for inference, integer chains joined and packed.

    Raises `InvalidModelError` where torch cannot, with what it said.
    """
    with _exporting(dynamic_batch):
        program = _exported(module, example, dynamic_batch)
        if not any(map(is_integer_chain, program.graph.nodes)):
            return program
        whole = _joined(program)
        lay_channels_innermost(whole.graph)
        pack_integers(whole)
        return _exported(whole, example, dynamic_batch)


def joined_program(module: nn.Module, example: Batch) -> GraphModule:
    """The graph of a module for inference, its integer chains joined, but not packed.

    Raises `InvalidModelError` where torch cannot export it, with what it said.
    """
    with _exporting(dynamic_batch=False):
        return _joined(_exported(module, example, dynamic_batch=False))


def _exported(module: nn.Module, example: Batch, dynamic_batch: bool) -> ExportedProgram:
    shapes = dynamic_shapes(example) if dynamic_batch else None
    return torch.export.export(
        module, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=False
    )


def _joined(program: ExportedProgram) -> GraphModule:
    whole = program.module()
    join_integers(whole.graph)
    return whole


@contextmanager
def _exporting(dynamic_batch: bool) -> Iterator[None]:
    try:
        with torch.no_grad(), _quiet():
            yield
    except Exception as error:
        raise _refused("be exported", error, dynamic_batch) from error


def export_onnx(
    module: nn.Module, example: Batch, dynamic_batch: bool, path: Path, *, optimize: bool = True
) -> None:
    """Write a model in evaluation mode as ONNX in standard operators.

    Batch-norms are folded where it is optimized. Raises `UnsupportedError` without onnxscript,
    `InvalidModelError` where torch cannot.
    """
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                example.args,
                kwargs=dict(example.kwargs),
                dynamo=True,
                verbose=False,
                optimize=optimize,
                dynamic_shapes=dynamic_shapes(example) if dynamic_batch else None,
            )
            assert program is not None
            program.save(path)
    except ImportError as error:
        raise UnsupportedError(
            f"writing ONNX takes a package that is not installed: {error.name}; run `pip install onnxscript`"
        ) from error
    except Exception as error:
        raise _refused("be written as ONNX", error, dynamic_batch) from error


def compile_package(program: ExportedProgram, path: Path) -> None:
    """Compile ahead of time to a `.pt2` package.

    Raises `InvalidModelError` where AOTInductor cannot, with what it said.
    """
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415 - takes long to import

    try:
        with _quiet():
            aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        raise _refused("be compiled ahead of time", error, dynamic_batch=False) from error


def load_package(path: Path) -> Callable[..., Any]:
    """A compiled package as a function of the model's inputs.

    Raises `InvalidModelError` where it is damaged.
    """
    from torch._inductor import aoti_load_package  # noqa: PLC0415 - takes long to import

    try:
        with _quiet():
            return aoti_load_package(str(path))
    except Exception as error:
        raise InvalidModelError(
            f"{path} is no compiled package that loads here: {_first_line(error)}; write it with "
            "tdpass.deploy"
        ) from error


def dynamic_shapes(example: Batch) -> tuple[dict[int, Any] | None, ...]:
    """The first axis of every input as one dynamic size.

    Positional inputs come first, as torch takes them.
    """
    batch = Dim("batch", min=1)
    return tuple({0: batch} if tensor.dim() else None for tensor in example.tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch warns about and logs within itself is nothing that a user can act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _refused(what: str, error: Exception, dynamic_batch: bool) -> InvalidModelError:
    hint = "try it without dynamic_batch, or see" if dynamic_batch else "see"
    return InvalidModelError(
        f"the model cannot {what}: {type(error).__name__}: {_first_line(error)}; {hint} what torch.export "
        "asks of a model"
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
