"""What a model answers whose layers are computed by crossbars, cell by cell."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.crossbars.devices import Devices
from tdpass.crossbars.mapping import Mapped, MappedMatrix, cells_of, layers_of
from tdpass.crossbars.states import digit_weights
from tdpass.errors import UsageError
from tdpass.formats.layer import Layer
from tdpass.kinds import dense_modules
from tdpass.layers.factorized import Factorized
from tdpass.models import ExampleInputs, open_model
from tdpass.ops import Pads, TorchOps
from tdpass.targets.crossbar import CrossbarArray
from tdpass.targets.layers import apply_layer, weights_of


@dataclass(frozen=True)
class Spread:
    """Scores of several draws of the devices."""

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Their standard deviation; 0 of a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.2f} +- {self.deviation:.2f}"


def simulate(
    model: nn.Module,
    mapped: Mapped,
    score: Callable[[nn.Module], float],
    devices: Devices | None = None,
    *,
    draws: int = 10,
    seed: int = 0,
    example_inputs: ExampleInputs = None,
) -> Spread:
    """The scores of a mapped model with devices drawn from so many seeds (Monte Carlo)."""
    if draws < 1:
        raise UsageError(f"draws={draws} of devices are none; give 1 or more")
    found = devices or Devices()
    with torch.no_grad():
        return Spread(
            tuple(
                float(score(simulated(model, mapped, found, seed + draw, example_inputs).eval()))
                for draw in range(draws)
            )
        )


def simulated(
    model: nn.Module,
    mapped: Mapped,
    devices: Devices | None = None,
    seed: int = 0,
    example_inputs: ExampleInputs = None,
) -> nn.Module:
    """A copy of a model in which every mapped layer is computed by its arrays, whose devices are drawn once.

    Activations enter at once, not bit by bit, as in aihwkit's tiles; every group of rows that is driven
    together is converted by itself. Raises `UsageError` where a mapped site is no module of its own, or pads
    with anything but zeros.
    """
    layers, made = layers_of(open_model(model, example_inputs), model), copy.deepcopy(model)
    array, found = mapped.map.array, devices or Devices()
    siemens = torch.tensor((0.0, *array.conductances))[mapped.state.long()]
    held = found.programmed(siemens, array, seed) / array.conductances[-1]
    for name in dict.fromkeys(matrix.site for matrix in mapped.map.matrices):
        if name not in layers:
            raise UsageError(
                f"the map names {name!r}, which is no site of the model; it has: {', '.join(layers)}"
            )
        products = _products(mapped, held, name)
        put = OnArrays(
            layers[name], _pads(made.get_submodule(name), name), products, array if found.converters else None
        )
        if not name:
            return put
        made.set_submodule(name, put)
    return made


@dataclass(frozen=True)
class Sums:
    """A matrix product as arrays answer it.

    `parts[P, groups, depth, columns]` are added up in P sums, each counting by `worth[P, groups, columns]`.
    """

    parts: Tensor
    worth: Tensor


class OnArrays(nn.Module):
    """A layer, in any format, whose matrix products are computed by arrays.

    Converters round where an array is given.
    """

    def __init__(
        self,
        layer: Layer,
        pads: tuple[str, tuple[int, ...]] | None,
        products: Sequence[Sums],
        converters: CrossbarArray | None,
    ) -> None:
        super().__init__()
        self.layer, self.pads, self.products, self.converters = layer, pads, tuple(products), converters

    def forward(self, x: Tensor) -> Tensor:
        """The output, with the sums of the arrays in place of those of the weights."""
        if self.pads is not None:
            x = F.pad(x, self.pads[1], mode=self.pads[0])
        return apply_layer(
            _ArrayOps(iter(self.products), self.converters), self.layer, x, weights_of(self.layer)
        )


class _ArrayOps(TorchOps):
    """Operations whose products are those of arrays, in the order in which they were mapped."""

    def __init__(self, products: Iterator[Sums], converters: CrossbarArray | None) -> None:
        self.products, self.converters = products, converters

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self._product(x, next(self.products))
        return y if bias is None else y + bias

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        sums = next(self.products)
        if b.dim() == 2:
            return self._product(a, sums)
        if a.dim() != b.dim():
            raise UsageError(
                "a weight on the left of all activations is mapped, not simulated; leave its site out of "
                "the map with exclude="
            )
        parts = torch.einsum("gmk,pgkn->pgmn", self._entered(a), sums.parts.to(a))
        return (self._converted(parts) * sums.worth.to(a)[:, :, None]).sum(0)

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        sums = next(self.products)
        p, _, _, n = sums.parts.shape
        stacked = sums.parts.permute(1, 0, 3, 2).reshape(groups * p * n, *weight.shape[1:]).to(x)
        made = super().conv(self._entered(x), stacked, None, stride, padding, dilation, groups)
        parts = self._converted(made).reshape(len(x), groups, p, n, *made.shape[2:])
        worth = sums.worth.transpose(0, 1).to(x).reshape(groups, p, n, *(1 for _ in stride))
        y = (parts * worth).sum(2).flatten(1, 2)
        return y if bias is None else y + bias.reshape(-1, *(1 for _ in stride))

    def conv_transpose(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        cut: Pads,
        dilation: Sequence[int],
        groups: int = 1,
    ) -> Tensor:
        raise UsageError(
            "transposed convolutions on arrays are priced and mapped, not simulated; leave their sites out "
            "of the map with exclude="
        )

    def _product(self, x: Tensor, sums: Sums) -> Tensor:
        parts = self._converted(torch.einsum("...k,pkn->...pn", self._entered(x), sums.parts[:, 0].to(x)))
        return (parts * sums.worth[:, 0].to(x)).sum(-2)

    def _entered(self, x: Tensor) -> Tensor:
        return x if self.converters is None else _rounded(x, self.converters.input_bits)

    def _converted(self, sums: Tensor) -> Tensor:
        return sums if self.converters is None else _rounded(sums, self.converters.adc_bits)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits values, evenly spaced over the range that they have, zero among them."""
    low, high = float(values.min().clamp_max(0)), float(values.max().clamp_min(0))
    step = (high - low) / (2**bits - 1)
    return (values / step).round() * step if step else values


