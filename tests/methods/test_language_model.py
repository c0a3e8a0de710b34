"""Methods that learn ranks train a language model of opened LSTM layers from beginning to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.methods import METHODS
from tdpass.training.batches import Batches

WORDS, WIDTH, STEPS = 30, 20, 8
SHORT: dict[str, dict[str, Any]] = {
    "svd-training": {"factored": 1, "sparsify": 1, "tune": 1},
    "lc": {"rounds": 2},
    "batude": {"rounds": 2},
    "haloc": {"measure": "params", "formats": ("svd",), "ranks": 3, "warm": 1, "search": 1, "tune": 1},
}


class LanguageModel(nn.Module):
    """Scores of the next word after each of `[n, steps]` words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.decoder = nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.lstm(self.embedding(x))[0])
        return y


@pytest.mark.parametrize("name", SHORT)
def test_a_language_model_is_trained_into_low_rank(name: str) -> None:
    words = torch.randint(0, WORDS, (48, STEPS + 1)).sort(1).values  # the next word is no smaller
    model = tdpass.open_recurrent(LanguageModel())
    method = METHODS.get(name)(budget={"params": 0.7}, **SHORT[name])
    settings = {"optimizer": "adam", "lr": 2e-3, "clip": 0.5}
    batches = Batches(words[:, :-1], words[:, 1:], size=16)
    artifact = tdpass.train(
        model, batches, method, settings=settings, control=False, finetune=1, example_inputs=words[:2, :-1]
    )
    assert artifact.report.final.params <= 0.7 * artifact.report.original.params
    assert any(choice.format == "svd" for choice in artifact.plan)
    with torch.no_grad():
        assert torch.isfinite(artifact.model(words[:, :-1])).all()
