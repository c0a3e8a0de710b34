"""Low rank and a quantized or sparse remainder, W = U V + Q(W - U V), and products in grouped int4."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import tdpass
from tdpass.errors import NumericalError, PlanError
from tdpass.form import DENSE, Form
from tdpass.formats import FORMATS, Layer, Metric
from tdpass.formats.layer import cost_of
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.planner.offers import Offer, remainder_format
from tdpass.planner.rank_plan import Choice
from tdpass.planner.remainders import stored_beside

WITH_REMAINDER = [fmt for fmt in FORMATS if fmt.remainder]


def leading(o: int, i: int, *kernel: int, seed: int = 0) -> Tensor:
    """A weight with a few directions far larger than the rest, as transformers have."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.Size((i, *kernel)).numel()
    rest = 0.3 * torch.randn(o, width, generator=generator)
    few = torch.randn(o, 6, generator=generator) @ torch.randn(6, width, generator=generator)
    return ((rest + few) / width**0.5).reshape(o, i, *kernel)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    with torch.no_grad():
        made[0].weight.copy_(leading(96, 64))
        made[2].weight.copy_(leading(64, 96, seed=1))
    return made


def rows(count: int = 256) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(3))


def graph(module: nn.Sequential, opset: int = 17) -> onnx.ModelProto:
    make = helper.make_node
    nodes = [
        make("MatMul", ["x", "0.weight"], ["m"]),
        make("Add", ["m", "0.bias"], ["h"]),
        make("Relu", ["h"], ["r"]),
        make("Gemm", ["r", "2.weight", "2.bias"], ["y"], transB=1),
    ]
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    state["0.weight"] = state["0.weight"].T.copy()
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x", "y"))
    constants = [numpy_helper.from_array(value, name) for name, value in state.items()]
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=opsets, ir_version=8
    )


def compressed(model: object, steps: str) -> tdpass.Artifact:
    return tdpass.compress(model, None, rows(), pipeline=f"{steps},verify", cache=False)


