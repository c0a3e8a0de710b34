"""Memory that computes, in closed form: against bits combined one by one and published energies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tdpass.targets.pim import PimMemory
from tdpass.targets.workload import Product

SOT = PimMemory.load("sot_mram")
MRAM = ("sot_mram", "stt_mram", "stt_mram_fast")
LENET = (Product(576, 25, 20, 1, 784, 11520), Product(64, 500, 50, 1, 2880, 3200))
CLASSIC = (Product(784, 25, 6, 1, 784, 4704), Product(100, 150, 16, 1, 1176, 1600))


@pytest.mark.parametrize("preset", MRAM)
def test_a_product_of_two_bits_takes_what_was_published(preset: str) -> None:
    """LeNet-5 of 1-bit weights and 8-bit activations takes 0.85 uJ in SOT-MRAM.

    That is 0.056 pJ (Caffe's net) to 0.26 pJ (the classic) a product.
    """
    memory = PimMemory.load(preset)
    assert 0.056e-12 <= memory.and_joules + memory.count_joules <= 0.26e-12
    binary = replace(memory, weight_bits=1, input_bits=8, write_joules=0.0, watts=0.0)
    large, small = (sum(binary.cost(product).get("joules") for product in net) for net in (LENET, CLASSIC))
    assert small < 0.85e-6 < large


def test_every_bit_of_a_weight_meets_every_bit_of_an_activation() -> None:
    draw = np.random.default_rng(0)
    x, w = draw.integers(0, 8, (3, 5)), draw.integers(0, 4, (5, 2))
    ands, total = 0, np.zeros((3, 2), dtype=int)
    for row, column, depth in np.ndindex(3, 2, 5):
        for p in range(3):
            for q in range(2):
                total[row, column] += ((x[row, depth] >> p & 1) & (w[depth, column] >> q & 1)) << (p + q)
                ands += 1
    assert (total == x @ w).all()
    memory = replace(SOT, weight_bits=2, input_bits=3)
    product = Product(3, 5, 2, 1, 15, 6)
    assert memory.bit_products(product) == ands
    assert memory.weight_memory(product) == 2 * w.size
    cost = memory.cost(product)
    written = 6 * memory.sum_bits
    rows, writes = -(-ands // memory.columns), -(-written // memory.columns)
    seconds = rows * memory.sense_seconds + writes * memory.write_seconds
    assert cost.seconds == pytest.approx(seconds)
    assert cost.get("joules") == pytest.approx(
        ands * (memory.and_joules + memory.count_joules)
        + written * memory.write_joules
        + memory.watts * seconds
    )
    assert cost.get("area") == memory.sub_array_area


@pytest.mark.parametrize("preset", PimMemory.presets())
def test_half_the_width_or_half_the_bits_take_a_quarter_of_the_energy_and_half_the_bits_half_the_memory(
    preset: str,
) -> None:
    memory = replace(PimMemory.load(preset), write_joules=0.0, watts=0.0)
    full, half = Product(64, 512, 256, 1, 0, 0), Product(64, 256, 128, 1, 0, 0)
    sixteen = replace(memory, weight_bits=16, input_bits=16)
    assert memory.cost(full).get("joules") == pytest.approx(4 * memory.cost(half).get("joules"))
    assert sixteen.cost(full).get("joules") == pytest.approx(4 * memory.cost(full).get("joules"))
    assert sixteen.weight_memory(full) == 2 * memory.weight_memory(full)
    assert sixteen.cost(full).get("area") == pytest.approx(2 * memory.cost(full).get("area"))


def test_only_so_many_sub_arrays_work_at_once() -> None:
    product = Product(64, 512, 256, 1, 0, 0)
    held = SOT.held_by(product)
    assert held == 512 * 256 * 8 // 65536
    one, all_of_them = (replace(SOT, sub_arrays=count).cost(product) for count in (1, 512))
    assert one.get("cycles") == held * all_of_them.get("cycles")
    assert one.get("area") == all_of_them.get("area")
