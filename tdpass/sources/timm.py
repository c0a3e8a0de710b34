"""Image models of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdpass.errors import UsageError
from tdpass.optional import optional
from tdpass.registry import nearest
from tdpass.sources.base import ModuleSource, register_module_source


@register_module_source
class Timm(ModuleSource):
    """`timm:resnet50`, `timm:vit_tiny_patch16_224`."""

    name = "timm"
    example = "timm:resnet50"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        library: Any = optional("timm", "timm", f"timm:{text}")
        if not library.is_model(text.partition(".")[0]):
            meant = nearest(text, library.list_models())
            raise UsageError(
                f"timm has no model {text!r}{meant}; timm.list_models('resnet*') names those it has"
            )
        model: nn.Module = library.create_model(text, pretrained=pretrained)
        return model