def _products(mapped: Mapped, held: Tensor, site: str) -> list[Sums]:
    """The products of a site, from conductances over the largest."""
    found: dict[int, list[MappedMatrix]] = {}
    for matrix in mapped.map.matrices:
        if matrix.site == site:
            found.setdefault(matrix.product, []).append(matrix)
    return [_sums(mapped, held, found[number]) for number in sorted(found)]


def _sums(mapped: Mapped, held: Tensor, groups: Sequence[MappedMatrix]) -> Sums:
    parts = [list(_parts(mapped, held, matrix)) for matrix in groups]
    count, depth, columns = max(1, *map(len, parts)), groups[0].depth, groups[0].columns
    stack, worth = torch.zeros(count, len(groups), depth, columns), torch.zeros(count, len(groups), columns)
    for group, found in enumerate(parts):
        for number, (part, counts) in enumerate(found):
            stack[number, group], worth[number, group] = part, counts
    return Sums(stack, worth)


def _parts(mapped: Mapped, held: Tensor, matrix: MappedMatrix) -> Iterator[tuple[Tensor, Tensor]]:
    """What is converted one after another.

    The matrix cut into groups of rows, digits and signs, and what each column of it counts. The k-th groups
    of rows of all columns are one part, since columns do not mix.
    """
    array = mapped.map.array
    digits, cells = (digit_weights(array) * array.conductances[-1]).float(), array.polarities * array.digits
    rank = torch.zeros(matrix.columns, dtype=torch.long)
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for place in matrix.places:
        columns, start = torch.tensor(place.columns), 0
        for size in place.groups:
            number = int(rank[columns].max())
            rank[columns] = number + 1
            rows = torch.tensor(place.rows[start : start + size])[:, None]
            for k, (number_of, digit, (lines, across)) in enumerate(cells_of(place, array)):
                part, worth = made.setdefault(
                    number * cells + k,
                    (torch.zeros(matrix.depth, matrix.columns), torch.zeros(matrix.columns)),
                )
                window = slice(lines.start + start, lines.start + start + size), across
                part[rows, columns] = held[number_of][window].float()
                worth[columns] = (
                    mapped.sign[number_of][window].sum(0).sign().float() * digits[digit] * matrix.scale
                )
            start += size
    yield from (made[number] for number in sorted(made))


def _pads(module: nn.Module, name: str) -> tuple[str, tuple[int, ...]] | None:
    """How a module pads before its layer; raises `UsageError` for one that is no layer, or pads by itself."""
    if isinstance(module, Factorized):
        return (module.padding_mode, module.pads) if module.pads else None
    if not isinstance(module, dense_modules()) or getattr(module, "padding_mode", "zeros") != "zeros":
        raise UsageError(
            f"{name!r} is a {type(module).__name__} that is not simulated: only layers of their own that "
            "pad with zeros are; use exclude="
        )
    return None
