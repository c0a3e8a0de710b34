"""Training recipes, seed by seed: accuracy against the dense control, weights, bytes, multiply-adds.

    TDPASS_DATA=... python -m benchmarks.bench_training lenet5_admm_nn --seeds 0 1 2
    TDPASS_DATA=... python -m benchmarks.bench_training resnet20_batude --set method.batude.budget.macs=0.35

Each run is one command of the library, `tdpass train RECIPE --seed S`, in this process; an interrupted one
goes on from its checkpoints.  Rows go to results/training.csv: scores are percentages of the test images,
`kept` the weights of all constrained layers that are not zero, `weight_data` their bits without positions (as
the literature counts), `stored` what lies in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
from collections.abc import Mapping
from pathlib import Path

from torch import nn

import tdpass
from benchmarks.results import Table, Value, show
from tdpass.cli.train import line
from tdpass.methods.recipe import Recipe

COLUMNS = (
    "recipe",
    "changes",
    "seed",
    "epochs",
    "score_dense",
    "score_control",
    "score_before_finetuning",
    "score_final",
    "params_fraction",
    "macs_fraction",
    "weights",
    "kept",
    "ratio",
    "weight_data_bytes",
    "weight_data_ratio",
    "stored_bytes",
    "stored_ratio",
    "seconds_per_epoch",
    "peak_mib",
)


def row_of(artifact: tdpass.Artifact, folder: Path) -> dict[str, Value]:
    """What a run has to show."""
    report, module = artifact.report, artifact.model
    if not isinstance(module, nn.Module):
        raise TypeError(f"the recipe made a {type(module).__name__}")
    artifact.save(folder / "model.safetensors")
    artifact.report.save(folder / "report.json")
    checks: Mapping[str, float] = report.checks
    dense = [choice for choice in artifact.plan if choice.kept_dense]
    modules = dict(module.named_modules())
    weights = sum(choice.dense.params for choice in artifact.plan)
    kept = sum(int(modules[choice.site].weight.count_nonzero()) for choice in dense) + sum(
        c.cost.params for c in artifact.plan if not c.kept_dense
    )
    row: dict[str, Value] = {name: checks.get(name) for name in COLUMNS if name.startswith("score_")}
    row |= {"weights": weights, "kept": kept, "ratio": weights / kept if kept else None}
    row |= {"params_fraction": report.final.params / report.original.params}
    row |= {"macs_fraction": report.final.macs / report.original.macs if report.original.macs else None}
    trained = [entry for entry in report.training if entry.stage in ("method", "finetune")]
    row |= {
        "epochs": len(trained),
        "seconds_per_epoch": sum(entry.seconds for entry in trained) / max(1, len(trained)),
    }
    if report.stored is not None:
        size = report.stored
        row |= {
            "weight_data_bytes": size.weight_data_bytes,
            "weight_data_ratio": 4 * weights / size.weight_data_bytes,
        }
        row |= {"stored_bytes": size.true_bytes, "stored_ratio": 4 * weights / size.true_bytes}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe, as `tdpass train --set` does",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("out/training"), help="where checkpoints and models go"
    )
    parser.add_argument("--out", default="training.csv", help="CSV file (default: results/training.csv)")
    options = parser.parse_args()
    table = Table(options.out, COLUMNS)
    for seed in options.seeds:
        recipe = Recipe.load(options.recipe).with_options(options.set).seeded(seed)
        name = Path(options.recipe).stem
        changes = hashlib.blake2b(" ".join(options.set).encode(), digest_size=6).hexdigest()
        folder = options.folder / "-".join([name, *([changes] if options.set else []), str(seed)])
        artifact = recipe.run(folder, resume=True, log=lambda row: print(line(row), flush=True), note=print)
        table.add(recipe=name, changes=" ".join(options.set), seed=seed, **row_of(artifact, folder))
        print(show([table.rows[-1]], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
