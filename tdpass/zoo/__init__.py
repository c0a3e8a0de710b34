"""Networks to try things on, untrained; one file per network, known by name.

Each is built by its function or by name, `NETS.get("lenet5").build(classes=10)`, and says in `sample` what
one input must look like.
"""

from __future__ import annotations

from tdpass.zoo.base import NETS as NETS
from tdpass.zoo.base import Net as Net
from tdpass.zoo.base import register_net as register_net
from tdpass.zoo.cifar_resnet import resnet20 as resnet20
from tdpass.zoo.cifar_resnet import resnet32 as resnet32
from tdpass.zoo.cifar_resnet import resnet56 as resnet56
from tdpass.zoo.digits import digits_net as digits_net
from tdpass.zoo.lenet5 import lenet5 as lenet5
from tdpass.zoo.resnet import resnet18 as resnet18
from tdpass.zoo.resnet import resnet50 as resnet50
from tdpass.zoo.row_reader import row_reader as row_reader
from tdpass.zoo.transformer import vision_transformer as vision_transformer
from tdpass.zoo.vgg import vgg11 as vgg11
from tdpass.zoo.vgg import vgg16 as vgg16
