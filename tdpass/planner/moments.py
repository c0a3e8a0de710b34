"""Second moments of what every site reads, and of what its output means to the network.

They are streamed from calibration runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tdpass.errors import InvalidModelError
from tdpass.formats.metric import Metric
from tdpass.kinds import kind_of
from tdpass.planner.divergence import FittedDivergence
from tdpass.site import Site
from tdpass.tape import Tape

MEMORY_LIMIT = 512 * 2**20
FULL_LIMIT = 8192
VALUES_PER_CALL = 2**22
INPUT_DAMPING = 1e-3
OUTPUT_DAMPING = 5e-2
PROBES = 2
_SEED = 20260
_ROUNDING = 1e-6  # of the mean square: what sums in single precision may leave of no spread
_SQUARES_FROM = 1e15  # sums of squares of what is larger may leave the range of single precision


def working(rows: Tensor) -> Tensor:
    """The rows in a type to sum products in: float64 stays, everything narrower becomes float32."""
    return rows if rows.dtype == torch.float64 else rows.float()


def centered(squares: Tensor, means: Tensor) -> Tensor:
    """Covariances `[groups, d, d]` from averages of products and of what is multiplied.

    What varies by no more than rounding is constant: its spread is what rounding may leave, and it varies with
    nothing else.
    """
    found = squares - means[:, :, None] * means[:, None, :]
    spread, least = (each.diagonal(dim1=1, dim2=2).clone() for each in (found, _ROUNDING * squares))
    constant = spread <= least
    if bool(constant.any()):
        found = found.masked_fill(constant[:, :, None] | constant[:, None, :], 0.0)
        found.diagonal(dim1=1, dim2=2).copy_(torch.where(constant, least, spread))
    return found


def moment_bytes(site: Site) -> int:
    """Memory that the moments of a site take while they are streamed."""
    width = site.weights // site.o
    inputs = width if width > FULL_LIMIT else width * width
    return 8 * site.groups * (inputs + _output_channels(site) ** 2 + (1 + site.table) * width)


def _output_channels(site: Site) -> int:
    """Output channels of a group between which products of gradients are summed.

    There are none of what is only read by rows.
    """
    share = site.o // site.groups
    return 0 if share > FULL_LIMIT or (site.table and not site.extents) else share


@dataclass
class _Sums:
    """Running sums for one site."""

    site: Site
    inputs: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    outputs: Tensor = field(init=False)
    looked_up: Tensor = field(init=False)
    rows: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        groups, width, share = (
            self.site.groups,
            self.site.weights // self.site.o,
            _output_channels(self.site),
        )
        self.inputs = torch.zeros(
            (groups, width) if width > FULL_LIMIT else (groups, width, width), dtype=torch.float64
        )
        self.mean = torch.zeros(groups, width, dtype=torch.float64)
        self.outputs = torch.zeros((groups, share, share) if share else (), dtype=torch.float64)
        self.looked_up = torch.zeros_like(self.inputs[0]) if self.site.table else torch.zeros(())

    def add_inputs(self, x: Tensor, generator: torch.Generator) -> None:
        if self._looks_up(x):
            return
        width = self.site.weights // self.site.o
        most = max(2 * width, VALUES_PER_CALL // (self.site.groups * width))
        rows = working(kind_of(self.site).rows(x.detach(), self.site, most, generator))
        if float(rows.abs().max()) > _SQUARES_FROM:
            rows = rows.double()
        for sums, part in zip(self.inputs, rows.chunk(self.site.groups, 1), strict=True):
            sums.add_((part.square().sum(0) if sums.dim() == 1 else part.T @ part).double())
        self.mean += rows.sum(0, dtype=torch.float64).reshape(self.mean.shape)
        self.rows += rows.shape[0]

    def _looks_up(self, x: Tensor) -> bool:
        """Whether a call that reads `x` reads rows of a table."""
        return self.site.table and not x.is_floating_point()

    def add_gradient(self, x: Tensor, gradient: Tensor, samples: int) -> None:
        looked_up = self._looks_up(x)
        if self.outputs.dim() == 0 and not looked_up:
            return
        rows = working(kind_of(self.site).output_rows(gradient, self.site))
        if not bool(
            torch.isfinite(rows).all()
        ):  # half precision overflows in a backward pass where it does not in the forward one
            return
        if looked_up:
            self.looked_up += (rows.square().sum(0) if self.looked_up.dim() == 1 else rows.T @ rows).double()
            return
        for sums, part in zip(self.outputs, rows.chunk(self.site.groups, 1), strict=True):
            sums.add_((part.T @ part).double())
        self.samples += samples

    def metric(self) -> Metric:
        """The damped metric; the identity where nothing was seen."""
        if self.site.table:
            return self._of_table()
        if self.rows == 0:
            return Metric()
        mean = self.mean / self.rows
        inputs = torch.stack(
            [_damped_covariance(moment, at) for moment, at in zip(self.inputs / self.rows, mean, strict=True)]
        )
        outputs: Tensor | None = self.outputs / max(self.samples, 1)
        assert outputs is not None
        level = float(outputs.diagonal(dim1=-2, dim2=-1).mean()) if self.samples else 0.0
        if level > 0:
            outputs.diagonal(dim1=-2, dim2=-1).add_(OUTPUT_DAMPING * level)
        else:
            outputs = None
        metric = Metric(inputs, outputs, mean, self.site.groups)
        return metric if metric.groups > 1 else metric.of_group(0)

    def _of_table(self) -> Metric:
        """C of a table: what its columns mean to the network.

        They are rows that are read, and inputs of the layer, alike. Every row weighs the same, seen or not,
        and no bias makes up for a mean, since rows have none.
        """
        seen = [moment for moment in (self.inputs[0], self.looked_up) if float(moment.abs().max()) > 0]
        if not seen:
            return Metric()
        unseen = torch.zeros(self.site.i, dtype=torch.float64)
        damped = [_damped_covariance(moment / _level(moment), unseen) for moment in seen]
        return Metric(torch.stack(damped).sum(0))


def _level(moment: Tensor) -> float:
    return float((moment if moment.dim() == 1 else moment.diagonal()).mean())


def _damped_covariance(moment: Tensor, mean: Tensor) -> Tensor:
    """The covariance, or its diagonal, of a second moment or of the diagonal of one."""
    if moment.dim() == 1:
        spread = (moment - mean.square()).clamp_min(0)
        return spread + INPUT_DAMPING * spread.mean() + 1e-12
    covariance = moment - torch.outer(mean, mean)
    covariance.diagonal().add_(INPUT_DAMPING * float(covariance.diagonal().mean()) + 1e-12)
    return covariance


def stream_metrics(
    tapes: Sequence[Tape],
    sites: Sequence[Site],
    divergence: FittedDivergence,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[tuple[Site, Metric]]:
    """The metric of each site, in groups whose sums fit in memory.

    Every group is one pass over the calibration runs. C is the covariance of the unfolded input, plus 1e-3 of
    its mean diagonal (its diagonal alone beyond 8,192 inputs). G is the Gauss-Newton metric of the site's
    output: the second moment, summed over positions, of the gradients of random projections of the network's
    outputs, plus 5 % (none beyond 8,192 outputs, or where no gradient arrives).
    """
    groups = _groups(sites)
    for number, group in enumerate(groups):
        sums = {site.name: _Sums(site) for site in group}
        generator = torch.Generator().manual_seed(_SEED)
        for index, tape in enumerate(tapes):
            _accumulate(tape, sums, divergence, generator)
            tick(number * len(tapes) + index + 1, len(groups) * len(tapes))
        for site in group:
            yield site, sums.pop(site.name).metric()


def _groups(sites: Sequence[Site]) -> list[list[Site]]:
    groups: list[list[Site]] = [[]]
    used = 0
    for site in sites:
        size = moment_bytes(site)
        if groups[-1] and used + size > MEMORY_LIMIT:
            groups.append([])
            used = 0
        groups[-1].append(site)
        used += size
    return [group for group in groups if group]


@dataclass
class _Observer:
    """Adds up what the sites of a run read, and keeps their outputs.

    A second try of a run goes on where the first one failed.
    """

    sums: Mapping[str, _Sums]
    generator: torch.Generator
    outputs: list[tuple[_Sums, Tensor, Tensor]] = field(default_factory=list)
    added: int = 0

    def __call__(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        entry = self.sums.get(name)
        if entry is not None:
            if len(self.outputs) == self.added:
                entry.add_inputs(x, self.generator)
                self.added += 1
            if not y.requires_grad and torch.is_grad_enabled():
                y.requires_grad_(True)
            self.outputs.append((entry, x, y))
        return y


def _accumulate(
    tape: Tape, sums: Mapping[str, _Sums], divergence: FittedDivergence, generator: torch.Generator
) -> None:
    if not any(name in sums for name in tape.site_calls):
        return
    observer = _Observer(sums, generator)
    try:
        with torch.enable_grad():
            _add_gradients(
                divergence.outputs(tape.play().finish(observer)), observer, divergence, tape.batch_size
            )
    except (
        RuntimeError,
        InvalidModelError,
    ):  # some operation has no derivative: what the sites read is still to be had
        observer.outputs.clear()
        with torch.no_grad():
            tape.play().finish(observer)


def _add_gradients(
    returned: Mapping[str, Tensor], observer: _Observer, divergence: FittedDivergence, samples: int
) -> None:
    results = {name: value for name, value in returned.items() if value.requires_grad}
    for _ in range(PROBES if results else 0):
        answered = {name: value.detach() for name, value in results.items()}
        directions = divergence.probe(answered, samples, observer.generator)
        moved, at = [results[name] for name in directions], [y for _, _, y in observer.outputs]
        gradients = torch.autograd.grad(
            moved, at, list(directions.values()), retain_graph=True, allow_unused=True
        )
        for (entry, x, _), gradient in zip(observer.outputs, gradients, strict=True):
            if gradient is not None:
                entry.add_gradient(x, gradient, samples)
