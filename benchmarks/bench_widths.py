"""One set of weights at several widths and ranks: accuracy, what each setting costs, and what a switch takes.

    python -m benchmarks.bench_widths                  # digits: four widths, then two, of four rank shares
    python -m benchmarks.bench_widths resnet20_widths  # another recipe whose method is channel-adaptive
    python -m benchmarks.bench_widths --alone          # and every setting trained alone for as many epochs
    python -m benchmarks.bench_widths --alone 0.5 1    # or those of these widths

Every setting is exported as the ordinary model it stands for, its weights or factors stored in 32, 16 and 8
bits (`int16`, `int8`), and priced in memory that computes (`pim:sot_mram`, modelled)
with weights and activations of 8 and of 16 bits.  `alone` is the accuracy of an ordinary network of that
width from random weights, trained for as many epochs as the adaptive one in all.  `switch_microseconds` is
the mean over a thousand switches between the settings.  An interrupted run goes on from its checkpoints.
Rows go to results/widths.csv.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import tdpass
from benchmarks.results import Table, show
from tdpass.cli.train import line
from tdpass.layers.adaptive import dial_of
from tdpass.methods import ChannelAdaptive, make_method
from tdpass.methods.material import Material, gathered
from tdpass.methods.recipe import Recipe
from tdpass.models import Batch
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.ordinary import open_setting
from tdpass.report import TrainingRow
from tdpass.targets import Setting
from tdpass.targets.pim import PimMemory, PimTarget

COLUMNS = (
    "recipe",
    "width",
    "rank",
    "bits",
    "accuracy",
    "dense",
    "alone",
    "params",
    "macs",
    "bytes",
    "microjoules",
    "microseconds",
    "area_mm2",
    "switch_microseconds",
    "epochs",
    "seconds",
)
CELLS = (8, 16)
STORED: Mapping[int, str] = {32: "", 16: "quantize{numbers=int16}", 8: "quantize{numbers=int8}"}


def switch_seconds(model: nn.Module, settings: list[tuple[float, float]]) -> float:
    """The mean time of choosing a setting."""
    start = time.perf_counter()
    for width, rank in itertools.islice(itertools.cycle(settings), 1000):
        tdpass.set_width(model, width)
        tdpass.set_rank(model, rank)
    return (time.perf_counter() - start) / 1000


def trained_alone(recipe: Recipe, material: Material, model: nn.Module, epochs: int, folder: Path) -> float:
    """The accuracy of an ordinary network of that structure, trained from random weights."""
    torch.manual_seed(recipe.seed)
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    settings = {**recipe.settings, **(recipe.pretraining or {})}
    artifact = tdpass.train(
        fresh,
        material.batches,
        None,
        settings=settings,
        pretrain=epochs,
        control=False,
        seed=recipe.seed,
        folder=folder,
        resume=True,
        log=_say,
    )
    return accuracy(material, artifact.model, recipe)


def accuracy(material: Material, model: object, recipe: Recipe) -> float:
    """The percentage of test images that a model gets right."""
    score = material.score(recipe.test)
    assert score is not None
    assert isinstance(model, nn.Module)
    return score(model.eval())


def priced(opened: TorchModel, example: Batch, bits: int) -> dict[str, float]:
    """What a call costs in memory that computes, with weights and activations of so many bits."""
    target = PimTarget(replace(PimMemory.load("sot_mram"), weight_bits=bits, input_bits=bits))
    (cost,) = target.cost_models([opened], lambda: example, Setting())
    return {
        "microjoules": 1e6 * cost.get("joules"),
        "microseconds": 1e6 * cost.get("seconds"),
        "area_mm2": cost.get("area"),
    }


def kept_in(pipeline: str, opened: TorchModel, material: Material, recipe: Recipe) -> dict[str, float]:
    """Accuracy and bytes of a setting with its weights, or factors, stored so."""
    if not pipeline:
        return {"accuracy": accuracy(material, opened.module, recipe), "bytes": opened.bytes()}
    stored = tdpass.compress(opened.module, pipeline=pipeline, example_inputs=opened.example(), cache=False)
    return {"accuracy": accuracy(material, stored.model, recipe), "bytes": stored.report.final.bytes}


def _say(row: TrainingRow) -> None:
    print(line(row), flush=True)


def measure(
    name: str, options: Sequence[str], table: Table, folder: Path, *, alone: Sequence[float] | None
) -> None:
    """Train a recipe and write a row for each of its settings and numbers of bits.

    Settings of the widths `alone` are trained alone too; of an empty sequence, all.
    """
    recipe = replace(Recipe.load(name).with_options(options), control=False)
    artifact = recipe.run(folder / name, resume=True, log=_say)
    seconds = sum(entry.seconds for entry in artifact.report.training)
    material, model = gathered(recipe), artifact.model
    assert isinstance(model, nn.Module)
    method = make_method(recipe.method or "")
    assert isinstance(method, ChannelAdaptive)
    epochs, adaptation = material.pretrain + method.epochs(recipe.rounds_per_epoch), dial_of(model).adaptation
    settings = [(width, rank) for width in adaptation.widths for rank in adaptation.ranks]
    switch = switch_seconds(model, settings)
    example = Batch((torch.zeros(1, *material.example[1:]),))
    for width, rank in settings:
        opened = open_setting(model, width, rank, example)
        narrow = tdpass.ordinary(model, width, rank).eval()
        own = folder / f"{name}-alone-{width}-{rank}"
        wanted = alone is not None and (not alone or width in alone)
        by_itself = trained_alone(recipe, material, narrow, epochs, own) if wanted else None
        for bits, pipeline in STORED.items():
            table.add(
                recipe=name,
                width=width,
                rank=rank,
                bits=bits,
                **kept_in(pipeline, opened, material, recipe),
                dense=artifact.report.checks["score_dense"],
                alone=by_itself,
                params=opened.params(),
                macs=opened.count().per_sample,
                switch_microseconds=1e6 * switch,
                epochs=epochs,
                seconds=seconds,
                **(priced(opened, example, bits) if bits in CELLS else {}),
            )


def main() -> None:
    """Measure the wanted recipes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=["digits_widths", "digits_widths_and_ranks"])
    parser.add_argument("--alone", type=float, nargs="*", metavar="WIDTH", help="all where none is given")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipes")
    parser.add_argument("--folder", type=Path, default=Path("out/widths"), help="where checkpoints go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("widths.csv", COLUMNS)
    for name in arguments.recipes:
        measure(name, arguments.set, table, arguments.folder, alone=arguments.alone)
    print(show(table.rows, COLUMNS[:13]))


if __name__ == "__main__":
    main()
