"""Models of transformers, from the hub or a folder that `save_pretrained` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tdpass.errors import UsageError
from tdpass.optional import optional
from tdpass.sources.base import ModuleSource, register_module_source


def _is_folder(text: str) -> bool:
    """Whether no model of the hub can have that name."""
    return text.startswith((".", "~")) or Path(text).is_absolute() or text.count("/") > 1


@register_module_source
class HuggingFace(ModuleSource):
    """`hf:bert-base-uncased`, `hf:./folder`: the model with the head that its configuration names."""

    name = "hf"
    example = "hf:bert-base-uncased"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        if _is_folder(text) and not Path(text).is_dir():
            raise UsageError(f"there is no folder {text}; check the path, or name a model of the hub")
        library: Any = optional("transformers", "transformers", f"hf:{text}")
        config = library.AutoConfig.from_pretrained(text)
        if getattr(config, "quantization_config", None):
            # without it transformers makes layers that tdpass factored anew at random
            import tdpass.hugging_face  # noqa: F401, PLC0415 - it needs transformers itself
        named = next(iter(config.architectures or ()), "")
        cls = getattr(library, named, library.AutoModel)
        if pretrained:
            made: nn.Module = cls.from_pretrained(text)
        else:
            made = library.AutoModel.from_config(config) if cls is library.AutoModel else cls(config)
        return made
