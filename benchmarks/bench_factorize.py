"""Decompositions against the libraries that a user would take: seconds and error.

    python -m benchmarks.bench_factorize        # results/factorize.csv

Weights are random with decaying spectra.  Wall time; medians of three, one run for the large matrix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_planner import decaying
from benchmarks.results import Table, Value, show
from tdpass.formats import FORMATS
from tdpass.site import Site

COLUMNS = (
    "case",
    "seconds",
    "reference",
    "reference_seconds",
    "speedup",
    "relative_error",
    "reference_error",
    "goal",
    "met",
)
WIDTHS = (*(64,) * 3, *(128,) * 4, *(256,) * 6, *(512,) * 3)  # the 3x3 kernels of a ResNet-50
SWEEPS = 5


@dataclass(frozen=True)
class Way:
    """One way to decompose some weights: `run` is timed, `rebuild` of what it returns is not."""

    run: Callable[[], list[Any]]
    rebuild: Callable[[Any], Tensor]

    def measure(self, weights: Sequence[Tensor], rounds: int) -> tuple[float, float]:
        """Median seconds and mean relative error in the Frobenius norm."""
        seconds: list[float] = []
        for _ in range(rounds):
            start = time.perf_counter()
            made = self.run()
            seconds.append(time.perf_counter() - start)
        errors = [
            float((weight - self.rebuild(factors)).norm() / weight.norm())
            for weight, factors in zip(weights, made, strict=True)
        ]
        return statistics.median(seconds), statistics.mean(errors)


def tucker2() -> dict[str, Value]:
    """Tucker-2 at half the channels of 16 kernels: ours, and tensorly's higher-order orthogonal iteration."""
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    generator = torch.Generator().manual_seed(0)
    kernels = [decaying((width, width, 3, 3), generator) for width in WIDTHS]
    sites = [Site("k", "conv", tuple(kernel.shape), (1, 1), ((1, 1), (1, 1)), (1, 1)) for kernel in kernels]
    fmt = FORMATS.get("tucker2")
    ours = Way(
        lambda: [
            (site, fmt.factorize(kernel, site, (site.o // 2, site.i // 2)))
            for kernel, site in zip(kernels, sites, strict=True)
        ],
        lambda made: fmt.reconstruct(made[1], made[0]).float(),
    )
    theirs = Way(
        lambda: [
            partial_tucker(
                kernel.numpy(),
                rank=[len(kernel) // 2] * 2,
                modes=[0, 1],
                n_iter_max=SWEEPS,
                tol=0,
                init="svd",
                random_state=0,
            )[0]
            for kernel in kernels
        ],
        lambda made: torch.from_numpy(multi_mode_dot(made[0], made[1], modes=[0, 1])),
    )
    return compared(
        "tucker2, 16 3x3 kernels of ResNet-50",
        kernels,
        ours,
        f"tensorly partial_tucker, {SWEEPS} sweeps",
        theirs,
        8.0,
        1.01,
    )


def svd() -> dict[str, Value]:
    """A 4096 x 11008 matrix at rank 1024: ours, and torch's singular value decomposition."""
    weight = decaying((4096, 11008), torch.Generator().manual_seed(0))
    site, fmt = Site("w", "linear", (4096, 11008)), FORMATS.get("svd")
    ours = Way(
        lambda: [fmt.factorize(weight, site, (1024,))],
        lambda made: fmt.reconstruct({name: factor.float() for name, factor in made.items()}, site),
    )
    theirs = Way(
        lambda: [torch.linalg.svd(weight, full_matrices=False)],
        lambda made: (made[0][:, :1024] * made[1][:1024]) @ made[2][:1024],
    )
    return compared(
        "svd 4096x11008, rank 1024", [weight], ours, "torch.linalg.svd", theirs, 4.0, 1.001, rounds=1
    )


def compared(
    case: str,
    weights: Sequence[Tensor],
    ours: Way,
    reference: str,
    theirs: Way,
    faster: float,
    worse: float,
    rounds: int = 3,
) -> dict[str, Value]:
    """One row: the goal is that many times as fast at no more than that many times the error."""
    seconds, reached = ours.measure(weights, rounds)
    reference_seconds, known = theirs.measure(weights, rounds)
    speedup = reference_seconds / seconds
    return {
        "case": case,
        "seconds": seconds,
        "reference": reference,
        "reference_seconds": reference_seconds,
        "speedup": speedup,
        "relative_error": reached,
        "reference_error": known,
        "goal": f"{faster}x at {worse}x the error",
        "met": str(speedup >= faster and reached <= worse * known).lower(),
    }


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    table = Table("factorize.csv", COLUMNS)
    for case in (tucker2, svd):
        table.add(**case())
        print(show(table.rows[-1:], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
