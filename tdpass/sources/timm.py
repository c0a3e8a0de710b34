"""Image models of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdpass.errors import UsageError
from tdpass.optional import optional
from tdpass.sources.base import ModuleSource, register_module_source


@register_module_source
class Timm(ModuleSource):
    """`timm:resnet50`, `timm:vit_tiny_patch16_224`."""

    name = "timm"
    example = "timm:resnet50"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        library: Any = optional("timm", "timm", f"timm:{text}")
        if not library.is_model(text.partition(".")[0]):
            raise UsageError(
                f"timm has no model {text!r}; near it: "
                f"{', '.join(library.list_models(f'*{text[:6]}*')[:5]) or 'nothing'}"
            )
        model: nn.Module = library.create_model(text, pretrained=pretrained)
        return model
