"""Calling a module as a deployed model is called.

In evaluation mode, its inputs on its device and in its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import Self

from tdpass.errors import InvalidModelError
from tdpass.layers.fused import layer_by_layer
from tdpass.models.base import Batch
from tdpass.models.torch.modules.module_values import buffers_kept, check_filled, input_types
from tdpass.products import Counted, counting


class ModuleRunner:
    """Runs `module` and leaves its buffers and modes as they were.

    A call that it does not take raises `InvalidModelError`.
    """

    def __init__(self, module: nn.Module, input_type: torch.dtype | None = None) -> None:
        self.module, self._input_type = module, input_type

    def on(self, module: nn.Module) -> Self:
        """The same for a copy of the module."""
        return type(self)(module, self._input_type)

    def run(self, batch: Batch) -> object:
        """Outputs on the CPU, in the module's own structure."""
        placed = self.placed(batch)
        with torch.no_grad(), buffers_kept(self.module):
            answer = self.answer(placed)
            plain = dict(answer) if isinstance(answer, Mapping) else answer
            return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, plain)

    def answer(self, placed: Batch) -> object:
        """What the module answers to a placed batch."""
        with self.evaluating():
            return self._call(placed)

    def count(self, calls: Sequence[Batch]) -> Counted:
        """Multiply-adds of all that runs in these calls."""
        placed = [self.placed(call) for call in calls]
        with self.evaluating(), buffers_kept(self.module), counting() as counter, layer_by_layer(self.module):
            for call in placed:
                self._call(call)
        return counter.counted(sum(call.size for call in calls) or 1)

    def placed(self, batch: Batch) -> Batch:
        """The batch on the module's device, floating-point tensors in the type that it runs with."""
        check_filled(self.module)
        types = input_types(self.module, batch)
        if self._input_type not in types:
            self._input_type = types[0] if len(types) == 1 else self._type_it_takes(batch, types)
        return self._moved(batch, self._input_type)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Every part in evaluation mode while it lasts."""
        training = [module for module in self.module.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        except (TypeError, RuntimeError, IndexError, ValueError, AssertionError) as error:
            raise InvalidModelError(
                f"the model does not run on the given data: {type(error).__name__}: "
                f"{str(error).splitlines()[0]}; "
                "pass example_inputs or data of the shape and type that it takes"
            ) from error
        finally:
            for module in training:
                module.training = True

    def _call(self, placed: Batch) -> object:
        return self.module(*placed.args, **placed.kwargs)

    def _type_it_takes(self, batch: Batch, types: Sequence[torch.dtype]) -> torch.dtype | None:
        """The first of these types in which the module runs."""
        for dtype in types:
            try:
                with torch.no_grad(), buffers_kept(self.module):
                    self.answer(self._moved(batch, dtype))
            except InvalidModelError:
                continue
            return dtype
        return next(iter(types), None)

    def _moved(self, batch: Batch, dtype: torch.dtype | None) -> Batch:
        device = next((parameter.device for parameter in self.module.parameters()), None)
        return batch.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))
