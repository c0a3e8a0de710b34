"""The systolic array in closed form, against an array that is run cycle by cycle.

And planning on it, where nothing is timed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from selection import mostly_slow
from torch import nn

import tdpass
from tdpass.clock import on_cpu
from tdpass.errors import BudgetError, UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, offered_formats
from tdpass.formats.layer import dense_cost
from tdpass.kinds import KINDS
from tdpass.models import open_model
from tdpass.site import Site
from tdpass.targets import Setting, open_target
from tdpass.targets.systolic import SystolicArray, SystolicTarget
from tdpass.targets.workload import Product, products_of

ARRAY = SystolicArray.load("gemmini")
PRESETS = ("gemmini", "output_stationary", "tpu_like", "tpu_v1")


@dataclass
class Machine:
    """A grid of units with registers, run cycle by cycle.

    `entered` and `left` count what crosses its edges and is no padding.
    """

    rows: int
    columns: int
    cycles: int = 0
    entered: dict[str, int] = field(default_factory=lambda: {"inputs": 0, "weights": 0, "sums": 0})
    left: int = 0

    def weights_stay(self, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
        """y += x @ w for a block that fits: weights shift in from the top, inputs go right, sums go down."""
        (length, depth), (_, columns) = x.shape, w.shape
        kept, inputs, sums = (np.zeros((self.rows, self.columns)) for _ in range(3))
        for row in reversed(range(self.rows)):
            kept = np.vstack(
                [self._padded(w[row], self.columns) if row < depth else np.zeros(self.columns), kept[:-1]]
            )
            self.entered["weights"] += columns if row < depth else 0
            self.cycles += 1
        done, made = 0, np.zeros((length, self.columns))
        for t in itertools.count():
            reads = [(row, t - row) for row in range(depth) if 0 <= t - row < length]
            left = np.zeros(self.rows)
            for row, m in reads:
                left[row] = x[m, row]
            self.entered["inputs"] += len(reads)
            inputs = np.hstack([left[:, None], inputs[:, :-1]])
            sums = np.vstack([np.zeros(self.columns), sums[:-1]]) + kept * inputs
            self.cycles += 1
            for column in range(self.columns):
                m = t - (self.rows - 1) - column
                if 0 <= m < length:
                    made[m, column] = sums[-1, column]
                    done += 1
                    self.left += column < columns
            if done == length * self.columns:
                break
        y += made[:, :columns]

    def outputs_stay(self, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
        """y = x @ w for a block that fits: inputs go right, weights down, results shift out below."""
        (length, depth), (_, columns) = x.shape, w.shape
        inputs, weights, sums = (np.zeros((self.rows, self.columns)) for _ in range(3))
        busy = 0
        while busy < depth * self.rows * self.columns:
            t, left, top = self.cycles, np.zeros(self.rows), np.zeros(self.columns)
            t -= self.started
            for row in (row for row in range(length) if 0 <= t - row < depth):
                left[row] = x[row, t - row]
                self.entered["inputs"] += 1
            for column in (column for column in range(columns) if 0 <= t - column < depth):
                top[column] = w[t - column, column]
                self.entered["weights"] += 1
            inputs, weights = np.hstack([left[:, None], inputs[:, :-1]]), np.vstack([top, weights[:-1]])
            sums += inputs * weights
            busy += sum(
                0 <= t - row - column < depth for row in range(self.rows) for column in range(self.columns)
            )
            self.cycles += 1
        for row in reversed(range(self.rows)):
            if row < length:
                y[row] = sums[-1, :columns]
                self.left += columns
            sums = np.vstack([np.zeros(self.columns), sums[:-1]])
            self.cycles += 1

    def weights_stay_and_the_next_come(self, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
        """y += x @ w, all blocks one after another: a unit swaps its weights as a block's first input comes.

        The weight of row r enters its column r cycles after those of the block were begun, and moves down one
        row a cycle to the register of its unit that is not in use.
        """
        length, depth = x.shape
        blocks = [
            (slice(row, row + self.rows), slice(column, column + self.columns))
            for column in range(0, w.shape[1], self.columns)
            for row in range(0, depth, self.rows)
        ]
        coming, begun = {0: 0}, {0: self.rows}
        seen = np.zeros((self.rows, self.columns), int)  # blocks whose weight a unit has got
        last = 0
        for block, (lines, columns) in enumerate(blocks):
            if block:
                coming[block] = begun[block - 1]
                begun[block] = max(begun[block - 1] + length, coming[block] + self.rows)
            for row, column in itertools.product(range(self.rows), range(self.columns)):
                arrives = coming[block] + column + 2 * row
                first = begun[block] + row + column
                assert arrives <= first, "an input came before its weight"
                freed = begun[block - 1] + row + column if block else 0
                assert arrives >= freed, "a weight in use was overwritten"
                seen[row, column] += 1
                last = max(last, first + length)
            y[:, columns] += x[:, lines] @ w[lines, columns]
        assert (seen == len(blocks)).all()
        self.cycles = last

    @property
    def started(self) -> int:
        """The cycle in which the block began."""
        return self._started

    _started: int = 0

    def run(self, stationary: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """x @ w, block by block."""
        (length, depth), columns = x.shape, w.shape[1]
        y = np.zeros((length, columns))
        along = depth if stationary == "weight" else length
        for column, row in itertools.product(range(0, columns, self.columns), range(0, along, self.rows)):
            block, lines = slice(column, column + self.columns), slice(row, row + self.rows)
            self._started = self.cycles
            if stationary == "weight":
                self.entered["sums"] += y[:, block].size if row else 0
                self.weights_stay(x[:, lines], w[lines, block], y[:, block])
            else:
                self.outputs_stay(x[lines], w[:, block], y[lines, block])
        return y

    @staticmethod
    def _padded(values: np.ndarray, size: int) -> np.ndarray:
        return np.pad(values, (0, size - len(values)))


@pytest.mark.parametrize("stationary", ["weight", "output"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 2), (3, 3)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 2), (4, 7, 5), (7, 4, 6), (2, 9, 3), (6, 6, 6)])
def test_every_cycle_and_every_crossing_is_that_of_an_array_which_is_run(
    rows: int, columns: int, sizes: tuple[int, int, int], stationary: str
) -> None:
    length, depth, width = sizes
    draw = np.random.default_rng(0)
    x, w = (
        draw.integers(-3, 4, (length, depth)).astype(float),
        draw.integers(-3, 4, (depth, width)).astype(float),
    )
    machine = Machine(rows, columns)
    assert (machine.run(stationary, x, w) == x @ w).all()
    array = replace(ARRAY, rows=rows, columns=columns, stationary=stationary, preload=False)
    product = Product(length, depth, width, 1, length * depth, length * width)
    assert array.busy_cycles(product) == machine.cycles
    operands = machine.entered["inputs"] + machine.entered["weights"]
    assert array.edge_bytes(product) == operands + 4 * (machine.entered["sums"] + machine.left)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 2), (3, 3)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 2), (4, 7, 5), (7, 4, 6), (2, 9, 3), (6, 6, 6)])
def test_weights_that_come_while_others_work_hide_the_filling(
    rows: int, columns: int, sizes: tuple[int, int, int]
) -> None:
    length, depth, width = sizes
    draw = np.random.default_rng(0)
    x, w, y = draw.normal(size=(length, depth)), draw.normal(size=(depth, width)), np.zeros((length, width))
    machine = Machine(rows, columns)
    machine.weights_stay_and_the_next_come(x, w, y)
    np.testing.assert_allclose(y, x @ w, rtol=1e-12)
    array = replace(ARRAY, rows=rows, columns=columns, preload=True)
    product = Product(length, depth, width, 1, length * depth, length * width)
    assert array.busy_cycles(product) == machine.cycles
    assert array.edge_bytes(product) == replace(array, preload=False).edge_bytes(product)


def test_outputs_that_stay_have_no_weights_to_load_ahead() -> None:
    with pytest.raises(ValueError, match="preload is of weights that stay"):
        replace(ARRAY, stationary="output").sound()


def test_groups_are_products_of_their_own() -> None:
    one, four = Product(9, 5, 4, 1, 45, 36), Product(9, 5, 4, 4, 180, 144)
    alone = replace(ARRAY, preload=False)
    assert alone.busy_cycles(four) == 4 * alone.busy_cycles(one)
    assert ARRAY.edge_bytes(four) == 4 * ARRAY.edge_bytes(one)


def test_the_array_waits_for_memory_where_moving_takes_longer() -> None:
    product = Product(64, 1024, 1024, 1, 65536, 65536)
    fill = ARRAY.rows * ARRAY.columns / 16
    assert ARRAY.cycles(product) == ARRAY.busy_cycles(product) + fill
    slow = replace(ARRAY, bytes_per_cycle=0.25)
    assert slow.cycles(product) == 4 * (1024 * 1024 + 2 * 65536) + 4 * ARRAY.rows * ARRAY.columns


def test_what_the_buffers_do_not_hold_is_moved_again() -> None:
    product = Product(100, 64, 48, 1, 6400, 4800)
    assert ARRAY.memory_bytes(product) == 6400 + 64 * 48 + 4800
    assert replace(ARRAY, buffer_bytes=6399).memory_bytes(product) == 3 * 6400 + 64 * 48 + 4800
    assert (
        replace(ARRAY, sum_bytes=4 * 1600 - 1).memory_bytes(product)
        == 6400 + 64 * 48 + 4800 + 4 * 2 * 3 * 4800
    )
    turned = replace(ARRAY, stationary="output", preload=False, buffer_bytes=3071)
    assert turned.memory_bytes(product) == 3 * 6400 + 7 * 64 * 48 + 4800


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_sources_and_its_energy_is_the_sum_of_its_parts(preset: str) -> None:
    array, product = SystolicArray.load(preset), Product(49, 64, 32, 1, 3136, 1568)
    assert array.source
    target = open_target(f"systolic:{preset}", "torch")
    assert isinstance(target, SystolicTarget)
    cost = target.cost_product(product)
    moved = (
        array.edge_bytes(product) * array.buffer_joules + array.memory_bytes(product) * array.memory_joules
    )
    assert cost.get("joules") == pytest.approx(
        49 * 64 * 32 * array.mac_joules + moved + array.watts * cost.seconds
    )
    assert cost.seconds == pytest.approx(cost.get("cycles") / array.hertz)


def _forms(site: Site) -> list[Form]:
    fits = [FORMATS.get(name) for name in offered_formats()]
    return [
        DENSE,
        *(
            Form(fmt.name, rank)
            for fmt in fits
            if fmt.fits(site)
            for rank in (fmt.ranks(site)[0], fmt.ranks(site)[-1])
        ),
    ]


@pytest.mark.parametrize("site", [site for kind in KINDS for site in kind.examples()], ids=str)
def test_the_products_of_a_layer_do_the_multiply_adds_that_its_format_counts(site: Site) -> None:
    call = replace(site, extents=site.extents[:1], samples=1)
    for form in _forms(call):
        counted = dense_cost(call).macs if form == DENSE else FORMATS.get(form.format).macs(call, form.rank)
        assert sum(product.macs for product in products_of(call, form)) == counted, form
        assert sum(product.macs for product in products_of(call, form, 3)) == 3 * counted, form


def _net() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 25, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


IMAGES = torch.randn(12, 3, 15, 15, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing may be timed."""
    for place in ("tdpass.targets.cpu.on_cpu", "tdpass.fusing.choose.on_cpu", f"{on_cpu.__module__}.on_cpu"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("something was timed"), raising=False)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("measure", mostly_slow(["cycles", "seconds", "joules"], ["cycles"]))
