"""Formats without what their factors hold twice: lossless, counted, saved, alike in torch and ONNX."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import model_of
from torch import Tensor, nn

import tdpass
import tdpass.passes.pivot
from tdpass.errors import NumericalError, PlanError
from tdpass.form import DENSE, Form
from tdpass.formats import FORMATS, Layer
from tdpass.formats.layer import cost_of, shrinks
from tdpass.formats.pivoted import LEAD, PIVOT, Pivoted, spared_formats
from tdpass.formats.pivots import BOUND, choose_pivots, leading_coefficients, order_of
from tdpass.formats.tap_bond import TapBond
from tdpass.kinds import KINDS
from tdpass.models import open_model
from tdpass.models.base import Batch, Model
from tdpass.models.torch.model import TorchModel
from tdpass.models.torch.saving.state import load_module, save_module
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.site import Site

NAMES = [fmt.name for fmt in FORMATS if isinstance(fmt, Pivoted) and fmt.ordered]
CONV = Site("w", "conv", (16, 8, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
SITES = [site for kind in KINDS for site in kind.examples()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "r"), [(30, 1), (30, 12), (12, 12), (200, 90)])
def test_all_rows_are_small_multiples_of_the_pivots(n: int, r: int) -> None:
    for matrix in (
        normal(n, r),
        normal(n, r) * 10.0 ** -torch.arange(r),
        torch.cat([normal(n, r)[:, : r // 2], torch.zeros(n, r - r // 2)], 1),
    ):
        pivots, coefficients = choose_pivots(matrix.double())
        assert pivots.tolist() == sorted(set(pivots.tolist()))
        rest = order_of(pivots, n)[r:]
        assert torch.allclose(
            coefficients @ matrix[pivots], matrix[rest], rtol=1e-12, atol=1e-12 * float(matrix.abs().max())
        )
        assert not coefficients.numel() or float(coefficients.abs().max()) <= BOUND


def test_leading_rows_that_do_not_make_up_the_others_are_refused() -> None:
    matrix = normal(20, 5)
    order = order_of(choose_pivots(matrix)[0], 20)
    assert torch.allclose(leading_coefficients(matrix[order]) @ matrix[order][:5], matrix[order][5:])
    matrix[:5, 4] = 0
    with pytest.raises(NumericalError, match="leading 5 of 20 rows"):
        leading_coefficients(matrix)


def test_every_format_of_two_or_three_layers_has_one_without_what_is_held_twice() -> None:
    assert set(NAMES) == {
        name + PIVOT
        for name in (
            "svd",
            "channel_svd",
            "input_svd",
            "tucker2",
            "tensor_train",
            "spatial_svd",
            "tensor_ring",
        )
    }
    assert {name.removesuffix(PIVOT) + LEAD for name in NAMES} <= set(FORMATS.names())


@pytest.mark.parametrize("name", NAMES)
def test_no_rank_below_full_is_larger_than_dense(name: str) -> None:
    fmt = FORMATS.get(name)
    for site in (site for site in SITES if fmt.fits(site)):
        one = fmt.inner.ranks(site)[-1]
        below = [rank for rank in fmt.ranks(site) if len(rank) == 1 and rank < one]
        for rank in below if name == f"svd{PIVOT}" else []:
            assert shrinks(site, name, rank)
            assert cost_of(site, Form(name, rank)).params == rank[0] * (site.o + site.i - rank[0])
        for rank in fmt.ranks(site):
            plain = fmt.inner.cost(site, rank)
            assert fmt.cost(site, rank).params < plain.params
            assert fmt.cost(site, rank).macs < plain.macs


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_converts_there_and_back(name: str) -> None:
    fmt = FORMATS.get(name)
    for site in (site for site in SITES if fmt.fits(site)):
        rank = fmt.ranks(site)[len(fmt.ranks(site)) // 2]
        chain = Layer(
            site, Form(fmt.chain.name, rank), fmt.chain.factorize(normal(*site.shape), site, rank)
        ).to(torch.float32)
        spared = chain.converted(name)
        assert spared.form == Form(name, rank)
        scale = float(chain.reconstruct().norm())
        assert float((spared.reconstruct() - chain.reconstruct()).norm()) < 1e-5 * scale
        again = spared.converted(fmt.chain.name)
        assert {key: factor.shape for key, factor in again.factors.items()} == {
            key: factor.shape for key, factor in chain.factors.items()
        }
        assert float((again.reconstruct() - chain.reconstruct()).norm()) < 1e-5 * scale


@pytest.mark.parametrize("name", NAMES)
def test_leading_channels_need_no_order(name: str) -> None:
    fmt = FORMATS.get(name)
    lead = FORMATS.get(fmt.chain.name + LEAD)
    for site in (site for site in SITES if fmt.fits(site)):
        rank = fmt.ranks(site)[len(fmt.ranks(site)) // 2]
        factors = fmt.factorize(normal(*site.shape), site, rank)
        unordered = {
            key: torch.arange(len(factor), dtype=torch.int32) if key in fmt.orders(site, rank) else factor
            for key, factor in factors.items()
        }
        ordered = Layer(site, Form(name, rank), unordered, normal(site.o))
        layer = ordered.converted(lead.name)
        assert lead.orders(site, rank) == {}
        assert (
            {key: tuple(factor.shape) for key, factor in layer.factors.items()}
            == lead.shapes(site, rank)
            == fmt.shapes(site, rank)
        )
        x = torch.randn(KINDS.get(site.kind).sample(site, 2), dtype=torch.float64)
        torch.testing.assert_close(layer(x), ordered(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "site", "rank", "spared"),
    [
        # of three taps, all of 12 // 3 outputs; the sums of their taps are kept as 4 x 3 x 3 ones
        ("spatial_svd", CONV, (12,), 12 * 12 - 4 * 9),
        ("spatial_svd", CONV, (13,), 12 * 13 - 4 * 9),
        ("tensor_ring", Site("w", "linear", (36, 64)), (3, 3, 3, 3), 9),
        ("tensor_train", Site("w", "linear", (36, 64)), (5,), 25),
        ("tensor_train", Site("w", "linear", (64, 64)), (3, 2), 9 + 4),
        ("tensor_train", replace(CONV, shape=(16, 16, 3, 3)), (2, 6, 7, 3), 4 + 36 + 49 + 9),
    ],
)
def test_so_many_numbers_are_spared_of_cores_and_taps(
    name: str, site: Site, rank: tuple[int, ...], spared: int
) -> None:
    fmt, lean = FORMATS.get(name), FORMATS.get(name + PIVOT)
    factors = fmt.factorize(normal(*site.shape), site, rank)
    stored = lean.from_chain(factors, site)
    numbers = {key: value for key, value in stored.items() if value.is_floating_point()}
    assert {key: tuple(value.shape) for key, value in numbers.items()} == lean.shapes(site, rank)
    assert {key: len(value) for key, value in stored.items() if key not in numbers} == lean.orders(site, rank)
    assert fmt.cost(site, rank).params - lean.cost(site, rank).params == spared
    whole, again = fmt.reconstruct(factors, site), lean.reconstruct(stored, site)
    torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-10 * float(whole.abs().max()))


@pytest.mark.parametrize(("o", "r"), [(8, 6), (16, 24), (32, 48), (64, 48)])
def test_outputs_of_several_taps_are_small_multiples_of_whole_outputs(o: int, r: int) -> None:
    last = normal(o, r, 1, 3, seed=o) * torch.arange(1, r + 1)[:, None, None] ** -0.7
    bond = TapBond("last", "first", writes=True)
    made = bond.pivot(last, ordered=True)
    assert float(made.factors["last"][:, : r // 3 * 3].abs().max()) <= 3 * BOUND
    stored = {**made.factors, "last_order": made.order}
    whole = torch.einsum("osx,sr->orx", bond.whole(stored).flatten(2), made.square)
    torch.testing.assert_close(whole, last.flatten(2), rtol=1e-10, atol=1e-10)


def test_slices_that_the_first_does_not_make_up_are_refused() -> None:
    site = Site("w", "linear", (36, 64))
    fmt = FORMATS.get("tensor_train")
    factors = fmt.factorize(normal(36, 64), site, (5,))
    factors["g2"][:, 0] = 0
    layer = Layer(site, Form("tensor_train", (5,)), factors)
    with pytest.raises(NumericalError, match="do not make up the slices of g2"):
        layer.converted(f"tensor_train{PIVOT}")


def test_formats_that_spare_are_found_for_a_layer() -> None:
    site = Site("w", "linear", (8, 6))
    assert spared_formats("svd", site, (3,)) == [f"svd{LEAD}", f"svd{PIVOT}"]
    assert spared_formats(f"svd{PIVOT}", site, (3,)) == [f"svd{LEAD}"]
    assert spared_formats(f"svd{LEAD}", site, (3,)) == []
    assert spared_formats("svd", site, (6,)) == spared_formats("dense", site, ()) == []
    with pytest.raises(PlanError, match="has nothing to spare"):
        FORMATS.get(f"svd{PIVOT}").check_rank(site, (6,))


class Net(nn.Module):
    """A convolution, and linear layers over two and over three axes, wide to narrow and narrow to wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.tokens = nn.Linear(64, 12, bias=False)
        self.wider = nn.Linear(12, 20)
        self.fc = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x)).flatten(2)
        return self.fc(torch.relu(self.wider(torch.relu(self.tokens(h)))).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs() -> Tensor:
    return torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(1))


