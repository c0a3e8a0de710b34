"""What precision gains per layer shape, up to which rank low rank pays, and from which sparsity zeros do.

    python -m benchmarks.bench_bits                                  # results/bits.csv and docs/bits.svg
    python -m benchmarks.bench_bits --layers bert --runtimes onnxruntime --output /tmp/a.csv --plot /tmp/a.svg
    python -m benchmarks.bench_bits --draw                           # the plot alone, from what the CSV holds

Each layer is a network of its own with weights of noise, run as in `bench_models --dtype`; the best runtime
of each type counts, of `--runtimes` where these are named.  `us_at_0.25` is the time at a quarter of the
multiply-adds, `break_even` the largest share of them at which low rank is no slower than dense in the same
type.  `rows_pay_from` and `channels_pay_from` are the shares of outputs and of input channels that are left
out from which on the smaller layer, with what gathers and places, is faster than dense; `weights_pay_from`
that of single zeros in the sparse operator: in single precision, in the same runtimes.  Rows that the file
holds already of this machine are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.bench_break_even import LAYERS
from benchmarks.bench_kernels import keep_freed_memory
from benchmarks.figures import figure
from benchmarks.model_dtypes import DTYPES, candidates
from benchmarks.results import Table, Value, show
from tdpass.clock import on_cpu, threads_of_torch
from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import dense_cost
from tdpass.kinds import kind_of
from tdpass.layers.factorized import Factorized
from tdpass.site import Site
from tdpass.targets import Setting
from tdpass.targets.cpu import CpuTarget
from tdpass.targets.layers import make_layer
from tdpass.targets.runtimes import RUNTIMES
from tdpass.views.html import Html, tag

SHARES = (0.75, 0.5, 0.25, 0.125)
TIMES = tuple(f"us_at_{share:g}" for share in SHARES)
PAY = {"row": "rows_pay_from", "channel": "channels_pay_from", "weight": "weights_pay_from"}
COLUMNS = (
    "layer",
    "shape",
    "dtype",
    "threads",
    "batch",
    "dense_runtime",
    "dense_us",
    *TIMES,
    "break_even",
    *PAY.values(),
)
TARGET_RUNTIMES = ("eager", "inductor", "onnxruntime", "openvino")
ROUNDS, NEVER = 7, "never"
PLOT = Path(__file__).parents[1] / "docs" / "bits.svg"
LEFT, TOP, WIDE, HIGH, GAP, ACROSS = 60, 40, 170, 110, 45, 4
STYLE = """
svg { --ground: #ffffff; --ink: #1f2328; --faint: #d0d7de; font: 11px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ground: #0d1117; --ink: #e6edf3; --faint: #3d444d; } }
.ground { fill: var(--ground); } text { fill: var(--ink); } .name { font-weight: 600; } .grid { stroke: var(--faint); }
polyline { fill: none; stroke-width: 2; } .fp32 { stroke: #0757b0; } .bf16 { stroke: #b3400a; } .int8 { stroke: #1a7f37; }
"""


def measure(name: str, dtype: str, threads: int, runtimes: Sequence[str] = ()) -> dict[str, Value]:
    """Times of one layer in one type, dense and at falling shares of the multiply-adds, all in turn."""
    site = LAYERS[name]
    modules = [_module(site, share) for share in (1.0, *SHARES)]
    x = torch.randn(*kind_of(site).sample(site, 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), threads_of_torch(threads):
        found = [
            [
                each
                for each in candidates(dtype, module, None if runtimes else module, x, threads, runtimes)
                if each.shape != "chain"
            ]
            for module in modules
        ]
        flat = [each.call for group in found for each in group]
        seconds = iter(on_cpu(flat, threads, ROUNDS, least=0.01, warm_up=0.1))
    times = [{each.runtime: next(seconds) for each in group} for group in found]
    best = [min(group.values()) for group in times]
    return {
        "layer": name,
        "shape": "x".join(map(str, site.shape)),
        "dtype": dtype,
        "threads": threads,
        "batch": 1,
        "dense_runtime": min(times[0], key=times[0].__getitem__),
        "dense_us": 1e6 * best[0],
        **dict(zip(TIMES, (1e6 * time for time in best[1:]), strict=True)),
        "break_even": _break_even(best),
        **(zeros(site, threads, runtimes) if dtype == DTYPES[0] else {}),
    }


def zeros(site: Site, threads: int, runtimes: Sequence[str]) -> dict[str, Value]:
    """From which share of zeros on a layer is faster, by what is zero at once."""
    target = CpuTarget([RUNTIMES.get(name) for name in runtimes or TARGET_RUNTIMES], None)
    found = {group: target.break_even_sparsity(site, group, Setting(1, threads)) for group in PAY}
    return {column: NEVER if found[group] is None else found[group] for group, column in PAY.items()}


def _module(site: Site, share: float) -> nn.Module:
    """A network of that layer; at a share below one its low-rank form with that part of the multiply-adds."""
    form = Form("dense", ())
    if share < 1:
        fmt = FORMATS.get("channel_svd" if site.axes else "svd")
        whole = dense_cost(site).macs
        rank = min(fmt.ranks(site), key=lambda rank: abs(fmt.cost(site, rank).macs - share * whole))
        form = Form(fmt.name, rank)
    layer = make_layer(site, form, torch.float32)
    bias = None if layer.bias is None else nn.Parameter(layer.bias)
    return nn.Sequential(
        _dense(site, layer.factors["kernel"], bias) if share == 1 else Factorized(layer, bias)
    )


def _dense(site: Site, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """The layer as torch has it."""
    made: nn.Module
    if not site.axes:
        made = nn.Linear(site.i, site.o, bias is not None)
    else:
        pads = tuple(before for before, _ in site.padding)
        made = nn.Conv2d(site.i, site.o, site.kernel, site.stride, pads, bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            made.bias.copy_(bias)  # type: ignore[operator]
    return made.eval()


def _break_even(times: Sequence[float]) -> Value:
    """The largest share at which low rank is no slower, by a straight line between the two around it."""
    shares = (1.0, *SHARES)
    for place in range(1, len(shares)):
        if times[place] > times[0]:
            continue
        slow, fast = times[place - 1] - times[0], times[0] - times[place]
        part = slow / (slow + fast) if place > 1 else 0.0
        return shares[place - 1] + part * (shares[place] - shares[place - 1]) if place > 1 else shares[place]
    return NEVER


def draw(rows: Sequence[Mapping[str, Value]]) -> Html:
    """Speed over dense in single precision against the share of the multiply-adds.

    There is a panel per layer and a line per type.
    """
    layers = list(dict.fromkeys(str(row["layer"]) for row in rows))
    width = LEFT + ACROSS * (WIDE + GAP)
    height = TOP + math.ceil(len(layers) / ACROSS) * (HIGH + GAP) + 20
    panels = [
        tag(
            "g",
            *_panel([row for row in rows if row["layer"] == layer], layer),
            transform=f"translate({LEFT + n % ACROSS * (WIDE + GAP)} {TOP + n // ACROSS * (HIGH + GAP)})",
        )
        for n, layer in enumerate(layers)
    ]
    return figure(
        STYLE,
        width,
        height,
        "Speed over dense single precision by precision and share of the multiply-adds, layer by layer",
        *(tag("text", dtype, class_="name", x=LEFT + 80 * n, y=16) for n, dtype in enumerate(DTYPES)),
        *(
            tag("polyline", class_=dtype, points=f"{LEFT + 80 * n + 34},12 {LEFT + 80 * n + 60},12")
            for n, dtype in enumerate(DTYPES)
        ),
        *panels,
    )


def _panel(rows: Sequence[Mapping[str, Value]], layer: str) -> Iterator[Html]:
    yield tag("text", layer, class_="name", x=0, y=-7)
    ruler = next((float(str(row["dense_us"])) for row in rows if row["dtype"] == "fp32"), None)
    for speed in (1, 4, 16):
        yield tag("line", class_="grid", x1=0, x2=WIDE, y1=f"{_y(speed):.1f}", y2=f"{_y(speed):.1f}")
        yield tag("text", f"{speed}x", x=-7, y=f"{_y(speed):.1f}", dy="0.35em", text_anchor="end")
    for row in rows:
        times = [float(str(row[column])) for column in ("dense_us", *TIMES)]
        points = " ".join(
            f"{_x(share):.1f},{_y((ruler or times[0]) / time):.1f}"
            for share, time in zip((1.0, *SHARES), times, strict=True)
        )
        yield tag(
            "polyline",
            tag("title", f"{row['dtype']}: {row['break_even']}"),
            class_=str(row["dtype"]),
            points=points,
        )


def _x(share: float) -> float:
    return WIDE * math.log(share) / math.log(SHARES[-1])


def _y(speed: float) -> float:
    return HIGH * (1 - math.log(min(max(speed, 0.5), 32) / 0.5) / math.log(64))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--layers", nargs="+", default=[""], help="only layers whose names contain one of these"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--runtimes", nargs="+", default=[], choices=TARGET_RUNTIMES, help="only these, and quicker"
    )
    parser.add_argument("--output", default="bits.csv", help="file under results/, or a path")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where the plot goes (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    keep_freed_memory()
    table = Table(options.output, COLUMNS)
    for threads in [] if options.draw else options.threads:
        torch.set_num_threads(threads)
        for name in LAYERS:
            for dtype in options.dtypes if any(part in name for part in options.layers) else ():
                if table.kept(layer=name, dtype=dtype, threads=threads):
                    continue
                table.add(**measure(name, dtype, threads, options.runtimes))
                print(show(table.rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    with table.path.open(newline="", encoding="utf-8") as file:
        found = {(row["layer"], row["dtype"]): row for row in csv.DictReader(file) if row["threads"] == "1"}
    options.plot.write_text(draw(list(found.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
