"""Random models of a front end, and how to run, count and load them without tdpass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Protocol

import onnx
import onnxruntime
import torch
from counts import onnx_macs, onnx_params, onnx_session, torch_macs, torch_params
from graphs import graph
from nets import Case, net
from torch import Tensor, nn

import tdpass


class Frontend(Protocol):
    """What the differential tests need of one kind of model."""

    def draw(self, rng: Random) -> Case:
        """A random model with data, which runs as it is."""

    def run(self, model: Any, call: Any) -> dict[str, Tensor]:
        """Floating-point outputs by name."""

    def macs(self, model: Any, calls: list[Any]) -> int:
        """Multiply-adds of these calls together."""

    def stored(self, model: Any) -> tuple[int, int]:
        """Numbers and bytes of all parameters."""

    def loaded(self, path: Path, original: Any) -> Any:
        """The model in a saved file."""

    suffix: str


class TorchFrontend:
    suffix = ".safetensors"

    def draw(self, rng: Random) -> Case:
        return net(rng)

    def run(self, model: nn.Module, call: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            returned = model(call)
        if isinstance(returned, Tensor):
            return {"output": returned}
        return (
            dict(returned)
            if isinstance(returned, Mapping)
            else {str(place): value for place, value in enumerate(returned)}
        )

    def macs(self, model: nn.Module, calls: list[Tensor]) -> int:
        return sum(torch_macs(lambda call=call: model(call)) for call in calls)

    def stored(self, model: nn.Module) -> tuple[int, int]:
        return torch_params(model)

    def loaded(self, path: Path, original: nn.Module) -> nn.Module:
        return tdpass.load(path, copy.deepcopy(original))


class OnnxFrontend:
    suffix = ".onnx"

    def draw(self, rng: Random) -> Case:
        drawn = (graph(rng) for _ in range(100))
        return next(case for case in drawn if self._runs(case))

    def _runs(self, case: Case) -> bool:
        """Whether ONNX Runtime runs it: some operators have no kernel in some types."""
        try:
            answers = [self.run(case.model, call) for call in (*case.calls, *case.fresh)]
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
            return False
        return all(bool(torch.isfinite(value).all()) for answer in answers for value in answer.values())

    def run(self, model: onnx.ModelProto, call: Mapping[str, Any]) -> dict[str, Tensor]:
        session = onnx_session(model)
        names = [output.name for output in session.get_outputs()]
        return {
            name: torch.from_numpy(array)
            for name, array in zip(names, session.run(names, dict(call)), strict=True)
        }

    def macs(self, model: onnx.ModelProto, calls: list[Mapping[str, Any]]) -> int:
        return onnx_macs(model, calls)

    def stored(self, model: onnx.ModelProto) -> tuple[int, int]:
        return onnx_params(model)

    def loaded(self, path: Path, original: onnx.ModelProto) -> onnx.ModelProto:
        return onnx.load(path)


FRONTENDS: dict[str, Frontend] = {"torch": TorchFrontend(), "onnx": OnnxFrontend()}
