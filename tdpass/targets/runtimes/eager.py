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
from tdpass.targets.runtimes.base import Call, Runtime, a_few_calls, register_runtime


@register_runtime
class Eager(Runtime):
    """Eager torch on the CPU.

    Images and kernels of layers lie channels innermost, which is what it is fastest with; a whole model is run
    so and as it is, whichever is faster.
    """

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
        placed = [placed_model(model, batch)]
        if any(parameter.dim() == 4 for parameter in placed[0][0].parameters()):  # else the layouts are one
            placed.append(placed_model(model, batch, innermost=False))
        calls = [partial(module, *each.args, **each.kwargs) for module, each in placed]
        with torch.no_grad():
            return min(calls, key=a_few_calls)


def placed_model(model: RunsAsModule, batch: Batch, innermost: bool = True) -> tuple[nn.Module, Batch]:
    """A copy of the module on the CPU, in evaluation mode, and the batch in its floating-point type.

    Both have their channels innermost, or the batch lies in order and the module as it is.
    """
    module = model.inference_module().cpu()
    if innermost:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = next(
        (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), torch.float32
    )

    def place(tensor: Tensor) -> Tensor:
        moved = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
        return channels_last(moved) if innermost else moved.contiguous()

    return module, batch.map(place)
