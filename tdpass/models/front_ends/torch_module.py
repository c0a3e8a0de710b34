"""Modules of torch, rewritten in place of themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdpass.models.base import Batch, Model
from tdpass.models.front_ends.base import FrontEnd, register_front_end
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.modules.quantized import dequantized_module


def _open(model: object, example: Batch | None, _overridable: Sequence[str]) -> Model:
    assert isinstance(model, nn.Module)
    return TorchModel(model, example)


def _dequantized(model: object) -> object:
    assert isinstance(model, nn.Module)
    return dequantized_module(model)


register_front_end(FrontEnd("torch", _open, types=(nn.Module,), dequantized=_dequantized))
