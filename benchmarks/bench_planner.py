"""Time and peak memory to decompose and plan.

ResNet-18 and ResNet-50, single large layers, and an ONNX file larger than memory.

    python -m benchmarks.bench_planner                        # every case, to results/planner.csv
    python -m benchmarks.bench_planner --cases svd_4096x11008 onnx_2.5GiB

Each case runs in a process of its own, so that its peak resident memory, Python and torch included, is its
own.  Weights are random with decaying spectra; nothing is read and no calibration data is used, so these are
the costs of the decompositions, of the planner and of rewriting, not of measuring sensitivities.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tdpass
from benchmarks.results import Table, show
from tdpass.formats import FORMATS
from tdpass.formats.metric import Metric
from tdpass.site import Site
from tdpass.zoo.resnet import ResNet

COLUMNS = ("case", "seconds", "peak_mib", "goal", "met", "detail")
Figures = dict[str, str | float]


def resnet(depth: int) -> ResNet:
    """ResNet-18 or ResNet-50 with weights of decaying spectra."""
    blocks, bottleneck = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}[depth]
    model, generator = ResNet(blocks, bottleneck), torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight = nn.Parameter(decaying(module.weight.shape, generator))
    return model.eval()


def decaying(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random weight whose k-th singular value falls about as 1 / sqrt(k), as those of trained layers do."""
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(rows, columns)
    scale = torch.arange(1, rank + 1).float().rsqrt()
    left, right = (
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
    )
    weight = (left * scale) @ right
    return (weight * (2 / columns) ** 0.5 / weight.std()).reshape(shape)


def network(depth: int, formats: tuple[str, ...] = ()) -> Figures:
    """Plan and carry out half the multiply-adds of a ResNet, all formats unless restricted."""
    model = resnet(depth)
    start = time.perf_counter()
    artifact = tdpass.compress(
        model, {"macs": 0.5}, example_inputs=torch.zeros(1, 3, 224, 224), formats=formats, cache=False
    )
    seconds = time.perf_counter() - start
    macs = artifact.plan.planned.macs / artifact.plan.original.macs
    chosen = sorted({choice.format for choice in artifact.plan})
    return {
        "seconds": seconds,
        "detail": (
            f"{len(artifact.plan.choices)} sites, {macs:.3f} of the multiply-adds, chosen: {' '.join(chosen)}"
        ),
    }


