"""The ResNets for small colour images of He et al. 2016, section 4.2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.zoo.base import register_net


class Shortcut(nn.Module):
    """Parameter-free shortcut: every second pixel, and as many new channels as there are, all zero.

    Half of them are before and half after.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]` to `[n, 2 c, h / 2, w / 2]`."""
        side = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm and a residual connection."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut()

    def forward(self, x: Tensor) -> Tensor:
        """One residual block."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks each, of 16, 32 and 64 channels: 6 `blocks` + 2 layers."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 3, h, w]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


@register_net(3, None, None)
def resnet20(classes: int = 10) -> nn.Module:
    """An untrained ResNet-20."""
    return CifarResNet(3, classes)


@register_net(3, None, None)
def resnet32(classes: int = 10) -> nn.Module:
    """An untrained ResNet-32."""
    return CifarResNet(5, classes)


@register_net(3, None, None)
def resnet56(classes: int = 10) -> nn.Module:
    """An untrained ResNet-56."""
    return CifarResNet(9, classes)