def test_a_budget_on_what_the_model_tells_is_met_exactly_and_nothing_is_timed(measure: str) -> None:
    artifact = tdpass.compress(
        _net(), {measure: 0.6}, IMAGES, target="systolic:gemmini", effort="fast", cache=False
    )
    report, plan = artifact.report, artifact.plan
    assert report.final.get(measure) <= 0.6 * report.original.get(measure)
    assert (
        report.final.get("cycles")
        == plan.planned.get("cycles")
        == sum(choice.cost.get("cycles") for choice in plan)
    )
    assert report.original.get("cycles") == sum(choice.dense.get("cycles") for choice in plan)
    assert report.final.get("joules") == pytest.approx(sum(choice.cost.get("joules") for choice in plan))
    for choice in plan:
        assert choice.kept_dense or choice.cost.get(measure) < choice.dense.get(measure)
    assert any(not choice.kept_dense for choice in plan)
    assert tdpass.RankPlan.from_json(plan.to_json()) == plan


@pytest.mark.usefixtures("untimed")
def test_no_chosen_rank_could_be_raised_at_no_cost() -> None:
    plan = tdpass.make_plan(
        _net(), {"cycles": 0.6}, IMAGES, target="systolic:gemmini", effort="fast", cache=False
    ).plan
    target, sites = (
        open_target("systolic:gemmini", "torch"),
        {site.name: site for site in open_model(_net(), (IMAGES[:1],)).sites()},
    )
    for choice in plan:
        largest = FORMATS.get(choice.format).ranks(sites[choice.site])[-1]
        for place, rank in enumerate(choice.rank if len(choice.rank) == len(largest) else ()):
            raised = (*choice.rank[:place], rank + 1, *choice.rank[place + 1 :])
            if raised[place] > largest[place]:
                continue
            (cost,) = target.cost(sites[choice.site], [Form(choice.format, raised)], Setting())
            assert cost.get("cycles") > choice.cost.get("cycles"), choice


