"""The GPU kernels against the dense layer and the unfused chain on the CUDA device of this machine.

    python -m benchmarks.bench_gpu                              # every case, to results/gpu.csv
    python -m benchmarks.bench_gpu --cases svd tucker2 --dtypes float16

Every case is timed five ways: the kernel (`fused`), the dense layer by cuBLAS or cuDNN (`dense`), the same
compiled with `max-autotune` (`dense-compiled`), the chain of its factors (`chain`) and that compiled
(`chain-compiled`).  All run in a CUDA graph, so that the time to launch them from Python is nobody's;
rounds go over the five in turn, between rounds the second-level cache is overwritten, and the median
counts.  Beside it stand two floors of the factored layer: its bytes (input, output, factors, each once)
over the bandwidth, and its FLOPs over the arithmetic rate, both of which are measured here, by a large copy
and a large product. Layers in int8, int4 and float8 (`benchmarks/gpu_low_precision.py`) stand beside the
same dense layer and chain in the type of x; their error is that of rounding weights too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases import Case, random
from benchmarks.gpu_low_precision import LOW_PRECISION
from benchmarks.results import Table, show, skip
from tdpass.kernels import gpu

COLUMNS = (
    "case",
    "shape",
    "dtype",
    "way",
    "microseconds",
    "low",
    "high",
    "error",
    "bytes_floor",
    "flops_floor",
    "over_dense",
    "over_chain",
    "device",
    "triton",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDS, FLUSH = 41, 256 << 20
Run = Callable[[], Tensor]


def svd(dtype: torch.dtype) -> Iterator[Case]:
    """Linear layers of a transformer, from one token to many."""
    from tdpass.kernels.gpu.svd_linear import svd_linear

    for tokens, i, o, r in (
        (1, 4096, 4096, 256),
        (128, 768, 3072, 192),
        (4096, 768, 3072, 128),
        (4096, 4096, 4096, 256),
        (8192, 4096, 11008, 1024),
    ):
        x, v, u = (
            random(tokens, i, fan=1, dtype=dtype),
            random(r, i, fan=i, dtype=dtype),
            random(o, r, fan=r, dtype=dtype),
        )
        yield Case(
            "svd",
            f"{tokens}x{i}x{o} r{r}",
            lambda x, w: F.gelu(F.linear(x, w)),
            lambda x, v, u: F.gelu(F.linear(F.linear(x, v), u)),
            lambda x, v, u: svd_linear(x, v, u, activation="gelu"),
            x,
            [v, u],
            u @ v,
            tokens * o,
            2 * tokens * r * (i + o),
        )


def tucker2(dtype: torch.dtype) -> Iterator[Case]:
    """3 x 3 convolutions of a residual network, channels last."""
    from tdpass.kernels.gpu.tucker2_conv2d import tucker2_conv2d

    for n, c, r, size in (
        (1, 256, 128, 14),
        (32, 64, 32, 56),
        (32, 128, 64, 28),
        (32, 256, 128, 14),
        (32, 512, 256, 7),
    ):
        x = random(n, c, size, size, fan=1, dtype=dtype).contiguous(memory_format=torch.channels_last)
        first, core, last = (
            random(r, c, 1, 1, fan=c, dtype=dtype),
            random(r, r, 3, 3, fan=9 * r, dtype=dtype),
            random(c, r, 1, 1, fan=r, dtype=dtype),
        )
        weight = torch.einsum("os,srhw,ri->oihw", last.flatten(1), core, first.flatten(1)).contiguous(
            memory_format=torch.channels_last
        )
        positions = n * size * size
        yield Case(
            "tucker2",
            f"{n}x{c}@{size} r{r}",
            lambda x, w: F.relu(F.conv2d(x, w, padding=1)),
            lambda x, first, core, last: F.relu(
                F.conv2d(F.conv2d(F.conv2d(x, first), core, padding=1), last)
            ),
            lambda x, first, core, last: tucker2_conv2d(
                x, first, core, last, activation="relu", padding=((1, 1), (1, 1))
            ),
            x,
            [first, core, last],
            weight,
            positions * c,
            2 * positions * r * (2 * c + 9 * r),
        )


def train(dtype: torch.dtype) -> Iterator[Case]:
    """Linear layers as tensor trains of two cores."""
    from tdpass.kernels.gpu.tt_linear import tt_linear

    for tokens, (o1, o2), (i1, i2), r in (
        (128, (48, 64), (24, 32), 4),
        (4096, (48, 64), (24, 32), 4),
        (4096, (64, 64), (64, 64), 8),
    ):
        x = random(tokens, i1 * i2, fan=1, dtype=dtype)
        a, b = random(1, o1, i1, r, fan=i1 * r, dtype=dtype), random(r, o2, i2, 1, fan=i2, dtype=dtype)

        def chain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            h = torch.einsum("nij,rbj->nirb", x.unflatten(1, (a.shape[2], -1)), b[..., 0])
            return torch.einsum("air,nirb->nab", a[0], h).flatten(1)

        weight = (
            torch.einsum("oir,rab->oaib", a[0].float(), b[..., 0].float()).reshape(o1 * o2, i1 * i2).to(dtype)
        )
        flops = 2 * tokens * r * (i1 * i2 * o2 + o1 * o2 * i1)
        shape = f"{tokens}x{i1 * i2}x{o1 * o2} r{r}"
        yield Case(
            "train",
            shape,
            F.linear,
            chain,
            lambda x, a, b: tt_linear(x, [a, b]),
            x,
            [a, b],
            weight,
            tokens * o1 * o2,
            flops,
        )


def block_term(dtype: torch.dtype) -> Iterator[Case]:
    """Linear layers as block terms."""
    from tdpass.kernels.gpu.block_term_linear import block_term_linear

    for tokens, p, i, o, (b, s, r) in ((128, 48, 64, 768, (4, 32, 32)), (4096, 48, 64, 768, (4, 32, 32))):
        x, first = random(tokens, p * i, fan=1, dtype=dtype), random(b * r, i, fan=i, dtype=dtype)
        core, last = random(b, p * r, s, fan=p * r, dtype=dtype), random(o, b * s, fan=b * s, dtype=dtype)

        def chain(x: Tensor, first: Tensor, core: Tensor, last: Tensor, p: int = p, b: int = b) -> Tensor:
            h = F.linear(x.unflatten(1, (p, -1)), first).unflatten(2, (b, -1)).permute(2, 0, 1, 3).flatten(2)
            return F.linear((h @ core).permute(1, 0, 2).flatten(1), last)

        whole = torch.einsum(
            "obs,bprs,bri->opi",
            last.unflatten(1, (b, s)),
            core.unflatten(1, (p, r)),
            first.unflatten(0, (b, r)),
        ).flatten(1)
        flops = 2 * tokens * b * (r * p * i + s * (r * p + o))
        yield Case(
            "block_term",
            f"{tokens}x{p * i}x{o} ({b},{s},{r})",
            F.linear,
            chain,
            block_term_linear,
            x,
            [first, core, last],
            whole,
            tokens * o,
            flops,
        )


CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "svd": svd,
    "tucker2": tucker2,
    "train": train,
    "block_term": block_term,
    **LOW_PRECISION,
}


def in_graph(run: Run) -> Callable[[], None]:
    """The run as a CUDA graph, after runs that compile and tune.

    The output of the graph lives as long as it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: Tensor = kept) -> None:
        graph.replay()

    return replay


