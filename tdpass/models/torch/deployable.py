"""Torch models in the form in which they are compiled ahead of time: factored layers as calls of the fused operators."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.formats.lowering import Lowered, lower
from tdpass.kernels import native
from tdpass.kernels.conv_chain import CONV_CHAIN, packing
from tdpass.kernels.linear_chain import LINEAR_CHAIN
from tdpass.kernels.stage import Lanes
from tdpass.layers.factorized import Factorized
from tdpass.layers.fused import Fused
from tdpass.models.base import Batch


class FusedLayer(nn.Module):
    """A factored layer for inference: the fused operator on packed factors, which are buffers, and nothing that takes Python to run."""

    def __init__(self, dense: Factorized, lowered: Lowered) -> None:
        super().__init__()
        self.axes = lowered.axes
        self.integers, self.widths = lowered.integers, lowered.widths
        self.activation = dense.activation if isinstance(dense, Fused) else "identity"
        self.lanes: Lanes = "pixels" if isinstance(dense, Fused) and dense.lanes == "pixels" else "channels"
        if not isinstance(dense, Fused):
            self.lanes = lowered.lanes
        self.lanes = packing(self.lanes, next(iter(dense.factors().values())).dtype)
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


def fused(module: nn.Module) -> tuple[nn.Module, int]:
    """A copy for inference on the CPU, and how many layers run fused.

    A factored layer stays as it is where its format is no chain, its type none that the kernels compute in,
    or where it was fused before and found to be slower so.
    """
    twin = copy.deepcopy(module).cpu()
    for child in twin.modules():
        child.training = False
    made: dict[int, FusedLayer] = {}
    for name, layer in list(twin.named_modules(remove_duplicate=False)):
        if not isinstance(layer, Factorized) or (isinstance(layer, Fused) and layer.lanes is None):
            continue
        lowered = lower(layer.layer())
        if lowered is None or any(value.dtype not in native.DTYPES for value in layer.factors().values()):
            continue
        new = made.setdefault(id(layer), FusedLayer(layer, lowered))
        owner, _, leaf = name.rpartition(".")
        if not name:
            return new, 1
        setattr(twin.get_submodule(owner), leaf, new)
    return twin, len(made)


def export_program(module: nn.Module, example: Batch, dynamic_batch: bool) -> ExportedProgram:
    """Export for inference; raises `InvalidModelError` where torch cannot, with what it said."""
    args, kwargs = example.args, dict(example.kwargs)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes(example) if dynamic_batch else None,
                strict=False,
            )
    except Exception as error:
        raise _refused("be exported", error, dynamic_batch) from error


def export_onnx(
    module: nn.Module, example: Batch, dynamic_batch: bool, path: Path, *, optimize: bool = True
) -> None:
    """Write a model in evaluation mode as ONNX in standard operators, batch-norms folded where it is optimized.

    Raises `UnsupportedError` without onnxscript, `InvalidModelError` where torch cannot.
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
