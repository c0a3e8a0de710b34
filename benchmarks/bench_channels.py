"""Narrower dense networks: projections against selections of channels, at equal multiply-adds.

    TDPASS_DATA=... python -m benchmarks.bench_channels                      # results/channels.csv
    TDPASS_DATA=... python -m benchmarks.bench_channels --networks resnet56 --epochs 2

`how` is that of `project-channels`: mixtures that were fitted to what the next layer reads (`learned`), by
principal components (`principal`), or channels selected by norm, Taylor expansion or geometric median, all from
the same 512 images.  Batch-norms are folded first.  Accuracy is on all test images: as the networks came, with
biases corrected and weights refitted to the dense answers, and after `--epochs` of distillation.  torch-pruning at
the same budgets stands in results/peers_accuracy.csv.
"""

from __future__ import annotations

import argparse

from torch import nn

import tdpass
from benchmarks import cifar
from benchmarks.finetune import distil
from benchmarks.results import Table, Value, show
from tdpass.planner.joint.project_channels import NARROWINGS

COLUMNS = (
    "model",
    "how",
    "budget",
    "macs_fraction",
    "accuracy",
    "accuracy_repaired",
    "epochs",
    "accuracy_finetuned",
)


def narrowed(network: str, how: str, budget: float, effort: str, epochs: int) -> dict[str, Value]:
    """One row."""
    dense = cifar.load_resnet(network)
    narrow = f"fold-batchnorm,project-channels{{how={how},macs={budget:g}}}"
    artifact, repaired = (
        tdpass.compress(
            dense, data=cifar.calibration(), pipeline=steps, effort=effort, strict=False, progress=False
        )
        for steps in (narrow, f"{narrow},correct-bias,refit")
    )
    model = repaired.model
    assert isinstance(artifact.model, nn.Module)
    assert isinstance(model, nn.Module)
    row: dict[str, Value] = {"model": network, "how": how, "budget": budget, "epochs": epochs}
    row |= {"macs_fraction": artifact.report.final.macs / artifact.report.original.macs}
    row |= {"accuracy": cifar.accuracy(artifact.model), "accuracy_repaired": cifar.accuracy(model)}
    if epochs:
        row |= {"accuracy_finetuned": cifar.accuracy(distil(model, dense, epochs))}
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", default=["resnet20", "resnet56"], choices=list(cifar.DENSE_ACCURACY)
    )
    parser.add_argument("--how", nargs="+", default=list(NARROWINGS), choices=list(NARROWINGS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--effort", default="normal", choices=["fast", "normal", "thorough"])
    parser.add_argument("--epochs", type=int, default=0)
    options = parser.parse_args()
    table = Table("channels.csv", COLUMNS)
    for network in options.networks:
        for budget in options.budgets:
            for how in options.how:
                row = narrowed(network, how, budget, options.effort, options.epochs)
                table.add(**row)
                print(show([row], COLUMNS).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
