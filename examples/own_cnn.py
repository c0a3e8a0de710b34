"""A network of one's own, trained and compressed to 40 % of its multiply-adds.

It is written, and loaded without its class.

python examples/own_cnn.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from tdpass.datasets import open_dataset


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.hidden, self.classes = nn.Linear(64 * 2 * 2, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, 8, 8]`."""
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        scores: Tensor = self.classes(F.relu(self.hidden(x.flatten(1))))
        return scores


def main() -> None:
    """Train, compress, save, load, and compare accuracies."""
    torch.manual_seed(0)
    digits, net = open_dataset("digits"), Net()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(3):
        for inputs, targets in digits.batches(0, 64):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
    artifact = tdpass.compress(net.eval(), {"macs": 0.4}, digits.inputs("calibration"), effort="fast")
    artifact.save("own.safetensors", program=True)
    loaded = tdpass.load("own.safetensors")
    print(repr(artifact))
    for name, model in {"dense": net, "compressed": artifact.model, "loaded": loaded}.items():
        print(f"{name:12}{digits.accuracy(model, 'test'):6.2f} %")


if __name__ == "__main__":
    main()
