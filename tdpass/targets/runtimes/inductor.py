"""inductor: torch.compile, with the weights as constants."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.formats.layer import Layer
from tdpass.models.abilities import RunsAsModule
from tdpass.models.base import Batch, Model
from tdpass.targets.layers import LayerModule, channels_last, example_input
from tdpass.targets.runtimes.base import Call, Runtime, a_few_calls, register_runtime
from tdpass.targets.runtimes.eager import placed_model

_OPTIONS: dict[str, Any] = {}
if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
    # all layers share one forward function, and compiled code is dropped after a few versions of a function
    _OPTIONS["isolate_recompiles"] = True


@register_runtime
class Inductor(Runtime):
    """torch.compile on the CPU; every layer takes seconds to compile."""

    name = "inductor"
    families = frozenset({"torch"})
    on_demand = True

    def version(self) -> str:
        return str(torch.__version__)

    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        module, x = LayerModule(layer), channels_last(example_input(layer, batch))
        # a linear layer compiled for sizes that vary goes to another library, on some machines one twice as
        # fast
        ways = (False,) if layer.site.axes else (False, True)
        calls = [call for dynamic in ways if (call := compiled(module, Batch((x,)), dynamic)) is not None]
        return min(calls, key=a_few_calls) if calls else None

    def prepare_model(self, model: Model, batch: Batch, threads: int) -> Call | None:
        if not isinstance(model, RunsAsModule):
            return None
        module, placed = placed_model(model, batch)
        return compiled(module, placed, dynamic=None)


def compiled(module: nn.Module, batch: Batch, dynamic: bool | None) -> Callable[[], Any] | None:
    """The compiled module on that batch, its weights frozen; None where it cannot be compiled."""
    from torch._inductor import config as inductor_config  # noqa: PLC0415 - takes seconds to import

    try:
        # as an option of torch.compile freezing comes too late: by then the weights are inputs of the graph
        with warnings.catch_warnings(), inductor_config.patch(freezing=True):
            warnings.simplefilter("ignore")
            program = torch.compile(module, dynamic=dynamic, **_OPTIONS)

            def call() -> Any:
                with torch.no_grad():
                    return program(*batch.args, **batch.kwargs)

            call()
    # a compiler fails in many ways, and each means that it does not serve this layer
    except Exception:  # noqa: BLE001
        return None
    return call
