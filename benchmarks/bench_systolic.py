"""ResNet-20 planned for modelled systolic arrays.

Cycles and energy before and after, and where the ranks land.

    python -m benchmarks.bench_systolic                        # every array, half of the cycles
    python -m benchmarks.bench_systolic --arrays gemmini       # one

Random weights, effort fast, one thread, an empty cache, nothing is timed but the planning itself.  Of a
chosen rank that could be one larger in some place, `on_edges` is the share that would then take more cycles:
those are on an edge of the array's staircase. Where an array cannot reach the budget, the smallest reachable
share is planned for.  Rows go to results/systolic.csv.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import tdpass
from benchmarks.nets import NETS
from benchmarks.results import Table, show
from tdpass.errors import BudgetError
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.models import open_model
from tdpass.planner.rank_plan import RankPlan
from tdpass.site import Site
from tdpass.targets import Target, open_target

ARRAYS = ("gemmini", "output_stationary", "tpu_like")
COLUMNS = (
    "network",
    "array",
    "budget",
    "cycles_before",
    "cycles_after",
    "share",
    "microjoules_before",
    "microjoules_after",
    "macs_share",
    "sites_changed",
    "on_edges",
    "plan_seconds",
)


def smallest(network: str, array: str, budget: float) -> tuple[float, tdpass.Artifact, float]:
    """The plan at that share of the cycles, or at the smallest percentage above that can be reached.

    With it the seconds of the first attempt.
    """
    net = NETS[network]
    model, x = net.build().eval(), net.input(8)
    seconds = 0.0
    with tempfile.TemporaryDirectory() as cache:
        for percent in range(round(100 * budget), 101):
            start = time.perf_counter()
            try:
                artifact = tdpass.make_plan(
                    model,
                    {"cycles": percent / 100},
                    x,
                    target=f"systolic:{array}",
                    effort="fast",
                    cache=Path(cache),
                )
            except BudgetError:
                continue
            finally:
                seconds = seconds or time.perf_counter() - start
            return percent / 100, artifact, seconds
    raise SystemExit(f"{array} runs {network} no faster whatever the plan")


def on_edges(plan: RankPlan, sites: dict[str, Site], target: Target) -> float:
    """Of the ranks that can be raised by one, the share that cannot be raised at no cost."""
    found = [dearer for choice in plan for dearer in _raised(choice.form, sites[choice.site], target)]
    return sum(found) / len(found) if found else math.nan


def _raised(form: Form, site: Site, target: Target) -> Iterator[bool]:
    largest = FORMATS.get(form.format).ranks(site)[-1] if form.rank else ()
    for place, (rank, top) in enumerate(zip(form.rank, largest, strict=False)):
        if rank < top and len(form.rank) == len(largest):
            raised = Form(form.format, (*form.rank[:place], rank + 1, *form.rank[place + 1 :]))
            now, then = (cost.get("cycles") for cost in target.cost(site, [form, raised]))
            yield then > now


def main() -> None:
    """Run the wanted arrays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arrays", nargs="*", choices=ARRAYS, default=ARRAYS)
    parser.add_argument("--budget", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("systolic.csv", COLUMNS)
    sites = {
        site.name: site
        for site in open_model(NETS["resnet20"].build().eval(), (NETS["resnet20"].input(1),)).sites()
    }
    for array in arguments.arrays:
        budget, artifact, seconds = smallest("resnet20", array, arguments.budget)
        before, after = artifact.plan.original, artifact.plan.planned
        table.add(
            network="resnet20",
            array=array,
            budget=budget,
            cycles_before=int(before.get("cycles")),
            cycles_after=int(after.get("cycles")),
            share=after.get("cycles") / before.get("cycles"),
            microjoules_before=1e6 * before.get("joules"),
            microjoules_after=1e6 * after.get("joules"),
            macs_share=after.macs / before.macs,
            sites_changed=sum(not choice.kept_dense for choice in artifact.plan),
            on_edges=on_edges(artifact.plan, sites, open_target(f"systolic:{array}", "torch")),
            plan_seconds=seconds,
        )
    print(show(table.rows, COLUMNS))


if __name__ == "__main__":
    main()
