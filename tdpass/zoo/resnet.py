"""ResNet-18 and ResNet-50 for images of 224 x 224 pixels (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.zoo.base import register_net


class Residual(nn.Module):
    """A residual block: convolutions with batch-norms, each but the last with ReLU, and a shortcut."""

    def __init__(self, widths: Sequence[int], kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        # the stride is that of the (first) 3x3 convolution
        strides = [stride if k == 3 and 3 not in kernels[:place] else 1 for place, k in enumerate(kernels)]
        shapes = zip(widths, widths[1:], kernels, strides, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        changes = stride != 1 or widths[0] != widths[-1]
        projection = (
            (nn.Conv2d(widths[0], widths[-1], 1, stride, bias=False), nn.BatchNorm2d(widths[-1]))
            if changes
            else ()
        )
        self.shortcut = nn.Sequential(*projection) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        h = x
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h))
            h = F.relu(h) if place + 1 < len(self.convs) else F.relu(h + self.shortcut(x))
        return h


class ResNet(nn.Module):
    """Four stages of so many blocks each, plain or with bottlenecks."""

    def __init__(self, depths: Sequence[int], bottleneck: bool, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, inputs = [], 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            outputs = 4 * width if bottleneck else width
            for place in range(depth):
                stride = 2 if stage > 0 and place == 0 else 1
                widths = (inputs, width, width, outputs) if bottleneck else (inputs, outputs, outputs)
                blocks.append(Residual(widths, (1, 3, 1) if bottleneck else (3, 3), stride))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 3, h, w]`."""
        scores: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


@register_net(3, None, None)
def resnet18(classes: int = 1000) -> nn.Module:
    """An untrained ResNet-18."""
    return ResNet((2, 2, 2, 2), False, classes)


@register_net(3, None, None)
def resnet50(classes: int = 1000) -> nn.Module:
    """An untrained ResNet-50."""
    return ResNet((3, 4, 6, 3), True, classes)
