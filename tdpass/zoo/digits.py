"""A small convolutional network for images of 8 x 8 grey pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.zoo.base import register_net


class DigitsNet(nn.Module):
    """Two stages with batch-norm, the second with a residual block, and two linear layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.widen = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        )
        first = (nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.block = nn.Sequential(*first, nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
        self.hidden = nn.Linear(64 * 2 * 2, 128)
        self.classes = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, 8, 8]`."""
        x = self.widen(self.stem(x))
        x = F.max_pool2d(F.relu(self.block(x) + x), 2)
        scores: Tensor = self.classes(F.relu(self.hidden(x.flatten(1))))
        return scores


@register_net(1, 8, 8)
def digits_net(classes: int = 10) -> nn.Module:
    """An untrained network for the digits that come with tdpass."""
    return DigitsNet(classes)
