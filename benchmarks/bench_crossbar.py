r"""What a training recipe for memristor arrays left, against the dense mapping.

These are arrays, area, energy and power, and accuracy on devices that vary.

    TDPASS_DATA=... python -m benchmarks.bench_crossbar lenet5_crossbar \
        --folder out/training/lenet5_crossbar-0
    TDPASS_DATA=... python -m benchmarks.bench_crossbar resnet20_crossbar --images 100
    TDPASS_DATA=... python -m benchmarks.bench_crossbar lenet5_crossbar --noise 0 0.1 --chips

The second maps the trained weights that the recipe starts from; the third trains without and with noise and
compares.

The folder is that of a run of `bench_training` or `tdpass train`, which is not repeated; without one the
dense network is mapped at the array's own bits.  With `--noise` the recipe is trained once for each deviation
of conductances (below `--out`, a run that is there goes on), in all else alike.  The dense mapping that a row
is held against has the whole matrices at the array's own bits (9).  `energy_cut` is of one inference;
`power_cut` is of the power that all arrays draw at once, each counted once however often its layer is called,
as published.  `accuracy_N` is on `--images` test images with conductances that vary by N % (log-normal) and
the array's converters, as mean and deviation over `--draws` draws of all devices; `accuracy_exact` is that of
the weights themselves.  Rows go to results/crossbar.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tdpass
from benchmarks.results import Table, Value, show
from tdpass.cost import Cost
from tdpass.crossbars import Devices, chip, map_model, simulate
from tdpass.crossbars.mapping import layers_of
from tdpass.crossbars.use import dense_costs, uses_of
from tdpass.datasets import Dataset, open_dataset
from tdpass.methods import Crossbar
from tdpass.methods.base import make_method
from tdpass.methods.recipe import Recipe
from tdpass.models import Batch, open_model
from tdpass.report import Report
from tdpass.targets.crossbar import CrossbarArray
from tdpass.zoo import NETS

VARIATIONS = (0, 5, 10, 20)
CHIPS = ("pcm", "reram")
COLUMNS = (
    "recipe",
    "changes",
    "noise",
    "weights",
    "kept",
    "ratio",
    "bits",
    "score_dense",
    "score",
    "arrays_dense",
    "arrays",
    "arrays_cut",
    "mm2_dense",
    "mm2",
    "area_cut",
    "microjoules_dense",
    "microjoules",
    "energy_cut",
    "watts_dense",
    "watts",
    "power_cut",
    "images",
    "draws",
    "accuracy_exact",
    *(f"accuracy_{percent}" for percent in VARIATIONS),
    *(f"accuracy_{name}" for name in CHIPS),
)
SHOWN = ("noise", "ratio", "score", "area_cut", "energy_cut", "power_cut", *COLUMNS[-7:])


@dataclass(frozen=True)
class Subject:
    """A network on arrays, its training noise and score, and the dense one it is held against.

    The dense one is at the bits of `own`.
    """

    model: nn.Module
    dense: nn.Module
    array: CrossbarArray
    own: CrossbarArray
    noise: float
    checks: Mapping[str, float]


def costs(subject: Subject, example: Tensor) -> dict[str, Value]:
    """Weights, arrays, area, energy and power, as amounts and as cuts of the dense mapping."""
    opened = open_model(subject.dense.eval(), (example,))
    opened.observe(Batch((example,)))
    sites = {site.name: site for site in opened.sites()}
    layers = layers_of(open_model(subject.model), subject.model)
    weights = {name: layers[name].reconstruct() for name in sites}
    uses = uses_of(sites, weights, subject.array)
    before = sum(dense_costs(sites, subject.own).values(), Cost())
    after = sum((use.cost for use in uses.values()), Cost())
    total, kept = (
        sum(int(count(weight)) for weight in weights.values())
        for count in (Tensor.numel, Tensor.count_nonzero)
    )
    arrays_dense = round(before.get("area") / subject.own.array_area())
    arrays = sum(use.arrays for use in uses.values())

    def cut(measure: str) -> float:
        return 1 - after.get(measure) / before.get(measure)

    return {
        "weights": total,
        "kept": kept,
        "ratio": total / kept,
        "bits": subject.array.weight_bits,
        "arrays_dense": arrays_dense,
        "arrays": arrays,
        "arrays_cut": 1 - arrays / arrays_dense,
        "mm2_dense": before.get("area"),
        "mm2": after.get("area"),
        "area_cut": cut("area"),
        "microjoules_dense": 1e6 * before.get("joules"),
        "microjoules": 1e6 * after.get("joules"),
        "energy_cut": cut("joules"),
        "watts_dense": before.get("watts"),
        "watts": after.get("watts"),
        "power_cut": cut("watts"),
    }


def subject_of(recipe: Recipe, folder: Path | None, data: Dataset) -> Subject:
    """What a run left in a folder, or the network that the recipe starts from."""
    method = make_method(recipe.method or "")
    if not isinstance(method, Crossbar):
        raise SystemExit("this is no recipe for arrays")
    dense = NETS.get(recipe.model).build()
    if folder is None:
        dense.load_state_dict(load_file(data.weights[recipe.model]))
        return Subject(dense.eval(), dense, method.own, method.own, 0.0, {})
    model = tdpass.load(folder / "model.safetensors", NETS.get(recipe.model).build())
    checks = Report.load(folder / "report.json").checks
    return Subject(model.eval(), dense, method.machine, method.own, method.noise, checks)


def scorer(data: Dataset, count: int) -> Callable[[nn.Module], float]:
    """The percentage of so many test images that a network gets right.

    The images are evenly spaced, as they may lie class by class.
    """
    test = data.part("test")
    chosen = torch.linspace(0, len(test) - 1, count).long()
    images, classes = data.prepared(test.inputs[chosen]), test.targets[chosen]

    def score(network: nn.Module) -> float:
        with torch.inference_mode():
            found = torch.cat([network(part).argmax(1) for part in images.split(100)])
        return 100 * float((found == classes).double().mean())

    return score


def trained(recipe: Recipe, noise: float, out: Path) -> Path:
    """The folder of the recipe's run with that noise, made or gone on with where it is not there."""
    folder = out / f"{recipe.model}-noise-{noise:g}-{recipe.seed}"
    if not (folder / "model.safetensors").exists():
        artifact = recipe.run(folder, resume=folder.exists(), log=lambda row: print(noise, row, flush=True))
        artifact.save_all(folder)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--noise", type=float, nargs="*", default=[], help="train with each of these")
    parser.add_argument("--out", type=Path, default=Path("out/crossbar"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as the run is, or was, changed"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--chips", action="store_true", help="with devices as measured, by aihwkit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.load(options.recipe).with_options(options.set)
    data = open_dataset(recipe.data)
    devices = {f"accuracy_{percent}": Devices(variation=percent / 100) for percent in VARIATIONS}
    devices |= {f"accuracy_{name}": Devices(chip=chip(name)) for name in CHIPS if options.chips}
    noisy = [recipe.with_options([f"method.crossbar.noise={noise}"]) for noise in options.noise]
    runs = [
        (each, trained(each, noise, options.out)) for each, noise in zip(noisy, options.noise, strict=True)
    ]
    score, table = scorer(data, options.images), Table("crossbar.csv", COLUMNS)
    for each, folder in runs or [(recipe, options.folder)]:
        subject = subject_of(each, folder, data)
        mapped = map_model(subject.model, subject.array)
        found: dict[str, Value] = {
            name: str(simulate(subject.model, mapped, score, device, draws=options.draws))
            for name, device in devices.items()
        }
        table.add(
            recipe=options.recipe,
            changes=" ".join(options.set),
            noise=subject.noise,
            **costs(subject, data.prepared(data.test.inputs[:1])),
            score_dense=subject.checks.get("score_dense"),
            score=subject.checks.get("score_final"),
            images=options.images,
            draws=options.draws,
            accuracy_exact=score(subject.model),
            **found,
        )
    print(show(table.rows, SHOWN))


if __name__ == "__main__":
    main()
