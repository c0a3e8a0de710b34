"""What modelled targets say of layers in number types and with supports.

These are the costs of their bits and of what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from onnx_nets import to_onnx
from torch import nn

import tdpass
from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, offered_formats
from tdpass.formats.layer import check_form, storage_of
from tdpass.kinds import KINDS
from tdpass.numbers import numbers_named
from tdpass.site import Site
from tdpass.targets import TARGETS, open_target
from tdpass.targets.crossbar import CrossbarArray
from tdpass.targets.modelled import ModelledTarget
from tdpass.targets.pim import PimMemory
from tdpass.targets.systolic import SystolicArray
from tdpass.targets.workload import Product, products_of

SITES = [site for kind in KINDS for site in kind.examples()]
MODELLED = [target.name for target in TARGETS if issubclass(target, ModelledTarget)]
LINEAR = Site("fc", "linear", (48, 64), extents=(((9,), (9,)),))
CONV = Site("conv", "conv", (48, 32, 3, 3), (1, 1), ((1, 1),) * 2, (1, 1), extents=(((8, 8), (8, 8)),))


def forms(site: Site) -> list[Form]:
    fits = [FORMATS.get(name) for name in offered_formats() if FORMATS.get(name).fits(site)]
    return [DENSE, *(Form(fmt.name, fmt.ranks(site)[len(fmt.ranks(site)) // 2]) for fmt in fits)]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_every_product_has_the_bits_of_the_factor_that_it_multiplies_by(site: Site) -> None:
    """Number types of other bits for each factor: what each stores is what products of those bits hold."""
    call, types = replace(site, extents=site.extents[:1], samples=1), ("int4", "int8", "levels8", "levels128")
    for plain in forms(call):
        names = list(storage_of(call, plain).shapes)
        form = replace(plain, numbers=tuple(types[k % len(types)] for k in range(len(names))))
        storage = storage_of(call, form)
        found = products_of(call, form)
        assert [replace(product, bits=0) for product in found] == list(products_of(call, plain)), form
        known = {numbers.bits for numbers in storage.numbers.values()}
        assert {product.bits for product in found} <= known, form
        assert all(product.bits == 0 for product in products_of(call, replace(plain, numbers=("float16",))))
        if len(found) == len(names):
            held = sorted((storage.count(name), storage.numbers[name].bits) for name in names)
            assert sorted((product.weights, product.bits) for product in found) == held, form


def pim(bits: int, product: Product) -> float:
    memory = PimMemory.load("sot_mram")
    ands, written = product.macs * bits * memory.input_bits, product.made * memory.sum_bits
    held = -(-product.weights * bits // (memory.rows * memory.columns))
    lanes = memory.columns * min(held, memory.sub_arrays)
    seconds = -(-ands // lanes) * memory.sense_seconds + -(-written // lanes) * memory.write_seconds
    return (
        ands * (memory.and_joules + memory.count_joules)
        + written * memory.write_joules
        + held * memory.watts * seconds
    )


def crossbar(bits: int, product: Product) -> float:
    array = CrossbarArray.load("isaac")  # with an offset: ceil(bits / 2) cells of one array for a weight
    digits, slices = -(-bits // array.cell_bits), array.input_bits // array.dac_bits
    steps = product.rows * slices
    across = -(-product.columns // (array.columns // digits))
    reads = steps * product.depth * product.columns * digits
    conversions = steps * -(-product.depth // array.rows) * product.columns * digits
    drives, driven = steps * product.depth * across, steps * -(-product.depth // array.rows) * across
    return (
        conversions * (array.adc_joules + array.sum_joules)
        + reads * array.cell_joules
        + drives * array.dac_joules
        + driven * array.driver_joules
        + (product.read + product.made) * array.input_bits * array.buffer_joules
    )


def systolic(bits: int, product: Product) -> float:
    """Weights that stay, all in the buffers: short in memory, and as wide as an operand in the array."""
    array = SystolicArray.load("gemmini")
    whole = array.memory_bytes(product) - product.weights * (array.bits - bits) / 8
    first = array.rows * array.columns * array.bits / 8
    cycles = max(array.busy_cycles(product), -(-whole // array.bytes_per_cycle)) + -(
        -first // array.bytes_per_cycle
    )
    moved = array.edge_bytes(product) * array.buffer_joules + whole * array.memory_joules
    return product.macs * array.mac_joules + moved + array.watts * cycles / array.hertz


CLOSED = {"pim:sot_mram": pim, "crossbar:isaac": crossbar, "systolic:gemmini": systolic}


@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("numbers", ["int8", "int4", "levels16", "levels8"])
@pytest.mark.parametrize(("target", "closed"), CLOSED.items(), ids=CLOSED)
def test_energy_is_that_of_the_bits(
    target: str, closed: Callable[[int, Product], float], numbers: str, site: Site
) -> None:
    bits, opened = numbers_named(numbers).bits, open_target(target, "torch")
    low = "svd" if site is LINEAR else "channel_svd"
    for form in (Form("dense", (), (numbers,)), Form(low, (16,), (numbers,))):
        (cost,) = opened.cost(site, [form])
        plain = products_of(site, replace(form, numbers=()))
        assert cost.get("joules") == pytest.approx(sum(closed(bits, product) for product in plain))


@pytest.mark.parametrize("target", MODELLED)
def test_each_measure_falls_with_the_bits_and_factors_have_their_own(target: str) -> None:
    opened = open_target(target, "torch")
    forms = [Form("svd", (16,), numbers) for numbers in (("int8",), ("int4", "int8"), ("int4",))]
    eight, mixed, four = opened.cost(LINEAR, forms)
    for measure in opened.measures:
        assert four.get(measure) <= mixed.get(measure) <= eight.get(measure)
    assert four.get("joules") < mixed.get("joules") < eight.get("joules")


def test_four_bits_take_half_the_memory_and_half_the_cells() -> None:
    large = replace(LINEAR, shape=(1024, 1024))
    for target, share in (("pim:sot_mram", 2), ("crossbar:isaac", 2)):
        eight, four = open_target(target, "torch").cost(
            large, [Form("dense", (), (bits,)) for bits in ("int8", "int4")]
        )
        assert eight.get("area") == pytest.approx(share * four.get("area"))


LEFT: list[tuple[Site, str, int, int]] = [
    (LINEAR, "rows/12", 64, 12),
    (LINEAR, "columns/25%", 16, 48),
    (LINEAR, "blocks12x64/3", 64, 36),
    (CONV, "rows/12", 288, 12),
    (CONV, "columns/100", 100, 48),
    (LINEAR, "blocks4x4/30%", 64, 48),
    (LINEAR, "2:4", 64, 48),
    (CONV, "unstructured/10%", 288, 48),
]


@pytest.mark.parametrize(("site", "support", "depth", "columns"), LEFT)
def test_whole_rows_and_columns_that_are_left_out_are_not_computed(
    site: Site, support: str, depth: int, columns: int
) -> None:
    form = Form("dense", (), support=support)
    (whole,), (left,) = products_of(site, DENSE), products_of(site, form)
    made = whole.made * columns // whole.columns
    assert left == replace(whole, depth=depth, columns=columns, made=made)
    for target in MODELLED:
        opened = open_target(target, "torch")
        dense, sparse = opened.cost(site, [DENSE, form])
        assert (sparse.get("joules") < dense.get("joules")) is (left != whole)


def test_groups_without_rows_are_gone_and_factors_are_cut_by_themselves() -> None:
    grouped = Site(
        "conv", "conv", (8, 1, 3, 3), (1, 1), ((1, 1),) * 2, (1, 1), extents=CONV.extents, groups=8
    )
    (left,) = products_of(grouped, Form("dense", (), support="rows/3"))
    assert (left.count, left.depth, left.columns, left.read, left.made) == (3, 9, 1, 3 * 64, 3 * 64)
    first, second = products_of(LINEAR, Form("svd", (16,), support="columns/20,rows/12"))
    assert (first.depth, first.columns, second.depth, second.columns) == (20, 16, 16, 12)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_every_format_may_lose_rows(site: Site) -> None:
    call = replace(site, extents=site.extents[:1], samples=1)
    for plain in forms(call):
        form = replace(plain, support="rows/50%")
        try:
            check_form(call, form)
        except PlanError:
            continue
        assert sum(product.macs for product in products_of(call, form)) < sum(
            product.macs for product in products_of(call, plain)
        )


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(64, 10)).eval()


IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NONE = "plan{numbers=none},factorize,verify"


@pytest.mark.parametrize("frontend", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_budget_on_energy_chooses_precision_and_rank_together(frontend: str) -> None:
    model = _net() if frontend == "torch" else to_onnx(_net(), IMAGES)
    options = {"target": "pim:sot_mram", "cache": False, "effort": "fast", "formats": ["svd", "channel_svd"]}
    artifact = tdpass.compress(model, {"joules": 0.3}, IMAGES, **options)
    report, opened = artifact.report, open_target("pim:sot_mram", "torch")
    assert any(choice.form.numbers and choice.form.rank for choice in artifact.plan)
    assert 0 < report.final.get("joules") <= 0.3 * report.original.get("joules")
    for choice, site in zip(artifact.plan, artifact.opened.sites(), strict=True):
        (cost,) = opened.cost(site, [choice.form])
        assert choice.cost.get("joules") == pytest.approx(cost.get("joules"))
    ranks = tdpass.compress(model, {"joules": 0.3}, IMAGES, pipeline=NONE, **options)
    assert not any(choice.form.numbers for choice in ranks.plan)
    assert report.checks["divergence"] < 0.7 * ranks.report.checks["divergence"]


def test_supports_and_number_types_are_offered_where_the_target_counts_them() -> None:
    text = "plan{numbers=int4,supports=rows/50%}"
    options = {"cache": False, "effort": "fast", "pipeline": text, "formats": ["channel_svd"]}
    found = tdpass.make_plan(_net(), {"joules": 0.2}, IMAGES, target="pim", **options)
    assert any(choice.form.encoded for choice in found.plan)
    counted = tdpass.make_plan(_net(), {"macs": 0.5}, IMAGES, target="pim", **options)
    assert not any(choice.form.encoded for choice in counted.plan)
