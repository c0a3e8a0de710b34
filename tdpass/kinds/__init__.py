"""Layer kinds: one file each under the registry `KINDS`; nothing outside names one.

Importing this package registers all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn

from tdpass.kinds.base import KINDS as KINDS
from tdpass.kinds.base import Attributes as Attributes
from tdpass.kinds.base import LayerKind as LayerKind
from tdpass.kinds.base import Window as Window
from tdpass.kinds.base import dense_modules as dense_modules
from tdpass.kinds.base import is_layer_call as is_layer_call
from tdpass.kinds.base import kind_of as kind_of
from tdpass.kinds.base import kind_of_function as kind_of_function
from tdpass.kinds.base import kind_of_module as kind_of_module
from tdpass.kinds.base import register_kind as register_kind
from tdpass.kinds.contraction import Contraction as Contraction
from tdpass.kinds.contraction import moves as moves
from tdpass.kinds.convolution import Convolution
from tdpass.kinds.linear import Linear
from tdpass.kinds.lookup import STORED_FIRST as STORED_FIRST
from tdpass.kinds.lookup import is_lookup as is_lookup
from tdpass.kinds.lookup import is_table as is_table
from tdpass.kinds.lookup import why_no_table as why_no_table
from tdpass.kinds.transposed_convolution import TransposedConvolution as TransposedConvolution
from tdpass.kinds.transposed_linear import TransposedLinear as TransposedLinear
from tdpass.kinds.transposed_linear import as_layer as as_layer
from tdpass.site import Site

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

PRODUCT = Linear.name
"""The kind that is a matrix product and nothing more."""


def plain_site(name: str, shape: tuple[int, ...]) -> Site:
    """The plainest layer with a weight of that shape: no stride, no padding, no dilation."""
    axes = len(shape) - 2
    if axes == 0:
        return Site(name, Linear.name, shape)
    return Site(name, Convolution.name, shape, (1,) * axes, ((0, 0),) * axes, (1,) * axes)


def plain_module(shape: tuple[int, ...]) -> nn.Module:
    """`plain_site` as a torch module on the meta device, without bias."""
    kind = KINDS.get(plain_site("", shape).kind)
    return kind.build(kind.modules[len(shape) - 2 - kind.axes.start], shape, {})
