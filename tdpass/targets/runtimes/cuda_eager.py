"""cuda_eager: torch on the first CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.models.abilities import RunsAsModule
from tdpass.models.base import Batch, Model
from tdpass.ops import TorchOps
from tdpass.targets.layers import apply_layer, channels_last, example_input, weights_of
from tdpass.targets.runtimes.base import Call, Runtime, register_runtime
from tdpass.targets.runtimes.eager import placed_model


@register_runtime
class CudaEager(Runtime):
    """Eager torch on a CUDA device, channels innermost."""

    name = "cuda_eager"
    families = frozenset({"cuda"})

    def available(self) -> bool:
        return torch.cuda.is_available()

    def version(self) -> str:
        return str(torch.__version__)

    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        weights = {name: channels_last(weight.cuda()) for name, weight in weights_of(layer).items()}
        ops, x = TorchOps(), channels_last(example_input(layer, batch).cuda())
        return lambda: apply_layer(ops, layer, x, weights)

    def prepare_model(self, model: Model, batch: Batch, threads: int) -> Call | None:
        if not isinstance(model, RunsAsModule):
            return None
        module, placed = placed_model(model, batch)
        module = module.cuda()
        args, kwargs = (
            tuple(tensor.cuda() for tensor in placed.args),
            {name: tensor.cuda() for name, tensor in placed.kwargs.items()},
        )
        return lambda: module(*args, **kwargs)