def graph(module: Net, opset: int = 17) -> onnx.ModelProto:
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "conv.weight", "conv.bias"], ["c"], pads=[1, 1, 1, 1]),
        make("Relu", ["c"], ["r"]),
        make("Reshape", ["r", "whole"], ["t"]),
        make("MatMul", ["t", "tokens.weight"], ["m"]),
        make("Relu", ["m"], ["s"]),
        make("MatMul", ["s", "wider.weight"], ["w"]),
        make("Add", ["w", "wider.bias"], ["b"]),
        make("Relu", ["b"], ["u"]),
        make("Flatten", ["u"], ["f"]),
        make("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    for name in ("tokens.weight", "wider.weight"):
        state[name] = np.ascontiguousarray(state[name].T)
    state["whole"] = np.array([0, 8, 64])
    return model_of(nodes, state, ("N", 6, 8, 8), opset=opset)


def put(model: Model, name: str, numbers: tuple[str, ...] = ()) -> list[Layer]:
    """Every site that the format fits, in that format."""
    layers = []
    for site in model.sites():
        fmt = FORMATS.get(name)
        if fmt.fits(site):
            rank = fmt.ranks(site)[len(fmt.ranks(site)) // 2]
            plain = Layer(
                site,
                Form(name, rank),
                fmt.factorize(model.weight(site.name), site, rank),
                model.bias(site.name),
            ).to(torch.float32)
            layers.append(plain.stored(Form(name, rank, numbers)))
            model.replace(site.name, layers[-1])
    return layers


def run(model: Model) -> Tensor:
    found = model.run(Batch((inputs(),)))
    return found["y"] if isinstance(found, dict) else found


@pytest.mark.parametrize("numbers", [(), ("int8",), ("float16",)])
@pytest.mark.parametrize("name", NAMES)
def test_both_front_ends_count_run_save_and_load_it(
    name: str, numbers: tuple[str, ...], tmp_path: Path
) -> None:
    module = net()
    model, onnx_side = open_model(copy.deepcopy(module)), open_model(graph(module))
    assert isinstance(model, TorchModel)
    before = {site.name: cost_of(site, DENSE) for site in model.sites()}
    params, size = model.params(), model.bytes()
    layers = put(model, name, numbers)
    assert layers
    put(onnx_side, name, numbers)
    assert model.params() == params + sum(
        cost_of(layer.site, layer.form).params - before[layer.site.name].params for layer in layers
    )
    assert model.bytes() == size + sum(
        cost_of(layer.site, layer.form).bytes - before[layer.site.name].bytes for layer in layers
    )
    for layer in layers:
        assert cost_of(layer.site, layer.form).bytes == sum(part.nbytes for part in layer.factors.values())
    assert (onnx_side.params(), onnx_side.bytes()) == (model.params(), model.bytes())
    torch.testing.assert_close(run(onnx_side), run(model), rtol=1e-4, atol=1e-5)
    save_module(model.module, tmp_path / "net.safetensors", {})
    loaded = load_module(tmp_path / "net.safetensors", net())
    assert torch.equal(loaded(inputs()), model.module(inputs()))
    exported = torch.export.export(model.module, (inputs(),)).module()
    assert torch.equal(exported(inputs()), model.module(inputs()))
    counted = model.count(Batch((inputs(),))).per_sample
    assert counted == onnx_side.count(Batch((inputs(),))).per_sample


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 21])
@pytest.mark.parametrize("ending", [PIVOT, LEAD])
def test_every_opset_runs_it(opset: int, ending: str, tmp_path: Path) -> None:
    module, model = net(), open_model(graph(net(), opset))
    expected = {}
    for site in model.sites():
        fmt = FORMATS.get(("tucker2" if site.axes else "svd") + ending)
        rank = fmt.ranks(site)[0]
        weight = fmt.chain.reconstruct(fmt.chain.factorize(model.weight(site.name), site, rank), site)
        long = weight if ending == PIVOT else _with_leading_pivots(weight, rank)
        layer = Layer(
            site, Form(fmt.chain.name, rank), fmt.chain.factorize(long, site, rank), model.bias(site.name)
        ).to(torch.float32)
        model.replace(site.name, layer.converted(fmt.name))
        expected[site.name] = layer.reconstruct()
    for name, weight in expected.items():
        module.get_submodule(name).weight.data = weight
    model.save(tmp_path / "net.onnx", {})
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": inputs().numpy()})[0])
    torch.testing.assert_close(found, module(inputs()).detach(), rtol=1e-4, atol=1e-5)


