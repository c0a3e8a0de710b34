"""Models of torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdpass.errors import UsageError
from tdpass.optional import optional
from tdpass.registry import nearest
from tdpass.sources.base import ModuleSource, register_module_source


@register_module_source
class Torchvision(ModuleSource):
    """`torchvision:resnet18`."""

    name = "torchvision"
    example = "torchvision:resnet18"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        library: Any = optional("torchvision.models", "torchvision", f"torchvision:{text}")
        names = library.list_models()
        if text not in names:
            raise UsageError(f"torchvision has no model {text!r}{nearest(text, names)}")
        model: nn.Module = library.get_model(text, weights="DEFAULT" if pretrained else None)
        return model
