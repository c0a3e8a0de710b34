"""Graph modules of torch.fx: a copy whose calls of functions with weights are modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch.fx import GraphModule

from tdpass.models.base import Batch, Model
from tdpass.models.front_ends.base import FrontEnd, register_front_end
from tdpass.models.torch.graphs.lift import lift
from tdpass.models.torch.graphs.quantized_graph import dequantized_graph
from tdpass.models.torch.model import TorchModel


def _open(model: object, example: Batch | None, _overridable: Sequence[str]) -> Model:
    assert isinstance(model, GraphModule)
    return TorchModel(lift(copy.deepcopy(model)), example)


def _dequantized(model: object) -> object:
    assert isinstance(model, GraphModule)
    return dequantized_graph(model)


register_front_end(FrontEnd("torch.fx", _open, types=(GraphModule,), dequantized=_dequantized))
