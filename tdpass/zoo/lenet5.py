"""LeNet-5 for images of 28 x 28 grey pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.zoo.base import register_net


class LeNet5(nn.Module):
    """The Caffe variant of LeNet-5.

    20 and 50 filters of 5x5, 500 hidden units, 430,500 weights at ten classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, 28, 28]`."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        scores: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return scores


@register_net(1, 28, 28)
def lenet5(classes: int = 10) -> nn.Module:
    """An untrained LeNet-5."""
    return LeNet5(classes)
