"""Networks of `tdpass.zoo`."""

from __future__ import annotations

from torch import nn

from tdpass.errors import UsageError
from tdpass.sources.base import ModuleSource, register_module_source
from tdpass.zoo import NETS

_MOST_CLASSES = 1_000_000


@register_module_source
class Zoo(ModuleSource):
    """`zoo:resnet20`, untrained; `zoo:resnet20:100` for so many classes."""

    name = "zoo"
    example = "zoo:resnet20"

    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        del pretrained  # there are no published weights of them
        name, sign, classes = text.partition(":")
        if not sign:
            return NETS.get(name).build()
        if not classes.isdecimal() or not 0 < int(classes) <= _MOST_CLASSES:
            raise UsageError(
                f"zoo:{text} ends in {classes!r}, which is no number of classes; give 1 to {_MOST_CLASSES:,}, "
                "such as 100"
            )
        return NETS.get(name).build(classes=int(classes))
