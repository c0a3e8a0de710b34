"""Projections of all layers of a ResNet-50 on low-rank formats, as each round of ADMM takes them.

Rows hold the seconds, and the error beside the formats' own.

    python -m benchmarks.bench_project        # results/project.csv

Random weights with decaying spectra, about a third of the parameters left in each layer.  Wall time with 2
threads, median of three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.bench_planner import decaying
from benchmarks.results import Table, Value, show
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.rank_budget import RankBudget
from tdpass.formats import FORMATS, Rank
from tdpass.site import Site

COLUMNS = (
    "case",
    "layers",
    "params_fraction",
    "seconds",
    "relative_error",
    "reference_seconds",
    "reference_error",
    "goal",
    "met",
)
SECONDS, WORSE = 3.0, 1.001
FRACTION = 1 / 3
# (blocks, width, input width, output size) of the stages; each block is 1x1, 3x3, 1x1, the first with a 1x1
# shortcut
STAGES = ((3, 64, 64, 56), (4, 128, 256, 28), (6, 256, 512, 14), (3, 512, 1024, 7))
# the format of 3x3, 1x1 and linear layers
CASES = {
    "svd": ("channel_svd", "channel_svd", "svd"),
    "tucker2": ("tucker2", "channel_svd", "svd"),
    "tensor_train": ("tensor_train", "channel_svd", "tensor_train"),
}


def shapes() -> list[tuple[tuple[int, ...], int]]:
    """Shape and output size of the convolutions and the linear layer of a ResNet-50."""
    found: list[tuple[tuple[int, ...], int]] = [((64, 3, 7, 7), 112)]
    for blocks, width, before, size in STAGES:
        for block in range(blocks):
            inputs = before if block == 0 else 4 * width
            found += [
                ((width, inputs, 1, 1), size),
                ((width, width, 3, 3), size),
                ((4 * width, width, 1, 1), size),
            ]
            if block == 0:
                found.append(((4 * width, inputs, 1, 1), size))
    return [*found, ((1000, 2048), 1)]


def site_of(number: int, shape: tuple[int, ...], size: int) -> Site:
    """A layer as a site."""
    if len(shape) == 2:
        return Site(f"layer{number}", "linear", shape, extents=(((1,), (1,)),))
    return Site(
        f"layer{number}",
        "conv",
        shape,
        (1, 1),
        ((shape[2] // 2,) * 2,) * 2,
        (1, 1),
        extents=(((size, size), (size, size)),),
    )


def format_of(case: str, site: Site) -> str:
    """The format of a layer."""
    taps, pointwise, linear = CASES[case]
    if site.kind == "linear":
        return linear
    return taps if site.kernel[0] > 1 else pointwise


def rank_of(site: Site, name: str) -> Rank:
    """The largest proposed rank with at most a third of the parameters."""
    form = FORMATS.get(name)
    ranks = [
        rank
        for rank in form.ranks(site)
        if form.cost(site, rank).params <= FRACTION * site.weights and len(rank) == len(form.ranks(site)[0])
    ]
    return max(ranks or [form.ranks(site)[0]], key=lambda rank: form.cost(site, rank).params)


def project(case: str, rounds: int) -> dict[str, Value]:
    """One row: all layers, projected and rebuilt from the formats' float64 factors."""
    generator = torch.Generator().manual_seed(0)
    sites = [site_of(number, shape, size) for number, (shape, size) in enumerate(shapes())]
    weights = [decaying(site.shape, generator) for site in sites]
    constraints = [
        InFormat(site, format_of(case, site), rank_of(site, format_of(case, site))) for site in sites
    ]
    params = sum(FORMATS.get(one.format).cost(one.site, one.rank).params for one in constraints)
    seconds: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        made = [constraint.project(weight) for constraint, weight in zip(constraints, weights, strict=True)]
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    rebuilt = [
        FORMATS.get(one.format).reconstruct(one.factors(weight), one.site).float()
        for one, weight in zip(constraints, weights, strict=True)
    ]
    reference_seconds = time.perf_counter() - start
    ours, theirs, middle = error(weights, made), error(weights, rebuilt), statistics.median(seconds)
    return {
        "case": f"{case}, layers of ResNet-50",
        "layers": len(sites),
        "params_fraction": params / sum(site.weights for site in sites),
        "seconds": middle,
        "relative_error": ours,
        "reference_seconds": reference_seconds,
        "reference_error": theirs,
        "goal": f"{SECONDS} s at {WORSE}x the error",
        "met": str(middle <= SECONDS and ours <= WORSE * theirs).lower(),
    }


def divide() -> dict[str, Value]:
    """One row: the ranks of all layers from one budget of multiply-adds."""
    generator = torch.Generator().manual_seed(0)
    sites = {f"layer{number}": site_of(number, shape, size) for number, (shape, size) in enumerate(shapes())}
    weights: Mapping[str, Tensor] = {name: decaying(site.shape, generator) for name, site in sites.items()}
    formats = {name: format_of("tucker2", site) for name, site in sites.items()}
    budget = RankBudget(sites, formats, FRACTION * sum(site.weights for site in sites.values()), "params")
    start = time.perf_counter()
    chosen = budget.divide(weights)
    seconds = time.perf_counter() - start
    cost = sum(
        budget.cost_of(name, one.rank if isinstance(one, InFormat) else None) for name, one in chosen.items()
    )
    return {
        "case": "rank budget, layers of ResNet-50",
        "layers": len(sites),
        "params_fraction": cost / sum(site.weights for site in sites.values()),
        "seconds": seconds,
        "goal": f"{SECONDS} s",
        "met": str(seconds <= SECONDS).lower(),
    }


def error(weights: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """Mean relative error in the Frobenius norm."""
    return statistics.mean(
        float((weight - other).norm() / weight.norm()) for weight, other in zip(weights, made, strict=True)
    )


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(2)
    table = Table("project.csv", COLUMNS)
    for row in (*(project(case, 3) for case in CASES), divide()):
        table.add(**row)
        print(show(table.rows[-1:], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
