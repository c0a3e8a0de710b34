"""What a training recipe for memristor arrays left: arrays, area, energy and power against the dense mapping, and accuracy on devices that vary.

    TDPASS_DATA=... python -m benchmarks.bench_crossbar out/training/lenet5_crossbar-0 --recipe lenet5_crossbar

The folder is that of a run of `bench_training` or `tdpass train`, which is not repeated.  The dense mapping has the whole matrices at the
array's own bits (9), the layers computed one after another; `energy_cut` is of one inference, `power_cut` of its energy over its time.
`accuracy_N` is on the first `--images` test images with conductances that vary by N % (log-normal) and the array's converters, as mean and
deviation over `--draws` draws of all devices.  Rows go to results/crossbar.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import tdpass
from benchmarks.results import Table, Value, show
from tdpass.crossbars import Devices, chip, map_model, simulate
from tdpass.datasets import open_dataset
from tdpass.methods import Crossbar
from tdpass.methods.base import make_method
from tdpass.methods.recipe import Recipe
from tdpass.report import Report
from tdpass.zoo import NETS

VARIATIONS = (0, 5, 10, 20)
CHIPS = ("pcm", "reram")
COLUMNS = (
    "recipe", "changes", "weights", "kept", "ratio", "bits", "score_dense", "score", "arrays_dense", "arrays", "arrays_cut", "mm2_dense", "mm2", "area_cut",
    "microjoules_dense", "microjoules", "energy_cut", "power_cut", "images", "draws", "accuracy_exact",
    *(f"accuracy_{percent}" for percent in VARIATIONS), *(f"accuracy_{name}" for name in CHIPS),
)  # fmt: skip


def costs(report: Report, method: Crossbar) -> dict[str, Value]:
    """The report's costs as shares of the dense ones."""
    before, after = report.original, report.final
    area = method.machine.array_area()
    arrays = [round(cost.get("area") / area) for cost in (before, after)]
    power = [cost.get("joules") / cost.seconds for cost in (before, after)]
    return {
        "arrays_dense": arrays[0], "arrays": arrays[1], "arrays_cut": 1 - arrays[1] / arrays[0],
        "mm2_dense": before.get("area"), "mm2": after.get("area"), "area_cut": 1 - after.get("area") / before.get("area"),
        "microjoules_dense": 1e6 * before.get("joules"), "microjoules": 1e6 * after.get("joules"),
        "energy_cut": 1 - after.get("joules") / before.get("joules"), "power_cut": 1 - power[1] / power[0],
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as the run was changed")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--chips", action="store_true", help="with devices as measured, by aihwkit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.load(options.recipe).with_options(options.set)
    method = make_method(recipe.method or "")
    if not isinstance(method, Crossbar):
        raise SystemExit(f"{options.recipe} is no recipe for arrays")
    model = tdpass.load(options.folder / "model.safetensors", NETS.get(recipe.model).build()).eval()
    report, data = Report.load(options.folder / "report.json"), open_dataset(recipe.data)
    test = data.part("test")
    images, classes = data.prepared(test.inputs[: options.images]), test.targets[: options.images]

    def accuracy(net: nn.Module) -> float:
        with torch.inference_mode():
            return 100 * sum(float((net(x).argmax(1) == y).sum()) for x, y in zip(images.split(100), classes.split(100), strict=True)) / len(classes)

    mapped = map_model(model, method.machine)
    devices = {f"accuracy_{percent}": Devices(variation=percent / 100) for percent in VARIATIONS}
    devices |= {f"accuracy_{name}": Devices(chip=chip(name)) for name in CHIPS if options.chips}
    found: dict[str, Value] = {name: str(simulate(model, mapped, accuracy, each, draws=options.draws)) for name, each in devices.items()}
    weights, kept = (sum(getattr(row, side).params for row in report.sites) for side in ("before", "after"))
    table = Table("crossbar.csv", COLUMNS)
    table.add(
        recipe=options.recipe, changes=" ".join(options.set), weights=weights, kept=kept, ratio=weights / kept, bits=method.machine.weight_bits,
        score_dense=report.checks.get("score_dense"), score=report.checks.get("score_final"), images=len(classes), draws=options.draws,
        accuracy_exact=accuracy(model), **costs(report, method), **found,
    )  # fmt: skip
    print(show(table.rows, COLUMNS))


if __name__ == "__main__":
    main()
