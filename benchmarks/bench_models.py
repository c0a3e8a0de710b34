"""Whole networks: low rank as a plain chain and with fused operators, over the best dense of all runtimes.

    python -m benchmarks.bench_models                         # results/models.csv
    python -m benchmarks.bench_models --nets resnet18 --threads 2
    python -m benchmarks.bench_models --dtype fp32,bf16,int8  # results/model_dtypes.csv, with output errors

Random weights: speed only.  Ranks are the same share of the channels everywhere, on the grid of 16 (8 for
CIFAR), at the given cut in multiply-adds.  All candidates of a network run in one process, in turn; processor
time at one thread, least wall time at two; everything float32.  `chain` is the best runtime's plain chain,
`fused` the best of torch with backend="tdpass", its weights frozen or not, and ONNX Runtime with the operator
library.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import tdpass
from benchmarks import model_dtypes, recurrent_dtypes
from benchmarks.nets import NETS, Net, Recurrent, exported
from benchmarks.results import Table, Value, show
from tdpass.clock import on_cpu, threads_of_torch
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import dense_cost
from tdpass.models import Batch, open_model
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.site import Site
from tdpass.targets.runtimes import RUNTIMES, inductor

COLUMNS = ("net", "batch", "threads", "macs_ratio", "candidate", "ms", "over_best_dense")
BAR_COLUMNS = ("net", "batch", "threads", "what", "bar", "measured", "met", "by")
ROUNDS = 11
Calls = dict[str, Callable[[], object]]

# net, batch: bar of the best plain chain and of the best with fused operators, over the best dense
BARS = {
    ("resnet18", 1): (2.5, 2.65),
    ("resnet18", 8): (2.45, 2.6),
    ("resnet50", 1): (2.4, 2.5),
    ("resnet20", 1): (1.35, 1.5),
    ("resnet20", 64): (1.45, 1.6),
    ("encoder", 1): (2.2, 2.5),
    ("encoder", 8): (2.2, 2.4),
    ("lstm", 1): (2.8, 3.2),
}


def uniform_plan(net: Net, model: nn.Module, x: Tensor) -> RankPlan:
    """The largest common share of the channels that reaches the cut.

    Layers that would not get cheaper stay dense.
    """
    opened = tdpass.compress(model, pipeline="fold-batchnorm", example_inputs=x, exclude=net.exclude).opened
    sites = [
        site
        for site in opened.sites()
        if not any(site.name.startswith(name.rstrip("*")) for name in net.exclude)
    ]
    whole = sum(dense_cost(site).macs for site in opened.sites())
    for step in range(100, 0, -1):
        choices = tuple(_choice(net, site, step / 100) for site in sites)
        saved = sum(choice.dense.macs - choice.cost.macs for choice in choices)
        if whole / (whole - saved) >= net.cut:
            break
    return RankPlan(choices, tdpass.Cost(0, whole, 0))


def _choice(net: Net, site: Site, share: float) -> Choice:
    dense = dense_cost(site)
    name = net.formats.get(site.kernel[0] if site.kernel else 0)
    if name is not None and FORMATS.get(name).fits(site):
        limits = (site.o, site.i) if name == "tucker2" else (min(site.o, site.i),)
        rank = tuple(max(net.grid, round(share * limit / net.grid) * net.grid) for limit in limits)
        cost = (
            FORMATS.get(name).cost(site, rank)
            if all(r <= limit for r, limit in zip(rank, limits, strict=True))
            else dense
        )
        if cost.macs < dense.macs:
            return Choice(site.name, site.shape, Form(name, rank), cost, dense)
    return Choice(site.name, site.shape, DENSE, dense, dense)


def candidates(net: Net, batch: int, threads: int) -> tuple[Calls, float]:
    """Everything to be timed, by name, and the cut in multiply-adds."""
    model, x = net.build(), net.input(batch)
    plan = uniform_plan(net, model, x)
    factored = tdpass.compress(model, plan=plan, pipeline="fold-batchnorm,factorize", example_inputs=x).model
    assert isinstance(factored, nn.Module)
    calls: Calls = {}
    for form, module in (("dense", model), ("chain", factored)):
        calls |= {f"{form} {name}": call for name, call in _in_runtimes(module, x, threads)}
    module = factored.to(memory_format=torch.channels_last) if x.dim() == 4 else factored
    seen = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    for label, options in (("fused torch", {}), ("fused torch frozen", {"freeze": True})):
        compiled = torch.compile(module, backend="tdpass", options=options)
        compiled(seen)
        calls[label] = functools.partial(compiled, seen)
    fused = tdpass.compress(
        exported(factored, x), plan=RankPlan((), plan.original), pipeline="fuse-kernels", example_inputs=x
    )
    call = RUNTIMES.get("onnxruntime").prepare_model(fused.opened, Batch((x,), {}), threads)
    if call is not None:
        calls["fused onnxruntime"] = call
    return calls, plan.original.macs / plan.planned.macs


def _in_runtimes(module: nn.Module, x: Tensor, threads: int) -> Iterator[tuple[str, Callable[[], object]]]:
    torch_model, onnx_model = open_model(module, x), open_model(exported(module, x), None)
    for name in ("eager", "inductor", "onnxruntime", "openvino"):
        runtime = RUNTIMES.get(name)
        if runtime.available():
            for model in (torch_model, onnx_model):
                if (call := runtime.prepare_model(model, Batch((x,), {}), threads)) is not None:
                    yield name, call
    # compiled for sizes that vary, linear layers go to another library
    if x.dim() == 3 and (call := inductor.compiled(module, Batch((x,), {}), dynamic=True)) is not None:
        yield "inductor dynamic", call


def lstm(threads: int) -> tuple[Calls, float]:
    """Two layers of 512, 100 steps, one sample; input and recurrent weights of rank 128."""
    model, x = Recurrent().eval(), torch.randn(1, 100, 512, generator=torch.Generator().manual_seed(0))
    calls = {f"dense {name}": call for name, call in _in_runtimes(model, x, threads)}
    opened, svd = tdpass.open_recurrent(model), FORMATS.get("svd")
    sites = open_model(opened, x).sites()
    choices = tuple(
        Choice(site.name, site.shape, Form("svd", (128,)), svd.cost(site, (128,)), dense_cost(site))
        for site in sites
    )
    plan = RankPlan(choices, sum((choice.dense for choice in choices), tdpass.Cost()))
    small = tdpass.compress(opened, plan=plan, pipeline="factorize", example_inputs=x).model
    assert isinstance(small, nn.Module)
    calls["fused torch"] = lambda: small(x)
    return calls, plan.original.macs / plan.planned.macs


def measure(
    name: str, batch: int, threads: int, rounds: int
) -> tuple[list[dict[str, Value]], list[dict[str, Value]]]:
    """Rows of times, and of what they say of the bars."""
    with threads_of_torch(threads):
        calls, cut = lstm(threads) if name == "lstm" else candidates(NETS[name], batch, threads)
        seconds = dict(
            zip(calls, on_cpu(list(calls.values()), threads, rounds, least=0.02, warm_up=0.2), strict=True)
        )
    dense = min(value for key, value in seconds.items() if key.startswith("dense"))
    head = {"net": name, "batch": batch, "threads": threads}
    rows = [
        {**head, "macs_ratio": cut, "candidate": key, "ms": value * 1e3, "over_best_dense": dense / value}
        for key, value in seconds.items()
    ]
    bars = []
    for what, bar in zip(("chain", "fused"), BARS[name, batch], strict=True):
        found = {
            key: value
            for key, value in seconds.items()
            if key.startswith(what) or (what == "fused" and key.startswith("fused"))
        }
        if found:
            best = min(found, key=found.__getitem__)
            ratio = dense / found[best]
            bars.append(
                {
                    **head,
                    "what": what,
                    "bar": bar,
                    "measured": ratio,
                    "met": str(ratio >= bar).lower(),
                    "by": best.split(maxsplit=1)[1],
                }
            )
    return rows, bars


def by_dtype(options: argparse.Namespace) -> None:
    """Measure the networks in every type that is asked for."""
    dtypes = tuple(options.dtype.split(","))
    unknown = [dtype for dtype in dtypes if dtype not in model_dtypes.DTYPES]
    if unknown:
        raise SystemExit(f"--dtype {unknown[0]} is not known; give some of {','.join(model_dtypes.DTYPES)}")
    table = Table(options.output or "model_dtypes.csv", model_dtypes.COLUMNS)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, batch in (*BARS, ("gru", 1)):
            if name not in options.nets or batch not in (options.batches or (batch,)):
                continue
            torch.compiler.reset()
            rows = _rows_by_dtype(name, batch, threads, dtypes, options.rounds)
            for row in rows:
                table.add(**row)
            print(show(rows, model_dtypes.COLUMNS), end="\n\n", flush=True)


def _rows_by_dtype(
    name: str, batch: int, threads: int, dtypes: tuple[str, ...], rounds: int
) -> list[dict[str, Value]]:
    if name in recurrent_dtypes.KINDS:
        return recurrent_dtypes.rows_of(name, batch, threads, dtypes, rounds)
    net = NETS[name]
    plan = uniform_plan(net, net.build(), net.input(batch))
    return model_dtypes.rows_of(net, plan, batch, threads, dtypes, rounds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--nets",
        nargs="+",
        default=sorted({name for name, _ in BARS}),
        choices=sorted({name for name, _ in BARS} | {"gru"}),
        help="gru with --dtype alone",
    )
    parser.add_argument("--batches", nargs="+", type=int, help="only these batch sizes")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often all are timed in turn")
    parser.add_argument("--output", help="file under results/, or a path")
    parser.add_argument("--bars", default="model_bars.csv", help="file under results/, or a path")
    parser.add_argument(
        "--dtype",
        help=f"types joined by commas, of {', '.join(model_dtypes.DTYPES)}: times and errors of each",
    )
    options = parser.parse_args()
    if options.dtype:
        by_dtype(options)
        return
    table, verdicts = Table(options.output or "models.csv", COLUMNS), Table(options.bars, BAR_COLUMNS)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, batch in BARS:
            if name in options.nets and batch in (options.batches or (batch,)):
                torch.compiler.reset()
                rows, bars = measure(name, batch, threads, options.rounds)
                for row in rows:
                    table.add(**row)
                for row in bars:
                    verdicts.add(**row)
                print(show(rows, COLUMNS), show(bars, BAR_COLUMNS), sep="\n\n", end="\n\n", flush=True)


if __name__ == "__main__":
    main()
