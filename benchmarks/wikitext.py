"""WikiText-2 and a small language model: an LSTM that predicts the next word.

The data folder is named by the environment variable `TDPASS_DATA`; its `data/wikitext2/` holds the validation
and the test text, tokenised as they were published.  Of the validation text the first nine tenths are trained
on and the rest tuned on; perplexity is on the test text.  Words that are seen less than three times in the
text trained on are one unknown word.
"""

from __future__ import annotations

import copy
import functools
import math
import os
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from benchmarks.results import skip
from tdpass.training.batches import Batches

STEPS = 35
SAMPLES = 20
LEAST = 3
WIDTH = 200
UNKNOWN = "<unk>"


class LanguageModel(nn.Module):
    """Embedding, two LSTMs, a linear layer over the vocabulary (Zaremba, Sutskever, Vinyals 2014)."""

    def __init__(self, words: int, width: int = WIDTH, dropout: float = 0.4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, dropout=dropout)
        self.decoder = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next word, `[n, steps, words]`, at each of `[n, steps]` words."""
        states, _ = self.lstm(self.drop(self.embedding(x)))
        return self.decoder(self.drop(states))


def model() -> nn.Module:
    """An untrained language model, the weights of its LSTM open to factoring."""
    return tdpass.open_recurrent(LanguageModel(len(vocabulary())))


@functools.cache
def text(split: str) -> tuple[str, ...]:
    """The words of the `training`, `tuning` or `test` text, with a mark at the end of every line."""
    name = "test" if split == "test" else "valid"
    path = Path(os.environ.get("TDPASS_DATA", "")) / "data" / "wikitext2" / f"{name}.txt"
    if not path.is_file():
        skip("set TDPASS_DATA to the folder that holds data/wikitext2/valid.txt and test.txt")
    lines = path.read_text(encoding="utf-8").splitlines()
    words = tuple(word for line in lines for word in (*line.split(), "<eos>"))
    if split == "test":
        return words
    cut = len(words) * 9 // 10
    return words[:cut] if split == "training" else words[cut:]


@functools.cache
def vocabulary() -> dict[str, int]:
    """Words by number, most frequent first."""
    counts = Counter(text("training"))
    known = [word for word, count in counts.most_common() if count >= LEAST and word != UNKNOWN]
    return {word: number for number, word in enumerate((UNKNOWN, *known))}


def windows(split: str) -> tuple[Tensor, Tensor]:
    """Windows of `STEPS` words `[n, steps]`, and the words that follow each of them."""
    known = vocabulary()
    numbers = torch.tensor([known.get(word, 0) for word in text(split)])
    count = (len(numbers) - 1) // STEPS
    return numbers[: count * STEPS].view(count, STEPS), numbers[1 : count * STEPS + 1].view(count, STEPS)


def training(seed: int = 0) -> Batches:
    """Shuffled batches of windows; every window begins without a state."""
    return Batches(*windows("training"), size=SAMPLES, seed=seed)


def minus_perplexity(model: nn.Module, split: str = "test") -> float:
    """The perplexity of a text below zero, so that more is better."""
    model, total, count = copy.deepcopy(model).eval(), 0.0, 0
    with torch.inference_mode():
        for x, y in zip(*(part.split(100) for part in windows(split)), strict=True):
            total += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
            count += y.numel()
    return -math.exp(total / count)


def tuning_score(model: nn.Module) -> float:
    """The same of the text to tune on."""
    return minus_perplexity(model, "tuning")
