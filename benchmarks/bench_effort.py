"""Time to plan by effort, and the accuracy lost by it.

Of the ten networks most are untrained; ResNet-20 on CIFAR-10 is among them.

    TDPASS_DATA=... python -m benchmarks.bench_effort                       # all networks and efforts
    python -m benchmarks.bench_effort --networks bytes bert --efforts fast  # a few

Half of the multiply-adds, 512 samples, one thread, no cache.  `plan_seconds` is processor time of the plan
alone; `divergence` that of the finished result from the original on the calibration data.  Untrained networks
lose no accuracy that could be measured: theirs is the divergence.  Rows go to results/effort.csv.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

import tdpass
from benchmarks import cifar
from benchmarks.results import Table, Value, show

COLUMNS = ("network", "effort", "sites", "plan_seconds", "measured", "divergence", "accuracy")
BUDGET = {"macs": 0.5}
Case = Callable[[], tuple[nn.Module, Tensor]]


class Reader(nn.Module):
    """A text reader: embedding, a body over `[n, width, length]`, each channel's largest, a classifier."""

    def __init__(self, width: int, layers: int, recurrent: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.recurrent = nn.LSTM(64, width, layers, batch_first=True) if recurrent else None
        kernels = [] if recurrent else [(64 if layer == 0 else width, width) for layer in range(layers)]
        self.convolutions = nn.Sequential(
            *(part for sizes in kernels for part in (nn.Conv1d(*sizes, 5, padding=2), nn.ReLU()))
        )
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of `[n, length]` bytes."""
        h = self.embedding(x)
        h = h.transpose(1, 2) if self.recurrent is None else self.recurrent(h)[0].transpose(1, 2)
        scores: Tensor = self.head(self.convolutions(h).amax(2))
        return scores


class Encoder(nn.Module):
    """A BERT-like encoder of `6 * layers + 2` linear sites."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(*self._sizes(name, width)) for name in "qkvoud") for _ in range(layers)
        )
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 4)

    @staticmethod
    def _sizes(name: str, width: int) -> tuple[int, int]:
        return {"u": (width, 4 * width), "d": (4 * width, width)}.get(name, (width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of `[n, length]` tokens."""
        h = self.embedding(x)
        for q, k, v, o, up, down in self.layers:  # type: ignore[misc]
            heads = [part(h).unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, k, v)]
            h = nn.functional.layer_norm(
                h + o(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)),
                h.shape[-1:],
            )
            h = nn.functional.layer_norm(h + down(nn.functional.gelu(up(h))), h.shape[-1:])
        scores: Tensor = self.head(torch.tanh(self.pooler(h[:, 0])))
        return scores


def images(*widths: int, size: int, samples: int = 512) -> tuple[nn.Module, Tensor]:
    """A plain convolutional classifier."""
    layers = [
        part
        for before, after in zip((3, *widths), widths, strict=False)
        for part in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
    ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    ), torch.randn(samples, 3, size, size)


def perceptron(*widths: int) -> tuple[nn.Module, Tensor]:
    """A multilayer perceptron."""
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(512, widths[0])


def tokens(model: nn.Module, length: int, of: int = 256) -> tuple[nn.Module, Tensor]:
    """A model that reads tokens, and some."""
    return model, torch.randint(0, of, (512, length))


CASES: Mapping[str, Case] = {
    "resnet20": lambda: (cifar.load_resnet("resnet20"), cifar.calibration()),
    "small_cnn": lambda: images(32, 64, 64, size=32),
    "wide_cnn": lambda: images(64, 128, 256, 256, size=16),
    "large_images": lambda: images(64, 64, 96, 96, 128, size=128, samples=64),
    "byte_cnn": lambda: tokens(Reader(256, 3, False), 128),
    "byte_cnn_wide": lambda: tokens(Reader(512, 4, False), 64),
    "byte_lstm": lambda: tokens(Reader(256, 2, True), 64),
    "bert_74": lambda: tokens(Encoder(128, 12), 64, 1000),
    "bert_26": lambda: tokens(Encoder(256, 4), 64, 1000),
    "perceptron": lambda: perceptron(784, 512, 512, 10),
}


def rows(name: str, effort: str) -> Iterator[dict[str, Value]]:
    """One network under one effort."""
    torch.manual_seed(0)
    model, data = CASES[name]()
    model = tdpass.open_recurrent(model)
    model.eval()
    start = time.process_time()
    plan = tdpass.make_plan(model, BUDGET, data, effort=effort, cache=False)
    seconds = time.process_time() - start
    found = tdpass.compress(model, BUDGET, data, plan=plan.plan)
    note = next(note for row in plan.report.passes for note in row.notes if "losses measured" in note)
    loss = tdpass.verify(model, found.model, data)["divergence"]
    accuracy = (
        cifar.evaluate(found.model) if name == "resnet20" and isinstance(found.model, nn.Module) else None
    )
    yield {"network": name, "effort": effort, "sites": len(plan.plan.choices), "plan_seconds": seconds} | {
        "measured": note.partition(": ")[2],
        "divergence": loss,
        "accuracy": accuracy,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--efforts", nargs="+", default=["fast", "normal", "thorough"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("effort.csv", COLUMNS)
    for name in options.networks:
        for effort in options.efforts:
            for row in rows(name, effort):
                table.add(**row)
                print(show([row], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
