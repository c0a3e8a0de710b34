"""VGG with batch-norm and one classifier layer, for small colour images (Simonyan and Zisserman 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.zoo.base import register_net


class Vgg(nn.Module):
    """Stages of 3x3 convolutions of so many channels.

    Each stage but the last is followed by a pooling that halves the image.
    """

    def __init__(self, stages: Sequence[Sequence[int]], classes: int = 10) -> None:
        super().__init__()
        made, before = [], 3
        for widths in stages:
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            made.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(made)
        self.hidden = nn.Linear(before, 512)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 3, h, w]`."""
        for place, stage in enumerate(self.stages):
            x = stage(x if place == 0 else F.max_pool2d(x, 2, ceil_mode=True))
        scores: Tensor = self.classifier(F.relu(self.hidden(x.mean((2, 3)))))
        return scores


@register_net(3, None, None)
def vgg11(classes: int = 10) -> nn.Module:
    """An untrained VGG of eight convolutions and two linear layers."""
    return Vgg(((64,), (128,), (256, 256), (512, 512), (512, 512)), classes)


@register_net(3, None, None)
def vgg16(classes: int = 10) -> nn.Module:
    """An untrained VGG of thirteen convolutions and two linear layers."""
    return Vgg(((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)), classes)