def measure(runs: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float, float]]:
    """Median, 10th and 90th percentile in seconds, runs in turn, each with a cold second-level cache."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    trash = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for _ in range(ROUNDS):
        for name, run in runs.items():
            trash.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    deciles = {name: statistics.quantiles(seen, n=10) for name, seen in times.items()}
    return {
        name: (statistics.median(seen), deciles[name][0], deciles[name][-1]) for name, seen in times.items()
    }


def peaks(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and FLOPs per second that a large copy and a large product reach."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    size = 8192
    a, b, c = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(3))

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(a, b, out=c)

    for _ in range(3):
        copy()
        multiply()
    found = measure({"copy": copy, "multiply": multiply})
    return 2 * source.numel() / found["copy"][0], 2 * size**3 / found["multiply"][0]


def run_case(case: Case, dtype: torch.dtype, floors: tuple[float, float], table: Table) -> None:
    """Time one layer in every way and write a row for each."""
    import triton

    torch.compiler.reset()
    options = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
    ways: dict[str, Run] = {"fused": lambda: case.fused(case.x, *case.factors)}
    for name, function, weights in (
        ("dense", case.dense, [case.weight]),
        ("chain", case.chain, case.factors),
    ):
        compiled = torch.compile(function, **options)
        ways[name] = lambda function=function, weights=weights: function(case.x, *weights)
        ways[f"{name}-compiled"] = lambda compiled=compiled, weights=weights: compiled(case.x, *weights)
    exact = case.chain(case.x.double(), *(factor.double() for factor in case.factors))
    errors = {name: float((run().double() - exact).norm() / exact.norm()) for name, run in ways.items()}
    found = measure({name: in_graph(run) for name, run in ways.items()})
    dense, chain = (min(found[name][0], found[f"{name}-compiled"][0]) for name in ("dense", "chain"))
    bandwidth, rate = floors
    for name, (median, low, high) in found.items():
        table.add(
            case=case.name,
            shape=case.shape,
            dtype=str(dtype).removeprefix("torch."),
            way=name,
            microseconds=1e6 * median,
            low=1e6 * low,
            high=1e6 * high,
            error=errors[name],
            bytes_floor=1e6 * case.bytes / bandwidth,
            flops_floor=1e6 * case.flops / rate,
            over_dense=dense / median,
            over_chain=chain / median,
            device=torch.cuda.get_device_name(),
            triton=triton.__version__,
        )


def main() -> None:
    """Run the benchmark; without a device, say so and stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--output", default="gpu.csv", help="a file name in benchmarks/results, or a path")
    arguments = parser.parse_args()
    if not gpu.available():
        skip(f"there is no device for the GPU kernels here: {gpu.missing()}")
    # Every way multiplies float32 in tf32, the kernels too: they follow torch's settings.
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    table = Table(arguments.output, COLUMNS)
    with torch.no_grad():
        for name in arguments.dtypes:
            floors = peaks(DTYPES[name])
            for case in (case for kind in arguments.cases for case in CASES[kind](DTYPES[name])):
                run_case(case, DTYPES[name], floors, table)
                print(show(table.rows[-5:], COLUMNS[:12]), flush=True)


if __name__ == "__main__":
    main()
