r"""From which sparsity on a pruned layer is faster than dense.

There are 12 layer shapes, single zeros and blocks of 16 x 1, one and two threads.

    python -m benchmarks.bench_break_even         # results/break_even.csv and docs/break_even.svg
    python -m benchmarks.bench_break_even --layers lenet --threads 1 --runtimes eager \
        --output /tmp/a.csv --plot /tmp/a.svg
    python -m benchmarks.bench_break_even --draw  # the plot alone, from what the CSV holds

Zeros lie where magnitude pruning leaves them in a weight of noise.  All sparsities of a layer are measured in
turn with its dense form in the runtime that is fastest, batch 1; processor time at one thread, least wall
time at two.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.bench_kernels import keep_freed_memory
from benchmarks.figures import figure
from benchmarks.results import Table, Value, show
from tdpass.form import DENSE
from tdpass.site import Site
from tdpass.targets import Setting
from tdpass.targets.break_even import STAIRCASE
from tdpass.targets.cpu import CpuTarget
from tdpass.targets.runtimes import RUNTIMES
from tdpass.views.html import Html, tag

TIMES = tuple(f"us_at_{sparsity:g}" for sparsity in STAIRCASE)
COLUMNS = ("layer", "shape", "group", "threads", "batch", "dense_runtime", "dense_us", *TIMES, "break_even")
RUNTIME_NAMES = ("eager", "inductor", "onnxruntime", "openvino")
GROUPS = ("weight", "block")
NEVER = "never"
PLOT = Path(__file__).parents[1] / "docs" / "break_even.svg"


def conv(outputs: int, inputs: int, kernel: int, before: int, pad: int) -> Site:
    """A convolution of stride 1 with bias."""
    size = ((before,) * 2, (before + 2 * pad - kernel + 1,) * 2)
    return Site(
        "conv",
        "conv",
        (outputs, inputs, kernel, kernel),
        (1, 1),
        ((pad, pad),) * 2,
        (1, 1),
        True,
        extents=(size,),
    )


def linear(outputs: int, inputs: int, tokens: int) -> Site:
    """A linear layer with bias on that many tokens."""
    return Site("linear", "linear", (outputs, inputs), bias=True, extents=(((tokens,), (tokens,)),))


LAYERS = {
    "lenet5 conv1": conv(20, 1, 5, 28, 0),
    "lenet5 conv2": conv(50, 20, 5, 12, 0),
    "lenet5 fc1": linear(500, 800, 1),
    "lenet5 fc2": linear(10, 500, 1),
    "resnet20 16@32": conv(16, 16, 3, 32, 1),
    "resnet20 64@8": conv(64, 64, 3, 8, 1),
    "resnet18 64@56": conv(64, 64, 3, 56, 1),
    "resnet18 256@14": conv(256, 256, 3, 14, 1),
    "resnet18 512@7": conv(512, 512, 3, 7, 1),
    "bert 384x1536@128": linear(384, 1536, 128),
    "vgg fc 4096x4096": linear(4096, 4096, 1),
    "lstm 2048x512": linear(2048, 512, 1),
}


def measure(name: str, group: str, threads: int, runtimes: Sequence[str]) -> dict[str, Value]:
    """One row."""
    site, setting = LAYERS[name], Setting(1, threads)
    target = CpuTarget([RUNTIMES.get(runtime) for runtime in runtimes], None)
    (dense,) = target.time(site, [DENSE], setting)
    times = [
        ratio * dense.seconds * 1e6 for ratio in target.sparse_over_dense(site, group, STAIRCASE, setting)
    ]
    found = target.break_even_sparsity(site, group, setting)
    return {
        "layer": name,
        "shape": "x".join(map(str, site.shape)),
        "group": group,
        "threads": threads,
        "batch": 1,
        "dense_runtime": dense.kernel,
        "dense_us": dense.seconds * 1e6,
        **dict(zip(TIMES, times, strict=True)),
        "break_even": NEVER if found is None else found,
    }


WIDE, HIGH, ACROSS = 210, 150, 4
LEFT, TOP, GAP_X, GAP_Y, FOOT = 62, 46, 18, 44, 20
LOW, TOP_SPEED = 0.125, 64.0  # of the speed-up axis; beyond it a line runs along the edge
TICKS_X = {0.0: "0", 0.5: "50", 0.9: "90", 0.99: "99"}
STYLE = """
svg { --ground: #ffffff; --ink: #1f2328; --faint: #d0d7de; --weight: #0757b0; --block: #b3400a; font: 11px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ground: #0d1117; --ink: #e6edf3; --faint: #3d444d; --weight: #6cb1ff; --block: #ffa657; } }
.ground { fill: var(--ground); } text { fill: var(--ink); } .name { font-weight: 600; } .grid { stroke: var(--faint); }
.one { stroke: var(--ink); } polyline { fill: none; stroke-width: 2; } .weight { stroke: var(--weight); } .block { stroke: var(--block); }
.two { stroke-dasharray: 4 3; } .legend { stroke-width: 2; }
"""


def draw(rows: Sequence[Mapping[str, Value]]) -> Html:
    """Speed-up over dense against sparsity, a panel per layer, a line per pattern and thread count."""
    layers = list(dict.fromkeys(str(row["layer"]) for row in rows))
    width = LEFT + ACROSS * (WIDE + GAP_X)
    height = TOP + math.ceil(len(layers) / ACROSS) * (HIGH + GAP_Y) + FOOT
    places = [
        (LEFT + n % ACROSS * (WIDE + GAP_X), TOP + n // ACROSS * (HIGH + GAP_Y)) for n in range(len(layers))
    ]
    panels = [
        tag(
            "g",
            *_panel([row for row in rows if row["layer"] == layer], layer, n),
            transform=f"translate({x} {y})",
        )
        for n, (layer, (x, y)) in enumerate(zip(layers, places, strict=True))
    ]
    middle = (height - FOOT + TOP) / 2
    return figure(
        STYLE,
        width,
        height,
        "Speed-up of pruned layers over dense against the share of zero weights, layer by layer",
        *_legend(sorted({int(str(row["threads"])) for row in rows})),
        *panels,
        tag(
            "text",
            "zero weights, % (spaced by the logarithm of what is left)",
            x=(LEFT + width) / 2,
            y=height - 12,
            text_anchor="middle",
        ),
        tag(
            "text",
            "speed-up over the fastest dense runtime",
            transform=f"translate(16 {middle:g}) rotate(-90)",
            text_anchor="middle",
        ),
    )


def _legend(threads: Sequence[int]) -> Iterator[Html]:
    x = LEFT
    for group, words in (("weight", "single weights"), ("block", "blocks of 16 x 1")):
        for count in threads:
            yield tag(
                "line", class_=f"legend {group}{' two' if count > 1 else ''}", x1=x, x2=x + 26, y1=16, y2=16
            )
            yield tag(
                "text", f"{words}, {count} thread{'s' if count > 1 else ''}", x=x + 32, y=16, dy="0.35em"
            )
            x += 190


def _panel(rows: Sequence[Mapping[str, Value]], layer: str, place: int) -> Iterator[Html]:
    yield tag("text", layer, class_="name", x=0, y=-7)
    for speed in (0.25, 1, 4, 16):
        y = f"{_y(speed):.1f}"
        yield tag("line", class_="one" if speed == 1 else "grid", x1=0, x2=WIDE, y1=y, y2=y)
        if place % ACROSS == 0:
            yield tag("text", f"{speed:g}x", x=-7, y=y, dy="0.35em", text_anchor="end")
    for sparsity, words in TICKS_X.items():
        x = f"{_x(sparsity):.1f}"
        yield tag("line", class_="grid", x1=x, x2=x, y1=0, y2=HIGH)
        yield tag("text", words, x=x, y=HIGH + 15, text_anchor="middle")
    for row in rows:
        speeds = [float(row["dense_us"] or 0) / float(row[column] or 0) for column in TIMES]
        points = " ".join(
            f"{_x(sparsity):.1f},{_y(speed):.1f}" for sparsity, speed in zip(STAIRCASE, speeds, strict=True)
        )
        end = str(row["break_even"])
        words = (
            f"{row['group']}, {row['threads']} threads: "
            f"{'never pays' if end == NEVER else f'pays from {100 * float(end):.3g} % on'}"
        )
        yield tag(
            "polyline",
            tag("title", words),
            class_=f"{row['group']}{' two' if int(str(row['threads'])) > 1 else ''}",
            points=points,
        )


def _x(sparsity: float) -> float:
    return WIDE * math.log(1 - sparsity) / math.log(1 - STAIRCASE[-1])


def _y(speed: float) -> float:
    return HIGH * (1 - math.log(min(max(speed, LOW), TOP_SPEED) / LOW) / math.log(TOP_SPEED / LOW))


def latest(path: Path) -> list[Mapping[str, Value]]:
    """The last row of each layer, pattern and number of threads in the CSV, layers in their order here."""
    with path.open(newline="", encoding="utf-8") as file:
        found = {(row["layer"], row["group"], row["threads"]): row for row in csv.DictReader(file)}
    return sorted(found.values(), key=lambda row: list(LAYERS).index(row["layer"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--layers", nargs="+", default=[""], help="only layers whose names contain one of these"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--runtimes",
        nargs="+",
        default=list(RUNTIME_NAMES),
        choices=RUNTIME_NAMES,
        help="where dense layers run",
    )
    parser.add_argument("--output", default="break_even.csv", help="file under results/, or a path")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where the plot goes (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    keep_freed_memory()
    table = Table(options.output, COLUMNS)
    runtimes = [name for name in options.runtimes if RUNTIMES.get(name).available()]
    for threads in [] if options.draw else options.threads:
        torch.set_num_threads(threads)
        for name in LAYERS:
            if any(part in name for part in options.layers):
                for group in GROUPS:
                    table.add(**measure(name, group, threads, runtimes))
                    print(show(table.rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    print(f"\n{show(table.rows, COLUMNS)}")
    options.plot.write_text(draw(latest(table.path)), encoding="utf-8")


if __name__ == "__main__":
    main()