def _with_leading_pivots(weight: Tensor, rank: tuple[int, ...]) -> Tensor:
    """The weight with outputs and inputs ordered so that those of the largest volume lead."""
    for axis in (0, 1):
        matrix = weight.movedim(axis, 0).flatten(1)
        r = min(rank[min(axis, len(rank) - 1)], *matrix.shape)
        vectors = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :r]
        weight = weight.index_select(axis, order_of(choose_pivots(vectors)[0], len(matrix)))
    return weight


@pytest.mark.parametrize("frontend", ["torch", "onnx"])
def test_plans_price_it_and_the_pass_makes_it(frontend: str, tmp_path: Path) -> None:
    source = net() if frontend == "torch" else graph(net())
    data = [inputs(), inputs() + 0.1]
    steps = "plan{pivot=true},factorize,correct-bias,refit,verify"
    asked = tdpass.compress(
        source, budget={"macs": 0.5}, data=data, formats=("svd", "tucker2"), pipeline=steps
    )
    assert any(choice.format.endswith(PIVOT) for choice in asked.plan)
    assert asked.report.final.macs <= 0.5 * asked.report.original.macs
    after = tdpass.compress(
        source,
        budget={"macs": 0.5},
        data=data,
        formats=("svd", "tucker2"),
        pipeline="plan,factorize,correct-bias,refit,pivot{measure=false},verify",
    )
    plain = tdpass.compress(
        source,
        budget={"macs": 0.5},
        data=data,
        formats=("svd", "tucker2"),
        pipeline="plan,factorize,correct-bias,refit,verify",
    )
    changed = [choice for choice in after.plan if choice.format.endswith((PIVOT, LEAD))]
    assert changed
    assert after.report.final.params == after.plan.planned.params < plain.report.final.params
    assert after.report.final.macs < plain.report.final.macs
    # at equal cost the ranks are no lower, and the expected loss no higher
    assert asked.plan.loss <= plain.plan.loss * 1.01 + 1e-12
    asked.plan.save(tmp_path / "plan.json")
    assert tdpass.RankPlan.load(tmp_path / "plan.json").choices == asked.plan.choices


