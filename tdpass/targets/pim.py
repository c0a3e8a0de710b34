"""pim: memory that computes.

Rows of bits are combined by AND where they are stored, and counted, in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tdpass.cost import Cost
from tdpass.documents import Amount, Positive, Size
from tdpass.targets.base import register_target
from tdpass.targets.constants import Constants
from tdpass.targets.modelled import ModelledTarget
from tdpass.targets.workload import Product


@dataclass(frozen=True)
class PimMemory(Constants):
    """The constants of sub-arrays that combine two rows in one sensing, and add up bits beside them.

    A YAML file with these keys.

    `rows` [cells]: word lines of a sub-array.
    `columns` [cells]: bit lines of a sub-array, all sensed at once.
    `sub_arrays` []: those that may work at once.
    `weight_bits` [bit]: of a weight whose form has no number type, or a floating-point one.
    `input_bits` [bit]: of an activation.
    `sum_bits` [bit]: of a result that is written back.
    `and_joules` [J]: of one bit of a row-wide AND, which is one sensing.
    `count_joules` [J]: of adding one bit.
    `write_joules` [J]: of writing one bit.
    `sense_seconds` [s]: of sensing a row.
    `write_seconds` [s]: of writing a row.
    `sub_array_area` [mm2]: of a sub-array with its periphery.
    `watts` [W]: at rest, of a sub-array that holds weights, while its layer is computed.
    """

    noun = "memory that computes"
    folder = "pim_memories"
    usual = "sot_mram"

    rows: Size
    columns: Size
    sub_arrays: Size
    weight_bits: Size
    input_bits: Size
    sum_bits: Size
    and_joules: Amount
    count_joules: Amount
    write_joules: Amount
    sense_seconds: Positive
    write_seconds: Amount
    sub_array_area: Amount
    watts: Amount
    source: str
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    def bits(self, product: Product) -> int:
        """Bits of a weight of the product: those of its number type, else the memory's own."""
        return product.bits or self.weight_bits

    def weight_memory(self, product: Product) -> int:
        """Bits that the weights of a product take."""
        return product.weights * self.bits(product)

    def held_by(self, product: Product) -> int:
        """Sub-arrays that its weights fill."""
        return -(-self.weight_memory(product) // (self.rows * self.columns))

    def bit_products(self, product: Product) -> int:
        """Products of one bit by another.

        Macs b_w b_a, every bit of a weight with every bit of an activation.
        """
        return product.macs * self.bits(product) * self.input_bits

    def cost(self, product: Product) -> Cost:
        """Energy, time and area; the sub-arrays that hold the weights work at once, a row after another.

        E = macs b_w b_a (e_and + e_count) + outputs b_sum e_write + watts t,  t = macs b_w b_a / (columns n)
        t_sense + outputs b_sum / (columns n) t_write, with n sub-arrays (Angizi, He, Fan, ISVLSI 2019, whose
        AND-accumulate this is).  Cycles are sensings.
        """
        ands, written = self.bit_products(product), product.made * self.sum_bits
        held = self.held_by(product)
        lanes = self.columns * min(held, self.sub_arrays)
        seconds = -(-ands // lanes) * self.sense_seconds + -(-written // lanes) * self.write_seconds
        joules = (
            ands * (self.and_joules + self.count_joules)
            + written * self.write_joules
            + held * self.watts * seconds
        )
        return Cost(
            cycles=-int(-seconds / self.sense_seconds // 1),
            seconds=seconds,
            joules=joules,
            area=held * self.sub_array_area,
        )


@register_target
class PimTarget(ModelledTarget):
    """`pim:NAME` or `pim:FILE.yaml`.

    A `PimMemory` that holds all weights, one layer computed after another.
    """

    name = "pim"
    measures = ("joules", "seconds", "cycles", "area")
    numbers = ("int8", "int4")

    def __init__(self, memory: PimMemory) -> None:
        super().__init__()
        self.memory = memory
        self.filled_by = str(memory)
        self._price = cache(memory.cost)

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> PimTarget:
        return cls(PimMemory.load(way))

    def cost_product(self, product: Product) -> Cost:
        return self._price(product)
