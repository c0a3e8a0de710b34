"""Models of transformers, from the hub or a folder that `save_pretrained` wrote."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdpass.optional import optional
from tdpass.sources.base import ModuleSource, register_module_source


@register_module_source
class HuggingFace(ModuleSource):
    """`hf:bert-base-uncased`, `hf:./folder`: the model with the head that its configuration names."""

    name = "hf"
    example = "hf:bert-base-uncased"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        library: Any = optional("transformers", "transformers", f"hf:{text}")
        config = library.AutoConfig.from_pretrained(text)
        named = next(iter(config.architectures or ()), "")
        cls = getattr(library, named, library.AutoModel)
        if pretrained:
            made: nn.Module = cls.from_pretrained(text)
        else:
            made = library.AutoModel.from_config(config) if cls is library.AutoModel else cls(config)
        return made