@pytest.mark.parametrize("fmt", WITH_REMAINDER, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("text", ["int8", "int4", "levels4"])
def test_a_few_directions_in_many_bits_carry_what_few_bits_lose(fmt, text: str) -> None:
    site = next(
        site
        for kind in tdpass.kinds.KINDS
        for site in kind.examples()
        if fmt.fits(site) and site.groups == 1 and min(site.o, site.weights // site.o) > 8
    )
    weight = leading(site.o, site.i, *site.kernel).double()
    form = Form(
        fmt.name, (6,), tuple(text if name == fmt.remainder else "float16" for name in fmt.shapes(site, (6,)))
    )
    plain = Layer(site, Form(fmt.name, (6,)), fmt.factorize(weight, site, (6,)))
    width = weight[0].numel()
    mixing = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    covariance = mixing @ mixing.T / width
    metric = Metric(covariance)
    made = plain.to(torch.float32)
    layer = Layer(site, form, stored_beside(weight, made, form, metric, covariance[None]))
    assert sum(part.nbytes for part in layer.factors.values()) == cost_of(site, form).bytes
    alone = Layer(site, DENSE, {"kernel": weight}).stored(Form("dense", (), (text,)))
    found = metric.relative_error(weight, layer.reconstruct().double())
    assert found < 0.7 * metric.relative_error(weight, alone.reconstruct().double())
    # in turns, no worse than once: the rest rounded beside the best factors of the weight
    assert found <= metric.relative_error(weight, made.stored(form).reconstruct().double()) * (1 + 1e-9)


def test_quantize_beside_factors_loses_less_and_runs_alike_on_both_front_ends() -> None:
    module = net()
    alone = compressed(module, "quantize{numbers=int4/32}")
    here = compressed(module, "quantize{numbers=int4/32,beside=8}")
    there = compressed(graph(module), "quantize{numbers=int4/32,beside=8}")
    assert [str(choice.form) for choice in here.plan] == ["svd_residual 8 float16,float16,int4/32"] * 2
    assert here.report.checks["divergence"] < 0.1 * alone.report.checks["divergence"]
    assert here.report.final.bytes == there.report.final.bytes
    (theirs,) = open_model(there.model).run(Batch((rows(),))).values()
    exact = module(rows()).detach()
    for found in (here.model(rows()).detach(), theirs):
        assert float((found - exact).norm() / exact.norm()) < 0.05


def test_a_sparse_remainder_is_a_form_too() -> None:
    module = net()
    site = open_model(copy.deepcopy(module)).sites()[0]
    form = Form.parse("svd_residual 8 float32 all,all,unstructured/25%")
    assert Form.parse(str(form)) == form
    plan = tdpass.RankPlan(
        (Choice(site.name, site.shape, form, cost_of(site, form), cost_of(site, DENSE)),),
        tdpass.Cost(),
    )
    found = tdpass.compress(module, plan=plan, data=rows(), pipeline="factorize", cache=False)
    layer = found.model[0].layer()
    values = layer.values(torch.float32)
    assert int(values["residual"].count_nonzero()) <= site.weights // 4
    low = Form("svd", (8,))
    least = FORMATS.get("svd").factorize(module[0].weight.detach(), site, (8,))
    low_rank = Layer(site, low, least).reconstruct()
    weight = module[0].weight.detach()
    assert float((layer.reconstruct() - weight).norm()) < 0.7 * float((low_rank - weight).norm())


def test_the_planner_chooses_it_where_it_loses_less(tmp_path) -> None:
    module = net()
    artifact = tdpass.compress(module, {"bytes": 0.2}, rows(), cache=False, effort="fast")
    assert any(choice.form.format == "svd_residual" for choice in artifact.plan)
    assert artifact.report.final.bytes <= 0.2 * artifact.report.original.bytes
    artifact.save(tmp_path / "it.safetensors")
    loaded = tdpass.load(tmp_path / "it.safetensors", net())
    assert torch.equal(loaded(rows()), artifact.model(rows()))
    without = tdpass.compress(
        module,
        {"bytes": 0.2},
        rows(),
        cache=False,
        effort="fast",
        pipeline="plan{numbers=int8+int4+levels8+levels4},factorize,correct-bias,refit,verify",
    )
    assert artifact.report.checks["divergence"] < without.report.checks["divergence"]


def test_an_offer_of_ranks_beside_goes_with_numbers_of_few_bits() -> None:
    site = open_model(net()).sites()[0]
    offer = Offer.parse("int8+int4/32+levels4", "", "4+8")
    assert [str(form) for form in offer.with_remainder(site)] == [
        f"svd_residual {rank} float16,float16,{text}" for rank in (4, 8) for text in ("int4/32", "levels4")
    ]
    for bad in ("x", "0", "4+-1"):
        with pytest.raises(PlanError, match="is no list of ranks"):
            Offer.parse("int4", "", bad)


def test_factors_that_no_half_precision_holds_are_an_error_with_what_to_do() -> None:
    site = open_model(net()).sites()[0]
    fmt = remainder_format(site)
    assert fmt is not None
    weight = 1e30 * leading(96, 64).double()
    plain = Layer(site, Form(fmt.name, (4,)), fmt.factorize(weight, site, (4,))).to(torch.float32)
    form = Form.parse("svd_residual 4 float16,float16,int4")
    with pytest.raises(NumericalError, match=r"beyond the range of .*exclude"):
        stored_beside(weight, plain, form, Metric(), None)


@pytest.mark.parametrize("opset", [11, 13, 21])
@pytest.mark.parametrize(
    ("text", "operators"),
    [
        ("int4/16", {"MatMulNBits"}),
        ("int4/32", {"MatMulNBits"}),
        ("int4/8", set()),
        ("int4", set()),
        ("int4/16/zero", {"MatMulNBits"}),
        ("int4/8/zero", set()),
    ],
)
def test_four_bits_in_groups_are_one_operator_of_onnx_runtime(
    text: str, operators: set[str], opset: int
) -> None:
    module = net()
    here, there = open_model(copy.deepcopy(module)), open_model(graph(module, opset))
    for model in (here, there):
        for site in model.sites():
            plain = Layer(site, DENSE, {"kernel": model.weight(site.name)}, model.bias(site.name))
            model.replace(site.name, plain.stored(Form("dense", (), (text,))))
    (theirs,) = there.run(Batch((rows(),))).values()
    torch.testing.assert_close(theirs, here.module(rows()).detach(), rtol=1e-4, atol=1e-5)
    assert (there.bytes(), there.params()) == (here.bytes(), here.params())
    written = {node.op_type for node in there.unwrap().graph.node}
    assert written & {"MatMulNBits", "DequantizeLinear"} >= operators
    assert ("MatMulNBits" in written) == bool(operators)


@pytest.mark.parametrize("steps", ["quantize{numbers=int4/32,beside=8}", "quantize{numbers=int4/32}"])
def test_few_bits_go_through_export_and_compile(steps: str) -> None:
    model = compressed(net(), steps).model
    with torch.no_grad():
        exported = torch.export.export(model, (rows(),)).module()
        assert torch.equal(exported(rows()), model(rows()))
        made = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(made(rows()), model(rows()))