def test_what_is_stored_in_other_numbers_is_left_and_said(tmp_path: Path) -> None:
    result = tdpass.compress(
        net(),
        budget={"bytes": 0.4},
        data=[inputs()],
        formats=("svd", "tucker2"),
        pipeline="plan{numbers=int8},factorize,pivot{measure=false},verify",
    )
    encoded = [choice.site for choice in result.plan if choice.form.encoded and choice.format != "dense"]
    assert all("pivot before that" in result.report.declined[site] for site in encoded)
    assert math.isfinite(result.report.final.bytes)


@pytest.mark.parametrize("frontend", ["torch", "onnx"])
def test_the_layer_behind_takes_the_order_where_it_alone_reads(frontend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 6)
    ).eval()
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(2))
    made = [
        helper.make_node("Gemm", [f"h{k}", f"{2 * k}.weight", f"{2 * k}.bias"], [f"g{k}"], transB=1)
        for k in range(3)
    ]
    nodes = [
        made[0],
        helper.make_node("Relu", ["g0"], ["h1"]),
        made[1],
        helper.make_node("Relu", ["g1"], ["h2"]),
        made[2],
    ]
    constants = [numpy_helper.from_array(value.numpy(), name) for name, value in module.state_dict().items()]
    ends = (
        helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["N", 40]),
        helper.make_tensor_value_info("g2", TensorProto.FLOAT, ["N", 6]),
    )
    onnx_graph = helper.make_graph(nodes, "g", [ends[0]], [ends[1]], constants)
    source = (
        module
        if frontend == "torch"
        else helper.make_model(onnx_graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    plain = tdpass.compress(
        source,
        budget={"params": 0.6},
        data=x,
        formats=("svd",),
        pipeline="plan,factorize,verify",
        strict=False,
    )
    led = tdpass.compress(
        source, plan=plain.plan, data=x, pipeline="factorize,pivot{measure=false},verify", strict=False
    )
    forms = [choice.format for choice in led.plan]
    assert f"svd{LEAD}" in forms
    assert led.report.final.params == led.plan.planned.params < plain.report.final.params
    batch = Batch((x,)) if frontend == "torch" else Batch((), {"h0": x})
    answers = [made.opened.run(batch) for made in (plain, led)]
    first, second = (
        answer if isinstance(answer, Tensor) else next(iter(answer.values())) for answer in answers
    )
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    led.save(tmp_path / ("led.safetensors" if frontend == "torch" else "led.onnx"))
    if frontend == "torch":
        fresh = copy.deepcopy(module)
        torch.testing.assert_close(
            tdpass.load(tmp_path / "led.safetensors", fresh).eval()(x), second, rtol=1e-5, atol=1e-6
        )
    assert led.report.checks["divergence"] == pytest.approx(
        plain.report.checks["divergence"], rel=1e-3, abs=1e-7
    )


@pytest.mark.parametrize("numbers", [(), ("int8",)])
@pytest.mark.parametrize(("apart", "fits"), [(0, True), (4 * 36, True), (4, False)])
def test_plans_of_versions_that_did_not_count_orders_are_read(
    numbers: tuple[str, ...], apart: int, fits: bool
) -> None:
    site, form = Site("w", "linear", (36, 64)), Form("svd_pivot", (5,), numbers)
    cost, dense = cost_of(site, form), cost_of(site, DENSE)
    choice = Choice("w", site.shape, form, cost.replace(bytes=cost.bytes - apart), dense)
    text = RankPlan((choice,), dense, prepared=dense).to_json()
    if fits:
        assert RankPlan.from_json(text, "plan").choices == (choice,)
        return
    with pytest.raises(PlanError, match=r"takes .* bytes"):
        RankPlan.from_json(text, "plan")


def test_a_model_without_factors_needs_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tdpass.passes.pivot, "open_target", None)
    made = tdpass.compress(net(), data=inputs(), pipeline="pivot,verify", progress=False)
    assert "no layer is factored" in str(made.report.passes)
