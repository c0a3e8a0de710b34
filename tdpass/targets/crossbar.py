"""crossbar: arrays of memristors with weights for conductances, and their periphery, in closed form.

The periphery drives and reads them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from tdpass.cost import Cost
from tdpass.documents import Amount, Positive, Size
from tdpass.form import DENSE
from tdpass.site import Site
from tdpass.targets.base import register_target
from tdpass.targets.constants import Constants
from tdpass.targets.modelled import ModelledTarget
from tdpass.targets.workload import Product

Signs = Literal["pair", "fragments", "offset"]
_MM2 = 1e-6  # of a square micrometre


@dataclass(frozen=True)
class Block:
    """A block of a matrix in an array: rows and columns of weights, and the steps its rows are driven in."""

    rows: int
    columns: int
    groups: int


@dataclass(frozen=True)
class Filling:
    """`times` arrays with the same blocks in each, side by side along the diagonal."""

    blocks: tuple[Block, ...]
    times: int = 1

    @property
    def groups(self) -> int:
        """Steps in which the rows of one array are driven."""
        return sum(block.groups for block in self.blocks)

    @property
    def columns(self) -> int:
        """Columns of weights in one array."""
        return sum(block.columns for block in self.blocks)


@dataclass(frozen=True)
class CrossbarArray(Constants):
    """The constants of an array of memristors and its periphery; a YAML file with these keys.

    `rows` [cells]: word lines of an array.
    `columns` [cells]: bit lines of an array.
    `cell_bits` [bit]: of a cell, which has 2^cell_bits states.
    `weight_bits` [bit]: of a weight, its sign included, whose form has no number type, or a floating-point
    one.
    `signs` []: how weights are negative: a `pair` of arrays whose sums are subtracted, `fragments` of rows
    whose weights share a sign, or an `offset`.
    `slices` []: where the cells of one weight lie, in `arrays` of their own or in adjacent `columns`.
    `rows_at_once` [cells]: word lines driven in one step; a fragment has as many.
    `input_bits` [bit]: of an activation.
    `dac_bits` [bit]: of an activation that a word line is driven with at once.
    `adc_bits` [bit]: of a converted sum.
    `adcs` [converters]: of an array, which convert its columns one after another.
    `hertz` [Hz]: conversions per second of a converter.
    `read_seconds` [s]: from driving the rows to sums that stand.
    `least_siemens` [S]: the least conductance of a state.
    `most_siemens` [S]: the largest.
    `states` [S]: all conductances, ascending, where they are not evenly spaced from the least to the largest.
    `wire_ohms` [Ohm]: of a line between two cells.
    `cell_joules` [J]: of a cell in a driven row of a used column, per step, over all states and inputs.
    `adc_joules` [J]: of a conversion.
    `dac_joules` [J]: of driving a row, per step.
    `driver_joules` [J]: of an array per step: decoders, samples held.
    `sum_joules` [J]: of a shift and an addition, one for each conversion.
    `buffer_joules` [J/bit]: of an activation that is read or written.
    `cell_area` [um2]: of a cell.
    `adc_area` [um2]: of a converter.
    `dac_area` [um2]: of the driver of one row.
    `driver_area` [um2]: of decoders and what holds samples, of an array.
    `sum_area` [um2]: of a unit that shifts and adds, one for each converter.
    `buffer_area` [um2]: of an array's share of the activation buffers.
    """

    noun = "crossbar array"
    folder = "crossbar_arrays"
    usual = "isaac"

    rows: Size
    columns: Size
    cell_bits: Size
    weight_bits: Size
    signs: Signs
    slices: Literal["arrays", "columns"]
    rows_at_once: Size
    input_bits: Size
    dac_bits: Size
    adc_bits: Size
    adcs: Size
    hertz: Positive
    read_seconds: Amount
    least_siemens: Positive
    most_siemens: Positive
    wire_ohms: Amount
    cell_joules: Amount
    adc_joules: Amount
    dac_joules: Amount
    driver_joules: Amount
    sum_joules: Amount
    buffer_joules: Amount
    cell_area: Amount
    adc_area: Amount
    dac_area: Amount
    driver_area: Amount
    sum_area: Amount
    buffer_area: Amount
    source: str
    states: tuple[Positive, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    def sound(self) -> None:
        if self.weight_bits < 2 or self.width < 1:
            raise ValueError(
                f"weights of {self.weight_bits} bits in cells of {self.cell_bits} do not fit {self.columns} "
                "columns"
            )
        if self.least_siemens >= self.most_siemens:
            raise ValueError(
                f"least_siemens is {self.least_siemens}, which is not below most_siemens, {self.most_siemens}"
            )
        if self.states and (
            len(self.states) != 2**self.cell_bits or list(self.states) != sorted(set(self.states))
        ):
            raise ValueError(
                f"states are {len(self.states)} conductances; give 2^cell_bits = {2**self.cell_bits} of "
                "them, ascending"
            )
        if self.states and not self.least_siemens <= self.states[0] < self.states[-1] <= self.most_siemens:
            raise ValueError(
                f"states run from {self.states[0]} to {self.states[-1]}, outside least_siemens to "
                "most_siemens"
            )

    @property
    def digits(self) -> int:
        """Cells that hold the magnitude of one weight, of b bits in cells of c.

        They are ceil((b - 1) / c), and ceil(b / c) with an offset.
        """
        return -(-(self.weight_bits - (self.signs != "offset")) // self.cell_bits)

    @property
    def polarities(self) -> int:
        """Arrays that together hold weights of both signs."""
        return 2 if self.signs == "pair" else 1

    @property
    def width(self) -> int:
        """Weights in a row of an array."""
        return self.columns // self.digits if self.slices == "columns" else self.columns

    @property
    def copies(self) -> int:
        """Arrays that a block of weights takes."""
        return self.polarities * (1 if self.slices == "columns" else self.digits)

    @property
    def conductances(self) -> tuple[float, ...]:
        """The states, ascending."""
        if self.states:
            return self.states
        steps = 2**self.cell_bits - 1
        return tuple(
            self.least_siemens + k * (self.most_siemens - self.least_siemens) / steps
            for k in range(steps + 1)
        )

    def holding(self, bits: int) -> CrossbarArray:
        """The array with weights of so many bits in its cells, 0 for its own.

        A weight has a sign and a bit at least.
        """
        return replace(self, weight_bits=max(2, bits)) if bits else self

    def groups(self, rows: int) -> int:
        """Steps in which so many rows are driven."""
        return -(-rows // self.rows_at_once)

    def fillings(self, product: Product) -> list[Filling]:
        """How the weights of a product fill arrays.

        They are tiles of a matrix, the last ones ragged, or several small matrices along a diagonal.
        """
        depth, columns, count = product.depth, product.columns, product.count
        if depth <= self.rows and columns <= self.width:
            abreast = min(count, self.rows // depth, self.width // columns)
            block = Block(depth, columns, self.groups(depth))
            whole, rest = divmod(count, abreast)
            return [
                Filling((block,) * size, times)
                for size, times in ((abreast, whole), (rest, 1))
                if size and times
            ]
        high, wide = _parts(depth, self.rows), _parts(columns, self.width)
        return [Filling((Block(r, c, self.groups(r)),), count * n * m) for r, n in high for c, m in wide]

    def arrays(self, fillings: Iterable[Filling]) -> int:
        """How many arrays they are: ceil(K / R) ceil(N / C) copies of one matrix."""
        return self.copies * sum(filling.times for filling in fillings)

    def utilisation(self, fillings: Iterable[Filling]) -> float:
        """The share of the cells of these arrays that holds weights."""
        filled = list(fillings)
        cells = sum(
            filling.times * block.rows * block.columns for filling in filled for block in filling.blocks
        )
        return cells * self.polarities * self.digits / (self.arrays(filled) * self.rows * self.columns)

    def array_area(self) -> float:
        """Square millimetres of an array with its periphery."""
        periphery = self.adcs * (self.adc_area + self.sum_area) + self.driver_area + self.buffer_area
        return (self.rows * (self.columns * self.cell_area + self.dac_area) + periphery) * _MM2

    def cost(self, rows: int, fillings: Iterable[Filling], moved: float) -> Cost:
        """What `rows` products with the weights in these arrays cost.

        `moved` counts the activations that are read and written. An activation enters in ceil(input_bits /
        dac_bits) slices.  In each, every group of rows is driven once, and every used column of its block
        converted once.  Arrays work side by side, the columns of one wait for its converters.

        E = rows slices sum_a E_a + moved e_buffer, with the energy E_a of one slice in the arrays a.  In a
        chip whose layers work at once on inputs that follow each other, all arrays are busy: P = sum_a E_a /
        t_a, however often a layer is called, which the cuts in power fit that Yuan et al., ISLPED 2019,
        publish.
        """
        alike = Counter[tuple[Block, ...]]()
        for filling in fillings:
            alike[filling.blocks] += filling.times
        filled = [Filling(blocks, times) for blocks, times in alike.items()]
        slices = -(-self.input_bits // self.dac_bits)
        energies = [filling.times * self._slice_joules(filling) for filling in filled]
        lengths = [filling.groups * self._step(filling) for filling in filled]
        cycles = rows * slices * max(lengths, default=0)
        power = [energy * self.hertz / length for energy, length in zip(energies, lengths, strict=True)]
        return Cost(
            cycles=cycles,
            seconds=cycles / self.hertz,
            joules=rows * slices * math.fsum(energies) + moved * self.input_bits * self.buffer_joules,
            area=self.arrays(filled) * self.array_area(),
            watts=math.fsum(power),
        )

    def _slice_joules(self, filling: Filling) -> float:
        """What one slice of an input takes in an array and its copies: conversions, cells, drivers."""
        cells, blocks = self.polarities * self.digits, filling.blocks
        conversions = cells * sum(block.groups * block.columns for block in blocks)
        reads = cells * sum(block.rows * block.columns for block in blocks)
        drives = self.copies * sum(block.rows for block in blocks)
        return (
            conversions * (self.adc_joules + self.sum_joules)
            + reads * self.cell_joules
            + drives * self.dac_joules
            + self.copies * filling.groups * self.driver_joules
        )

    def _step(self, filling: Filling) -> int:
        """Conversions that a converter has time for or makes in one step."""
        used = filling.columns * (self.digits if self.slices == "columns" else 1)
        return max(math.ceil(self.read_seconds * self.hertz - 1e-9), -(-used // self.adcs))


@register_target
class CrossbarTarget(ModelledTarget):
    """`crossbar:NAME` or `crossbar:FILE.yaml`: a `CrossbarArray` as often as the weights need it.

    One layer is computed after another. Weights stay where they are, so the area of all layers adds up and a
    layer that is called twice is there once.
    """

    name = "crossbar"
    measures = ("joules", "area", "seconds", "cycles", "watts")
    numbers = ("int8", "int4")

    def __init__(self, array: CrossbarArray) -> None:
        super().__init__()
        self.array = array
        self.filled_by = str(array)
        self._price = cache(self._cost_product)

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> CrossbarTarget:
        return cls(CrossbarArray.load(way))

    def cost_product(self, product: Product) -> Cost:
        return self._price(product)

    def cost_filled(self, site: Site, filled: Sequence[Filling], batch: int = 1) -> Cost:
        """What a dense site costs whose weights fill arrays like that, rather than as a whole matrix does."""
        return self._cost(
            site,
            DENSE,
            batch,
            lambda product: self.array.cost(product.rows, filled, product.read + product.made),
        )

    def _cost_product(self, product: Product) -> Cost:
        array = self.array.holding(product.bits)
        return array.cost(product.rows, array.fillings(product), product.read + product.made)


def _parts(size: int, limit: int) -> list[tuple[int, int]]:
    """The sizes that a length is cut into, each with how often."""
    return [(part, times) for part, times in ((limit, size // limit), (size % limit, 1)) if part and times]
