"""Networks of `tdpass.zoo`."""

from __future__ import annotations

from torch import nn

from tdpass.sources.base import ModuleSource, register_module_source
from tdpass.zoo import NETS


@register_module_source
class Zoo(ModuleSource):
    """`zoo:resnet20`, untrained."""

    name = "zoo"
    example = "zoo:resnet20"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        del pretrained  # there are no published weights of them
        return NETS.get(text).build()
