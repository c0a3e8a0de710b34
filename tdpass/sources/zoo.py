"""Networks of `tdpass.zoo`."""

from __future__ import annotations

from torch import nn

from tdpass.errors import UsageError
from tdpass.sources.base import ModuleSource, register_module_source
from tdpass.zoo import NETS


@register_module_source
class Zoo(ModuleSource):
    """`zoo:resnet20`, untrained; `zoo:resnet20:100` for so many classes."""

    name = "zoo"
    example = "zoo:resnet20"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        del pretrained  # there are no published weights of them
        name, _, classes = text.partition(":")
        if not classes:
            return NETS.get(name).build()
        if not classes.isdecimal() or not int(classes):
            raise UsageError(f"zoo:{text} ends in {classes!r}, which is no number of classes, such as 100")
        return NETS.get(name).build(classes=int(classes))