def test_ranks_are_raised_to_the_edge_but_never_above_dense() -> None:
    target = SystolicTarget(replace(ARRAY, bytes_per_cycle=1e9))
    site = Site("fc", "linear", (64, 64), extents=(((512,), (512,)),))
    assert target.filling(site, "svd", [(3,), (9,), (16,), (17,)]) == [(16,), (31,)]
    waiting = SystolicTarget(replace(ARRAY, bytes_per_cycle=0.01))  # every number that is moved costs cycles
    assert waiting.filling(site, "svd", [(3,), (9,)]) == [(3,), (9,)]


def test_a_site_costs_what_its_products_do_over_all_its_calls() -> None:
    target = open_target("systolic:gemmini", "torch")
    site = Site("fc", "linear", (40, 30), extents=(((3,), (3,)), ((3,), (3,)), ((5,), (5,))))
    (cost,) = target.cost(site, [DENSE], Setting(2))
    wanted = sum(ARRAY.cycles(Product(rows, 30, 40, 1, rows * 30, rows * 40)) for rows in (6, 6, 10))
    assert cost.get("cycles") == wanted
    (shared,) = target.cost(replace(site, samples=2), [DENSE], Setting(2))
    assert shared.get("cycles") == -(-wanted // 2)
    with pytest.raises(UsageError, match="not seen running"):
        target.cost(replace(site, extents=()), [DENSE])


def test_a_budget_that_cannot_be_met_or_told_says_so() -> None:
    with pytest.raises(
        BudgetError,
        match=r"smallest reachable plan \([\d,]+, of which .* "
        r"on target systolic only what takes fewer cycles than dense counts",
    ):
        tdpass.make_plan(
            _net(), {"cycles": "1k"}, IMAGES, target="systolic:gemmini", effort="fast", cache=False
        )
    with pytest.raises(
        BudgetError,
        match=r"cycles needs a machine that tells them, and none was given; pass target='crossbar'",
    ):
        tdpass.make_plan(_net(), {"cycles": 0.5}, IMAGES, effort="fast", cache=False)
    with pytest.raises(
        BudgetError,
        match=r"area needs a machine that tells them, target systolic does not tell them; "
        r"pass target='crossbar'",
    ):
        tdpass.make_plan(_net(), {"area": 0.5}, IMAGES, target="systolic", effort="fast", cache=False)


def test_break_even_is_asked_of_a_modelled_target_as_of_a_timed_one() -> None:
    target = open_target("systolic:gemmini", "torch")
    site = Site("fc", "linear", (64, 64), extents=(((512,), (512,)),))
    rank = target.break_even(site, "svd")
    dense, least, more = (
        cost.get("cycles") for cost in target.cost(site, [DENSE, Form("svd", (16,)), Form("svd", (32,))])
    )
    assert least < dense <= more
    assert rank == (16,)


def test_a_table_of_which_rows_are_read_costs_no_cycles_and_stays_under_a_budget_of_them() -> None:
    net = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32)).eval()
    plan = tdpass.make_plan(net, {"cycles": 1.0}, torch.arange(4), target="systolic", cache=False).plan
    table = plan.get("0")
    assert table.kept_dense
    assert table.cost.get("cycles") == 0
    assert "that dense does not take" in table.reason


def test_layers_that_are_no_sites_are_said_to_cost_nothing() -> None:
    net = nn.Sequential(nn.EmbeddingBag(5, 32, mode="max"), nn.PReLU(), nn.Linear(32, 32)).eval()
    words = torch.arange(4).reshape(4, 1)
    report = tdpass.make_plan(net, {"cycles": 1.0}, words, target="systolic", cache=False).report
    assert "what target systolic says is that of the sites alone; these layers are none: 0" in report.notes
