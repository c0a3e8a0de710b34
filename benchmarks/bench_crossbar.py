"""What a training recipe for memristor arrays left: arrays, area, energy and power against the dense mapping, and accuracy on devices that vary.

    TDPASS_DATA=... python -m benchmarks.bench_crossbar lenet5_crossbar --folder out/training/lenet5_crossbar-0
    TDPASS_DATA=... python -m benchmarks.bench_crossbar resnet20_crossbar --images 100        # the trained weights that it starts from

The folder is that of a run of `bench_training` or `tdpass train`, which is not repeated; without one the
dense network is mapped at the array's own bits.  The dense mapping that it is held against has the whole
matrices at these bits (9), the layers computed one after another; `energy_cut` is of one inference,
`power_cut` of its energy over its time.  `accuracy_N` is on `--images` test images with conductances that
vary by N % (log-normal) and the array's converters, as mean and deviation over `--draws` draws of all
devices.  Rows go to results/crossbar.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import tdpass
from benchmarks.results import Table, Value, show
from tdpass.cost import Cost
from tdpass.crossbars import Devices, chip, map_model, simulate
from tdpass.crossbars.use import dense_costs, uses_of
from tdpass.datasets import open_dataset
from tdpass.form import DENSE
from tdpass.formats.layer import dense_cost
from tdpass.methods import Crossbar
from tdpass.methods.base import make_method
from tdpass.methods.recipe import Recipe
from tdpass.models import Batch, open_model
from tdpass.report import Report, SiteRow
from tdpass.targets.crossbar import CrossbarArray
from tdpass.zoo import NETS

VARIATIONS = (0, 5, 10, 20)
CHIPS = ("pcm", "reram")
COLUMNS = (
    "recipe", "changes", "weights", "kept", "ratio", "bits", "score_dense", "score", "arrays_dense", "arrays", "arrays_cut", "mm2_dense", "mm2", "area_cut",
    "microjoules_dense", "microjoules", "energy_cut", "power_cut", "images", "draws", "accuracy_exact",
    *(f"accuracy_{percent}" for percent in VARIATIONS), *(f"accuracy_{name}" for name in CHIPS),
)  # fmt: skip


def report_of(model: nn.Module, example: torch.Tensor, array: CrossbarArray) -> Report:
    """What there is to say of a dense network whose weights are mapped as they are."""
    opened = open_model(model.eval(), (example,))
    opened.observe(Batch((example,)))
    sites = {site.name: site for site in opened.sites()}
    rows = [
        SiteRow(name, site.shape, DENSE, dense_cost(site), dense_cost(site), 0.0, 0.0)
        for name, site in sites.items()
    ]
    uses = uses_of(sites, {name: opened.weight(name) for name in sites}, array)
    before, after = (
        sum(dense_costs(sites, array).values(), Cost()),
        sum((use.cost for use in uses.values()), Cost()),
    )
    return Report(original=before, final=after, sites=rows)


def costs(report: Report, array: CrossbarArray) -> dict[str, Value]:
    """The report's costs as shares of the dense ones."""
    before, after = report.original, report.final
    area = array.array_area()
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
    parser.add_argument("recipe")
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as the run was changed"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--chips", action="store_true", help="with devices as measured, by aihwkit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.load(options.recipe).with_options(options.set)
    method = make_method(recipe.method or "")
    if not isinstance(method, Crossbar):
        raise SystemExit(f"{options.recipe} is no recipe for arrays")
    data, dense = open_dataset(recipe.data), NETS.get(recipe.model).build()
    if options.folder is None:
        array, model = method.own, dense
        model.load_state_dict(load_file(data.weights[recipe.model]))
        report = report_of(model, data.prepared(data.test.inputs[:1]), array)
    else:
        array, model, report = (
            method.machine,
            tdpass.load(options.folder / "model.safetensors", dense),
            Report.load(options.folder / "report.json"),
        )
    model.eval()
    test = data.part("test")
    chosen = torch.linspace(0, len(test) - 1, options.images).long()  # they may lie class by class
    images, classes = data.prepared(test.inputs[chosen]), test.targets[chosen]

    def accuracy(net: nn.Module) -> float:
        with torch.inference_mode():
            return (
                100
                * sum(
                    float((net(x).argmax(1) == y).sum())
                    for x, y in zip(images.split(100), classes.split(100), strict=True)
                )
                / len(classes)
            )

    mapped = map_model(model, array)
    devices = {f"accuracy_{percent}": Devices(variation=percent / 100) for percent in VARIATIONS}
    devices |= {f"accuracy_{name}": Devices(chip=chip(name)) for name in CHIPS if options.chips}
    found: dict[str, Value] = {
        name: str(simulate(model, mapped, accuracy, each, draws=options.draws))
        for name, each in devices.items()
    }
    weights, kept = (sum(getattr(row, side).params for row in report.sites) for side in ("before", "after"))
    table = Table("crossbar.csv", COLUMNS)
    table.add(
        recipe=options.recipe, changes=" ".join(options.set), weights=weights, kept=kept, ratio=weights / kept, bits=array.weight_bits,
        score_dense=report.checks.get("score_dense"), score=report.checks.get("score_final"), images=len(classes), draws=options.draws,
        accuracy_exact=accuracy(model), **costs(report, array), **found,
    )  # fmt: skip
    print(show(table.rows, COLUMNS))


if __name__ == "__main__":
    main()