def tucker2_kernels() -> Figures:
    """Tucker-2 at half the channels of the 16 3x3 kernels of ResNet-50, from the weights alone."""
    sites = [
        Site(name, "conv", tuple(conv.weight.shape), (1, 1), ((1, 1), (1, 1)), (1, 1))
        for name, conv in resnet(50).named_modules()
        if _is_3x3(conv)
    ]
    generator = torch.Generator().manual_seed(0)
    weights = [decaying(site.shape, generator).double() for site in sites]
    FORMATS.get("tucker2").decompose(weights[0], sites[0], Metric()).factors(
        (8, 8)
    )  # first use of the linear algebra library
    start = time.perf_counter()
    for weight, site in zip(weights, sites, strict=True):
        FORMATS.get("tucker2").decompose(weight, site, Metric()).factors((site.o // 2, site.i // 2))
    return {"seconds": time.perf_counter() - start, "detail": f"{len(sites)} kernels"}


def _is_3x3(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def large_svd(rows: int = 4096, columns: int = 11008, rank: int = 1024) -> Figures:
    """One layer of a 7-billion-parameter language model at a quarter of its rank."""
    site = Site("down", "linear", (rows, columns))
    weight = decaying(site.shape, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    factors = FORMATS.get("svd").factorize(weight, site, (rank,))
    seconds = time.perf_counter() - start
    error = float(
        (
            weight
            - FORMATS.get("svd").reconstruct({name: factor.float() for name, factor in factors.items()}, site)
        ).norm()
        / weight.norm()
    )
    return {"seconds": seconds, "detail": f"relative error {error:.4f}"}


def write_large_onnx(path: Path, layers: int = 160, width: int = 1024, inner: int = 4096) -> None:
    """A chain of MatMul and Relu with external data, 2.5 GiB, written with one weight in memory at a time."""
    import onnx
    from onnx import TensorProto, helper

    generator, nodes, weights, offset = torch.Generator().manual_seed(0), [], [], 0
    pool = [decaying((inner, width), generator).numpy() for _ in range(4)]
    with path.with_suffix(".data").open("wb") as data:
        for layer in range(layers):
            dims = (width, inner) if layer % 2 == 0 else (inner, width)
            # scaled a little, so that no two initializers are equal
            values = np.ascontiguousarray(
                (pool[layer % 4].T if layer % 2 == 0 else pool[layer % 4]) * np.float32(1 + layer / 1000)
            )
            tensor = TensorProto(
                name=f"w{layer}", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL
            )
            for key, value in (
                ("location", path.with_suffix(".data").name),
                ("offset", str(offset)),
                ("length", str(values.nbytes)),
            ):
                tensor.external_data.add(key=key, value=value)
            data.write(values.tobytes())
            offset += values.nbytes
            weights.append(tensor)
            nodes += [
                helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"y{layer}"]),
                helper.make_node("Relu", [f"y{layer}"], [f"x{layer + 1}"]),
            ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def large_onnx() -> Figures:
    """Half the parameters of a 2.5 GiB file with external data, by svd, read, rewritten and saved."""
    folder = Path(os.environ["TDPASS_BENCH_FOLDER"])
    start = time.perf_counter()
    tdpass.compress(folder / "large.onnx", {"params": 0.5}, formats=("svd",), cache=False).save(
        folder / "small.onnx"
    )
    seconds = time.perf_counter() - start
    before, after = (
        sum(path.stat().st_size for path in folder.glob(f"{stem}.*")) / 2**30 for stem in ("large", "small")
    )
    return {"seconds": seconds, "detail": f"{before:.2f} GiB to {after:.2f} GiB"}


CASES: Mapping[
    str, tuple[Callable[[], Figures], str, float]
] = {  # what runs, the figure that has a goal, and the goal
    "resnet18_all_formats": (lambda: network(18), "seconds", 30),
    "resnet50_all_formats": (lambda: network(50), "seconds", math.inf),
    "resnet50_tucker2_3x3": (tucker2_kernels, "seconds", 1),
    "svd_4096x11008_rank_1024": (large_svd, "seconds", 15),
    "onnx_2.5GiB": (large_onnx, "peak_mib", 1024),
}


def peak_mib() -> float:
    """Peak resident memory of this process.

    Where /proc tells, without what its parent held when it was started.
    """
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (int(own[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def run_case(name: str) -> dict[str, str | float]:
    """A case in a process of its own; raises `CalledProcessError` when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("onnx"):
            write_large_onnx(Path(folder) / "large.onnx")
        command = [sys.executable, "-m", "benchmarks.bench_planner", "--inside", name]
        done = subprocess.run(
            command,
            env={**os.environ, "TDPASS_BENCH_FOLDER": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    figures: dict[str, str | float] = json.loads(done.stdout.splitlines()[-1])
    _, figure, goal = CASES[name]
    bounded = math.isfinite(goal)
    return {
        "case": name,
        **figures,
        "goal": f"{figure} < {goal:g}" if bounded else "",
        "met": str(float(figures[figure]) < goal).lower() if bounded else "",
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--inside", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        figures = CASES[options.inside][0]()
        print(json.dumps({**figures, "peak_mib": peak_mib()}))
        return
    table = Table("planner.csv", COLUMNS)
    for name in options.cases:
        try:
            table.add(**run_case(name))
        except subprocess.CalledProcessError as error:
            print(f"{name}: failed with exit code {error.returncode}")
            continue
        print(show(table.rows[-1:], COLUMNS), flush=True)
    print(f"\n{show(table.rows, COLUMNS)}")


if __name__ == "__main__":
    main()
