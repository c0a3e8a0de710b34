"""What a runtime is: one way to run a layer, and perhaps a whole model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.models.base import Batch, Model
from tdpass.registry import Registry

Call = Callable[[], object]


@dataclass(frozen=True)
class Bound:
    """A call that works on memory which nothing else would keep."""

    run: Call
    held: object

    def __call__(self) -> object:
        return self.run()


@dataclass(frozen=True)
class BoundLayer(Bound):
    """The same with a tensor that it writes its answer to."""

    output: Tensor

    def __call__(self) -> Tensor:
        self.run()
        return self.output


class Runtime(ABC):
    """One way to run a layer; a subclass per file, registered with `register_runtime`.

    Class attributes: `name`; `families` that it belongs to, a family being the runtimes among which the
    layers of one model may be divided (`torch`, `onnxruntime`, `openvino`, `cuda`); `on_demand`, true where
    preparing takes so long that it is used only when it is named; `rounding`, by what share of their size its
    answers may differ from the layer's.
    """

    name: ClassVar[str]
    families: ClassVar[frozenset[str]]
    on_demand: ClassVar[bool] = False
    rounding: ClassVar[float] = 1e-4

    @abstractmethod
    def version(self) -> str:
        """Its version: measured times are good for no other."""

    def available(self) -> bool:
        """Whether it is installed."""
        return True

    @abstractmethod
    def prepare(self, layer: Layer, batch: int, threads: int) -> Callable[[], Tensor] | None:
        """A call that runs the layer on `example_input(layer, batch)` and answers with the output.

        None where it cannot serve this. The layer has one entry in `layer.site.extents`: the sizes of this
        call.  The output may be the same tensor every time.
        """

    def prepare_model(self, model: Model, batch: Batch, threads: int) -> Call | None:
        """A call that runs a whole model on that batch.

        None where models do not run in this runtime alone.
        """
        return None


RUNTIMES: Registry[Runtime] = Registry("runtime")


def register_runtime(cls: type[Runtime]) -> type[Runtime]:
    """Class decorator: make a runtime known by its `name`."""
    RUNTIMES.add(cls.name, cls())
    return cls


def a_few_calls(call: Call) -> float:
    """Seconds of a call at its best, to choose between ways to run the same by."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
