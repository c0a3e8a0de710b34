"""What a module takes and holds: its inputs and their types, and whether its tensors have values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tdpass.errors import InvalidModelError, UnsupportedError
from tdpass.models.base import Batch
from tdpass.models.signature import Input, Signature
from tdpass.models.torch.modules.quantized import is_foreign


def check_open(module: nn.Module) -> None:
    """Raise `UnsupportedError` for compiled code, `InvalidModelError` for parameters without a shape."""
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            "the layers of a ScriptModule are compiled and cannot be replaced; give the nn.Module that it "
            "was made from"
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise InvalidModelError(
                f"{name!r} has no shape yet, as it belongs to a lazy module; run the model once on a batch, "
                "then compress it"
            )


def check_filled(module: nn.Module) -> None:
    """Raise `InvalidModelError` for tensors on the meta device."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise InvalidModelError(
                f"{name!r} is on the meta device and has no values; call to_empty(device='cpu') and load "
                "its weights first"
            )


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo what calls of a module write into its buffers, or put in their place.

    These are counters, caches, and tables made at the first call.
    """
    # a scripted module's table of them is no dict, and nothing can be put into it
    before = [
        (part._buffers, dict(part._buffers)) for part in module.modules() if isinstance(part._buffers, dict)
    ]
    held = [buffer for buffer in module.buffers() if not (buffer.is_meta or buffer.is_inference())]
    values = [buffer.detach().clone() for buffer in held]
    try:
        yield
    finally:
        for buffers, own in before:
            buffers.clear()
            buffers.update(own)
        with torch.no_grad():
            for buffer, value in zip(held, values, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def input_types(module: nn.Module, batch: Batch) -> list[torch.dtype]:
    """Floating-point types that the module may want its inputs in, likely ones first.

    Empty where nothing speaks for one. Those of its parameters in the order of registration; where they are
    of several types, that of the data as well.
    """
    types = list(
        dict.fromkeys(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    )
    if len(types) > 1:
        types += [
            tensor.dtype
            for tensor in batch.tensors
            if tensor.is_floating_point() and tensor.dtype not in types
        ][:1]
    return types


def check_finite(module: nn.Module) -> None:
    """Raise `InvalidModelError` where a parameter is not finite, or a buffer holds NaN."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta or is_foreign(parameter):
            continue
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise InvalidModelError(
                f"parameter {name!r} holds NaN or infinite values; the model cannot be compressed"
            )
    for name, buffer in module.named_buffers():
        if not buffer.is_meta and bool(torch.isnan(buffer).any()):  # an infinite one may be a mask
            raise InvalidModelError(f"buffer {name!r} holds NaN; re-estimate or load it before compressing")


def signature_of(module: nn.Module) -> Signature:
    """What the module's forward takes."""
    given = inspect.signature(module.forward).parameters.values()
    named = [entry for entry in given if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)]
    return Signature(
        tuple(Input(entry.name, required=entry.default is entry.empty) for entry in named),
        others=len(named) < len(given),
    )


def version_of(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes with any parameter or buffer."""
    tensors = (*module.parameters(), *module.buffers())
    return tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
