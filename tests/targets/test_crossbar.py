"""Crossbars in closed form against arrays laid out one by one and published counts, and planned for."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import nn

import tdpass
from tdpass.errors import BudgetError, UsageError
from tdpass.form import DENSE, Form
from tdpass.site import Site
from tdpass.targets import open_target
from tdpass.targets.crossbar import Block, CrossbarArray, Filling
from tdpass.targets.workload import Product

SMALL = replace(
    CrossbarArray.load("admm_32x32"),
    rows=8,
    columns=6,
    rows_at_once=4,
    adcs=2,
    weight_bits=9,
    input_bits=8,
    dac_bits=2,
)
ISAAC = CrossbarArray.load("isaac")


def counted(array: CrossbarArray, product: Product) -> defaultdict[str, float]:
    """What happens in arrays that are filled one after the other, place by place, without closed forms."""
    found: defaultdict[str, float] = defaultdict(float)
    places: list[list[tuple[int, int, int]]] = []  # blocks of each array, as (rows, columns, matrix)
    for matrix in range(product.count):
        for top in range(0, product.depth, array.rows):
            for left in range(0, product.columns, array.width):
                block = (
                    min(array.rows, product.depth - top),
                    min(array.width, product.columns - left),
                    matrix,
                )
                last = places[-1] if places else []
                fits = (
                    sum(b[0] for b in last) + block[0] <= array.rows
                    and sum(b[1] for b in last) + block[1] <= array.width
                )
                whole = product.depth <= array.rows and product.columns <= array.width
                if last and fits and whole and last[-1][2] != matrix:
                    last.append(block)
                else:
                    places.append([block])
    slices = math.ceil(array.input_bits / array.dac_bits)
    slowest = 0
    for blocks in places:
        busy, joules = 0, 0.0  # of one slice of an input
        for rows, columns, _ in blocks:
            for _ in range(0, rows, array.rows_at_once):
                found["conversions"] += product.rows * slices * columns * array.polarities * array.digits
                found["driven"] += product.rows * slices * array.copies
                used = sum(b[1] for b in blocks) * (array.digits if array.slices == "columns" else 1)
                joules += columns * array.polarities * array.digits * (array.adc_joules + array.sum_joules)
                joules += array.copies * array.driver_joules
                busy += max(math.ceil(array.read_seconds * array.hertz - 1e-9), math.ceil(used / array.adcs))
            found["reads"] += product.rows * slices * rows * columns * array.polarities * array.digits
            found["drives"] += product.rows * slices * rows * array.copies
            joules += rows * columns * array.polarities * array.digits * array.cell_joules
            joules += rows * array.copies * array.dac_joules
        found["watts"] += joules / (busy / array.hertz)
        slowest = max(slowest, busy)
        found["arrays"] += array.copies
    found["cycles"] = product.rows * slices * slowest
    return found


ARRAYS = {
    "pair": SMALL,
    "adjacent": replace(SMALL, slices="columns"),
    "fragments": replace(SMALL, signs="fragments", cell_bits=2, slices="columns", columns=12, adcs=5),
    "offset": replace(SMALL, signs="offset", weight_bits=8, rows_at_once=8),
}
PRODUCTS = [
    Product(1, 8, 6, 1, 8, 6),
    Product(5, 9, 7, 1, 45, 35),
    Product(3, 30, 20, 1, 90, 60),
    Product(2, 3, 1, 7, 42, 14),
    Product(2, 2, 2, 9, 36, 36),
    Product(4, 20, 1, 3, 240, 12),
    Product(1, 8, 1, 4, 32, 4),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_the_closed_form_is_what_arrays_laid_out_one_by_one_do(
    array: CrossbarArray, product: Product
) -> None:
    found = counted(array, product)
    fillings = array.fillings(product)
    cost = array.cost(product.rows, fillings, product.read + product.made)
    assert array.arrays(fillings) == found["arrays"]
    assert cost.get("cycles") == found["cycles"]
    assert cost.seconds == pytest.approx(found["cycles"] / array.hertz)
    assert cost.get("area") == pytest.approx(found["arrays"] * array.array_area())
    joules = found["conversions"] * (array.adc_joules + array.sum_joules) + found["reads"] * array.cell_joules
    joules += found["drives"] * array.dac_joules + found["driven"] * array.driver_joules
    joules += (product.read + product.made) * array.input_bits * array.buffer_joules
    assert cost.get("joules") == pytest.approx(joules)
    assert cost.get("watts") == pytest.approx(found["watts"])
    used = product.weights * array.polarities * array.digits
    assert array.utilisation(fillings) == pytest.approx(used / (found["arrays"] * array.rows * array.columns))


@pytest.mark.parametrize(("depth", "columns"), [(800, 500), (576, 64), (4608, 512), (25, 20)])
@pytest.mark.parametrize("preset", ["admm_32x32", "admm_128x64"])
def test_five_bits_halve_the_arrays_that_nine_take(preset: str, depth: int, columns: int) -> None:
    nine = CrossbarArray.load(preset)
    product = Product(1, depth, columns, 1, depth, columns)
    counts = [array.arrays(array.fillings(product)) for array in (nine, replace(nine, weight_bits=5))]
    # arrays of a layer: ceil(rows / R) ceil(columns / C) 2 ceil((b - 1) / 4)
    assert counts == [
        math.ceil(depth / nine.rows) * math.ceil(columns / nine.columns) * 2 * math.ceil((bits - 1) / 4)
        for bits in (9, 5)
    ]
    assert counts[0] == 2 * counts[1]


def test_power_is_that_of_all_arrays_at_once_however_often_a_layer_is_called() -> None:
    """As published: a fully connected layer of LeNet-5, called once, draws as much as one at 64 positions."""
    target, nine = open_target("crossbar:admm_32x32", "torch"), CrossbarArray.load("admm_32x32")
    once = Site("fc", "linear", (64, 800), extents=(((1,), (1,)),))
    often = replace(once, extents=(((64,), (64,)),))
    (one,), (many,) = target.cost(once, [DENSE]), target.cost(often, [DENSE])
    assert one.get("watts") == many.get("watts")
    assert many.get("joules") == pytest.approx(64 * one.get("joules"))
    # whole arrays: 25 x 2 blocks of 32 rows and columns, four arrays each
    seconds = math.ceil(nine.read_seconds * nine.hertz - 1e-9) / nine.hertz
    each = 32 * (nine.adc_joules + nine.sum_joules + nine.dac_joules) + 1024 * nine.cell_joules
    assert one.get("watts") == pytest.approx(200 * (each + nine.driver_joules) / max(seconds, 1 / nine.hertz))
    (five,) = target.cost(once, [Form("dense", (), ("levels32",))])
    assert one.get("watts") == pytest.approx(2 * five.get("watts"))


def test_fragments_of_one_sign_need_no_second_array() -> None:
    forms, product = CrossbarArray.load("forms"), Product(4, 300, 90, 1, 1200, 360)
    pairs = replace(forms, signs="pair")
    assert 2 * forms.arrays(forms.fillings(product)) == pairs.arrays(pairs.fillings(product))


def test_a_published_array_of_isaac_takes_a_hundred_nanoseconds_a_slice_of_the_input() -> None:
    # 128 columns through one converter of 1.2 GS/s; 16 slices of one bit
    cost = ISAAC.cost(1, ISAAC.fillings(Product(1, 128, 16, 1, 128, 16)), 0)
    assert cost.seconds == pytest.approx(16 * 107e-9, rel=0.01)
    assert ISAAC.width == 16
    assert ISAAC.utilisation(ISAAC.fillings(Product(1, 128, 16, 1, 128, 16))) == 1.0


def test_what_stands_on_the_chip_is_counted_once_however_often_it_is_called() -> None:
    target = open_target("crossbar:isaac", "torch")
    one = Site("fc", "linear", (40, 30), extents=(((3,), (3,)),))
    (once,), (thrice,), (shared,), (large,) = (
        target.cost(site, [DENSE])
        for site in (
            one,
            replace(one, extents=one.extents * 3),
            replace(one, extents=one.extents * 3, samples=3),
            replace(one, extents=(((9,), (9,)),)),
        )
    )
    assert once.get("area") == thrice.get("area") == shared.get("area") == large.get("area") > 0
    assert thrice.get("joules") == pytest.approx(3 * once.get("joules"))
    assert shared.get("joules") == pytest.approx(once.get("joules"))


def test_a_filling_is_the_sum_of_its_blocks() -> None:
    filling = Filling((Block(3, 2, 1), Block(5, 4, 2)), 2)
    assert (filling.columns, filling.groups) == (6, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": 1, "slices": "columns"}, "do not fit 1 columns"),
        ({"weight_bits": 1}, "weights of 1 bits"),
        ({"least_siemens": 1.0}, "not below most_siemens"),
        ({"states": (1e-7, 2e-7)}, "give 2\\^cell_bits = 16 of them"),
        ({"cell_bits": 1, "states": (1e-9, 2e-7)}, "outside least_siemens"),
    ],
)
def test_constants_that_contradict_each_other_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CrossbarArray.load("admm_32x32"), **change).sound()


def test_states_are_data_and_evenly_spaced_where_none_are_given() -> None:
    array = CrossbarArray.load("admm_32x32")
    states = torch.tensor(array.conductances)
    assert (len(states), float(states[0]), float(states[-1])) == (
        16,
        pytest.approx(1e-7),
        pytest.approx(1e-6),
    )
    torch.testing.assert_close(states.diff(), torch.full((15,), 6e-8))
    assert replace(array, cell_bits=1, states=(2e-7, 9e-7)).conductances == (2e-7, 9e-7)


def _net() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(48, 10)).eval()


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


BUDGETS = [
    ("crossbar:forms", "joules", 0.5),
    ("crossbar:admm_32x32", "area", "2 mm2"),
    ("pim:sot_mram", "joules", 0.4),
]


@pytest.mark.parametrize(("target", "measure", "bound"), BUDGETS)
def test_budgets_on_energy_and_area_are_met_and_reported(
    target: str, measure: str, bound: float | str
) -> None:
    artifact = tdpass.compress(_net(), {measure: bound}, IMAGES, target=target, effort="fast", cache=False)
    report = artifact.report
    limit = bound * report.original.get(measure) if isinstance(bound, float) else 2.0
    assert 0 < report.final.get(measure) <= limit < report.original.get(measure)
    assert report.final.get(measure) == pytest.approx(
        sum(choice.cost.get(measure) for choice in artifact.plan)
    )
    assert report.original.get(measure) == pytest.approx(
        sum(choice.dense.get(measure) for choice in artifact.plan)
    )
    assert any(not choice.kept_dense for choice in artifact.plan)
    opened = open_target(target, "torch")
    for choice, site in zip(artifact.plan, artifact.opened.sites(), strict=True):
        (cost,) = opened.cost(site, [choice.form])
        assert choice.cost.get(measure) == pytest.approx(cost.get(measure))


def test_a_budget_below_what_is_reachable_says_so() -> None:
    with pytest.raises(BudgetError, match="on target crossbar only what takes less area than dense counts"):
        tdpass.make_plan(_net(), {"area": "0.001 mm2"}, IMAGES, target="crossbar", effort="fast", cache=False)
    with pytest.raises(UsageError, match="admm_128x64, admm_32x32, forms, isaac, prime"):
        open_target("crossbar:nowhere", "torch")
