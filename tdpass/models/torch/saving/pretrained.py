"""Configurations of compressed transformers models that say how these are built.

`from_pretrained` can thus build them again.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from tdpass.models.torch.saving.structure import structure_text

METHOD = "tdpass"
_ENTRY = (
    "quantization_config"  # what transformers asks of a checkpoint whose layers are not those of the class
)
_CLASS = "transformers.modeling_utils.PreTrainedModel"


def mark_pretrained(model: object) -> None:
    """Write the structure of a compressed `PreTrainedModel` into its configuration.

    Nothing for other models and dense ones.
    """
    if not isinstance(model, nn.Module) or all(
        f"{base.__module__}.{base.__qualname__}" != _CLASS for base in type(model).__mro__
    ):
        return
    text = structure_text(model)
    if text:
        config: Any = model.config
        setattr(config, _ENTRY, {"quant_method": METHOD, "structure": json.loads(text)})
