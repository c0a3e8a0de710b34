"""An LSTM that reads an image row by row."""

from __future__ import annotations

from torch import Tensor, nn

from tdpass.models import open_recurrent
from tdpass.zoo.base import register_net


class RowReader(nn.Module):
    """An LSTM over the 28 rows of an image, and a classifier on its last state."""

    def __init__(self, hidden: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, 28, 28]`."""
        states, _ = self.lstm(x.squeeze(1))
        scores: Tensor = self.classifier(states[:, -1])
        return scores


@register_net(1, 28, 28)
def row_reader(classes: int = 10) -> nn.Module:
    """An untrained LSTM(256), its weights open to factoring."""
    return open_recurrent(RowReader(classes=classes))
