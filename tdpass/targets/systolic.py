"""systolic: an array of multiply-add units that hand operands on to their neighbours, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from tdpass.cost import Cost
from tdpass.documents import Amount, Count, Positive, Size
from tdpass.targets.base import register_target
from tdpass.targets.constants import Constants
from tdpass.targets.modelled import ModelledTarget
from tdpass.targets.workload import Product


@dataclass(frozen=True)
class SystolicArray(Constants):
    """The constants of an array and its memories; a YAML file with these keys.

    `rows` [units]: along the axis that partial sums or weights move on.
    `columns` [units]: along the other axis.
    `stationary` []: what a unit keeps while others pass, a `weight` or an `output`.
    `preload` []: whether a unit has a second register, so that the next weights come while it works.
    `hertz` [Hz]: cycles per second.
    `bits` [bit]: of an operand.
    `sum_bits` [bit]: of a partial sum.
    `bytes_per_cycle` [B]: between the array's buffers and memory, which fill while the array works (double
    buffering).
    `buffer_bytes` [B]: for activations; what does not fit is read again for every block of columns, or of
    rows.
    `sum_bytes` [B]: for partial sums; those of a block of columns that do not fit go to memory and back.
    `mac_joules` [J]: of a multiply-add.
    `buffer_joules` [J/B]: of what enters or leaves the array.
    `memory_joules` [J/B]: of what enters or leaves the buffers.
    `watts` [W]: at rest.
    """

    noun = "systolic array"
    folder = "systolic_arrays"
    usual = "tpu_like"

    rows: Size
    columns: Size
    stationary: Literal["weight", "output"]
    preload: bool
    hertz: Positive
    bits: Size
    sum_bits: Size
    bytes_per_cycle: Positive
    buffer_bytes: Count
    sum_bytes: Count
    mac_joules: Amount
    buffer_joules: Amount
    memory_joules: Amount
    watts: Amount
    source: str
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    def sound(self) -> None:
        if self.preload and self.stationary != "weight":
            raise ValueError("preload is of weights that stay; with stationary: output say preload: false")

    def folds(self, product: Product) -> int:
        """How often the array is filled.

        Ceil(K / R) ceil(N / C) with weights that stay, ceil(M / R) ceil(N / C) with outputs.
        """
        return product.count * -(-self._along(product) // self.rows) * -(-product.columns // self.columns)

    def busy_cycles(self, product: Product) -> int:
        """Cycles of the array if it never waits: folds (2 R + C + T - 2), T = M or K, the axis that streams.

        R cycles fill the rows (or empty them), the T operands enter one a cycle, each row and column one
        cycle later than the one before, and the last result leaves R - 1 + C - 1 cycles after the last
        operand entered (Samajdar et al. 2018, SCALE-Sim).  With weights loaded ahead a fold begins as soon
        as the last operand of the one before has entered and its own weights have come:
        (folds - 1) max(T, R) + 2 R + C + T - 2.
        """
        streams = product.rows if self.stationary == "weight" else product.depth
        alone = 2 * self.rows + self.columns + streams - 2
        following = max(streams, self.rows) if self.preload else alone
        return (self.folds(product) - 1) * following + alone

    def edge_bytes(self, product: Product) -> float:
        """Bytes over the edges of the array, operands that pad it not counted.

        Weights stay: each enters once, inputs ceil(N / C) times, partial sums leave ceil(K / R) times and
        enter once less. Outputs stay: inputs ceil(N / C) times, weights ceil(M / R) times, outputs leave
        once.
        """
        blocks, folds = -(-product.columns // self.columns), -(-self._along(product) // self.rows)
        inputs = product.count * product.rows * product.depth * blocks
        outputs = product.count * product.rows * product.columns
        again, passes = (1, 2 * folds - 1) if self.stationary == "weight" else (folds, 1)
        return ((inputs + again * product.weights) * self.bits + passes * outputs * self.sum_bits) / 8

    def memory_bytes(self, product: Product) -> float:
        """Bytes between buffers and memory: everything once, and again what the buffers do not hold.

        Weights of a number type with fewer bits than an operand are as short there and in the buffers.
        """
        blocks, folds = -(-product.columns // self.columns), -(-self._along(product) // self.rows)
        held = product.read * self.bits <= 8 * self.buffer_bytes
        reads = product.read * (1 if held else blocks)
        spilled = 0
        weights = product.weights * min(product.bits or self.bits, self.bits)
        if self.stationary == "weight":
            sums = product.rows * min(product.columns, self.columns) * self.sum_bits
            spilled = 0 if sums <= 8 * self.sum_bytes else 2 * (folds - 1) * product.made
        else:
            weights *= 1 if weights <= 8 * self.buffer_bytes else folds
        return ((reads + product.made) * self.bits + weights + spilled * self.sum_bits) / 8

    def cycles(self, product: Product) -> int:
        """The longer of computing and moving, as they overlap, after the first operands have come.

        Traffic is spread evenly over the folds.
        """
        first = self.rows * self.columns * self.bits / 8
        return max(self.busy_cycles(product), _up(self.memory_bytes(product) / self.bytes_per_cycle)) + _up(
            first / self.bytes_per_cycle
        )

    def joules(self, product: Product) -> float:
        """Energy of the multiply-adds that count, of the traffic, and at rest over the time taken."""
        moved = (
            self.edge_bytes(product) * self.buffer_joules + self.memory_bytes(product) * self.memory_joules
        )
        return product.macs * self.mac_joules + moved + self.watts * self.cycles(product) / self.hertz

    def _along(self, product: Product) -> int:
        """The axis that is laid over the rows."""
        return product.depth if self.stationary == "weight" else product.rows


@register_target
class SystolicTarget(ModelledTarget):
    """`systolic:NAME` or `systolic:FILE.yaml`: a `SystolicArray`, running one product after another.

    Every product reads its activations from memory and writes them back.
    """

    name = "systolic"
    measures = ("cycles", "seconds", "joules")
    numbers = ("int8", "int4")

    def __init__(self, array: SystolicArray) -> None:
        super().__init__()
        self.array = array
        self.filled_by = str(array)
        self._price = cache(self._cost_product)

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> SystolicTarget:
        return cls(SystolicArray.load(way))

    def cost_product(self, product: Product) -> Cost:
        return self._price(product)

    def _cost_product(self, product: Product) -> Cost:
        cycles = self.array.cycles(product)
        return Cost(cycles=cycles, seconds=cycles / self.array.hertz, joules=self.array.joules(product))


def _up(value: float) -> int:
    return -int(-value // 1)
