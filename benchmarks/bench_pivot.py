"""What it gains that factors hold nothing twice.

Error at equal multiply-adds, time of a layer, and accuracy of ResNet-20.

    python -m benchmarks.bench_pivot --parts error time
    TDPASS_DATA=... python -m benchmarks.bench_pivot --parts accuracy --images 2000

Error: the relative error of a weight at the largest rank that half of its multiply-adds allow, of trained
weights (ResNet-56, MiniLM) where they are there, else of weights of the shapes of ResNet-18 and ResNet-50
whose spectra fall as k^-0.7.  Time: one call of a layer at that rank, of chain, `_pivot` and `_lead` alike.
Accuracy: what `compress` makes of ResNet-20 with `plan` and with `plan{pivot=true}`, all formats, on the
first test images.  Rows go to results/pivot.csv.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import tdpass
from benchmarks import cifar, minilm
from benchmarks.results import Table, Value, show
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import dense_cost
from tdpass.formats.pivoted import LEAD, PIVOT
from tdpass.kinds import plain_site
from tdpass.models import open_model
from tdpass.site import Site
from tdpass.targets import open_target
from tdpass.targets.base import Setting

COLUMNS = (
    "part",
    "case",
    "budget",
    "form",
    "macs_fraction",
    "error",
    "runtime",
    "seconds",
    "images",
    "accuracy",
)
PARTS = ("error", "time", "accuracy")


def convolution(name: str, o: int, i: int, k: int, size: int) -> Site:
    """A convolution that keeps its size, seen on one image."""
    pads = ((k // 2, k // 2),) * 2
    return replace(plain_site(name, (o, i, k, k)), padding=pads, extents=(((size, size), (size, size)),))


def linear(name: str, o: int, i: int, positions: int) -> Site:
    """A linear layer, seen on so many positions."""
    return replace(plain_site(name, (o, i)), extents=(((positions,), (positions,)),))


SITES = (
    (convolution("resnet18 64@56", 64, 64, 3, 56), "tucker2"),
    (convolution("resnet18 256@14", 256, 256, 3, 14), "tucker2"),
    (convolution("resnet18 512@7", 512, 512, 3, 7), "tucker2"),
    (convolution("resnet50 256x64@56", 256, 64, 1, 56), "channel_svd"),
    (convolution("resnet50 1024x256@14", 1024, 256, 1, 14), "channel_svd"),
    (linear("bert 768", 768, 768, 128), "svd"),
    (linear("bert 768 to 3072", 3072, 768, 128), "svd"),
    (linear("bert 3072 to 768", 768, 3072, 128), "svd"),
)


def falling(site: Site) -> Tensor:
    """A weight whose spectra along its first two axes fall as k^-0.7."""
    weight = torch.randn(site.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        size = site.shape[axis]
        mixing = torch.linalg.qr(
            torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(axis))
        )[0]
        mixing = mixing * torch.arange(1, size + 1, dtype=torch.float64) ** -0.7
        weight = torch.tensordot(weight, mixing, dims=([axis], [1])).movedim(-1, axis)
    return weight


def half(site: Site, name: str) -> Form:
    """The form of the largest rank, the same share of every limit, that half of the dense macs allow."""
    fmt, limit = FORMATS.get(name), dense_cost(site).macs / 2
    top = (FORMATS.get(name).chain if name.endswith(PIVOT) else fmt).ranks(site)[-1]
    steps = max(top)
    ranks = [tuple(max(1, r * k // steps) for r in top) for k in range(1, steps)]
    return Form(name, max(rank for rank in ranks if fmt.cost(site, rank).macs <= limit))


def trained() -> Iterator[tuple[Site, Tensor, str]]:
    """Layers of trained networks, as far as they are here."""
    if os.environ.get("TDPASS_DATA"):
        model = open_model(cifar.load_resnet("resnet56"), (torch.zeros(1, 3, 32, 32),))
        for site in [site for site in model.sites() if site.shape == (64, 64, 3, 3)][::6]:
            yield convolution(f"resnet56 {site.name}", 64, 64, 3, 8), model.weight(site.name), "tucker2"
    try:
        encoder = minilm.load_encoder()
    except SystemExit:
        return
    for path, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear) and "layer.2." in path:
            yield linear(f"minilm {path}", *module.weight.shape, positions=64), module.weight.detach(), "svd"


def errors() -> Iterator[dict[str, Value]]:
    """Relative errors at half of the multiply-adds."""
    for site, weight, name in (*((site, falling(site), name) for site, name in SITES), *trained()):
        for form in (half(site, name), half(site, name + PIVOT)):
            fmt = FORMATS.get(form.format)
            built = fmt.reconstruct(fmt.factorize(weight, site, form.rank), site)
            error = float((built - weight).norm() / weight.norm())
            share = fmt.cost(site, form.rank).macs / dense_cost(site).macs
            yield {
                "part": "error",
                "case": site.name,
                "budget": 0.5,
                "form": str(form),
                "macs_fraction": share,
                "error": error,
            }


def times() -> Iterator[dict[str, Value]]:
    """Seconds of one call, each form in the runtime of its front end that is fastest."""
    for frontend in ("torch", "onnx"):
        target = open_target("cpu", frontend)
        for site, name in SITES:
            rank = half(site, name).rank
            forms = [DENSE, *(Form(name + ending, rank) for ending in ("", PIVOT, LEAD))]
            dense = dense_cost(site).macs
            for form, timing in zip(forms, target.time(site, forms, Setting(), careful=True), strict=True):
                share = FORMATS.get(form.format).cost(site, form.rank).macs / dense
                yield {
                    "part": "time",
                    "case": site.name,
                    "form": str(form),
                    "macs_fraction": share,
                    "runtime": timing.kernel,
                    "seconds": timing.seconds,
                }


def accuracies(budgets: Sequence[float], images: int) -> Iterator[dict[str, Value]]:
    """ResNet-20 without training."""
    found, calibration = cifar.data(), cifar.calibration()
    x, labels = found.inputs("test")[:images], found.test.targets[:images]
    pipeline = "fold-batchnorm,{plan},factorize,correct-bias,refit,recalibrate-batchnorm,verify"
    for budget in budgets:
        for plan in ("plan", "plan{pivot=true}"):
            start = time.perf_counter()
            made = tdpass.compress(
                cifar.load_resnet("resnet20"),
                {"macs": budget},
                calibration,
                pipeline=pipeline.replace("{plan}", plan),
                strict=False,
            )
            seconds = time.perf_counter() - start
            with torch.no_grad():
                right = sum(
                    int((made.model(part).argmax(1) == wanted).sum())
                    for part, wanted in zip(x.split(250), labels.split(250), strict=True)
                )
            share = made.report.final.macs / made.report.original.macs
            row: dict[str, Value] = {"part": "accuracy", "case": "resnet20", "budget": budget, "form": plan}
            yield {
                **row,
                "macs_fraction": share,
                "seconds": seconds,
                "images": images,
                "accuracy": 100 * right / images,
            }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.4, 0.3])
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    table = Table("pivot.csv", COLUMNS)
    ways = {"error": errors, "time": times, "accuracy": lambda: accuracies(options.budgets, options.images)}
    for part in options.parts:
        for row in ways[part]():
            table.add(**row)
            print(show([row], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
