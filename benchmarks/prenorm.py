"""A small transformer with norms before each part, trained in a minute on the digits of tdpass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from tdpass.datasets import open_dataset

WIDTH, HEADS, DEPTH, PATCH = 64, 4, 4, 2
EPOCHS, BATCH, RATE = 12, 64, 2e-3
NAME = "prenorm-digits"


class Digits(nn.Module):
    """Patches of 2 x 2 pixels, positions, torch's encoder with `norm_first`, a norm and a classifier."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // PATCH) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.norm, self.classifier = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, size, size]`."""
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
        states = self.encoder(self.embed(patches) + self.positions)
        return self.classifier(self.norm(states).mean(1))  # type: ignore[no-any-return]


def trained(epochs: int = EPOCHS) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The network with its attention opened, batches to calibrate on, and held-out ones; seeds are fixed."""
    torch.manual_seed(0)
    digits = open_dataset("digits")
    images, classes = digits.training.inputs.float() / digits.scale, digits.training.targets.long()
    net = Digits(images.shape[-1])
    optimizer = torch.optim.AdamW(net.parameters(), RATE)
    for _ in range(epochs):
        for picked in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[picked]), classes[picked]).backward()
            optimizer.step()
    held_out = digits.test.inputs.float() / digits.scale
    return tdpass.open_attention(net.eval()), list(images[:512].split(BATCH)), list(held_out.split(BATCH))


def answers(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Scores of all batches, scaled to length one."""
    with torch.no_grad():
        return F.normalize(torch.cat([model(batch) for batch in batches]), dim=1)
