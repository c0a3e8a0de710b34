"""Supports that leave out whole outputs or input channels.

Layers run, are counted and are written as the smaller ones they are.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from onnx_nets import model_of
from torch import Tensor, nn

import tdpass
from tdpass.form import DENSE, Form
from tdpass.formats import lines
from tdpass.formats.layer import cost_of
from tdpass.kinds import KINDS
from tdpass.layers.derived import DERIVED
from tdpass.layers.factorized import Factorized
from tdpass.models import open_model
from tdpass.ops import TorchOps
from tdpass.site import Site
from tdpass.targets.layers import example_input, make_layer

EXAMPLES = [site for kind in KINDS for site in kind.examples() if site.groups == 1]
NUMBERS = ("", "float16", "int8", "int8/tensor", "int4", "levels8", "float8_e4m3")
SUPPORTS = ("rows/50%", "channels/50%")


class Watched(TorchOps):
    """Keeps the shapes of the weights that are multiplied with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.shapes.append(tuple(weight.shape))
        return super().linear(x, weight, bias)

    def conv(self, x: Tensor, weight: Tensor, *rest: object) -> Tensor:  # type: ignore[override]
        self.shapes.append(tuple(weight.shape))
        return super().conv(x, weight, *rest)  # type: ignore[arg-type]

    def conv_transpose(self, x: Tensor, weight: Tensor, *rest: object) -> Tensor:  # type: ignore[override]
        self.shapes.append(tuple(weight.shape))
        return super().conv_transpose(x, weight, *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(
    "site", EXAMPLES, ids=[f"{site.kind}-{'x'.join(map(str, site.shape))}" for site in EXAMPLES]
)
def test_every_kind_answers_from_a_smaller_weight_as_from_one_with_zeros(
    site: Site, support: str, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_MOVED", 0)
    form = Form("dense", (), (number,) if number else (), support)
    layer = make_layer(site, form, torch.float32)
    whole = replace(layer, form=DENSE, factors={"kernel": layer.reconstruct()})
    x, ops = example_input(layer, 2), Watched()
    found = lines.apply_stored(ops, x, layer.factors, layer.bias, site, form, layer.storage, torch.float32)
    assert torch.allclose(found, whole(x), atol=1e-5)
    assert torch.equal(layer(x), found)
    axis = SUPPORTS.index(support)
    (shape,) = ops.shapes
    assert shape[axis] == max(1, round(site.shape[axis] / 2))
    smaller = site.weights * shape[axis] // site.shape[axis]
    assert cost_of(site, form).macs == cost_of(site, DENSE).macs * smaller // site.weights


@pytest.mark.parametrize("support", [*SUPPORTS, "columns/50%"])
def test_groups_of_inputs_and_what_does_not_pay_are_computed_with_their_zeros(support: str) -> None:
    large = Site("a", "linear", (64, 128), extents=(((2,), (2,)),))
    narrow = Site("a", "linear", (6, 128) if support == "channels/50%" else (128, 6), extents=large.extents)
    few, grouped = Form("dense", (), support=support), Form("dense", (), ("int4/32",), support)
    assert cost_of(large, few).macs == cost_of(large, DENSE).macs // 2
    if support == "rows/50%":
        assert cost_of(narrow, few).macs == cost_of(narrow, DENSE).macs
    for form in (few, grouped):
        layer = make_layer(large, form, torch.float32)
        x = example_input(layer, 2)
        whole = replace(layer, form=DENSE, factors={"kernel": layer.reconstruct()})
        assert torch.allclose(layer(x), whole(x), atol=1e-5)


def test_a_module_derives_its_smaller_weight_once_and_anew_after_a_change() -> None:
    site, form = (
        Site("a", "linear", (64, 128), bias=True, extents=(((2,), (2,)),)),
        Form("dense", (), support="rows/50%"),
    )
    layer = make_layer(site, form, torch.float32)
    module = Factorized(layer, nn.Parameter(layer.bias)).eval()  # type: ignore[arg-type]
    x, before = example_input(layer, 2), len(DERIVED)
    first = module(x)
    assert torch.equal(module(x), first)
    assert len(DERIVED) == before + 1
    with torch.no_grad():
        module.kernel.mul_(2)  # type: ignore[operator, union-attr]
    assert torch.allclose(module(x) - module.bias, 2 * (first - module.bias), atol=1e-5)
    del module, layer
    assert len(DERIVED) == before


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORTS)
def test_what_is_exported_is_the_smaller_layer(support: str) -> None:
    site = Site("a", "linear", (64, 128), extents=(((2,), (2,)),))
    layer = make_layer(site, Form("dense", (), support=support), torch.float32)
    module, x = Factorized(layer, None).eval(), example_input(layer, 2)
    program = torch.export.export(module, (x,))
    assert torch.allclose(program.module()(x), module(x), atol=1e-5)
    (product,) = (node for node in program.graph.nodes if "linear" in str(node.target))
    assert math.prod(product.args[1].meta["val"].shape) == 64 * 128 // 2


class Net(nn.Module):
    """Two convolutions in a row, a sum around the second, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.third, self.fc = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        h = torch.relu(h + self.third(h))
        return self.fc(h.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def graph(module: nn.Module) -> onnx.ModelProto:
    make = onnx.helper.make_node

    def conv(x: str, name: str) -> onnx.NodeProto:
        return make("Conv", [x, f"{name}.weight", f"{name}.bias"], [f"{name}.y"], pads=[1, 1, 1, 1])

    nodes = [
        conv("x", "first"),
        make("Relu", ["first.y"], ["a"]),
        conv("a", "second"),
        make("Relu", ["second.y"], ["b"]),
        conv("b", "third"),
        make("Add", ["b", "third.y"], ["c"]),
        make("Relu", ["c"], ["d"]),
        make("GlobalAveragePool", ["d"], ["e"]),
        make("Flatten", ["e"], ["f"]),
        make("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    return model_of(
        nodes, {name: value.numpy() for name, value in module.state_dict().items()}, ("N", 3, 8, 8)
    )


def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def of_onnx(model: object, x: Tensor) -> Tensor:
    assert isinstance(model, onnx.ModelProto)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("support", SUPPORTS)
def test_sparsify_leaves_channels_out_on_both_sides_and_elsewhere_puts_them_in_place(support: str) -> None:
    """Between the first two layers nothing is put in place; the others feed a sum, or are fed by one."""
    step, found = f"sparsify{{support={support}}},verify", {}
    for given in (net(), graph(net())):
        artifact = tdpass.compress(given, None, images(), pipeline=step, cache=False, strict=False)
        assert artifact.report.final == artifact.plan.planned
        assert artifact.report.final.macs < 0.55 * artifact.report.original.macs
        found[type(given)] = artifact
    on_torch, on_onnx = found.values()
    forms = {choice.site: str(choice.form) for choice in on_torch.plan}
    assert forms == {choice.site: str(choice.form) for choice in on_onnx.plan}
    rows = support == SUPPORTS[0]
    assert forms["first"] == ("dense out 16" if rows else forms["first"])
    assert forms["second"] == ("dense in 16 rows/50%" if rows else "dense in 16")
    assert forms["third"] == f"dense {support}"
    assert torch.allclose(of_onnx(on_onnx.model, images()), on_torch.model(images()), atol=1e-4)
    kernels = {tuple(init.dims) for init in on_onnx.model.graph.initializer}
    assert kernels.isdisjoint({(32, 32, 3, 3), (32 * 32 * 9,)})


def test_without_data_or_folding_every_layer_is_stored_alone() -> None:
    for data, text in ((None, "rows/50%"), (images(), "rows/50%,fold=false"), (images(), "rows/8")):
        step = f"sparsify{{support={text}}}"
        artifact = tdpass.compress(copy.deepcopy(net()), None, data, pipeline=step, cache=False)
        assert {choice.form.narrow for choice in artifact.plan} == {False}
        assert open_model(artifact.model).params() == artifact.plan.planned.params
