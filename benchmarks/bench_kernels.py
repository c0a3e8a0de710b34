"""Fused operators against the best a user would pick, layer by layer.

These are dense and the unfused chain in every runtime.

    python -m benchmarks.bench_kernels                   # results/kernels.csv and results/kernel_goals.csv
    python -m benchmarks.bench_kernels --cases "cifar 16" --threads 1
    python -m benchmarks.bench_kernels --dtype bfloat16  # results/kernels_bfloat16.csv

In bfloat16 they run in torch alone, and without goals.  All candidates of a layer run in one process, in
turn and in shuffled order; processor time at one thread, least wall time at two.  The fused operator is the
best of those in torch and in ONNX Runtime.  Freed memory is kept by the process: ONNX Runtime writes to
memory bound beforehand, and torch's new outputs would be given back to the system and cleared by it in
every call. `macs_ratio` is dense over factored multiply-adds; a ratio of times that reaches it loses
nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.results import Table, Value, show
from tdpass.clock import on_cpu, threads_of_torch
from tdpass.form import DENSE
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import dense_cost
from tdpass.site import Site
from tdpass.targets.layers import make_layer
from tdpass.targets.runtimes import RUNTIMES

COLUMNS = (
    "case", "group", "format", "rank", "batch", "threads", "macs_ratio", "fused_us", "over_best_dense",
    "efficiency", "over_best_chain", "over_inductor_chain", "over_eager_chain", "best_dense", "best_dense_us",
    "best_chain", "best_chain_us", "fused_in",
)  # fmt: skip
GOAL_COLUMNS = ("goal", "what", "bar", "measured", "met", "layers")
BASELINES = ("eager", "inductor", "onnxruntime", "openvino")
FUSED = ("kernels-channels", "kernels-pixels", "onnxruntime-kernels-channels", "onnxruntime-kernels-pixels")
ROUNDS = 15


@dataclass(frozen=True)
class Case:
    """A layer, its format and rank, and the group of goals it counts for."""

    group: str
    site: Site
    format: str
    rank: tuple[int, ...]
    batches: tuple[int, ...] = (1,)

    @property
    def name(self) -> str:
        """Shape, rank and size as text."""
        size = "x".join(map(str, self.site.extents[0][0]))
        return (
            f"{self.group} {'x'.join(map(str, self.site.shape))}@{size} rank {'x'.join(map(str, self.rank))}"
        )


def conv(channels: int, size: int, kernel: int = 3) -> Site:
    """A square convolution of stride 1 that keeps the size."""
    pads = ((kernel // 2, kernel // 2),) * 2
    return Site(
        "conv",
        "conv",
        (channels, channels, kernel, kernel),
        (1, 1),
        pads,
        (1, 1),
        True,
        extents=(((size, size), (size, size)),),
    )


def linear(outputs: int, inputs: int, tokens: int) -> Site:
    """A linear layer on that many tokens."""
    return Site("linear", "linear", (outputs, inputs), bias=True, extents=(((tokens,), (tokens,)),))


CASES: tuple[Case, ...] = (
    *(
        Case("tucker2", conv(c, size), "tucker2", (r, r), (1, 8))
        for c, r, size in ((256, 128, 14), (128, 64, 28), (64, 32, 56))
    ),
    *(
        Case("tucker2", conv(c, size), "tucker2", (r, r))
        for c, r, size in ((256, 96, 14), (128, 32, 28), (512, 256, 14), (512, 224, 28))
    ),
    *(
        Case("cifar", conv(c, size), "tucker2", (r, r), (1, 64))
        for c, r, size in ((16, 8, 32), (32, 16, 16), (32, 8, 16), (64, 32, 8))
    ),
    *(
        Case("cifar", conv(c, size), "tucker2", (r, r), (1, 64))
        for c, r, size in ((64, 24, 8), (64, 16, 8), (64, 24, 32))
    ),
    *(
        Case("cp", conv(c, size), "cp", (r,), (1, 8))
        for c, r, size in ((256, 384, 14), (128, 192, 28), (64, 96, 56))
    ),
    *(
        Case("block_term", conv(c, size), "block_term", (4, r // 4, r // 4))
        for c, r, size in ((256, 256, 14), (128, 128, 28))
    ),
    *(
        Case("spatial_svd", conv(c, size), "spatial_svd", (r,))
        for c, r, size in ((256, 128, 14), (64, 32, 56))
    ),
    *(Case("svd", linear(768, 3072, tokens), "svd", (192,)) for tokens in (32, 128, 512)),
    *(Case("svd one token", linear(o, i, 1), "svd", (192,)) for o, i in ((768, 3072), (3072, 768))),
    *(
        Case("tensor_train", linear(3072, 768, tokens), "tensor_train", (4, 4, 4))
        for tokens in (32, 128, 512)
    ),
    *(
        Case("break-even", conv(c, size), "tucker2", (r, r))
        for c, r, size in ((64, 52, 56), (128, 104, 28), (256, 208, 14))
    ),
    *(
        Case("break-even", conv(c, size), "tucker2", (r, r))
        for c, r, size in ((16, 12, 32), (32, 23, 16), (64, 46, 8))
    ),
)


def measure(case: Case, batch: int, threads: int, dtype: torch.dtype) -> dict[str, Value]:
    """One row: the fused operator against dense and chain in every runtime."""
    dense = make_layer(case.site, DENSE, dtype)
    factored = make_layer(case.site, case.form, dtype)
    calls: dict[str, Callable[[], Tensor]] = {}
    with threads_of_torch(threads):
        for name in BASELINES:
            if RUNTIMES.get(name).available():
                for form, layer in (("dense", dense), ("chain", factored)):
                    if (call := RUNTIMES.get(name).prepare(layer, batch, threads)) is not None:
                        calls[f"{form} {name}"] = call
        for name in FUSED:
            if (call := RUNTIMES.get(name).prepare(factored, batch, threads)) is not None:
                calls[f"fused {name}"] = call
    seconds = dict(zip(calls, on_cpu(list(calls.values()), threads, ROUNDS, least=0.01), strict=True))
    best = {
        form: min((name for name in seconds if name.startswith(form)), key=seconds.__getitem__)
        for form in ("dense", "chain", "fused")
    }
    macs_ratio = dense_cost(case.site).macs / FORMATS.get(case.format).macs(case.site, case.rank)
    ours = seconds[best["fused"]]
    return {
        "case": case.name, "group": case.group, "format": case.format,
        "rank": "x".join(map(str, case.rank)), "batch": batch, "threads": threads,
        "macs_ratio": macs_ratio, "fused_us": ours * 1e6, "over_best_dense": seconds[best["dense"]] / ours,
        "efficiency": seconds[best["dense"]] / ours / macs_ratio,
        "over_best_chain": seconds[best["chain"]] / ours,
        "over_inductor_chain": seconds["chain inductor"] / ours if "chain inductor" in seconds else None,
        "over_eager_chain": seconds["chain eager"] / ours,
        "best_dense": best["dense"].split()[1], "best_dense_us": seconds[best["dense"]] * 1e6,
        "best_chain": best["chain"].split()[1], "best_chain_us": seconds[best["chain"]] * 1e6,
        "fused_in": best["fused"].split()[1],
    }  # fmt: skip


Rows = Sequence[Mapping[str, Value]]


@dataclass(frozen=True)
class Goal:
    """A bar on a statistic of the rows that it picks."""

    name: str
    what: str
    bar: float
    picks: Callable[[Mapping[str, Value]], bool]
    column: str
    statistic: Callable[[Sequence[float]], float] = min

    def row(self, rows: Rows) -> dict[str, Value] | None:
        """The verdict; None where no row was measured."""
        values = [float(row[self.column] or 0) for row in rows if self.picks(row)]
        if not values:
            return None
        measured = self.statistic(values)
        met = str(measured >= self.bar).lower()
        return {
            "goal": self.name,
            "what": self.what,
            "bar": self.bar,
            "measured": measured,
            "met": met,
            "layers": len(values),
        }


def picks(
    group: str, threads: int | None = None, batch: int | None = None, part: str = ""
) -> Callable[[Mapping[str, Value]], bool]:
    """Rows of a group, perhaps of one thread count, one batch size, or with this text in their names."""
    return lambda row: (
        row["group"] == group
        and threads in (None, row["threads"])
        and batch in (None, row["batch"])
        and part in str(row["case"])
    )


mean = statistics.geometric_mean
GOALS = (
    Goal("G1", "Tucker-2, C >= 64, over best dense / FLOP ratio, 1 thread", 0.90,
         picks("tucker2", 1), "efficiency"),
    Goal("G1b", "the same, 2 threads", 0.85, picks("tucker2", 2), "efficiency"),
    Goal("G2", "over the best chain, 1 thread, worst layer", 0.97, picks("tucker2", 1), "over_best_chain"),
    Goal("G2", "over the best chain, 1 thread, geometric mean", 1.05,
         picks("tucker2", 1), "over_best_chain", mean),
    Goal("G2", "over the best chain, 2 threads, batch 1, geometric mean", 1.10,
         picks("tucker2", 2, 1), "over_best_chain", mean),
    Goal("G3", "over the inductor chain, batch 1, 1 thread", 1.2,
         picks("tucker2", 1, 1), "over_inductor_chain"),
    Goal("G3", "over the inductor chain, batch 1, 2 threads", 1.4,
         picks("tucker2", 2, 1), "over_inductor_chain"),
    Goal("G3", "over the eager chain, batch 1, 1 thread", 1.5, picks("tucker2", 1, 1), "over_eager_chain"),
    Goal("G4", "CIFAR layers over the best chain, batch 1, geometric mean", 1.7,
         picks("cifar", 1, 1), "over_best_chain", mean),
    Goal("G4", "the same, batch 64", 1.3, picks("cifar", 1, 64), "over_best_chain", mean),
    Goal("G4", "16(8)@32 over the best chain, batch 1", 3.0,
         picks("cifar", 1, 1, "16x16x3x3"), "over_best_chain"),
    Goal("G4b", "32(16)@16 over best dense, batch 1", 2.0,
         picks("cifar", 1, 1, "32x32x3x3@16x16 rank 16"), "over_best_dense"),
    Goal("G4b", "64(32)@8 over best dense, batch 1", 2.0,
         picks("cifar", 1, 1, "64x64x3x3@8x8 rank 32"), "over_best_dense"),
    Goal("G4b", "16(8)@32 over best dense, batch 1", 3.0,
         picks("cifar", 1, 1, "16x16x3x3"), "over_best_dense"),
    Goal("G5", "CP over best dense, batch 1", 2.4, picks("cp", 1, 1), "over_best_dense"),
    Goal("G5", "CP over the best chain, batch 8", 1.1, picks("cp", 1, 8), "over_best_chain"),
    Goal("G5", "CP 64@56 over the best chain, batch 8", 1.35, picks("cp", 1, 8, "64x64"), "over_best_chain"),
    Goal("G6", "tensor train, 4 cores, over best dense", 3.2, picks("tensor_train", 1), "over_best_dense"),
    Goal("G6", "tensor train, 4 cores, over the best chain", 1.6,
         picks("tensor_train", 1), "over_best_chain"),
    Goal("G6", "tensor train, 4 cores, over the eager chain", 4.0,
         picks("tensor_train", 1), "over_eager_chain"),
    Goal("G7", "SVD linear, 32-512 tokens, over best dense / FLOP ratio", 0.95,
         picks("svd", 1), "efficiency"),
    Goal("G7", "SVD linear, over the best chain", 1.03, picks("svd", 1), "over_best_chain"),
    Goal("G7b", "SVD linear, one token, over the best chain", 0.97,
         picks("svd one token", 1), "over_best_chain"),
    Goal("G9", "break-even: layers with 1.2x fewer multiply-adds (C >= 64) or 1.5x (CIFAR) over best dense",
         1.0, picks("break-even", 1), "over_best_dense"),
)  # fmt: skip


def keep_freed_memory() -> None:
    """Let glibc give nothing back to the system.

    Torch's guide to CPU performance advises it by way of other allocators.
    """
    trim_threshold, mmap_threshold = -1, -3
    library = ctypes.CDLL(None)
    for option, value in ((trim_threshold, 2**31 - 1), (mmap_threshold, 2**30)):
        library.mallopt(option, value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--cases", nargs="+", default=[""], help="only cases whose names contain one of these"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--output", help="file under results/, or a path (default: kernels.csv, kernels_bfloat16.csv)"
    )
    parser.add_argument("--goals", default="kernel_goals.csv", help="file under results/, or a path")
    options = parser.parse_args()
    keep_freed_memory()
    plain = options.dtype == "float32"
    table = Table(options.output or ("kernels.csv" if plain else f"kernels_{options.dtype}.csv"), COLUMNS)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in CASES:
            if any(part in case.name for part in options.cases):
                for batch in case.batches:
                    table.add(**measure(case, batch, threads, getattr(torch, options.dtype)))
                    print(show(table.rows[-1:], COLUMNS[:11]).splitlines()[-1], flush=True)
    goals = Table(options.goals, GOAL_COLUMNS)
    for goal in GOALS if plain else ():
        if (row := goal.row(table.rows)) is not None:
            goals.add(**row)
    print(f"\n{show(table.rows, COLUMNS)}\n\n{show(goals.rows, GOAL_COLUMNS)}")


if __name__ == "__main__":
    main()
