"""eager: torch, channels innermost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tdpass.formats.layer import Layer
from tdpass.models.abilities import RunsAsModule
from tdpass.models.base import Batch, Model
from tdpass.ops import TorchOps
from tdpass.targets.layers import apply_layer, channels_last, example_input, factored_module, weights_of
from tdpass.targets.runtimes.base import Call, Runtime, register_runtime


@register_runtime
class Eager(Runtime):
    """Eager torch on the CPU; images and kernels lie channels innermost, which is what it is fastest with."""

    name = "eager"
    families = frozenset({"torch"})

    def version(self) -> str:
        return str(torch.__version__)

    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        x = channels_last(example_input(layer, batch))
        if layer.form.factored or layer.form.encoded:
            return partial(factored_module(layer), x)
        weights = {name: channels_last(weight) for name, weight in weights_of(layer).items()}
        ops = TorchOps()
        return lambda: apply_layer(ops, layer, x, weights)

    def prepare_model(self, model: Model, batch: Batch, threads: int) -> Call | None:
        if not isinstance(model, RunsAsModule):
            return None
        module, placed = channels_last_model(model, batch)
        return lambda: module(*placed.args, **placed.kwargs)


def channels_last_model(model: RunsAsModule, batch: Batch) -> tuple[nn.Module, Batch]:
    """A copy of the module on the CPU, in evaluation mode, and the batch in its floating-point type.

    Both have their channels innermost.
    """
    plain = model.inference_module().cpu()
    module: nn.Module = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = next(
        (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), torch.float32
    )

    def place(tensor: Tensor) -> Tensor:
        return channels_last(tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu())

    return module, batch.map(place)
