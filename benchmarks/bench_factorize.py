"""Decompositions against the libraries that a user would take: seconds and error.

    python -m benchmarks.bench_factorize        # results/factorize.csv

Weights are random with decaying spectra.  Wall time; medians of three, one run for the large matrix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_planner import decaying
from benchmarks.results import Table, Value, show
from tdpass.formats import FORMATS
from tdpass.site import Site

COLUMNS = ("case", "seconds", "reference", "reference_seconds", "speedup", "relative_error", "reference_error", "goal", "met")
WIDTHS = (*(64,) * 3, *(128,) * 4, *(256,) * 6, *(512,) * 3)  # the 3x3 kernels of a ResNet-50
SWEEPS = 5


def timed(run: Callable[[], float], rounds: int = 3) -> tuple[float, float]:
    """Median seconds of a call, and what it returned."""
    seconds, answer = [], 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        answer = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), answer


def error(weight: Tensor, rebuilt: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((weight - rebuilt).norm() / weight.norm())


def tucker2() -> dict[str, Value]:
    """Tucker-2 at half the channels of 16 kernels: ours, and tensorly's higher-order orthogonal iteration."""
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    generator = torch.Generator().manual_seed(0)
    kernels = [decaying((width, width, 3, 3), generator) for width in WIDTHS]
    fmt = FORMATS.get("tucker2")

    def ours() -> float:
        errors = []
        for kernel in kernels:
            site = Site("k", "conv", tuple(kernel.shape), (1, 1), ((1, 1), (1, 1)), (1, 1))
            errors.append(error(kernel.double(), fmt.reconstruct(fmt.factorize(kernel, site, (kernel.shape[0] // 2,) * 2), site)))
        return statistics.mean(errors)

    def theirs() -> float:
        errors = []
        for kernel in kernels:
            array = kernel.numpy()
            (core, factors), _ = partial_tucker(array, rank=[len(array) // 2] * 2, modes=[0, 1], n_iter_max=SWEEPS, tol=0, init="svd", random_state=0)
            errors.append(float(np.linalg.norm(multi_mode_dot(core, factors, modes=[0, 1]) - array) / np.linalg.norm(array)))
        return statistics.mean(errors)

    return compared("tucker2, 16 3x3 kernels of ResNet-50", ours, f"tensorly partial_tucker, {SWEEPS} sweeps", theirs, 2.5, 1.001)


def svd() -> dict[str, Value]:
    """A 4096 x 11008 matrix at rank 1024: ours, and torch's singular value decomposition."""
    weight = decaying((4096, 11008), torch.Generator().manual_seed(0))
    site, fmt = Site("w", "linear", (4096, 11008)), FORMATS.get("svd")

    def ours() -> float:
        return error(weight.double(), fmt.reconstruct(fmt.factorize(weight, site, (1024,)), site))

    def theirs() -> float:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return error(weight, (u[:, :1024] * s[:1024]) @ v[:1024])

    return compared("svd 4096x11008, rank 1024", ours, "torch.linalg.svd", theirs, 4.0, 1.001, rounds=1)


def compared(
    case: str, ours: Callable[[], float], reference: str, theirs: Callable[[], float], faster: float, worse: float, rounds: int = 3
) -> dict[str, Value]:
    """One row: the goal is that many times as fast at no more than that many times the error."""
    seconds, reached = timed(ours, rounds)
    reference_seconds, known = timed(theirs, rounds)
    speedup = reference_seconds / seconds
    return {
        "case": case, "seconds": seconds, "reference": reference, "reference_seconds": reference_seconds, "speedup": speedup,
        "relative_error": reached, "reference_error": known, "goal": f"{faster}x at {worse}x the error",
        "met": str(speedup >= faster and reached <= worse * known).lower(),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    table = Table("factorize.csv", COLUMNS)
    for case in (tucker2, svd):
        table.add(**case())
        print(show(table.rows[-1:], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
